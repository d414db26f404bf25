"""Where a result is written: checked before any work, kept from other processes, and complete or not there at all."""

import contextlib
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from glue_jax.checkpoints import orbax_format, torch_format
from glue_jax.checkpoints.headers import library

# Room for headers and side files, beside the weights.
_SPARE_BYTES = 2**20


def check_place(out: Path, num_bytes: int, overwrite: bool, inputs: Iterable[Path] = ()) -> None:
    """Refuses a place where a result cannot be written, or would destroy something else than an earlier result.

    Args:
        out: the place.
        num_bytes: the size of the result.
        overwrite: whether an earlier result may be replaced.
        inputs: what the result is made from.

    Raises:
        ValueError: if `out` is one of the inputs, contains one, or lies in the folder of one, or if its ending is one
            of PyTorch's.
        OSError: if `out` exists and may not be replaced, if its folder does not exist, or if the disk has no room for
            so many bytes.
    """
    real = out.resolve()
    for each in map(Path.resolve, inputs):
        if real == each or real in each.parents or (each.is_dir() and each in real.parents):
            raise ValueError(f"out is {out}, which would change {each}, one of the inputs; expected another place")
    if out.suffix in torch_format.SUFFIXES:
        raise ValueError(f"out is {out}; expected a folder, or a file with the ending .safetensors")
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
def aside(out: Path, num_bytes: int, overwrite: bool, inputs: Iterable[Path] = ()) -> Iterator[Path]:
    """Gives a place beside `out`, and renames what was written there to `out` at the end. Removes it after an error.

    Raises:
        ValueError: as `check_place`, before any work.
        OSError: as `check_place` and `owned`, before any work.
    """
    check_place(out, num_bytes, overwrite, inputs)
    place, old = (out.with_name(f".{out.name}.{word}") for word in ("partial", "old"))
    with owned(out):
        # A killed process left these.
        _remove(place)
        if old.exists() and not out.exists():
            old.rename(out)
            check_place(out, num_bytes, overwrite, inputs)
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
