"""A folder that one process at a time works in."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import filelock

_FILE = ".lock"


class LockedError(RuntimeError):
    """A folder that another process works in."""


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps a folder for this process; a process that is killed gives it back.

    Args:
        folder: made if it is not there, and removed if it is empty in the end. A hidden file lies in it meanwhile.

    Raises:
        LockedError: another process, named by its id, works in the folder.
        OSError: a folder that cannot be made or written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _FILE
    lock = filelock.FileLock(path, timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout as error:
        holder = ""
        # The file may be new, or gone by now.
        with contextlib.suppress(OSError):
            holder = path.read_text().strip()
        who = f"process {holder}" if holder else "another process"
        raise LockedError(f"{who} works in {folder}: wait until it ends, or choose another folder") from error
    try:
        path.write_text(f"{os.getpid()}\n")
        yield
    finally:
        # Before it is released: a process that opens it now finds that it has no name, and does not take it for a lock.
        path.unlink(missing_ok=True)
        lock.release()
        # An empty one is of no use.
        with contextlib.suppress(OSError):
            folder.rmdir()
