"""LoRA adapters of PEFT: `load_adapters` reads them for learning, and `save_adapter` writes an exact blend.

`merge_adapters` is the `merge_fn` of adapters. `add_adapter` adds a blend to the weights of a base.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from glue_jax.checkpoints.adapter_configs import (
    AdapterConfig,
    blended_config,
    common_base,
    rank_of,
    read_config,
    scaling_of,
)
from glue_jax.checkpoints.formats import ADAPTER_CONFIG, Checkpoint, PathLike, open_checkpoint
from glue_jax.checkpoints.low_rank import (
    FACTOR,
    SCALING,
    add_adapter,
    base_name,
    coefficients_of,
    merge_adapters,
    partner,
)
from glue_jax.checkpoints.places import aside
from glue_jax.checkpoints.saving import copy_side_files, save_file
from glue_jax.experts import place_leaf
from glue_jax.paths import check_finite
from glue_jax.types import Params, PyTree

__all__ = ["Adapters", "add_adapter", "load_adapters", "merge_adapters", "save_adapter"]

WEIGHTS = "adapter_model.safetensors"
_FILES = (WEIGHTS, "adapter_model.bin")
# PEFT stores a copy of the base's embedding beside its factors.
_COPY = ".base_layer.weight"


@dataclasses.dataclass(frozen=True, eq=False)
class Adapters:
    """K adapters of one base, in memory.

    Attributes:
        experts: the factors, for `glue_jax.learn` with `merge_fn=merge_adapters`: a flat dict by the names of PEFT. A
            factor A is `[K, R, ...]`, and a factor B is `[K, out, R, ...]`. R is the largest rank of the module. The
            factors of adapters with a smaller rank, or without the module, are filled with zeros, which changes no
            product. Each module also has its scalings, float32 `[K]`, at `<module>.lora_scaling`.
        ranks: the K ranks of each module, by its name. An adapter without the module has the rank 0.
        copies: copies of the base's embeddings, which PEFT stores beside factors of embeddings. All adapters have the
            same.
        base: the name of the base.
        configs: the K configurations.
        checkpoints: the K files of weights.
    """

    experts: Params
    ranks: Mapping[str, tuple[int, ...]]
    copies: Mapping[str, np.ndarray]
    base: str | None
    configs: Sequence[AdapterConfig] = dataclasses.field(repr=False)
    checkpoints: Sequence[Checkpoint] = dataclasses.field(repr=False)


def load_adapters(paths: Sequence[PathLike], *, base: str | None = None) -> Adapters:
    """Reads K LoRA adapters of PEFT for learning.

    Adapters may differ in rank, in scaling (rsLoRA, `rank_pattern` and `alpha_pattern` included), and in the modules
    that they change. All configurations and headers are checked before any weight is read.

    Args:
        paths: the folders of K adapters, each with `adapter_config.json` and `adapter_model.safetensors` or
            `adapter_model.bin`.
        base: the name of the base. Pass it if the configurations have different names for the same base, such as paths
            on several machines. With None, all configurations must have the same name and the same revision of the
            base.

    Returns:
        The adapters.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if an adapter is not a plain LoRA adapter. DoRA, a trained bias, `modules_to_save`, and an
            initialisation that changes the base are refused, for instance. The error names the entry and the reason.
        ValueError: if adapters have different bases, or change weights of different shapes.
        ValueError: if a factor is infinite or NaN.
    """
    folders = [Path(path).expanduser() for path in ([paths] if isinstance(paths, str | Path) else paths)]
    if not folders:
        raise ValueError("paths is empty; expected at least one folder of an adapter")
    configs = [read_config(folder) for folder in folders]
    base = common_base(folders, configs, base)
    checkpoints = [_open(folder) for folder in folders]
    for checkpoint, config in zip(checkpoints, configs, strict=True):
        _check_tensors(checkpoint, config)
    shapes = _common_shapes(checkpoints)
    arrays = [checkpoint.read(list(checkpoint.tensors)) for checkpoint in checkpoints]
    for checkpoint, read in zip(checkpoints, arrays, strict=True):
        check_finite(str(checkpoint.path), read)
    experts: dict[str, jax.Array] = {}
    ranks: dict[str, tuple[int, ...]] = {}
    for name, (shape, dtype) in shapes.items():
        found = FACTOR.fullmatch(name)
        assert found is not None
        stacked = np.zeros((len(arrays), *shape), dtype)
        for index, read in enumerate(arrays):
            if name in read:
                stacked[(index, *map(slice, read[name].shape))] = read[name]
        experts[name] = place_leaf(name, stacked, None)
        module = found["module"]
        if found["factor"] == "A":
            scalings = [
                scaling_of(config, base_name(module)) if name in read else 0.0
                for config, read in zip(configs, arrays, strict=True)
            ]
            experts[module + SCALING] = jnp.asarray(scalings, jnp.float32)
            ranks[module] = tuple(len(read[name]) if name in read else 0 for read in arrays)
    return Adapters(experts, ranks, _copies(checkpoints, arrays), base, configs, checkpoints)


def save_adapter(
    out: PathLike,
    adapters: Adapters,
    alpha: ArrayLike,
    groups: PyTree | None = None,
    *,
    side_files: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes the blend of adapters as one adapter, which PEFT loads.

    The blend is exact but for rounding: the factors B are computed in float32, and rounded to the dtype of the
    adapters. The rank of a module is the sum of the adapters' ranks there.

    Args:
        out: the folder of the result.
        adapters: the adapters.
        alpha: the coefficients, `[K]`, or `[G, K]` with `groups`.
        groups: as for `merge_adapters`.
        side_files: texts to write into the folder, by the names of their files. The small files beside the first
            adapter's weights, such as a tokenizer, are copied too.
        overwrite: as for `save_blend`.

    Returns:
        The path of the result.

    Raises:
        ValueError: if `alpha` or `groups` does not fit, or if a factor does not fit into the adapters' dtype.
        OSError: if `out` exists, or if there is no space left.
    """
    out, alpha = Path(out).expanduser().absolute(), np.asarray(alpha, np.float64)
    if not np.isfinite(alpha).all():
        raise ValueError(f"alpha is {alpha}; expected finite numbers")
    coefficients = coefficients_of(adapters.experts, alpha, groups)
    tensors = dict(adapters.copies)
    for name in adapters.experts:
        if (found := FACTOR.fullmatch(name)) and found["factor"] == "A":
            ranks = adapters.ranks[found["module"]]
            first, second = (np.asarray(adapters.experts[each]) for each in (name, partner(name)))
            weights = coefficients(found["module"]) * np.asarray(adapters.experts[found["module"] + SCALING])
            wide = jnp.promote_types(second.dtype, jnp.float32)
            parts = [
                weight.astype(wide) * part[:, :rank].astype(wide)
                for weight, part, rank in zip(weights, second, ranks, strict=True)
            ]
            tensors[name] = np.concatenate([part[:rank] for part, rank in zip(first, ranks, strict=True)])
            # What does not fit is infinite, and is refused below.
            with np.errstate(over="ignore"):
                tensors[partner(name)] = np.concatenate(parts, axis=1).astype(second.dtype)
    check_finite("the blend", tensors)
    totals = {base_name(module): sum(ranks) for module, ranks in adapters.ranks.items()}
    config = blended_config(adapters.configs, totals, adapters.base)
    like = adapters.checkpoints[0]
    size = sum(array.nbytes for array in tensors.values())
    inputs = [place for one in adapters.checkpoints for place in (one.path.parent, *one.places)]
    with aside(out, size, overwrite, inputs, is_folder=True) as place:
        place.mkdir()
        copy_side_files(like.path.parent, place)
        save_file(place / WEIGHTS, tensors, like)
        for name, text in {ADAPTER_CONFIG: json.dumps(config, indent=2) + "\n", **(side_files or {})}.items():
            (place / name).write_text(text)
    return out


def _open(folder: Path) -> Checkpoint:
    """Opens the weights of an adapter."""
    for name in _FILES:
        if (folder / name).is_file():
            return open_checkpoint(folder / name)
    raise FileNotFoundError(f"{folder} has neither {' nor '.join(_FILES)}")


def _check_tensors(checkpoint: Checkpoint, config: AdapterConfig) -> None:
    """Refuses an adapter whose tensors are not the factors that its configuration describes."""
    path, tensors = checkpoint.path, checkpoint.tensors
    for name, tensor in tensors.items():
        found = FACTOR.fullmatch(name)
        if found and ".base_layer." in name:
            raise ValueError(f"{path} holds {name}, a factor within another adapted module, which cannot be blended")
        if found is None and "lora_magnitude_vector" in name:
            raise ValueError(f"{path} holds {name}, so it is a DoRA adapter, which cannot be blended")
        if found is None and not name.endswith(_COPY):
            raise ValueError(f"{path} holds {name}, which is no factor of LoRA and cannot be blended")
        if not jnp.issubdtype(tensor.dtype, jnp.floating):
            raise ValueError(f"{path} holds {np.dtype(tensor.dtype)} at {name}; expected floating-point numbers")
        if found is None:
            continue
        pair = (name, partner(name)) if found["factor"] == "A" else (partner(name), name)
        if missing := [each for each in pair if each not in tensors]:
            raise ValueError(f"{path} holds {name} without {missing[0]}; expected both factors")
        first, second = (tensors[each].shape for each in pair)
        if second[1] != first[0] or any(size != 1 for size in second[2:]):
            raise ValueError(
                f"{path} has factors of shapes {first} and {second} at {found['module']}, which do not multiply; the "
                "factors of a convolution with groups cannot be blended"
            )
        if (rank := rank_of(config, base_name(found["module"]))) != first[0]:
            raise ValueError(
                f"{path} has rank {first[0]} at {found['module']}, but its configuration says {rank}; expected the same"
            )
    if not any(map(FACTOR.fullmatch, tensors)):
        raise ValueError(f"{path} holds no factors of LoRA")


def _common_shapes(checkpoints: Sequence[Checkpoint]) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Returns the shape and the dtype of each factor, with the largest rank of all adapters.

    Raises:
        ValueError: if adapters disagree in dtype, or in another axis than the rank's.
    """
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {}
    owner: dict[str, Path] = {}
    for checkpoint in checkpoints:
        for name, tensor in checkpoint.tensors.items():
            if not (found := FACTOR.fullmatch(name)):
                continue
            axis = "AB".index(found["factor"])
            shape, dtype = shapes.setdefault(name, (tensor.shape, tensor.dtype))
            first = owner.setdefault(name, checkpoint.path)
            rank = max(shape[axis], tensor.shape[axis])
            widened = tuple((*each[:axis], rank, *each[axis + 1 :]) for each in (shape, tensor.shape))
            if widened[0] != widened[1] or dtype != tensor.dtype:
                raise ValueError(
                    f"{checkpoint.path} has {np.dtype(tensor.dtype)} of shape {tensor.shape} at {name}, but {first} "
                    f"has {np.dtype(dtype)} of shape {shape}; expected the same dtype and, but for the rank, the same "
                    "shape"
                )
            shapes[name] = (widened[0], dtype)
    return shapes


def _copies(checkpoints: Sequence[Checkpoint], arrays: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Returns the copies of the base's embeddings, which must be equal in all adapters that have them."""
    copies: dict[str, np.ndarray] = {}
    for checkpoint, read in zip(checkpoints, arrays, strict=True):
        for name, array in read.items():
            if name.endswith(_COPY) and not np.array_equal(copies.setdefault(name, array), array):
                raise ValueError(
                    f"{checkpoint.path} has other values at {name} than an adapter before it; expected the embedding "
                    "of one base"
                )
    return copies
