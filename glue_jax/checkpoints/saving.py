"""`blend_files` and `save_blend`: a blend as files with the names, shapes and dtypes of an expert's files.

Whatever is written is first written beside its place, and is renamed when it is complete. So a reader finds the old
result, the new one, or none.
"""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from glue_jax.checkpoints import orbax_format
from glue_jax.checkpoints.formats import Checkpoint, PathLike, open_checkpoint
from glue_jax.checkpoints.headers import library
from glue_jax.checkpoints.loading import Rename, check_alike, differences_of, read_alike
from glue_jax.checkpoints.sums import NonFiniteError, weighted_sums
from glue_jax.paths import by_path, check_finite
from glue_jax.types import Params

AlphaOf = Callable[[str], np.ndarray]
"""A function from a tensor's name to its coefficients, `[K]`."""

# Room for headers and side files, beside the weights.
_SPARE_BYTES = 2**20
PROVENANCE_KEY = "glue"
"""The key of the header of a safetensors file that holds the provenance of a blend, as JSON."""

_NO_SIDE_FILES = (".safetensors", ".bin", ".pt", ".pth", ".index.json", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf")


def blend_files(
    checkpoints: Sequence[Checkpoint],
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
        checkpoints: K experts from `open_checkpoints`.
        alpha: the coefficients, `[K]`, or a function from a tensor's name to its coefficients.
        out: as for `save_blend`.
        take_first: as for `load_experts`.
        side_files: as for `save_blend`.
        overwrite: whether an existing `out` is replaced.
        on_progress: a function that is called with the number of bytes of the blend that are done, and with their sum.

    Returns:
        The path of the result.

    Raises:
        ValueError: if the experts do not fit together, if a weight is infinite or NaN, or if the coefficients do not
            fit.
        OSError: if `out` exists, or if there is no space left.
    """
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
        for portion in checkpoints[0].portions(names):
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

    return _write(out, checkpoints[0], blended, side_files or {}, overwrite)


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
        out: the place of the result. With the ending `.safetensors` it is one file. Otherwise it is a folder. If `like`
            is in safetensors, the folder has files of the same names, with the same tensors in each. If `like` is a
            file of PyTorch, the folder has `model.safetensors`. Other small files beside the expert's weights, such as
            `config.json` and a tokenizer, are copied. If `like` is an orbax checkpoint, the folder is one too.
        params: the model, with the structure that `load_experts` gave to the experts, without the axis K. Leaves in
            float32 are rounded to the dtypes of the expert.
        like: the expert, or its path.
        rename: the function that `load_experts` was given.
        side_files: texts to write into the folder, by the names of their files.
        overwrite: whether an existing `out` is replaced.

    Returns:
        The path of the result.

    Raises:
        ValueError: if the model differs from the expert in names or shapes, or if a weight is infinite or NaN, or does
            not fit into the expert's dtype.
        OSError: if `out` exists, or if there is no space left.
    """
    like = like if isinstance(like, Checkpoint) else open_checkpoint(like)
    leaves = by_path(params)
    if rename is not None:
        if missing := [name for name in like.tensors if rename(name) not in leaves]:
            raise ValueError(f"params has no {rename(missing[0])!r}, which rename gives for {missing[0]}")
        leaves = {name: leaves[rename(name)] for name in like.tensors}
    dtypes = {name: tensor.dtype for name, tensor in like.tensors.items()}
    shapes = {name: jax.ShapeDtypeStruct(np.shape(leaf), dtypes.get(name, bool)) for name, leaf in leaves.items()}
    if differences := list(differences_of(like.tensors, shapes)):
        raise ValueError(f"params does not fit {like.path}: {'; '.join(differences[:5])}")

    def cast(names: Sequence[str]) -> dict[str, np.ndarray]:
        arrays = {}
        for name in names:
            given, dtype = np.asarray(leaves[name]), like.tensors[name].dtype
            check_finite("params", {name: given})
            with np.errstate(over="ignore"):
                arrays[name] = given.astype(dtype)
            if jnp.issubdtype(dtype, jnp.inexact):
                check_finite(f"params, rounded to {np.dtype(dtype)},", {name: arrays[name]})
            elif not np.array_equal(arrays[name], given):
                raise ValueError(f"params holds {given.dtype} values at {name} that {np.dtype(dtype)} does not hold")
        return arrays

    return _write(out, like, cast, side_files or {}, overwrite)


def _write(
    out: PathLike,
    like: Checkpoint,
    tensors_of: Callable[[Sequence[str]], dict[str, np.ndarray]],
    side_files: Mapping[str, str],
    overwrite: bool,
) -> Path:
    """Writes a result. `tensors_of(names)` gives the tensors of one file of it."""
    out = Path(out).expanduser()
    with aside(out, like.num_bytes, overwrite) as place:
        if like.format == "orbax":
            if out.suffix == ".safetensors":
                raise ValueError(f"out is {out}, but the experts are orbax checkpoints; expected a folder")
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
    metadata = dict(like.metadata) | {"format": "pt"} | ({PROVENANCE_KEY: provenance} if provenance else {})
    # safetensors writes the memory of an array as it lies.
    arrays = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    try:
        library("safetensors.numpy").save_file(arrays, path, metadata=metadata)
    except Exception as error:
        # The library's own error, which is no OSError.
        if os.strerror(errno.ENOSPC) in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise
    # The library gives no other user a right to read it.
    shutil.copymode(next(iter(like.files.values())), path)


def _files(like: Checkpoint) -> dict[str, list[str]]:
    """Returns the names of the tensors of each file that the result has, by the file's name."""
    files: dict[str, list[str]] = {}
    for name, file in like.files.items():
        files.setdefault(file.name, []).append(name)
    if len(files) == 1:
        return {
            "model.safetensors" if like.path.is_file() or like.format == "torch" else next(iter(files)): [*like.tensors]
        }
    return {
        name.removeprefix("pytorch_").removesuffix(".bin") + ".safetensors" if like.format == "torch" else name: names
        for name, names in files.items()
    }


def _write_index(folder: Path, like: Checkpoint) -> None:
    """Writes the index of a folder with several files, as Hugging Face does."""
    files = _files(like)
    if len(files) > 1:
        index = {
            "metadata": {"total_size": like.num_bytes},
            "weight_map": {name: file for file, names in files.items() for name in names},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def copy_side_files(source: Path, folder: Path) -> None:
    """Copies the small files beside the weights of a folder, such as the configuration and the tokenizer."""
    for file in sorted(source.iterdir()):
        if file.is_file() and not file.name.endswith(_NO_SIDE_FILES) and not file.name.startswith("."):
            shutil.copyfile(file, folder / file.name)


def check_place(out: Path, num_bytes: int, overwrite: bool) -> None:
    """Refuses a place where a result cannot be written.

    Raises:
        OSError: if `out` exists and may not be replaced, if its folder does not exist, or if the disk has no room for
            so many bytes.
    """
    if out.exists() and not overwrite:
        raise FileExistsError(f"{out} exists; expected a new path, or overwrite")
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"the folder of {out} does not exist")
    needed, free = num_bytes + _SPARE_BYTES, shutil.disk_usage(out.absolute().parent).free
    if needed > free:
        raise OSError(f"no space left for {out}: it needs {needed:,} bytes, and {free:,} are free")


@contextlib.contextmanager
def aside(out: Path, num_bytes: int, overwrite: bool) -> Iterator[Path]:
    """Gives a place beside `out`, and renames what was written there to `out` at the end. Removes it after an error.

    Raises:
        OSError: as `check_place`, before any work.
    """
    check_place(out, num_bytes, overwrite)
    place, old = (out.with_name(f".{out.name}.{word}") for word in ("partial", "old"))
    # What a killed process left.
    _remove(place)
    try:
        yield place
        if out.is_dir() or (out.exists() and place.is_dir()):
            _remove(old)
            out.rename(old)
        place.replace(out)
    finally:
        _remove(place)
        if out.exists():
            _remove(old)
        elif old.exists():
            old.rename(out)


def _remove(path: Path) -> None:
    """Removes a file or a folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
