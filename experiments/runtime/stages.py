"""The stages of a run. Their results are kept on disk, so no stage is done twice."""

import contextlib
import glob
import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from experiments.runtime.locks import locked
from experiments.runtime.progress import Stage


class DamagedStageError(RuntimeError):
    """The file or folder of a stage does not hold what was written."""

    def __init__(self, path: Path, why: object):
        """Says what is damaged, why, and what to do."""
        super().__init__(f"{path} is damaged ({why}); delete it, and its stage is done again")


class Stages:
    """The results of stages, under one folder.

    A result is filed under the name of its stage and a fingerprint of all that it depends on: the settings, the data,
    and the source that computes it (`experiments.runtime.sources`). So an interrupted run continues, and a repeated run
    has nothing to do. If a setting or the source changes, the stages that depend on it are done anew, and the old
    results stay.
    """

    def __init__(self, folder: Path, accept: Collection[str] = (), say: Callable[[str], object] = print):
        """Keeps results under a folder.

        Args:
            folder: the folder.
            accept: kinds of stages, for example `experts`. The kind is the first part of a stage's name. A result of
                such a stage with the same settings and data is taken even if other source computed it. It is then filed
                as this source's.
            say: a function that is called with a line about each such stage.
        """
        self._folder, self._accept, self._say = folder, accept, say

    def path(self, name: str, depends_on: Mapping[str, Any]) -> Path:
        """Returns the place of a stage's result, without a suffix.

        Args:
            name: the name of the stage. It may contain slashes. It may not contain dots, because a suffix begins with a
                dot.
            depends_on: anything that JSON holds. Its `code` is the digest of the source that computes the stage.

        Raises:
            ValueError: if the name has a dot, or if `depends_on` has no `code`.
        """
        if "." in name:
            raise ValueError(f"name is {name!r}; expected one without a dot, where a suffix would begin")
        if "code" not in depends_on:
            raise ValueError(
                f"depends_on of {name!r} has {list(depends_on)}; expected 'code', the digest of its source"
            )
        return self._folder / f"{name}-{_fingerprint(depends_on)}"

    def read(self, name: str, depends_on: Mapping[str, Any]) -> dict[str, Any] | None:
        """Returns the result of a stage, or None if it is not done.

        Raises:
            DamagedStageError: if the file does not hold what `write` wrote there.
        """
        path = self.path(name, depends_on).with_suffix(".json")
        if not path.exists() and not self._carry_over(name, depends_on):
            return None
        stage, result = _unsealed(path)
        if stage != _stage(name, depends_on):
            raise DamagedStageError(path, "it is the result of another stage")
        return result

    def write(self, name: str, depends_on: Mapping[str, Any], result: dict[str, Any]) -> dict[str, Any]:
        """Keeps the result of a stage, a dict that JSON holds, with finite numbers. Returns it with its `machine`."""
        result = {"machine": machine(), **result}
        write_json(self.path(name, depends_on).with_suffix(".json"), _sealed(_stage(name, depends_on), result))
        return result

    def run(
        self,
        name: str,
        depends_on: Mapping[str, Any],
        compute: Callable[[], dict[str, Any]],
        bar: Stage | None = None,
        units: int = 0,
    ) -> dict[str, Any]:
        """Returns the result of a stage with its `seconds` and its `machine`. It is read from disk if it is done.

        Then its units are taken off the bar.
        """
        if (done := self.read(name, depends_on)) is not None:
            if bar:
                bar.skip(units)
            return done
        start = time.perf_counter()
        with naming(name):
            result = compute()
        return self.write(name, depends_on, {**result, "seconds": time.perf_counter() - start})

    def is_of_other_source(self, name: str, depends_on: Mapping[str, Any]) -> bool:
        """Returns whether this source has not done a stage, but other source has, with the same settings and data."""
        path = self.path(name, depends_on).with_suffix(".json")
        return not path.exists() and self._of_other_source(name, depends_on) is not None

    def lock(self) -> contextlib.AbstractContextManager[None]:
        """Keeps the folder for this process while it does work that several commands may need."""
        return locked(self._folder)

    def _carry_over(self, name: str, depends_on: Mapping[str, Any]) -> bool:
        """Files what other source computed as this source's, with the folder beside it, if that is accepted."""
        if name.partition("/")[0] not in self._accept or (found := self._of_other_source(name, depends_on)) is None:
            return False
        old, result = found
        new = self.path(name, depends_on)
        if old.with_suffix("").is_dir():
            # A folder without a result is left by a run that was killed.
            shutil.rmtree(new, ignore_errors=True)
            os.replace(old.with_suffix(""), new)
        write_json(new.with_suffix(".json"), _sealed(_stage(name, depends_on), result))
        old.unlink()
        self._say(f"{name}: {old.stem}, computed by other source, is taken for this source's")
        return True

    def _of_other_source(self, name: str, depends_on: Mapping[str, Any]) -> tuple[Path, dict[str, Any]] | None:
        """The newest file of this stage that other source wrote, and its result."""
        stage, path = _stage(name, depends_on), self.path(name, depends_on)
        pattern = f"{glob.escape(name.rpartition('/')[2])}-{'?' * 12}.json"
        for old in sorted(path.parent.glob(pattern), key=lambda each: each.stat().st_mtime, reverse=True):
            with contextlib.suppress(DamagedStageError):
                found, result = _unsealed(old)
                if _without_code(found["depends_on"]) == _without_code(stage["depends_on"]):
                    return old, result
        return None


def machine() -> str:
    """Returns the device that this process computes on, and the versions of JAX and Python."""
    devices = jax.devices()
    if devices[0].platform == "cpu":
        # The cores that this process may use, if the system says so.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        kind = f"{cores} CPU core{'s' if cores != 1 else ''}"
    else:
        kind = f"{len(devices)} x {devices[0].device_kind}"
    return f"{kind}, JAX {jax.__version__}, Python {platform.python_version()}"


@contextlib.contextmanager
def naming(stage: str) -> Iterator[None]:
    """Adds the name of the stage to an error about a loss that is not finite."""
    try:
        yield
    except FloatingPointError as error:
        raise FloatingPointError(f"{stage}: {error}; the stages that were finished before are kept") from error


@contextlib.contextmanager
def reading(path: Path, way_out: str) -> Iterator[None]:
    """Names a file that does not hold what this project writes there, where its content cannot be used.

    Args:
        path: the file.
        way_out: what the user can do.

    Raises:
        ValueError: in place of the error that the content raised.
    """
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        why = f"it has no {error}" if isinstance(error, KeyError) else f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{path} is damaged, or another program wrote it ({' '.join(why.split())}); {way_out}"
        ) from error


def read_json(path: Path) -> Any:
    """Returns the content of a JSON file.

    Raises:
        ValueError: if the file is not JSON, or has a number that is not finite.
    """

    def refuse(word: str) -> None:
        raise ValueError(f"it has {word}, which is no number")

    return json.loads(path.read_bytes(), parse_constant=refuse)


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file, whole or not at all. Refuses numbers that are not finite."""
    write_whole(path, lambda temporary: temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n"))


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` make a file beside `path`, and then moves it there.

    Args:
        path: the file. Its parents are made.
        write: a function that writes a file. It is called with another path with the same suffix, where no other
            process writes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.new{path.suffix}")
    # A link there is not followed.
    temporary.unlink(missing_ok=True)
    try:
        write(temporary)
        os.replace(temporary, path)
    except OSError as error:
        # Python names no file if the disk is full.
        error.filename = error.filename or str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Removes the temporary files below a folder that killed processes left in `write_whole`."""
    for left in folder.rglob(".*.new.*"):
        pid = left.name.split(".")[-3]
        if pid.isdigit() and not _is_alive(int(pid)):
            left.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    """Whether there is such a process."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _fingerprint(depends_on: Mapping[str, Any]) -> str:
    """12 hexadecimal digits."""
    return hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:12]


def _stage(name: str, depends_on: Mapping[str, Any]) -> dict[str, Any]:
    """What identifies a stage, as JSON gives it back."""
    return {"name": name, "depends_on": json.loads(json.dumps(depends_on))}


def _without_code(depends_on: Mapping[str, Any]) -> dict[str, Any]:
    """The settings and the data alone."""
    return {key: value for key, value in depends_on.items() if key != "code"}


def _sealed(stage: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """What a stage's file holds."""
    return {"stage": stage, "result": result, "digest": _digest(stage, result)}


def _unsealed(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The stage and the result in a stage's file."""
    try:
        content = read_json(path)
    except (ValueError, RecursionError, IsADirectoryError) as error:
        raise DamagedStageError(path, error) from error
    if not isinstance(content, dict) or content.keys() != {"stage", "result", "digest"}:
        raise DamagedStageError(path, "it is not what a stage writes")
    if content["digest"] != _digest(content["stage"], content["result"]):
        raise DamagedStageError(path, "its content is not what was written: their digests differ")
    return content["stage"], content["result"]


def _digest(stage: Any, result: Any) -> str:
    """The digest of all that a stage's file holds."""
    return hashlib.sha256(json.dumps([stage, result], sort_keys=True).encode()).hexdigest()
