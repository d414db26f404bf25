import json
import subprocess
import sys

import pytest

from experiments.runtime.stages import DamagedStageError, Stages, write_json, write_whole

ANY = {"code": "x"}


def test_a_stage_is_done_once_for_what_it_depends_on(tmp_path):
    calls = []

    def compute():
        calls.append(None)
        return {"value": 0.1 + 0.2}

    first = Stages(tmp_path).run("a/b", {"rate": 1e-3, "code": "x"}, compute)
    assert Stages(tmp_path).run("a/b", {"rate": 1e-3, "code": "x"}, compute) == first
    assert first["value"] == 0.1 + 0.2
    assert len(calls) == 1
    Stages(tmp_path).run("a/b", {"rate": 1e-2, "code": "x"}, compute)
    Stages(tmp_path).run("a/c", {"rate": 1e-3, "code": "x"}, compute)
    assert len(calls) == 3


def test_a_name_whose_dot_would_begin_a_suffix_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"name is 'radius-0\.1'; expected one without a dot"):
        Stages(tmp_path).run("radius-0.1", ANY, dict)


def test_a_stage_that_fails_leaves_nothing_and_is_done_again(tmp_path):
    def fail():
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        Stages(tmp_path).run("a", ANY, fail)
    assert Stages(tmp_path).read("a", ANY) is None
    assert Stages(tmp_path).run("a", ANY, lambda: {"value": 1})["value"] == 1


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})

    def half(temporary):
        temporary.write_text("{")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError):
        write_whole(path, half)
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_numbers_that_are_not_finite_are_refused(tmp_path):
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "x.json", {"a": float("nan")})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "content",
    [
        "",
        '{"stage": {"na',
        "null",
        "[1, 2]",
        "{}",
        '"high"',
        '{"stage": {}, "result": {"a": NaN}, "digest": ""}',
        b"\xff\xfe\x00",
    ],
)
def test_a_damaged_file_is_named_and_not_taken_for_missing(content, tmp_path):
    stages = Stages(tmp_path)
    stages.write("x", ANY, {"a": 1})
    path = stages.path("x", ANY).with_suffix(".json")
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DamagedStageError, match=rf"{path} is damaged .* delete it, and its stage is done again"):
        stages.run("x", ANY, dict)
    path.unlink()
    assert stages.run("x", ANY, lambda: {"a": 2})["a"] == 2


@pytest.mark.parametrize(
    "change", [{"alpha": [0.5]}, {"alpha": [0.25, 0.75]}, {"alpha": "high"}, {}, {"alpha": [0.5, 0.5], "more": 1}]
)
def test_a_result_that_was_changed_is_damaged(change, tmp_path):
    stages = Stages(tmp_path)
    stages.write("x", ANY, {"alpha": [0.5, 0.5]})
    path = stages.path("x", ANY).with_suffix(".json")
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "result": change}))
    with pytest.raises(DamagedStageError, match="its content is not what was written"):
        stages.read("x", ANY)


def test_another_stages_file_in_its_place_is_damage_and_so_is_a_folder(tmp_path):
    stages = Stages(tmp_path)
    stages.write("x", ANY, {"a": 1})
    stages.write("y", ANY, {"a": 1})
    path = stages.path("x", ANY).with_suffix(".json")
    path.write_bytes(stages.path("y", ANY).with_suffix(".json").read_bytes())
    with pytest.raises(DamagedStageError, match="it is the result of another stage"):
        stages.read("x", ANY)
    path.unlink()
    path.mkdir()
    with pytest.raises(DamagedStageError, match="is damaged"):
        stages.read("x", ANY)


def test_what_does_not_say_its_source_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"depends_on of 'x' has \['rate'\]; expected 'code'"):
        Stages(tmp_path).read("x", {"rate": 1})


OLD, NEW = {"rate": 1, "code": "old"}, {"rate": 1, "code": "new"}


def test_other_source_does_a_stage_anew_beside_the_old_one(tmp_path):
    stages = Stages(tmp_path)
    stages.write("x/a", OLD, {"value": 1})
    assert stages.read("x/a", NEW) is None
    assert stages.is_of_other_source("x/a", NEW)
    assert stages.run("x/a", NEW, lambda: {"value": 2})["value"] == 2
    assert not stages.is_of_other_source("x/a", NEW)
    kept = stages.read("x/a", OLD)
    assert kept is not None
    assert kept["value"] == 1


def test_what_other_source_computed_is_taken_where_it_is_accepted_and_named(tmp_path):
    Stages(tmp_path).write("x/a", OLD, {"value": 1, "machine": "there"})
    Stages(tmp_path).write("x/b", OLD, {"value": 2})
    (Stages(tmp_path).path("x/a", OLD)).mkdir()
    (Stages(tmp_path).path("x/a", OLD) / "array").write_text("3")
    said = []
    accepting = Stages(tmp_path, ["x"], said.append)
    assert accepting.read("x/a", NEW) == {"value": 1, "machine": "there"}
    assert len(said) == 1
    assert said[0].startswith("x/a: a-")
    assert (accepting.path("x/a", NEW) / "array").read_text() == "3"
    # It is the new source's from now on.
    assert Stages(tmp_path).read("x/a", NEW) == {"value": 1, "machine": "there"}
    assert Stages(tmp_path).read("x/a", OLD) is None
    # Neither another setting nor another kind is.
    assert accepting.read("x/b", {**NEW, "rate": 2}) is None
    assert Stages(tmp_path, ["y"], said.append).read("x/b", NEW) is None


def test_two_processes_write_one_file_by_names_of_their_own(tmp_path):
    program = f"""
from pathlib import Path
from experiments.runtime.stages import write_json
for _ in range(300):
    write_json(Path({str(tmp_path / "x.json")!r}), list(range(2000)))
"""
    running = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(2)]
    while any(process.poll() is None for process in running):
        if (tmp_path / "x.json").exists():
            assert len(json.loads((tmp_path / "x.json").read_text())) == 2000
    assert [process.returncode for process in running] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
