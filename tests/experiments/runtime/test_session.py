import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
from rich.console import Console

from experiments.runtime.session import INTERRUPTED, exit_on, session
from experiments.runtime.stages import DamagedStageError

COMMAND = "python -m experiments.digits"


def opened(out_dir, command=COMMAND):
    return session(out_dir, Console(file=io.StringIO()), command)


def test_the_folder_is_made_and_progress_is_given(tmp_path):
    output = io.StringIO()
    with session(tmp_path / "a" / "b", Console(file=output), COMMAND) as progress:
        assert (tmp_path / "a" / "b").is_dir()
        progress.say("on it")
    assert "on it" in output.getvalue()


@pytest.mark.parametrize("error", [FloatingPointError("a loss of nan"), DamagedStageError(Path("x.json"), "cut")])
def test_what_may_stop_the_work_becomes_one_line(error, tmp_path):
    with pytest.raises(SystemExit) as stopped, opened(tmp_path):
        raise error
    assert stopped.value.code == f"{type(error).__name__}: {error}"


def test_an_error_of_the_code_keeps_its_traceback(tmp_path):
    with pytest.raises(ValueError, match="a bug"), opened(tmp_path):
        raise ValueError("a bug")


def test_an_interruption_says_that_finished_stages_are_kept(tmp_path):
    output = io.StringIO()
    (tmp_path / "stage.json").write_text("{}")
    with pytest.raises(SystemExit) as stopped, session(tmp_path, Console(file=output, width=20), COMMAND):
        raise KeyboardInterrupt
    assert stopped.value.code == INTERRUPTED == 130
    assert f"finished stages are kept in {tmp_path}, the same command goes on" in output.getvalue()


def test_a_folder_that_cannot_be_made_is_refused_before_any_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stopped, opened(tmp_path / "file"):
        pytest.fail("the work began")
    assert f"--out-dir is {tmp_path / 'file'}: expected a folder that can be made" in str(stopped.value.code)


def test_other_errors_end_the_command_where_it_says_so():
    with pytest.raises(SystemExit) as stopped, exit_on(ValueError, OSError):
        raise ValueError("radius is 0")
    assert stopped.value.code == "ValueError: radius is 0"
    with pytest.raises(KeyError), exit_on(ValueError, OSError):
        raise KeyError("radius")


@pytest.mark.usefixtures("interruptions")
def test_a_process_that_is_interrupted_ends_at_once_with_its_status(tmp_path):
    # The interpreter would be torn down under XLA's threads.
    command = [sys.executable, "-m", "experiments.digits", "--out-dir", str(tmp_path / "run")]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert running.stdout is not None
    # It has said what it is going to do, and measures its first steps.
    assert "digits" in running.stdout.readline()
    time.sleep(2)
    running.send_signal(signal.SIGINT)
    said, _ = running.communicate(timeout=300)
    assert running.returncode == INTERRUPTED
    assert "interrupted: " in said


def test_a_folder_that_stays_empty_is_not_left(tmp_path):
    with pytest.raises(SystemExit), opened(tmp_path / "run"):
        sys.exit("a bad option")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("out_dir", ["", "gs://bucket/run", "file:///run"])
def test_a_folder_that_was_hardly_meant_is_refused(out_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"--out-dir is .*: expected the name of a folder"), opened(Path(out_dir)):
        pytest.fail("the work began")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "make"), [("stages", Path.touch), ("results.json", Path.mkdir)])
def test_what_is_in_the_way_is_named_before_any_work(name, make, tmp_path):
    make(tmp_path / name)
    with pytest.raises(SystemExit, match=f"{tmp_path / name} is in the way"), opened(tmp_path):
        pytest.fail("the work began")


def test_a_folder_that_cannot_be_written_is_refused_before_any_work(tmp_path, monkeypatch):
    # The user who runs the tests may be allowed to write anywhere.
    def read_only(*_):
        raise OSError(errno.EROFS, "Read-only file system", "x")

    monkeypatch.setattr("filelock.FileLock.acquire", read_only)
    said = r"expected a folder that can be made and written .*Read-only"
    with pytest.raises(SystemExit, match=said), opened(tmp_path):
        pytest.fail("the work began")


@pytest.mark.parametrize(
    ("results", "command", "whose"),
    [
        ({"experiment": "cifar10"}, COMMAND, "experiments.cifar10"),
        ({"experiment": "digits"}, "python -m experiments.studies.similarity --out-dir x", "experiments.digits"),
        ({"command": "python -m experiments.studies.ablation --epochs 1"}, COMMAND, "experiments.studies.ablation"),
        (
            {"command": "python -m experiments.studies.similarity --experiment=svhn"},
            "python -m experiments.studies.similarity --barriers 0",
            "experiments.studies.similarity for svhn",
        ),
        ({"a": 1}, COMMAND, "no command of the experiments"),
        ([1], COMMAND, "no command of the experiments"),
    ],
)
def test_another_commands_results_are_not_written_over(results, command, whose, tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(results))
    said = f"its results.json is of {whose}, and .* choose another folder"
    with pytest.raises(SystemExit, match=said), opened(tmp_path, command):
        pytest.fail("the work began")
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    assert json.loads((tmp_path / "results.json").read_text()) == results


@pytest.mark.parametrize(
    ("content", "command"),
    [
        ('{"experiment": "digits", "title": "of another setting"}', COMMAND),
        ('{"command": "python -m experiments.studies.cost"}', "python -m experiments.studies.cost --networks vit"),
        (
            '{"command": "python -m experiments.studies.ablation --experiment svhn --epochs 3"}',
            "python -m experiments.studies.ablation --experiment svhn",
        ),
        ('{"experiment": "dig', COMMAND),
    ],
)
def test_a_commands_own_results_and_damaged_ones_may_be_written_over(content, command, tmp_path):
    (tmp_path / "results.json").write_text(content)
    with opened(tmp_path, command):
        pass


def test_two_commands_at_once_in_one_folder_are_refused_with_the_process_that_holds_it(tmp_path):
    said = f"LockedError: process {os.getpid()} works in {tmp_path}"
    with opened(tmp_path), pytest.raises(SystemExit, match=said), opened(tmp_path):
        pytest.fail("the work began")
    with opened(tmp_path):
        pass


def test_a_full_disk_ends_with_one_line_and_what_was_finished_is_kept(tmp_path):
    (tmp_path / "stage.json").write_text("{}")
    with pytest.raises(SystemExit, match=f"no space is left to write into {tmp_path}: "), opened(tmp_path):
        # As Python raises it for an open file.
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(SystemExit) as stopped, opened(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "x"))
    said = str(stopped.value.code)
    assert f"no space is left to write {tmp_path / 'x'}: make room, and give the same command again" in said
    assert f"finished stages are kept in {tmp_path}" in said


def test_a_platform_that_is_not_there_ends_with_one_line_before_any_work(tmp_path, monkeypatch):
    def fail():
        raise AssertionError

    monkeypatch.setattr(jax, "devices", fail)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    said = r"JAX finds no device \(AssertionError: \); JAX_PLATFORMS is 'cuda'"
    with pytest.raises(SystemExit, match=said), opened(tmp_path / "run"):
        pytest.fail("the work began")
    assert not list(tmp_path.iterdir())


def test_too_little_memory_ends_with_one_line_and_other_errors_of_the_device_do_not(tmp_path):
    with pytest.raises(SystemExit) as stopped, opened(tmp_path):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes.\nBuffers: ...")
    said = (
        "the device's memory is too small for this (RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes.); no stage"
    )
    assert str(stopped.value.code).startswith(said)
    with pytest.raises(jax.errors.JaxRuntimeError), opened(tmp_path):
        raise jax.errors.JaxRuntimeError("INTERNAL: a bug")


def test_what_a_killed_process_left_half_written_is_removed(tmp_path):
    (tmp_path / "stages").mkdir()
    # The largest number that a process can have is below it.
    (tmp_path / "stages" / f".x.{2**22 + 1}.new.json").write_text("{")
    alive = tmp_path / f".y.{os.getpid()}.new.json"
    alive.write_text("{")
    with opened(tmp_path):
        pass
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [alive]
