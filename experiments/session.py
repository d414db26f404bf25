"""What surrounds the work of every command: its folder, its progress, and one clear line where it ends early."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from experiments.progress import ProgressBars
from experiments.stages import DamagedStageError


@contextlib.contextmanager
def session(out_dir: Path, console: Console) -> Iterator[ProgressBars]:
    """Makes a command's folder, and shows its progress until the work is done or stopped.

    Args:
        out_dir: the folder, which keeps the finished stages.
        console: where progress is shown.

    Raises:
        SystemExit: with one line, for a folder that cannot be made, a loss that is not finite or a damaged stage; with
            130, for an interruption, after saying that finished stages are kept.
    """
    with ProgressBars(console) as progress, exit_on(FloatingPointError, DamagedStageError):
        try:
            out_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            sys.exit(f"--out-dir is {out_dir}: expected a folder that can be made ({error})")
        try:
            yield progress
        except KeyboardInterrupt:
            progress.say(f"interrupted: finished stages are kept in {out_dir}, the same command goes on from them")
            sys.exit(130)


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
