"""The report of `experiments.studies.ablation`: tables of all recipes, and a picture."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console

from experiments.reporting.presentation import STYLE, markdown_table, rich_table, spread, write_report

_COLORS = {"the paper": "#777777", "remedies": "#0072b2", "combinations": "#d55e00"}
_WORDS = (
    "Refreshed: BatchNorm's statistics are estimated anew on target images. Minibatch: while learning, each model "
    "normalises by its minibatch, and is refreshed then. Aligned: the experts' units are permuted, jointly or to the "
    "first expert, before they are blended. By block, by layer: coefficients for each. Temperature: the logits' is "
    "learned, too. Free coefficients: without a softmax, with minibatch; by layer they go on from the one "
    "vector for the model, with one for all norms together. Task vectors: free coefficients of the differences to the "
    "experts' initialisation."
)
_WORDS_OF = {
    "RegMean": "RegMean: each layer is merged in closed form, by each expert's inputs to it on target images.",
    "Gauss-Newton": "Gauss-Newton, ours: coefficients are learned from the outputs of d + 2 blends a step, with d the "
    "number of coefficients (under a softmax one fewer), and no backward pass; validated every 5 steps.",
}
"""What is said of recipes with such a name, where there are any."""
# Epochs of fine-tuning that have a column.
_EPOCHS = (1, 5)


def write(results: Mapping[str, Any], folder: Path) -> None:
    """Writes `results.json`, `report.md` and `ablation.png`.

    Args:
        results: of `experiments.studies.ablation.__main__.main`.
        folder: where to.
    """
    write_report(folder, results, _markdown(results), {"ablation.png": figure(results)})


def print_tables(results: Mapping[str, Any], folder: Path, console: Console) -> None:
    """Prints the tables, and where the report lies."""
    for found in results["sets"]:
        title = f"{found['config']['initialization']} initialisation"
        console.print(rich_table(title, *table(found["rows"]), caption=_references(found)))
    console.print(f"report: {folder / 'report.md'}", highlight=False, soft_wrap=True)


def table(rows: list[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Returns a row for each recipe, headers and cells: means over seeds ± their standard deviation.

    Args:
        rows: of `experiments.studies.ablation.trials.measure`.
    """
    epochs = [epoch for epoch in _EPOCHS if rows and epoch < len(rows[0]["test_accuracy"])]
    headers = [
        "recipe",
        "prior, %",
        "prior, loss",
        "validation, %",
        *(f"after {epoch}, %" for epoch in epochs),
        "passes",
        "seconds",
    ]
    cells = []
    for name, runs in _by_recipe(rows).items():
        accuracy, loss = (np.array([run[field] for run in runs]) for field in ("test_accuracy", "test_loss"))
        cells.append(
            [
                name,
                spread(100 * accuracy[:, 0], 1),
                spread(loss[:, 0], 3),
                spread(100 * np.array([run["validation_accuracy"] for run in runs]), 1),
                *(spread(100 * accuracy[:, epoch], 1) for epoch in epochs),
                f"{np.mean([run['forward_passes'] for run in runs]):,.0f}",
                f"{np.mean([run['prior_seconds'] for run in runs]):.0f}",
            ]
        )
    return headers, cells


def figure(results: Mapping[str, Any]) -> Figure:
    """Returns each recipe's prior accuracy, seed by seed, beside the best expert's and the ensemble's."""
    sets = results["sets"]
    parts = {row["recipe"]: row["part"] for found in sets for row in found["rows"]}
    with mpl.rc_context(STYLE):
        picture = Figure(figsize=(3 + 3.5 * len(sets), 1.6 + 0.27 * len(parts)), layout="constrained")
        for axes, found in zip(picture.subplots(1, len(sets), squeeze=False, sharey=True)[0], sets, strict=True):
            _draw(axes, found, list(parts), [_COLORS[part] for part in parts.values()])
        first = picture.axes[0]
        first.set_yticks(range(len(parts)), list(parts))
        first.set_ylim(len(parts) - 0.5, -0.5)
        handles, labels = first.get_legend_handles_labels()
        picture.legend(handles, labels, loc="outside lower center", ncols=2)
    return picture


def _draw(axes: Axes, found: Mapping[str, Any], names: list[str], colors: list[str]) -> None:
    """A panel, of one initialisation."""
    for name, runs in _by_recipe(found["rows"]).items():
        values = [100 * run["test_accuracy"][0] for run in runs]
        place, color = names.index(name), colors[names.index(name)]
        axes.plot(values, [place] * len(values), "o", color=color, markersize=5, alpha=0.6)
        axes.plot(np.mean(values), place, "|", color=color, markersize=14, markeredgewidth=2)
    best = max(row["test_accuracy"] for row in found["experts"])
    axes.axvline(100 * best, color="black", linestyle="--", linewidth=1, label="best expert")
    ensemble = found["ensemble"]["test_accuracy"]
    axes.axvline(100 * ensemble, color="black", linestyle=":", linewidth=1.5, label="ensemble of all experts")
    axes.set_xlabel("test accuracy of the prior, %")
    axes.set_title(f"{found['config']['initialization']} initialisation")


def _markdown(results: Mapping[str, Any]) -> str:
    """The report."""
    config = results["sets"][0]["config"]
    seeds = config["seeds"]
    names = {row["recipe"] for found in results["sets"] for row in found["rows"]}
    means = f"means over {len(seeds)} seeds ± their standard deviation" if len(seeds) > 1 else f"seed {seeds[0]}"
    blocks = [
        f"# {results['title']}",
        f"    {results['command']}",
        f"{config['network']} on {results['sets'][0]['data']}, {config['num_experts']} experts of "
        f"{config['expert_examples']} images. Run on {results['machine']}.",
        "Test accuracy and loss of the prior, its accuracy on the validation images, which judge learning, and test "
        f"accuracy after so many epochs of fine-tuning it; {means}. Passes: how many times one model went forward on "
        "one target or validation image on the way to the prior; backward passes are not among them. Seconds: to the "
        "prior, with compilation, without the experts' alignment.",
        " ".join([_WORDS, *(words for word, words in _WORDS_OF.items() if any(word in name for name in names))]),
        "![accuracy of each recipe's prior](ablation.png)",
    ]
    for found in results["sets"]:
        blocks += [f"## Experts of {found['config']['initialization']} initialisation", f"{_references(found)}."]
        for part in dict.fromkeys(row["part"] for row in found["rows"]):
            blocks += [
                f"### {part[0].upper()}{part[1:]}",
                markdown_table(*table([row for row in found["rows"] if row["part"] == part])),
            ]
    return "\n\n".join(blocks) + "\n"


def _by_recipe(rows: list[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The rows of each recipe, one a seed."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["recipe"], []).append(row)
    return found


def _references(found: Mapping[str, Any]) -> str:
    """What the recipes are compared with."""
    accuracies = [100 * row["test_accuracy"] for row in found["experts"]]
    return (
        f"Experts: {np.mean(accuracies):.1f} % on average, {max(accuracies):.1f} % the best; the ensemble of all "
        f"{len(accuracies)}, as many networks: {100 * found['ensemble']['test_accuracy']:.1f} %"
    )
