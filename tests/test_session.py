import io
import signal
import subprocess
import sys
import time

import pytest
from rich.console import Console

from experiments.session import INTERRUPTED, exit_on, session
from experiments.stages import DamagedStageError


def test_the_folder_is_made_and_progress_is_given(tmp_path):
    output = io.StringIO()
    with session(tmp_path / "a" / "b", Console(file=output)) as progress:
        assert (tmp_path / "a" / "b").is_dir()
        progress.say("on it")
    assert "on it" in output.getvalue()


@pytest.mark.parametrize("error", [FloatingPointError("a loss of nan"), DamagedStageError("x.json is damaged")])
def test_what_may_stop_the_work_becomes_one_line(error, tmp_path):
    with pytest.raises(SystemExit) as stopped, session(tmp_path, Console(file=io.StringIO())):
        raise error
    assert stopped.value.code == f"{type(error).__name__}: {error}"


def test_an_error_of_the_code_keeps_its_traceback(tmp_path):
    with pytest.raises(ValueError, match="a bug"), session(tmp_path, Console(file=io.StringIO())):
        raise ValueError("a bug")


def test_an_interruption_says_that_finished_stages_are_kept(tmp_path):
    output = io.StringIO()
    (tmp_path / "stage.json").write_text("{}")
    with pytest.raises(SystemExit) as stopped, session(tmp_path, Console(file=output, width=20)):
        raise KeyboardInterrupt
    assert stopped.value.code == INTERRUPTED == 130
    assert f"finished stages are kept in {tmp_path}, the same command goes on" in output.getvalue()


def test_a_folder_that_cannot_be_made_is_refused_before_any_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stopped, session(tmp_path / "file", Console(file=io.StringIO())):
        pytest.fail("the work began")
    assert f"--out-dir is {tmp_path / 'file'}: expected a folder that can be made" in str(stopped.value.code)


def test_other_errors_end_the_command_where_it_says_so():
    with pytest.raises(SystemExit) as stopped, exit_on(ValueError, OSError):
        raise ValueError("radius is 0")
    assert stopped.value.code == "ValueError: radius is 0"
    with pytest.raises(KeyError), exit_on(ValueError, OSError):
        raise KeyError("radius")


def test_a_process_that_is_interrupted_ends_at_once_with_its_status(tmp_path):
    # The interpreter would be torn down under XLA's threads.
    command = [sys.executable, "-m", "experiments.digits", "--out-dir", str(tmp_path / "run")]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert running.stdout is not None
    # It has said what it is going to do, and measures its first steps.
    assert "digits" in running.stdout.readline()
    time.sleep(2)
    running.send_signal(signal.SIGINT)
    said, _ = running.communicate(timeout=60)
    assert running.returncode == INTERRUPTED
    assert "interrupted: " in said


def test_a_folder_that_stays_empty_is_not_left(tmp_path):
    with pytest.raises(SystemExit), session(tmp_path / "run", Console(file=io.StringIO())):
        sys.exit("a bad option")
    assert not (tmp_path / "run").exists()
