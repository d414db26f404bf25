"""Lets only one process at a time work in a folder."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import filelock

_FILE = ".lock"


class LockedError(RuntimeError):
    """Another process works in the folder."""


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps a folder for this process. A process that is killed gives it back.

    Args:
        folder: the folder. It is made if it does not exist, and removed if it is empty in the end. In the meantime it
            has a hidden file.

    Raises:
        LockedError: if another process works in the folder; the error has the id of the process.
        OSError: if the folder cannot be made or written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _FILE
    lock = filelock.FileLock(path, timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout as error:
        holder = ""
        # The file may be empty yet, or gone by now.
        with contextlib.suppress(OSError):
            holder = path.read_text().strip()
        who = f"process {holder}" if holder else "another process"
        raise LockedError(f"{who} works in {folder}: wait until it ends, or choose another folder") from error
    try:
        path.write_text(f"{os.getpid()}\n")
        yield
    finally:
        # This comes before the release: a process that opens the file now finds it without a name, so it is no lock.
        path.unlink(missing_ok=True)
        lock.release()
        with contextlib.suppress(OSError):
            folder.rmdir()
