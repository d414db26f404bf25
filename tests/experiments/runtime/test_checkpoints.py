"""Arrays on disk, whole, and noticed where they are damaged."""

import errno
import logging
import shutil
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.runtime import checkpoints
from experiments.runtime.stages import DamagedStageError
from tests.experiments.helpers import flip

# Where one array is damaged, orbax may fail before it waits for the task of another.
pytestmark = pytest.mark.filterwarnings("ignore:coroutine 'Store.* was never awaited:RuntimeWarning")

TREE = {"a": jnp.arange(5000.0).reshape(50, 100), "b": {"c": jnp.arange(3)}}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoints") / "kept"
    return path, checkpoints.save(path, TREE)


@pytest.fixture
def copied(saved, tmp_path):
    return shutil.copytree(saved[0], tmp_path / "kept")


@pytest.mark.parametrize("name", ["plain", "lr=[1e-3]", "a[bold]c", "a\\b", "[/b]", "50 %?*"])
def test_what_is_saved_is_loaded_whatever_the_folders_name(name, tmp_path):
    path = tmp_path / name / "run" / "0-abc"
    expected = checkpoints.save(path, TREE)
    loaded = checkpoints.load(path, TREE, expected=expected)
    assert jax.tree.all(jax.tree.map(np.array_equal, loaded, TREE))
    # Also over what is there.
    checkpoints.save(path, TREE)
    assert [left.name for left in path.parent.iterdir()] == ["0-abc"]


def cut(folder):
    for path in folder.rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def remove(pattern):
    def damage(folder):
        for path in folder.rglob(pattern):
            path.unlink() if path.is_file() else shutil.rmtree(path)

    return damage


@pytest.mark.parametrize(
    "damage",
    [flip, cut, remove("*METADATA*"), remove("d"), remove("manifest.ocdbt"), remove("*"), shutil.rmtree],
)
def test_damage_is_told_in_one_line_with_the_way_out(damage, saved, copied):
    damage(copied)
    with pytest.raises(DamagedStageError, match=f"{copied} is damaged .*delete it, and its stage") as caught:
        checkpoints.load(copied, TREE, expected=saved[1])
    assert len(str(caught.value).splitlines()) == 1


def test_what_tasks_log_after_a_failure_is_not_shown(saved, copied, caplog, monkeypatch):
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels = [logger.level for logger in loggers]
    checkpoints.load(copied, TREE, expected=saved[1])
    assert [logger.level for logger in loggers] == levels
    remove("d")(copied)
    with pytest.raises(DamagedStageError):
        checkpoints.load(copied, TREE, expected=saved[1])
    # As asyncio does when a task is collected whose error nobody asked for.
    logging.getLogger("asyncio").error("Task exception was never retrieved")
    assert not caplog.records
    # As tensorstore's threads do when a write ends after the failure.
    passed_on = []
    monkeypatch.setattr("sys.unraisablehook", passed_on.append)
    with pytest.raises(DamagedStageError):
        checkpoints.load(copied, TREE, expected=saved[1])
    for error in (RuntimeError("Event loop is closed"), RuntimeError("another")):
        sys.unraisablehook(SimpleNamespace(exc_value=error))  # pyright: ignore[reportArgumentType]
    assert [str(each.exc_value) for each in passed_on] == ["another"]
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


def test_other_arrays_of_the_same_shapes_are_damage(saved, copied):
    checkpoints.save(copied, jax.tree.map(lambda leaf: leaf + 1, TREE))
    with pytest.raises(DamagedStageError, match="its arrays are not what was written"):
        checkpoints.load(copied, TREE, expected=saved[1])


def test_the_checksum_is_of_paths_shapes_dtypes_and_numbers():
    trees = [
        {"a": jnp.zeros(4)},
        {"b": jnp.zeros(4)},
        {"a": jnp.zeros((2, 2))},
        {"a": jnp.zeros(4, jnp.int32)},
        {"a": jnp.zeros(4).at[3].set(1e-30)},
    ]
    assert len({checkpoints.checksum(tree) for tree in trees}) == len(trees)
    assert checkpoints.checksum({"a": jnp.zeros(4)}) == checkpoints.checksum({"a": np.zeros(4, np.float32)})


@pytest.mark.parametrize(
    "error",
    [
        ValueError("RESOURCE_EXHAUSTED: Failed writing: No space left on device [os_error_code='28']"),
        OSError(errno.ENOSPC, "No space left on device"),
    ],
)
def test_a_full_disk_is_an_error_of_the_system_and_leaves_no_half(error, tmp_path, monkeypatch):
    def full(path, tree, **_):
        (tmp_path / "0-abc.orbax-checkpoint-tmp").mkdir()
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.ocp, "save", full)
        with pytest.raises(OSError, match="No space left on device") as caught:
            checkpoints.save(tmp_path / "0-abc", TREE)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "0-abc"))
    assert not list(tmp_path.iterdir())
    # With room again.
    checkpoints.load(tmp_path / "0-abc", TREE, expected=checkpoints.save(tmp_path / "0-abc", TREE))
