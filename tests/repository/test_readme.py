"""README.md: short, true to what CI runs, and its links lead somewhere."""

import re
import tomllib

from tests.helpers import ROOT

README = (ROOT / "README.md").read_text()


def test_readme_has_at_most_900_words():
    assert len(README.split()) <= 900


def test_the_table_of_results_has_at_most_five_columns_and_eight_rows():
    (table,) = re.findall(r"(?:^\|.*\n)+", README, re.MULTILINE)
    rows = table.splitlines()
    assert len(rows) <= 2 + 8
    assert {row.count("|") - 1 for row in rows} == {5}


def test_the_table_of_results_has_the_figures_of_its_report():
    shown = [line for line in README.splitlines() if re.match(r"\| \d", line)]
    report = (ROOT / "experiments/results/digits/report.md").read_text()
    assert len(shown) == 5
    for line in shown:
        name, prior, tuned, passes, backward = (cell.strip() for cell in line.strip("|").split("|"))
        accuracies, costs = re.findall(rf"^\| {re.escape(name)} \| (.*) \|$", report, re.MULTILINE)[:2]
        found = [cell.strip() for cell in accuracies.split("|")]
        assert [prior, tuned] == [found[0], found[2]], name
        assert [passes, backward] == [cell.split("±")[0].strip() for cell in costs.split("|")[:2]], name


def test_the_test_command_is_what_ci_runs():
    ci = (ROOT / ".ci" / "run").read_text()
    (command,) = re.findall(r"^(.* && \.venv/bin/python -m pytest)$", README, re.MULTILINE)
    for part in command.split(" && "):
        assert part in ci.replace("--quiet ", "")


def test_all_files_name_one_public_address():
    address = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
    for path in ("README.md", "CITATION.cff"):
        found = set(re.findall(r"https://github\.com/[^/\s)]+/glue_jax", (ROOT / path).read_text()))
        assert found == {address}, path
