"""The stages of a run, kept on disk, so that none is done twice."""

import contextlib
import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax


class DamagedStageError(RuntimeError):
    """A stage's file that cannot be read."""


class Stages:
    """Results of stages under one folder.

    A result is filed under its stage's name and a fingerprint of all that it depends on: a run that was interrupted
    goes on, one that is repeated has nothing to do, and one with another setting does anew just what the setting
    touches, beside the old results.
    """

    def __init__(self, folder: Path):
        """Keeps results under `folder`."""
        self._folder = folder

    def path(self, name: str, depends_on: Any) -> Path:
        """Returns the place of a stage's result, without a suffix.

        Args:
            name: of the stage; may contain slashes, and no dots, where a suffix would begin.
            depends_on: anything that JSON holds.

        Raises:
            ValueError: a name with a dot.
        """
        if "." in name:
            raise ValueError(f"name is {name!r}; expected one without a dot, where a suffix would begin")
        text = json.dumps(depends_on, sort_keys=True)
        return self._folder / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    def read(self, name: str, depends_on: Any) -> dict[str, Any] | None:
        """Returns a stage's result, or None where it is not done.

        Raises:
            DamagedStageError: a file that holds no JSON.
        """
        path = self.path(name, depends_on).with_suffix(".json")
        try:
            return json.loads(path.read_text()) if path.exists() else None
        except ValueError as error:
            raise DamagedStageError(f"{path} is damaged ({error}); delete it, and its stage is done again") from error

    def write(self, name: str, depends_on: Any, result: dict[str, Any]) -> dict[str, Any]:
        """Keeps a stage's result, a dict that JSON holds, with finite numbers alone; returns it with its `machine`."""
        result = {**result, "machine": machine()}
        write_json(self.path(name, depends_on).with_suffix(".json"), result)
        return result

    def run(self, name: str, depends_on: Any, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Returns a stage's result, with its `seconds` and its `machine`, from disk where it is done."""
        if (done := self.read(name, depends_on)) is not None:
            return done
        start = time.perf_counter()
        with naming(name):
            result = compute()
        return self.write(name, depends_on, {**result, "seconds": time.perf_counter() - start})


def machine() -> str:
    """Returns what this process computes on."""
    devices = jax.devices()
    if devices[0].platform == "cpu":
        # What this process may use, where the system says.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        kind = f"{cores} CPU core{'s' if cores != 1 else ''}"
    else:
        kind = f"{len(devices)} x {devices[0].device_kind}"
    return f"{kind}, JAX {jax.__version__}, Python {platform.python_version()}"


@contextlib.contextmanager
def naming(stage: str) -> Iterator[None]:
    """Says which stage a loss that is not finite stopped."""
    try:
        yield
    except FloatingPointError as error:
        raise FloatingPointError(f"{stage}: {error}; the stages that were finished before are kept") from error


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file, whole or not at all; refuses numbers that are not finite."""
    write_whole(path, lambda temporary: temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n"))


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` make a file beside `path`, and then moves it there.

    Args:
        path: the file; its parents are made.
        write: writes the path that it is given, which has the same suffix.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.new{path.suffix}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
