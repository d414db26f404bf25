"""The command that compares the experts of a run."""

import pytest

from experiments.studies import similarity
from tests.experiments.helpers import folder_options


@pytest.mark.parametrize("initialization", ["common", "separate"])
def test_a_runs_experts_are_compared_and_advised_on(tiny, tmp_path, initialization):
    results = similarity.main([*folder_options(tmp_path), "--barriers", "2", "--initialization", initialization])
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
