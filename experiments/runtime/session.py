"""What surrounds the work of every command: its folder, its progress, and one clear line if it ends early."""

import argparse
import contextlib
import errno
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from experiments.runtime.locks import LockedError, locked
from experiments.runtime.progress import ProgressBars
from experiments.runtime.stages import DamagedStageError, read_json, sweep
from glue_jax.interrupts import interruptible

DEFAULT_EXPERIMENT = "digits"
"""The experiment whose experts a command uses by default."""
INTERRUPTED = 130
"""The exit status of a command that SIGINT ended."""


@contextlib.contextmanager
def session(out_dir: Path, console: Console, command: str) -> Iterator[ProgressBars]:
    """Makes a command's folder, keeps it for this process, and shows progress until the work ends.

    Args:
        out_dir: the folder, which keeps the finished stages and the report.
        console: where progress is shown.
        command: the command line, such as `python -m experiments.digits`.

    Raises:
        SystemExit: with one line, if the folder cannot be made or written, if another process works in it, or if it
            holds the results of another command. Also if a loss is not finite, if a stage is damaged, if the disk is
            full or another file cannot be read or written, or if there is no device or too little memory on it. After
            an interruption the status is `INTERRUPTED`, and the line says that finished stages are kept.
    """
    _check_device()
    with ProgressBars(console) as progress, exit_on(FloatingPointError, DamagedStageError, LockedError):
        lock = contextlib.ExitStack()
        try:
            _check_place(out_dir)
            lock.enter_context(locked(out_dir))
        except OSError as error:
            sys.exit(f"--out-dir is {out_dir}: expected a folder that can be made and written ({error})")
        try:
            with lock:
                _check_owner(out_dir, command)
                sweep(out_dir)
                yield progress
        except OSError as error:
            sys.exit(f"{failure(error, out_dir)}; {_kept(out_dir)}")
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            first_line = next(iter(str(error).splitlines()))
            sys.exit(f"the device's memory is too small for this ({first_line:.200}); {_kept(out_dir)}")
        except KeyboardInterrupt:
            progress.say(f"interrupted: {_kept(out_dir)}")
            sys.exit(INTERRUPTED)


@contextlib.contextmanager
def process() -> Iterator[None]:
    """Surrounds a command that is a process of its own. An interruption ends the process at once.

    The threads of XLA may be in the middle of a program. An interpreter that is torn down under them crashes.
    """
    try:
        with interruptible():
            yield
    except SystemExit as stopped:
        if stopped.code != INTERRUPTED:
            raise
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(INTERRUPTED)


@contextlib.contextmanager
def exit_on(*errors: type[Exception]) -> Iterator[None]:
    """Ends the command with one line for these errors, without a traceback. They are errors that the user can correct.

    Raises:
        SystemExit: in place of such an error.
    """
    try:
        yield
    except errors as error:
        sys.exit(f"{type(error).__name__}: {error}")


def failure(error: OSError, out_dir: Path) -> str:
    """Returns the message for a file that cannot be read or written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = error.filename or f"into {out_dir}"
        return f"no space is left to write {where}: make room, and give the same command again"
    return f"{type(error).__name__}: {error}"


def _kept(out_dir: Path) -> str:
    """Returns what a command leaves if it ends early, in words."""
    kept = f"finished stages are kept in {out_dir}, the same command goes on from them"
    return kept if out_dir.is_dir() and any(out_dir.iterdir()) else "no stage was finished yet"


def _check_device() -> None:
    """Ends the command if JAX does not start, for example for a platform that is missing."""
    try:
        jax.devices()
    except Exception as error:
        # A RuntimeError, or an AssertionError without a message.
        first_line = next(iter(str(error).splitlines()), "")
        sys.exit(
            f"JAX finds no device ({type(error).__name__}: {first_line}); JAX_PLATFORMS is "
            f"{os.environ.get('JAX_PLATFORMS')!r}: expected a platform that is installed and there, or none for any"
        )


def _check_place(out_dir: Path) -> None:
    """Ends the command if its folder is probably a mistake."""
    if out_dir == Path() or out_dir.parts[0].endswith(":"):
        sys.exit(f"--out-dir is {str(out_dir)!r}: expected the name of a folder on this machine")
    for name, is_right in (("stages", Path.is_dir), ("results.json", Path.is_file)):
        if (out_dir / name).exists() and not is_right(out_dir / name):
            sys.exit(f"--out-dir is {out_dir}: {out_dir / name} is in the way of what this command writes there")


def _check_owner(out_dir: Path, command: str) -> None:
    """Ends the command if the folder has the results of another command, which it would overwrite."""
    try:
        results = read_json(out_dir / "results.json")
    except FileNotFoundError:
        return
    except ValueError:
        # A damaged file belongs to no command.
        return
    theirs, ours = _owner_of(results), _owner(command)
    if theirs != ours:
        sys.exit(
            f"--out-dir is {out_dir}: its results.json is of {theirs}, and {ours} would write over it; choose another "
            "folder"
        )


def _owner_of(results: Any) -> str:
    """Returns the command whose results these are."""
    if isinstance(results, dict) and isinstance(results.get("experiment"), str):
        return f"experiments.{results['experiment']}"
    if isinstance(results, dict) and isinstance(results.get("command"), str):
        return _owner(results["command"])
    return "no command of the experiments"


def _owner(command: str) -> str:
    """Returns a command's module, with the experiment whose experts it uses, if it names one."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--experiment", default=DEFAULT_EXPERIMENT)
    try:
        words = shlex.split(command)
        experiment = parser.parse_known_args(words)[0].experiment
    except (ValueError, argparse.ArgumentError):
        return command
    module = next((word for word in words if word.startswith("experiments.")), command)
    return module if experiment == DEFAULT_EXPERIMENT else f"{module} for {experiment}"
