"""Writes reports and pictures anew from the results that are kept beside them. It measures nothing.

    python -m experiments.rewrite experiments/results/*

A folder without results.json is left as it is. `python -m experiments.report` makes the page of several runs.
"""

import dataclasses
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

import tyro

from experiments.reporting import run_report
from experiments.reporting.presentation import Report
from experiments.runtime.session import exit_on
from experiments.runtime.stages import read_json, reading


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What a command line says.

    Attributes:
        folders: the folders of runs and studies. A folder without results.json is left as it is.
    """

    folders: tyro.conf.Positional[tuple[Path, ...]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the reports of the folders that the command line names."""
    parsed = tyro.cli(Arguments, prog="python -m experiments.rewrite", description=__doc__, args=arguments)
    with exit_on(ValueError, OSError):
        for folder in parsed.folders:
            if (folder / "results.json").is_file():
                present(folder).write(folder)
                print(f"report: {folder / 'report.md'}")


def present(folder: Path) -> Report:
    """Returns what the command that wrote a folder's results shows of them.

    Raises:
        ValueError: if no command of this project wrote the file.
    """
    path = folder / "results.json"
    with reading(path, "give its command again"):
        results = read_json(path)
        if "runs" in results:
            return run_report.present(results)
        name = results["command"].split()[2]
        if not name.startswith("experiments.studies."):
            raise ValueError(f"its command is {results['command']!r}; expected one of experiments.studies")
        found = importlib.util.find_spec(name)
        is_package = found is not None and found.submodule_search_locations is not None
        return importlib.import_module(f"{name}.__main__" if is_package else name).present(results)


if __name__ == "__main__":
    sys.exit(main())
