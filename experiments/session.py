"""What surrounds the work of every command: its folder, its progress, and one clear line where it ends early."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from experiments.progress import ProgressBars
from experiments.stages import DamagedStageError

INTERRUPTED = 130
"""The exit status of a command that SIGINT ended."""


@contextlib.contextmanager
def session(out_dir: Path, console: Console) -> Iterator[ProgressBars]:
    """Makes a command's folder, and shows its progress until the work is done or stopped.

    Args:
        out_dir: the folder, which keeps the finished stages.
        console: where progress is shown.

    Raises:
        SystemExit: with one line, for a folder that cannot be made, a loss that is not finite or a damaged stage; with
            `INTERRUPTED`, for an interruption, after saying that finished stages are kept.
    """
    with ProgressBars(console) as progress, exit_on(FloatingPointError, DamagedStageError):
        try:
            out_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            sys.exit(f"--out-dir is {out_dir}: expected a folder that can be made ({error})")
        try:
            yield progress
        except KeyboardInterrupt:
            kept = f"finished stages are kept in {out_dir}, the same command goes on from them"
            progress.say(f"interrupted: {kept if any(out_dir.iterdir()) else 'no stage was finished yet'}")
            sys.exit(INTERRUPTED)
        finally:
            # An empty one is of no use.
            with contextlib.suppress(OSError):
                out_dir.rmdir()


@contextlib.contextmanager
def process() -> Iterator[None]:
    """Surrounds a command that is a process of its own: an interruption ends it at once.

    XLA's threads may be in the middle of a program then, and an interpreter that is torn down under them crashes.
    """
    try:
        yield
    except SystemExit as stopped:
        if stopped.code != INTERRUPTED:
            raise
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(INTERRUPTED)


@contextlib.contextmanager
def exit_on(*errors: type[Exception]) -> Iterator[None]:
    """Ends the command with one line for these errors, without a traceback: for what its user can mend.

    Raises:
        SystemExit: in their place.
    """
    try:
        yield
    except errors as error:
        sys.exit(f"{type(error).__name__}: {error}")
