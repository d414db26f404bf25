"""Where a result is written: checked before any work, kept from other processes, and complete or not there at all."""

import contextlib
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from glue_jax.checkpoints import orbax_format, torch_format
from glue_jax.checkpoints.headers import library

# Room for headers and side files, beside the weights.
_SPARE_BYTES = 2**20


def check_place(
    out: Path, num_bytes: int, overwrite: bool, inputs: Iterable[Path] = (), *, is_folder: bool = False
) -> None:
    """Refuses a place where a result cannot be written, or would destroy something else than an earlier result.

    Args:
        out: the place.
        num_bytes: the size of the result.
        overwrite: whether an earlier result may be replaced.
        inputs: the files and folders that the result is made from.
        is_folder: whether the result can only be a folder.

    Raises:
        ValueError: if `out` is one of the inputs, contains one, or lies in the folder of one, if its ending is one of
            PyTorch's, or if it has the ending of a file and the result is a folder.
        OSError: if `out` exists and may not be replaced, if its folder does not exist, or if the disk has no room for
            so many bytes.
    """
    real = out.resolve()
    for each in inputs:
        # A link and what it points to are both inputs.
        for form in (each.parent.resolve() / each.name, each.resolve()):
            if real == form or real in form.parents or (form.is_dir() and form in real.parents):
                raise ValueError(f"out is {out}, which would change {form}, one of the inputs; expected another place")
    if out.is_symlink() and (out.suffix == ".safetensors") != (real.suffix == ".safetensors"):
        raise ValueError(f"out is {out}, a link to {real}; expected both to be files .safetensors, or both folders")
    if out.suffix in torch_format.SUFFIXES:
        raise ValueError(f"out is {out}; expected a folder, or a file with the ending .safetensors")
    if is_folder and out.suffix == ".safetensors":
        raise ValueError(f"out is {out}, but from adapters or orbax checkpoints comes a folder; expected no ending")
    if real.is_file() and real.suffix != ".safetensors":
        raise FileExistsError(f"{out} is a file without weights, so it is no earlier result, and is not replaced")
    if out.is_symlink() and not out.exists():
        raise FileNotFoundError(f"{out} is a link to a place that does not exist")
    if out.exists() and not overwrite:
        raise FileExistsError(f"{out} exists; expected a new path, or overwrite (--overwrite)")
    if out.is_dir() and any(out.iterdir()) and not (any(out.glob("*.safetensors")) or orbax_format.is_checkpoint(out)):
        raise FileExistsError(f"{out} is a folder without weights, so it is no earlier result, and is not replaced")
    if not real.parent.is_dir():
        raise FileNotFoundError(f"the folder of {out} does not exist")
    needed, free = num_bytes + _SPARE_BYTES, shutil.disk_usage(real.parent).free
    if needed > free:
        raise OSError(f"no space left for {out}: it needs {needed:,} bytes, and {free:,} are free")


@contextlib.contextmanager
def owned(out: Path) -> Iterator[None]:
    """Keeps a place for this process, until the end of the block. A killed process gives it back.

    Raises:
        BlockingIOError: if another process writes there.
    """
    path = out.with_name(f".{out.name}.lock")
    lock = library("filelock").FileLock(path, timeout=0, is_singleton=True)
    try:
        lock.acquire()
    except library("filelock").Timeout as error:
        raise BlockingIOError(f"another process writes {out}; expected only one at a time") from error
    try:
        yield
    finally:
        if lock.lock_counter == 1:
            # This comes before the release, so that nobody holds a file without a name.
            path.unlink(missing_ok=True)
        lock.release()


@contextlib.contextmanager
def aside(
    out: Path, num_bytes: int, overwrite: bool, inputs: Iterable[Path] = (), *, is_folder: bool = False
) -> Iterator[Path]:
    """Gives a place beside `out`, and renames what was written there to `out` at the end. Removes it after an error.

    If `out` is a link, the place to which it points is replaced, and the link stays.

    Raises:
        ValueError: as `check_place`, before any work.
        OSError: as `check_place` and `owned`, before any work.
    """
    inputs = list(inputs)
    check_place(out, num_bytes, overwrite, inputs, is_folder=is_folder)
    out = out.resolve()
    place, old = (out.with_name(f".{out.name}.{word}") for word in ("partial", "old"))
    with owned(out):
        # A killed process left these.
        _remove(place)
        if old.exists() and not out.exists():
            old.rename(out)
            check_place(out, num_bytes, overwrite, inputs, is_folder=is_folder)
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
