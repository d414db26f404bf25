"""A folder that one process at a time works in."""

import os
import signal
import subprocess
import sys

import pytest

from experiments.runtime.locks import LockedError, locked

HOLD = """
import sys, time
from pathlib import Path
from experiments.runtime.locks import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_another_process_is_named_and_a_killed_one_gives_the_folder_back(tmp_path):
    folder = tmp_path / "run"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        for _ in range(2):
            said = f"process {holder.pid} works in {folder}: wait until it ends"
            with pytest.raises(LockedError, match=said), locked(folder):
                pytest.fail("two at once")
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    with locked(folder):
        assert (folder / ".lock").read_text() == f"{os.getpid()}\n"
        (folder / "result").touch()
    assert [path.name for path in folder.iterdir()] == ["result"]


def test_a_folder_that_stays_empty_is_not_left(tmp_path):
    with locked(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
    assert not (tmp_path / "a" / "b").exists()


def test_a_folder_that_cannot_be_made_is_an_error_of_the_system(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError), locked(tmp_path / "file" / "run"):
        pass
