"""Learning with many radii and with calibrated ones, at a tiny scale."""

import pytest

from experiments.studies import calibration
from tests.experiments.helpers import TINY, check_report, folder_options


@pytest.fixture
def few(tiny, monkeypatch):
    monkeypatch.setattr(calibration, "FACTORS", (1.0, 100.0))
    monkeypatch.setattr(calibration, "GUESSES", (1e4,))


def test_a_command_line_comes_to_its_report_and_has_nothing_to_do_again(few, tmp_path, monkeypatch):
    words = folder_options(tmp_path)
    results = calibration.main(words)
    assert [(row["way"], row["radius"]) for row in results["rows"]][:2] == [("sweep", 0.01), ("sweep", 1.0)]
    calibrated = results["rows"][2]
    assert calibrated["way"] == "calibrated from 100"
    # Three decades to either side of the guess, and far below it.
    assert 0.1 <= calibrated["radius"] <= 10
    assert all(row["steps"] == TINY.alpha_steps for row in results["rows"])
    report = check_report(tmp_path / "out", results, "calibration.png")
    assert "| calibrated from 100 |" in report
    monkeypatch.setattr(calibration, "_learn", lambda *_: pytest.fail("learned again"))
    assert calibration.main(words)["rows"] == results["rows"]


def test_a_loss_is_compared_with_the_best_radius_of_the_sweep():
    rows = [
        {"way": "sweep", "radius": 0.1, "loss": 1.0},
        {"way": "sweep", "radius": 0.1, "loss": 3.0},
        {"way": "sweep", "radius": 1.0, "loss": 5.0},
        {"way": "calibrated from 10", "radius": 0.3, "loss": 2.0},
        {"way": "calibrated from 10", "radius": 0.2, "loss": 2.04},
    ]
    _, cells = calibration.table([{**row, "steps": 7} for row in rows])
    assert [row[2] for row in cells] == ["+0.0 %", "+150.0 %", "+1.0 %"]
    assert cells[2][3:] == ["7", "0.3, 0.2"]


def test_radii_that_are_rounded_away_end_the_command_in_one_line(few, tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "FACTORS", ())
    with pytest.raises(SystemExit) as stopped:
        calibration.main([*folder_options(tmp_path), "--radius", "1e-20"])
    said = str(stopped.value.code)
    assert said.startswith("FloatingPointError: calibration/guess0-seed0: --radius is 1e-20, and no radius within")
    assert len(said.splitlines()) == 1
