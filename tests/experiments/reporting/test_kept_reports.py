"""Each report that is kept is what this code makes of the results beside it."""

import json

import pytest

from experiments import report
from experiments.reporting import run_report
from experiments.studies import calibration, numerics
from experiments.studies.ablation import ablation_report
from experiments.studies.cost import cost_report
from experiments.studies.variance import variance_report
from tests.helpers import ROOT

RESULTS = ROOT / "experiments" / "results"
FOLDERS = [path.parent for path in sorted(RESULTS.glob("*/results.json"))]
STUDIES = {
    "ablation": ablation_report,
    "calibration": calibration,
    "cost": cost_report,
    "numerics": numerics,
    "variance": variance_report,
}
# The runs of the page, in its order.
PAGE = ("cifar10", "mobilenetv2", "imagenette")


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_kept_report_is_that_of_its_results(folder):
    of_a_run = (folder / "config.json").exists()
    module = run_report if of_a_run else STUDIES[folder.name.partition("-")[0]]
    results = json.loads((folder / "results.json").read_text())
    assert (folder / "report.md").read_text() == module._markdown(results)


def test_the_kept_page_is_that_of_its_runs(tmp_path):
    report.write([report.read(RESULTS / name) for name in PAGE], tmp_path)
    assert (RESULTS / "page" / "report.md").read_text() == (tmp_path / "report.md").read_text()


def test_every_kept_report_has_its_pictures():
    for path in RESULTS.glob("*/report.md"):
        for line in path.read_text().splitlines():
            if line.startswith("!["):
                assert (path.parent / line.rpartition("(")[2].rstrip(")")).is_file(), line
