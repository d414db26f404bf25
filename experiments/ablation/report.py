"""The report of `experiments.ablation`: one table of all recipes, a picture, and the same table for the terminal."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console

from experiments.presentation import STYLE, markdown_table, rich_table, spread, write_report

_COLORS = {"the paper": "#999999", "remedies": "#0072b2", "combinations": "#d55e00"}


def write(results: Mapping[str, Any], folder: Path) -> None:
    """Writes `results.json`, `report.md` and `ablation.png`.

    Args:
        results: of `experiments.ablation.measurement.measure`, with its `title`, `command` and `machine`.
        folder: where to.
    """
    write_report(folder, results, _markdown(results), {"ablation.png": figure(results)})


def print_table(results: Mapping[str, Any], folder: Path, console: Console) -> None:
    """Prints the table, and where the report lies."""
    console.print(rich_table(results["title"], *table(results), caption=_references(results)))
    console.print(f"report: {folder / 'report.md'}", highlight=False, soft_wrap=True)


def table(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Returns a row for each recipe, headers and cells: means over seeds ± their standard deviation."""
    epochs = [epoch for epoch in (1, 5) if epoch < len(results["rows"][0]["test_accuracy"])]
    headers = ["recipe", "prior, %", "prior, loss", *(f"after {epoch}, %" for epoch in epochs), "images", "seconds"]
    rows = []
    for name, runs in by_recipe(results).items():
        accuracy, loss = (np.array([run[field] for run in runs]) for field in ("test_accuracy", "test_loss"))
        rows.append(
            [
                name,
                spread(100 * accuracy[:, 0], 1),
                spread(loss[:, 0], 3),
                *(spread(100 * accuracy[:, epoch], 1) for epoch in epochs),
                f"{np.mean([run['forward_passes'] for run in runs]) / 1000:.0f} k",
                f"{np.mean([run['prior_seconds'] for run in runs]):.0f}",
            ]
        )
    return headers, rows


def by_recipe(results: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """Returns the rows of each recipe, one a seed."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in results["rows"]:
        found.setdefault(row["recipe"], []).append(row)
    return found


def figure(results: Mapping[str, Any]) -> Figure:
    """Returns each recipe's prior accuracy, seed by seed, beside the best expert's and the ensemble's."""
    recipes = by_recipe(results)
    with mpl.rc_context(STYLE):
        picture = Figure(figsize=(8, 1.5 + 0.28 * len(recipes)), layout="constrained")
        axes = picture.subplots()
        for place, runs in enumerate(recipes.values()):
            values = [100 * run["test_accuracy"][0] for run in runs]
            color = _COLORS[runs[0]["part"]]
            axes.plot(values, [place] * len(values), "o", color=color, markersize=5, alpha=0.6)
            axes.plot(np.mean(values), place, "|", color=color, markersize=14, markeredgewidth=2)
        for label, value, style in (
            ("best expert", max(row["test_accuracy"] for row in results["experts"]), "--"),
            ("ensemble of all experts", results["ensemble"]["test_accuracy"], ":"),
        ):
            axes.axvline(100 * value, color="black", linestyle=style, linewidth=1, label=label)
        axes.set_yticks(range(len(recipes)), list(recipes))
        axes.invert_yaxis()
        axes.set_xlabel("test accuracy before any fine-tuning, %")
        axes.set_title(results["title"], fontsize=11)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=2)
    return picture


def _markdown(results: Mapping[str, Any]) -> str:
    """The report."""
    config = results["config"]
    parts = []
    for part in dict.fromkeys(row["part"] for row in results["rows"]):
        chosen = {**results, "rows": [row for row in results["rows"] if row["part"] == part]}
        parts += [f"## {part.capitalize()}", markdown_table(*table(chosen))]
    return (
        "\n\n".join(
            [
                f"# {results['title']}",
                f"    {results['command']}",
                f"{config['network']} on {results['data']}, {config['num_experts']} experts of "
                f"{config['expert_examples']} images, {config['initialization']} initialisation. Run on "
                f"{results['machine']}.",
                _references(results),
                "Test accuracy and loss of the prior, and test accuracy after so many epochs of fine-tuning; means over "
                f"{len(config['seeds'])} seeds ± their standard deviation. Images: how many times a model of the experts' "
                "size went forward on one image to get the prior, the coefficients' validation included; a full gradient's "
                "backward passes are not counted. Seconds: of all of it, compilation included.",
                *parts,
                "![prior accuracy of each recipe](ablation.png)",
            ]
        )
        + "\n"
    )


def _references(results: Mapping[str, Any]) -> str:
    """What the recipes are compared with."""
    accuracies: Sequence[float] = [100 * row["test_accuracy"] for row in results["experts"]]
    return (
        f"experts' test accuracy {np.mean(accuracies):.1f} % on average, {max(accuracies):.1f} % the best; the ensemble "
        f"of all, in {len(accuracies)} networks, {100 * results['ensemble']['test_accuracy']:.1f} %"
    )
