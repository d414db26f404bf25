"""The command that compares the experts of a run."""

import pytest

from experiments import digits
from experiments.studies import similarity
from tests.experiments.helpers import TINY


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(digits.PRESETS, "quick", TINY)


@pytest.mark.parametrize("initialization", ["common", "separate"])
def test_a_runs_experts_are_compared_and_advised_on(tiny, tmp_path, initialization):
    words = ["--run-dir", str(tmp_path / "run"), "--out-dir", str(tmp_path / "out"), "--barriers", "2"]
    results = similarity.main([*words, "--initialization", initialization])
    assert [row["module"] for row in results["modules"]] == ["conv1", "conv2", "head", "norm1", "norm2"]
    report = (tmp_path / "out" / "report.md").read_text()
    assert "nan" not in report
    if initialization == "common":
        # Two epochs do not go far.
        assert results["cosine"] > 0.8
        assert "weights are related" in report
        assert all(row["cosine_from_origin"] is not None for row in results["modules"])
    else:
        kernels = [row["cosine"] for row in results["modules"] if row["module"].startswith("conv")]
        assert max(map(abs, kernels)) < 0.3
        assert abs(results["cosine"]) < 0.1
        assert "Align them first" in report
        assert results["aligned_cosine"] > results["cosine"]
    assert results["barriers"].keys() == {"blended statistics", "statistics refreshed"}


@pytest.mark.parametrize(
    ("cosine", "barriers", "message"),
    [
        (0.02, {"blended statistics": [[0.0]]}, "Align them first"),
        (0.88, {}, "Barriers tell"),
        (0.88, {"blended statistics": [[0.0, 0.05]]}, "average them."),
        (0.88, {"blended statistics": [[0.0, 2.0]], "statistics refreshed": [[0.0, 0.05]]}, "refresh the statistics"),
        (0.88, {"blended statistics": [[0.0, 2.0]], "statistics refreshed": [[0.0, 1.0]]}, "Learn free coefficients"),
    ],
)
def test_the_advice_follows_weights_and_barriers(cosine, barriers, message):
    assert message in similarity.advice(cosine, barriers)


@pytest.mark.parametrize("barriers", ["1", "-1"])
def test_a_number_of_barriers_that_cannot_be_is_refused(tiny, tmp_path, barriers, capsys):
    with pytest.raises(SystemExit) as stopped:
        similarity.main(["--out-dir", str(tmp_path / "out"), "--barriers", barriers])
    printed = capsys.readouterr()
    said = " ".join(f"{stopped.value.code} {printed.out} {printed.err}".replace("│", " ").split())
    assert f"barriers is {barriers}; expected 0, or at least 2 experts" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num-experts", "1"], "num_experts is 1; expected at least 2 for this command"),
        (["--run-dir", "out"], "out_dir is out, which is run_dir: expected another folder"),
        (["--run-dir", "a/../out"], "which is run_dir"),
    ],
)
def test_what_cannot_be_compared_or_would_be_written_over_is_refused_before_any_work(
    tiny, tmp_path, words, message, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message):
        similarity.main(["--out-dir", "out", *words])
    assert not list(tmp_path.iterdir())
