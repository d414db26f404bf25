import json

import pytest

from experiments.stages import DamagedStageError, Stages, write_json, write_whole


def test_a_stage_is_done_once_for_what_it_depends_on(tmp_path):
    calls = []

    def compute():
        calls.append(None)
        return {"value": 0.1 + 0.2}

    first = Stages(tmp_path).run("a/b", {"rate": 1e-3}, compute)
    assert Stages(tmp_path).run("a/b", {"rate": 1e-3}, compute) == first
    assert first["value"] == 0.1 + 0.2
    assert len(calls) == 1
    Stages(tmp_path).run("a/b", {"rate": 1e-2}, compute)
    Stages(tmp_path).run("a/c", {"rate": 1e-3}, compute)
    assert len(calls) == 3


def test_a_name_whose_dot_would_begin_a_suffix_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"name is 'radius-0\.1'; expected one without a dot"):
        Stages(tmp_path).run("radius-0.1", {}, dict)


def test_a_stage_that_fails_leaves_nothing_and_is_done_again(tmp_path):
    def fail():
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        Stages(tmp_path).run("a", {}, fail)
    assert Stages(tmp_path).read("a", {}) is None
    assert Stages(tmp_path).run("a", {}, lambda: {"value": 1})["value"] == 1


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


def test_a_damaged_file_is_named_and_not_taken_for_missing(tmp_path):
    stages = Stages(tmp_path)
    stages.write("x", 1, {"a": 1})
    path = stages.path("x", 1).with_suffix(".json")
    path.write_text(path.read_text()[:5])
    with pytest.raises(DamagedStageError, match=rf"{path} is damaged .* delete it"):
        stages.run("x", 1, dict)
