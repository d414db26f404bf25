"""The report of a run: tables and pictures, and tables for the terminal."""

import json
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from experiments.protocol.config import CONFIGS
from experiments.reporting.analysis import by_config, configs_of, learned_configs_of, name_of, num_mixed
from experiments.reporting.claims import leads, leads_of_ours
from experiments.reporting.figure1 import figure1
from experiments.reporting.paper import EXPERT_ACCURACY, experiment_of
from experiments.reporting.presentation import STYLE, Report, TableCells, markdown_table, spread, unbroken

_SETTING = ("network", "num_experts", "expert_examples", "initialization")
EQUAL_SIZES = "All experts have the same number of images. So Config 1 is the uniform average, where learning starts."
OURS = "Configs 1 to 4 are the paper's. Config 5, Gauss-Newton, is ours: the paper does not have it."
"""Whose the Configs are, where Config 5 is there."""
TABLE_OF_CONFIGS = (
    "Test accuracy and test loss (cross-entropy, nats) of the prior (the blend), and after fine-tuning it: means over "
    "seeds ± the standard deviation. A seed decides target images, minibatches and directions."
)
"""What `config_table` has."""
PASSES = (
    "What each prior took, means over seeds ± the standard deviation. A pass is of one model on one image, "
    "validations included. The seconds end when the coefficients are known; compilation is part of them. '-': the run "
    "did not count."
)
"""What `cost_table` has."""
LEADS = (
    "GLUE (Config 4) against the paper's other Configs, points of test accuracy, means over seeds ± the standard "
    "deviation. Epoch 0 is the prior:"
)
"""What `experiments.reporting.claims.leads` has."""


def present(results: Mapping[str, Any]) -> Report:
    """Returns all that is shown of a run."""
    title = textwrap.fill(unbroken(results["title"]), 76)
    pictures = {"figure1.png": figure1({title: results}), "alpha.png": _alpha_figure(results)}
    name = f"{results['title']}: the prior and the fine-tuned model on the test images"
    tables = {name: config_table(results), "What the prior took": cost_table(results)}
    return Report("\n\n".join(_blocks(results)) + "\n", pictures, tables)


def config_table(results: Mapping[str, Any]) -> TableCells:
    """Returns headers and rows of the Configs: accuracy and loss on the test split, before and after fine-tuning."""
    accuracy, loss = by_config(results, "test_accuracy"), by_config(results, "test_loss")
    headers = ["Config", "prior, %", "prior, loss", "tuned, %", "tuned, loss"]
    rows = []
    for number in configs_of(results):
        row = [name_of(number)]
        for epoch in (0, -1):
            row += [spread(100 * accuracy[number][:, epoch], 1), spread(loss[number][:, epoch], 3)]
        rows.append(row)
    return headers, rows


def cost_table(results: Mapping[str, Any]) -> TableCells:
    """Returns headers and rows of the cost of each Config's prior. A run of an older version did not count it."""
    fields = ("forward_passes", "backward_passes", "prior_seconds")
    rows = []
    for number in configs_of(results):
        runs = [run for run in results["runs"] if run["config"] == number]
        cells = [
            spread(np.array([run[field] for run in runs]), digits) if all(field in run for run in runs) else "-"
            for field, digits in zip(fields, (0, 0, 1), strict=True)
        ]
        rows.append([name_of(number), *cells])
    return ["Config", "forward passes", "backward passes", "seconds"], rows


def _blocks(results: Mapping[str, Any]) -> Iterable[str]:
    """Yields the report, block by block."""
    config, data = results["config"], results["data"]
    yield f"# {results['title']}"
    images = [str(data[name]) for name in ("target", "validation", "test")]
    yield markdown_table(
        ["data", "network", "experts", "images of each", "initialisation", "target", "validation", "test images"],
        [[data["name"], *(str(config[name]) for name in _SETTING), *images]],
    )
    yield f"> {' '.join(data['description'].split())}"
    yield f"Run on {results['machine']}."
    yield "## The Configs"
    yield EQUAL_SIZES
    if 5 in configs_of(results):
        yield OURS
    yield TABLE_OF_CONFIGS
    yield markdown_table(*config_table(results))
    yield PASSES
    yield markdown_table(*cost_table(results))
    yield "![test accuracy by fine-tuning epoch](figure1.png)"
    yield LEADS
    yield markdown_table(*leads(results))
    if 5 in configs_of(results):
        yield "Gauss-Newton (Config 5, ours) against each of the paper's Configs, in the same units:"
        yield markdown_table(*leads_of_ours(results))
    yield "## The experts (Table 1)"
    yield (
        "Accuracy in percent and loss in nats. The target images are those of the first seed. Seen: the part of them "
        "that is among the expert's own training images. The paper's row is the mean of its Table 1, for a run with "
        "its data and network. The table's caption says 'evaluated on the target training dataset', the paper's text "
        "says test accuracy. A run of another scale than the paper's is not comparable: see its config."
    )
    yield markdown_table(*_expert_table(results))
    yield "## The coefficients"
    yield (
        "The table has means over seeds. Each learned Config keeps the coefficients of the lowest validation loss. The "
        "last column has their step, for each seed. 'Limit' is a run that reached the most steps before its plateau."
    )
    yield markdown_table(*_alpha_table(results))
    yield (
        "Do the learned coefficients mix or select? Mixes: how many experts they mix, exp(entropy): all experts if the "
        "coefficients are uniform, 1 if they select one. Of expert: the expert with the largest α, seed by seed. Loss "
        "and accuracy: of the prior, less those of Config 1's prior, in nats and points. The last column is the "
        "accuracy less the best expert's, in points."
    )
    yield markdown_table(*_mixing_table(results))
    yield "![coefficients by step](alpha.png)"
    yield "## Time"
    yield markdown_table(["stage", "seconds"], [[name, f"{value:.1f}"] for name, value in results["seconds"].items()])
    yield "## Config"
    yield markdown_table(["field", "value"], [[name, json.dumps(value)] for name, value in config.items()])


def _mixing_table(results: Mapping[str, Any]) -> TableCells:
    """Returns whether the learned coefficients mix or select, and how their prior's loss and accuracy compare."""
    accuracy, loss, alpha = (by_config(results, field) for field in ("test_accuracy", "test_loss", "alpha"))
    best = max(row["test_accuracy"] for row in results["experts"])
    return ["Config", "mixes", "largest α", "of expert", "loss", "accuracy", "over the best expert"], [
        [
            name_of(number),
            spread(num_mixed(alpha[number]), 1),
            spread(alpha[number].max(axis=-1), 2),
            ", ".join(map(str, alpha[number].argmax(axis=-1))),
            f"{(loss[number] - loss[1])[:, 0].mean():+.3f}",
            f"{100 * (accuracy[number] - accuracy[1])[:, 0].mean():+.1f}",
            f"{100 * (accuracy[number][:, 0].mean() - best):+.1f}",
        ]
        for number in learned_configs_of(results)
    ]


def _expert_table(results: Mapping[str, Any]) -> TableCells:
    """Table 1."""
    splits = ("test", "target", "validation")
    values = np.array(
        [
            [scale * row[f"{split}_{what}"] for split in splits for what, scale in (("accuracy", 100), ("loss", 1))]
            for row in results["experts"]
        ]
    )
    seen = np.array([row["target_images_seen"] for row in results["experts"]]) / results["data"]["target"]
    named = {str(index): (row, share) for index, (row, share) in enumerate(zip(values, seen, strict=True))}
    named["mean"] = values.mean(axis=0), seen.mean()
    rows = [[name, *_numbers(row), f"{100 * share:.1f}"] for name, (row, share) in named.items()]
    if experiment := experiment_of(results["config"]):
        rows.append(["the paper's mean", f"{np.mean(EXPERT_ACCURACY[experiment]):.1f}", *["-"] * 6])
    return ["expert", *(f"{split}, {unit}" for split in splits for unit in ("%", "loss")), "seen, %"], rows


def _numbers(row: Sequence[float] | np.ndarray) -> list[str]:
    """Accuracies and losses, alternating, as text."""
    return [f"{value:.1f}" if column % 2 == 0 else f"{value:.3f}" for column, value in enumerate(row)]


def _alpha_table(results: Mapping[str, Any]) -> TableCells:
    """Each Config's coefficients."""
    headers = ["Config", *(str(index) for index in range(results["config"]["num_experts"])), "best step"]
    rows = []
    for number, alpha in by_config(results, "alpha").items():
        learned = [run for run in results["runs"] if run["config"] == number and "validation_steps" in run]
        ends = ", ".join(_end(run, results["config"]) for run in learned) or "-"
        rows.append([name_of(number), *(f"{value:.3f}" for value in alpha.mean(axis=0)), ends])
    return headers, rows


def _end(run: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """The step at which a run was best, and its last step."""
    steps = run["validation_steps"]
    best = steps[int(np.argmin(run["validation_loss"]))]
    return f"{best} of {steps[-1]}" + ("" if steps[-1] < config["alpha_steps"] else " (limit)")


def _alpha_figure(results: Mapping[str, Any]) -> Figure:
    """The learned coefficients by step, a panel for each Config that learns them."""
    colors, numbers = mpl.colormaps["tab10"], learned_configs_of(results)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.0 * len(numbers) + 1, 4.2), layout="constrained")
        panels = figure.subplots(1, len(numbers), sharey=True)
        for axes, number in zip(panels, numbers, strict=True):
            for index, run in enumerate(run for run in results["runs"] if run["config"] == number):
                steps, alphas = np.array(run["alpha_steps"]), np.array(run["alphas"])
                best = run["validation_steps"][int(np.argmin(run["validation_loss"]))]
                for expert, alpha in enumerate(alphas.T):
                    color = colors(expert % colors.N)
                    label = f"expert {expert}" if index == 0 else None
                    axes.plot(steps, alpha, color=color, linewidth=1.2, alpha=0.8, label=label)
                    axes.plot(best, run["alpha"][expert], color=color, marker="o", markersize=4)
            axes.axhline(1 / results["config"]["num_experts"], color="black", linestyle=":", linewidth=1)
            axes.set_title(f"Config {number}: {CONFIGS[number]}")
            axes.set_xlabel("step")
        panels[0].set_ylabel("coefficient α")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center")
        title = textwrap.fill(
            f"{unbroken(results['title'])}; a line for each seed, dots: the best by validation, dotted: 1/K", 100
        )
        figure.suptitle(title, fontsize=11)
    return figure
