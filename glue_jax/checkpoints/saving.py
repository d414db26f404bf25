"""`blend_files` and `save_blend`: a blend as files with the names, shapes and dtypes of an expert's files.

Whatever is written is first written beside its place, and is renamed when it is complete. So a reader finds the old
result, the new one, or none.
"""

import json
import re
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from glue_jax.checkpoints import orbax_format, torch_format
from glue_jax.checkpoints.formats import Checkpoint, PathLike, open_checkpoint, open_checkpoints
from glue_jax.checkpoints.headers import library
from glue_jax.checkpoints.loading import Rename, check_alike, differences_of, portions_of, read_alike
from glue_jax.checkpoints.places import aside
from glue_jax.checkpoints.sums import NonFiniteError, check_variance, weighted_sums
from glue_jax.paths import by_path, check_finite
from glue_jax.types import Params

AlphaOf = Callable[[str], np.ndarray]
"""A function from a tensor's name to its coefficients, `[K]`."""

PROVENANCE_KEY = "glue"
"""The key of the header of a safetensors file that holds the provenance of a blend, as JSON."""

# Endings and the largest size of side files. Other files may hold weights, which do not fit the blend.
_SIDE_FILES = {".json", ".jsonl", ".txt", ".model", ".jinja", ".py", ".yaml", ".yml", ".md"}
_SIDE_FILES |= {".spm", ".bpe", ".codes", ".tiktoken"}
_SIDE_NAMES = {"LICENSE", "NOTICE"}
_MOST_SIDE_BYTES = 64 * 2**20

RECORD, CARD, RECIPE = "glue.json", "README.md", "mergekit.yaml"
"""The names of the three files that say where a blend comes from."""


def blend_files(
    checkpoints: Sequence[PathLike | Checkpoint],
    alpha: Sequence[float] | AlphaOf,
    out: PathLike,
    *,
    take_first: str | Sequence[str] = (),
    side_files: Mapping[str, str] | None = None,
    overwrite: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Blends experts from file to file (Eq. 1): `sum_i alpha_i theta_i`, one tensor after another.

    The sum is taken in float32, or in float64 for float64 tensors, and is rounded once to the dtype of the experts. The
    call needs memory for one file of the result, and for some tensors.

    Args:
        checkpoints: K experts, from `open_checkpoints` or by their paths.
        alpha: the coefficients, `[K]`, or a function from a tensor's name to its coefficients.
        out: as for `save_blend`.
        take_first: as for `load_experts`.
        side_files: as for `save_blend`.
        overwrite: as for `save_blend`.
        on_progress: a function that is called with two numbers: the bytes of the blend that are done, and the bytes of
            the whole blend.

    Returns:
        The path of the result.

    Raises:
        ValueError: if the experts do not fit together, if a weight is infinite or NaN, or if the coefficients do not
            fit.
        OSError: if `out` exists, or if there is no space left.
    """
    checkpoints = open_checkpoints(checkpoints)
    kept = check_alike(checkpoints, take_first)
    alpha_of = alpha if callable(alpha) else lambda name: np.asarray(alpha, np.float64)
    for name in checkpoints[0].tensors:
        coefficients = alpha_of(name)
        if np.shape(coefficients) != (len(checkpoints),) or not np.isfinite(coefficients).all():
            raise ValueError(
                f"the coefficients of {name} are {coefficients}; expected {len(checkpoints)} finite numbers, one for "
                "each expert"
            )
    total, done = checkpoints[0].num_bytes, 0

    def blended(names: Sequence[str]) -> dict[str, np.ndarray]:
        nonlocal done
        result = {}
        for portion in portions_of(checkpoints, names):
            try:
                result |= weighted_sums(read_alike(checkpoints, portion, kept), alpha_of)
            except NonFiniteError as error:
                # Names the expert, if one is to blame.
                for checkpoint in checkpoints:
                    check_finite(str(checkpoint.path), checkpoint.read([error.name]))
                raise
            done += sum(result[name].nbytes for name in portion)
            if on_progress:
                on_progress(done, total)
        return result

    inputs = [place for checkpoint in checkpoints for place in checkpoint.places]
    return _write(out, checkpoints[0], blended, side_files or {}, overwrite, inputs)


def save_blend(
    out: PathLike,
    params: Params,
    *,
    like: PathLike | Checkpoint,
    rename: Rename | None = None,
    side_files: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes a model with the names, shapes and dtypes of an expert's file.

    Args:
        out: the place of the result. If it ends in `.safetensors`, the result is one file. If it has another ending, or
            none, the result is a folder. The endings of PyTorch are refused. So is `.safetensors` if `like` is an orbax
            checkpoint. If the result is a folder and `like` is a single file, the folder has one file,
            `model.safetensors`. If `like` is a folder of safetensors, the new folder has files of the same names, with
            the same tensors in each. Small files beside the weights in the folder `like`, such as `config.json` and a
            tokenizer, are copied. If `like` is an orbax checkpoint, the result is an orbax checkpoint, and nothing is
            copied.
        params: the model, with the structure that `load_experts` gave to the experts, without the axis K. Leaves in
            float32 are rounded to the dtypes of the expert.
        like: the expert: its path, or what `open_checkpoint` returned. If `load_experts` was given a `subtree`, pass
            `open_checkpoint(path, subtree=...)`.
        rename: the function that `load_experts` was given.
        side_files: texts to write into the folder, by the names of their files. If the result is one file, its header
            holds the texts.
        overwrite: whether an earlier result at `out` is replaced. If `out` is a folder with safetensors or an orbax
            checkpoint, all that lies in it is removed. Any other folder that is not empty is never replaced.

    Returns:
        The path of the result.

    Raises:
        ValueError: if the model differs from the expert in names or shapes, if a weight is infinite or NaN, or does not
            fit into the expert's dtype, or if a variance of BatchNorm is negative.
        OSError: if `out` exists, or if there is no space left.
    """
    like = like if isinstance(like, Checkpoint) else open_checkpoint(like)
    leaves = by_path(params)
    if rename is not None:
        renamed = {name: rename(name) for name in like.tensors}
        if missing := [name for name, new in renamed.items() if new not in leaves]:
            raise ValueError(f"params has no {renamed[missing[0]]!r}, which rename gives for {missing[0]}")
        if unknown := leaves.keys() - renamed.values():
            raise ValueError(f"params holds {min(unknown)!r}, which rename gives for no tensor of {like.path}")
        leaves = {name: leaves[new] for name, new in renamed.items()}
    dtypes = {name: tensor.dtype for name, tensor in like.tensors.items()}
    shapes = {name: jax.ShapeDtypeStruct(np.shape(leaf), dtypes.get(name, bool)) for name, leaf in leaves.items()}
    if differences := list(differences_of(like.tensors, shapes)):
        raise ValueError(f"params does not fit {like.path}: {'; '.join(differences[:5])}")

    def cast(names: Sequence[str]) -> dict[str, np.ndarray]:
        arrays = {}
        for name in names:
            given, dtype = np.asarray(leaves[name]), like.tensors[name].dtype
            if jnp.issubdtype(dtype, jnp.inexact) and not jnp.issubdtype(given.dtype, jnp.inexact):
                raise ValueError(f"params holds {given.dtype} at {name}; expected floating point, as in {like.path}")
            check_finite("params", {name: given})
            check_variance(name, given)
            with np.errstate(over="ignore"):
                arrays[name] = given.astype(dtype)
            if jnp.issubdtype(dtype, jnp.inexact):
                check_finite(f"params, rounded to {np.dtype(dtype)},", {name: arrays[name]})
            elif not np.array_equal(arrays[name], given):
                raise ValueError(f"params holds {given.dtype} values at {name} that {np.dtype(dtype)} does not hold")
        return arrays

    return _write(out, like, cast, side_files or {}, overwrite, like.places)


def _write(
    out: PathLike,
    like: Checkpoint,
    tensors_of: Callable[[Sequence[str]], dict[str, np.ndarray]],
    side_files: Mapping[str, str],
    overwrite: bool,
    inputs: Sequence[Path],
) -> Path:
    """Writes a result. `tensors_of(names)` gives the tensors of one file of it."""
    out = Path(out).expanduser().absolute()
    with aside(out, like.num_bytes, overwrite, inputs, is_folder=like.format == "orbax") as place:
        if like.format == "orbax":
            leaves = tensors_of(list(like.tensors))
            orbax_format.save(place, jax.tree.map(leaves.__getitem__, like.structure))
        elif out.suffix == ".safetensors":
            save_file(place, tensors_of(list(like.tensors)), like, json.dumps(side_files) if side_files else None)
        else:
            place.mkdir()
            for name, names in _files(like).items():
                save_file(place / name, tensors_of(names), like)
            _write_index(place, like)
            if like.path.is_dir():
                copy_side_files(like.path, place)
        if place.is_dir():
            for name, text in side_files.items():
                (place / name).write_text(text)
    return out


def save_file(path: Path, arrays: dict[str, np.ndarray], like: Checkpoint, provenance: str | None = None) -> None:
    """Writes one safetensors file. Transformers wants the format in its header."""
    kept = {name: text for name, text in like.metadata.items() if name != PROVENANCE_KEY}
    metadata = kept | {"format": "pt"} | ({PROVENANCE_KEY: provenance} if provenance else {})
    # safetensors writes the memory of an array as it lies.
    arrays = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    try:
        library("safetensors.numpy").save_file(arrays, path, metadata=metadata)
    except Exception as error:
        # The library's own error, which is no OSError.
        raise OSError(f"{path} cannot be written: {error}") from error
    # The library gives no other user a right to read it.
    shutil.copymode(next(iter(like.files.values())), path)


def _files(like: Checkpoint) -> dict[str, list[str]]:
    """Returns the names of the tensors of each file that the result has, by the file's name."""
    files: dict[str, list[str]] = {}
    for name, file in like.files.items():
        new = file.name.removeprefix("pytorch_").removesuffix(".bin") + ".safetensors"
        files.setdefault(new if like.format == "torch" else file.name, []).append(name)
    is_alone = like.path.is_file() or (like.format == "torch" and like.index is None)
    return {"model.safetensors": list(like.tensors)} if is_alone else files


def _write_index(folder: Path, like: Checkpoint) -> None:
    """Writes the index of a folder that had one, as Hugging Face does."""
    if like.index is not None:
        index = {
            "metadata": {"total_size": like.num_bytes},
            "weight_map": {name: file for file, names in _files(like).items() for name in names},
        }
        name = "model.safetensors.index.json" if like.format == "torch" else like.index.name
        (folder / name).write_text(json.dumps(index, indent=2) + "\n")


def copy_side_files(source: Path, folder: Path) -> None:
    """Copies the small files beside the weights of a folder, such as the configuration and the tokenizer.

    The folders in it that hold no weights are copied too. The record, the card and the recipe of an earlier blend are
    left out.

    Warns:
        UserWarning: if a folder in it holds weights. They are not blended, and the folder is not copied.
    """
    folders = sorted(each for each in source.iterdir() if each.is_dir() and not each.name.startswith("."))
    with_weights = [each for each in folders if any(map(_is_weights, each.iterdir()))]
    if with_weights:
        warnings.warn(
            f"{source} has weights in {[each.name for each in with_weights]} too. They are not blended, nor copied",
            stacklevel=2,
        )
    copied = [source, *(each for each in folders if each not in with_weights)]
    for file in sorted(file for each in copied for file in each.iterdir() if file.is_file()):
        name = file.relative_to(source)
        is_other = _is_weights(file) or file.name.startswith(".") or file.name.endswith(".index.json")
        # Mistral's tokenizer is a file tokenizer.model.v3.
        suffix = Path(file.stem).suffix if re.fullmatch(r"\.v\d+", file.suffix) else file.suffix
        is_known = suffix in _SIDE_FILES or file.name in _SIDE_NAMES
        is_small = file.stat().st_size <= _MOST_SIDE_BYTES
        if is_small and is_known and not is_other and str(name) not in (RECORD, CARD, RECIPE):
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, folder / name)


def _is_weights(file: Path) -> bool:
    """Returns whether a file holds weights, by its ending."""
    return file.suffix in (".safetensors", *torch_format.SUFFIXES, ".h5", ".msgpack", ".onnx")
