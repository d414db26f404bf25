"""The paper's tables and figures from our runs, the paper's own numbers, and a verdict on each of its claims.

    python -m experiments.report                                    # of all runs under runs/
    python -m experiments.report runs/cifar10 runs/imagenette       # of these, in this order

The report of each run says how its figures were made.
"""

import contextlib
import dataclasses
import functools
import itertools
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from matplotlib.figure import Figure

from experiments.protocol.config import CONFIGS, PAPER_CONFIGS
from experiments.reporting import claims
from experiments.reporting.analysis import configs_of
from experiments.reporting.figure1 import figure1 as draw
from experiments.reporting.paper import EXPERIMENTS, EXPERT_ACCURACY, experiment_of, is_at_its_scale
from experiments.reporting.presentation import Report, TableCells, markdown_table, shortened, unbroken
from experiments.reporting.run_report import (
    LEADS,
    OURS,
    PASSES,
    TABLE_OF_CONFIGS,
    config_table,
    cost_table,
)
from experiments.runtime.session import exit_on, failure
from experiments.runtime.stages import read_json, reading

_AGAIN = "the experiment's own command, given again, writes it from the stages that are kept"


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What a command line says.

    Attributes:
        runs: the folders of runs, each with its results.json. The default is all finished runs under runs/.
        out_dir: the folder of the page and its picture.
    """

    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    out_dir: Path = Path("runs/report")


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the page of the runs that the command line names."""
    parsed = tyro.cli(Arguments, prog="python -m experiments.report", description=__doc__, args=arguments)
    try:
        with exit_on(ValueError):
            runs = [read(folder) for folder in parsed.runs] or _found(Path("runs"))
            write(runs, parsed.out_dir)
    except OSError as error:
        sys.exit(failure(error, parsed.out_dir))
    print(f"report: {parsed.out_dir / 'report.md'}")


def read(folder: Path) -> dict[str, Any]:
    """Returns a run's results.

    Raises:
        ValueError: if the folder has no results, if the file is damaged, or if it has the results of another command.
    """
    path = folder / "results.json"
    expected = "expected the folder of an experiment's run that came to its report"
    if not path.is_file():
        raise ValueError(f"{folder} holds no results.json: {expected}")
    with reading(path, _AGAIN):
        results = read_json(path)
        if not isinstance(results, dict) or not {"config", "experts", "runs"} <= results.keys():
            holds = list(results) if isinstance(results, dict) else f"{results!r:.40}"
            raise ValueError(f"it holds {holds}, not the results of an experiment's Configs: {expected}")
        _check_runs(results)
        # The file must have what a page of this run alone needs.
        list(_page([results]))
        figure1([results])
    return results


def _check_runs(results: Mapping[str, Any]) -> None:
    """Refuses results without exactly one run for each seed and Config, and accuracies that are no fractions."""
    found = sorted((run["seed"], run["config"]) for run in results["runs"])
    # Older runs have only the paper's Configs.
    if found not in (sorted(itertools.product(results["config"]["seeds"], of)) for of in (PAPER_CONFIGS, CONFIGS)):
        raise ValueError(f"it has runs of (seed, Config) {found}; expected each Config once for each seed")
    of_experts = [row[f"{split}_accuracy"] for row in results["experts"] for split in ("test", "target")]
    for accuracies in (of_experts, [value for run in results["runs"] for value in run["test_accuracy"]]):
        if not 0 <= min(accuracies) <= max(accuracies) <= 1:
            raise ValueError(f"it has accuracies from {min(accuracies)} to {max(accuracies)}; expected fractions")


def write(runs: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Writes `report.md` and `figure1.png`.

    Args:
        runs: the results of each run. Each has a panel, from the left.
        folder: the folder to write to.

    Raises:
        ValueError: if there are no runs.
    """
    if not runs:
        expected = ", ".join(f"python -m experiments.{name}" for name in EXPERIMENTS)
        raise ValueError(f"there is no run to report: give folders, or make some first ({expected})")
    Report("\n\n".join(_page(runs)) + "\n", {"figure1.png": figure1(runs)}, {}).write(folder)


def figure1(runs: Sequence[Mapping[str, Any]]) -> Figure:
    """Returns `experiments.reporting.figure1.figure1` of some runs, with their names and options above the panels."""
    panels = {}
    for name, results in _names(runs):
        seeds = len(results["config"]["seeds"])
        title = f"{shortened(results['title'], 80)}; {seeds} seed{'s' if seeds > 1 else ''}"
        panels[f"{name}\n{textwrap.fill(unbroken(title), 48)}"] = results
    return draw(panels)


def table1(runs: Sequence[Mapping[str, Any]]) -> TableCells:
    """Returns Table 1 as headers and rows: the accuracy of each expert in percent, in the paper and in our runs."""
    width = max(10, *(len(results["experts"]) for results in runs))
    rows = []
    for name, results in _names(runs):
        experiment = experiment_of(results["config"])
        found = {"the paper's": np.array(EXPERT_ACCURACY[experiment])} if experiment else {}
        for split in ("test", "target"):
            found[f"ours, {split}"] = np.array([100 * row[f"{split}_accuracy"] for row in results["experts"]])
        ends = {whose: np.array([each.mean(), each.min(), each.max()]) for whose, each in found.items()}
        for whose, each in found.items():
            cells = [f"{value:.1f}" for value in each] + [""] * (width - len(each))
            rows.append([name, whose, *cells, *(f"{value:.1f}" for value in ends[whose])])
        if experiment and is_at_its_scale(results["config"]):
            difference = [f"{value:+.1f}" for value in ends["ours, test"] - ends["the paper's"]]
            rows.append([name, "ours, test, less the paper's", *[""] * width, *difference])
    return ["run", "whose", *map(str, range(width)), "mean", "least", "most"], rows


def _by_run(table: Callable[[Mapping[str, Any]], TableCells], runs: Sequence[Mapping[str, Any]]) -> TableCells:
    """Returns the tables of all runs, one below the other."""
    tables = [(name, *table(results)) for name, results in _names(runs)]
    return ["run", *tables[0][1]], [[name, *row] for name, _, rows in tables for row in rows]


configs, costs, leads = (functools.partial(_by_run, table) for table in (config_table, cost_table, claims.leads))
"""Functions from some runs to the tables of all of them: of the Configs, of the priors' costs, and of GLUE's leads."""


def _names(runs: Sequence[Mapping[str, Any]]) -> list[tuple[str, Mapping[str, Any]]]:
    """Returns a short name for each run, with its results. A title may have many options."""
    return [
        (f"{number} {results['config']['dataset'].split('/')[0]}, {results['config']['network']}", results)
        for number, results in enumerate(runs, 1)
    ]


def _page(runs: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    """Yields the page, block by block."""
    yield "# The paper's tables and figures, from runs of this code"
    fields = ("initialization", "num_experts", "expert_examples", "expert_epochs")
    yield markdown_table(
        [
            "run",
            "options",
            "data",
            *(field.replace("_", " ") for field in fields),
            "target images",
            "test images",
            "machine",
        ],
        [
            [
                name,
                results["title"],
                results["data"]["name"],
                *(str(results["config"][field]) for field in fields),
                *(str(results["data"][split]) for split in ("target", "test")),
                results["machine"],
            ]
            for name, results in _names(runs)
        ],
    )
    yield "## Figure 1"
    yield "Test accuracy by fine-tuning epoch, mean and standard deviation over seeds. Epoch 0 is the prior."
    yield "![test accuracy by fine-tuning epoch, a panel a run](figure1.png)"
    yield TABLE_OF_CONFIGS
    yield markdown_table(*configs(runs))
    if any(5 in configs_of(results) for results in runs):
        yield OURS
    yield PASSES
    yield markdown_table(*costs(runs))
    yield LEADS
    yield markdown_table(*leads(runs))
    yield "## Table 1"
    yield (
        "Accuracy of each expert, percent. The paper's caption says 'evaluated on the target training dataset', its "
        "text says test accuracy: ours are both. Some target images are among an expert's own training images, since "
        "both are drawn from the same images (see each run's report). The experts of two draws do not correspond. So "
        "the differences are those of mean, least and most, for runs at the paper's scale."
    )
    yield markdown_table(*table1(runs))
    yield "## The claims of section 5"
    yield claims.EXPLANATION
    for name, results in _names(runs):
        yield f"### {name}"
        if not is_at_its_scale(results["config"]):
            yield "Of another scale than the paper's: the verdicts are on this run, not on the paper's figures."
        yield markdown_table(*claims.verdicts(results))


def _found(folder: Path) -> list[dict[str, Any]]:
    """Returns the finished runs below a folder. The paper's experiments come first."""
    runs = []
    for path in sorted(folder.glob("*/results.json")):
        # The studies keep their results beside the runs.
        with contextlib.suppress(ValueError):
            runs.append(read(path.parent))
    order = [*EXPERIMENTS, None]
    return sorted(runs, key=lambda results: order.index(experiment_of(results["config"])))


if __name__ == "__main__":
    main()
