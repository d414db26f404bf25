"""The kept reports are those that the code makes of the kept results."""

import json
import shutil
from pathlib import Path

import pytest

import experiments
from experiments import report, rewrite

RESULTS = Path(experiments.__file__).parent / "results"
KEPT = sorted(path.parent for path in RESULTS.glob("*/results.json"))
# In the order of the page's panels.
ON_THE_PAGE = [RESULTS / name for name in ("cifar10", "mobilenetv2", "imagenette")]


@pytest.mark.parametrize("folder", KEPT, ids=lambda folder: folder.name)
def test_a_kept_report_is_the_one_of_its_results(folder):
    made = rewrite.present(folder)
    assert (folder / "report.md").read_text() == made.markdown
    assert "nan" not in made.markdown
    assert {path.name for path in folder.glob("*.png")} == made.figures.keys()


def test_the_kept_page_is_the_one_of_its_runs(tmp_path):
    report.main([*map(str, ON_THE_PAGE), "--out-dir", str(tmp_path)])
    assert (RESULTS / "page" / "report.md").read_text() == (tmp_path / "report.md").read_text()


def test_reports_and_pictures_are_written_anew_and_results_are_not_touched(tmp_path, capsys):
    shutil.copy(RESULTS / "digits" / "results.json", tmp_path)
    before = (tmp_path / "results.json").stat().st_mtime_ns
    rewrite.main([str(tmp_path), str(RESULTS / "page")])
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "report.md", "figure1.png", "alpha.png"}
    assert (tmp_path / "results.json").stat().st_mtime_ns == before
    assert capsys.readouterr().out == f"report: {tmp_path / 'report.md'}\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "Expecting"),
        ("[]", "list indices"),
        ("{}", "it has no 'command'"),
        (json.dumps({"command": "python -m another.program"}), "its command is 'python -m another.program'"),
        (json.dumps({"command": "python -m experiments.studies.numerics"}), "it has no"),
    ],
)
def test_a_file_that_no_command_wrote_is_named_in_one_line(content, message, tmp_path):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(SystemExit) as stopped:
        rewrite.main([str(tmp_path)])
    said = str(stopped.value.code)
    assert f"{tmp_path / 'results.json'} is damaged" in said
    assert message in said
    assert len(said.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
