"""The study of LoRA adapters has a row for each blend."""

import json

import numpy as np
import pytest

from experiments.studies import adapters


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_a_small_run_reports_every_blend(tmp_path):
    pytest.importorskip("torch", reason="the study's base is a network of PyTorch")
    pytest.importorskip("peft", reason="PEFT trains the study's adapters")
    words = ["--seeds", "0", "--base-steps", "20", "--adapter-steps", "10", "--learning-steps", "5"]
    results = adapters.main([*words, "--out-dir", str(tmp_path)])
    names = [row["adapter"] for row in results["rows"]]
    assert len(names) == len(set(names)) == 6
    assert all(np.isfinite(row["losses"]).all() and len(row["losses"]) == 1 for row in results["rows"])
    losses = {row["adapter"]: row["losses"][0] for row in results["rows"]}
    assert losses["learned coefficients"] < losses["average of the products"]
    kept = json.loads((tmp_path / "results.json").read_text())
    assert adapters.present(kept).markdown == (tmp_path / "report.md").read_text()
