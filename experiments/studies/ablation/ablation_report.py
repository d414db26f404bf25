"""The report of `experiments.studies.ablation`: tables of all recipes, and a picture."""

from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.reporting.presentation import STYLE, Report, TableCells, grouped, markdown_table, page, spread

_COLORS = {"the paper": "#777777", "remedies": "#0072b2", "combinations": "#d55e00"}
_WORDS = """- Refreshed: BatchNorm's statistics are estimated anew on target images.
- Minibatch: while the coefficients are learned, each model normalises by its minibatch. It is refreshed afterwards.
- Aligned: the experts' units are permuted before they are blended, jointly or to the first expert.
- By block, by layer: each block or layer has its own coefficients.
- Temperature: a temperature of the logits is learned too.
- Free coefficients: without a softmax, with minibatch statistics. By layer, they go on from the one vector that was
  learned for the model, and all norms share one vector.
- Task vectors: free coefficients of the differences between the experts and their initialisation."""
_WORDS_OF = {
    "RegMean": "- RegMean: each layer is merged in closed form, by each expert's inputs to it on target images.",
    "Gauss-Newton": "- Gauss-Newton, ours: a step learns the coefficients from the outputs of d + 2 blends, with d the "
    "number of coefficients (one fewer under a softmax). It takes no backward pass, and validates every 5 steps.",
}
"""What is said of recipes with such a name, where there are any."""
# The epochs of fine-tuning that have a column.
_EPOCHS = (1, 5)


def present(results: Mapping[str, Any]) -> Report:
    """Returns all that is shown of the results of `experiments.studies.ablation.__main__.main`."""
    config = results["sets"][0]["config"]
    names = {row["recipe"] for found in results["sets"] for row in found["rows"]}
    words = [words for word, words in _WORDS_OF.items() if any(word in name for name in names)]
    fields = ("network", "num_experts", "expert_examples", "seeds")
    blocks = [
        markdown_table(
            ["data", *(field.replace("_", " ") for field in fields)],
            [[results["sets"][0]["data"], *(str(config[field]) for field in fields)]],
        ),
        "The prior is the model before fine-tuning. The tables have its test accuracy and test loss, its accuracy on "
        "the validation images, which judge learning, and the test accuracy after some epochs of fine-tuning: means "
        "over seeds ± the standard deviation. Passes: how many times one model went forward on one target or "
        "validation image on the way to the prior. Backward passes are not among them. Seconds: to the prior, with "
        "compilation, without the alignment of the experts.",
        "\n".join([_WORDS, *words]),
        "![accuracy of each recipe's prior](ablation.png)",
    ]
    tables = {}
    for found in results["sets"]:
        name = found["config"]["initialization"]
        tables |= {f"{name} initialisation": table(found["rows"]), f"{name} experts": references(found)}
        blocks += [f"## Experts of {name} initialisation", markdown_table(*references(found))]
        for part, rows in grouped(found["rows"], "part").items():
            blocks += [f"### {part[0].upper()}{part[1:]}", markdown_table(*table(rows))]
    return Report(page(results, *blocks), {"ablation.png": figure(results)}, tables)


def table(rows: list[Mapping[str, Any]]) -> TableCells:
    """Returns headers, and a row for each recipe: means over seeds ± their standard deviation."""
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
    for name, runs in grouped(rows, "recipe").items():
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
    """Returns a picture of each recipe's prior accuracy, seed by seed, beside the best expert's and the ensemble's."""
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
    """Draws the panel of one initialisation."""
    for name, runs in grouped(found["rows"], "recipe").items():
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


def references(found: Mapping[str, Any]) -> TableCells:
    """Returns a header and one row, with what the recipes are compared with."""
    accuracies = [row["test_accuracy"] for row in found["experts"]]
    values = np.mean(accuracies), max(accuracies), found["ensemble"]["test_accuracy"]
    headers = ["test accuracy, %", "mean expert", "best expert", "ensemble of all experts"]
    return headers, [["of the experts", *(f"{100 * value:.1f}" for value in values)]]
