"""The report of a run: tables, pictures, and the same table for the terminal."""

import json
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console

from experiments.protocol.config import CONFIGS
from experiments.reporting.analysis import by_config, configs_of, learned_configs_of, name_of, num_mixed
from experiments.reporting.claims import leads, leads_of_ours
from experiments.reporting.paper import EXPERT_ACCURACY, experiment_of, is_at_its_scale
from experiments.reporting.presentation import STYLE, markdown_table, rich_table, spread, unbroken, write_report
from experiments.runtime.stages import write_json

_COLORS = {1: "#999999", 2: "#e69f00", 3: "#0072b2", 4: "#d55e00", 5: "#009e73"}
PASSES = (
    "A pass is of one model on one image, validations included. The seconds are until the coefficients are known, with "
    "the compilation that fell into them."
)
"""What `cost_table` counts."""
OURS = "Configs 1 to 4 are the paper's. Config 5, Gauss-Newton, is ours: the paper does not have it."
"""Whose the Configs are, where Config 5 is there."""


def write(results: Mapping[str, Any], folder: Path) -> None:
    """Writes `config.json`, `results.json`, `report.md`, `figure1.png` and `alpha.png`, each whole or not at all.

    Args:
        results: of a run, with its `title` and `machine`.
        folder: where to.
    """
    pictures = {"figure1.png": _accuracy_figure(results), "alpha.png": _alpha_figure(results)}
    markdown = _markdown(results)
    write_json(folder / "config.json", results["config"])
    write_report(folder, results, markdown, pictures)


def draw_accuracy(axes: Axes, results: Mapping[str, Any]) -> None:
    """Draws test accuracy by fine-tuning epoch: a panel of Figure 1."""
    for number, values in by_config(results, "test_accuracy").items():
        mean, deviation = 100 * values.mean(axis=0), 100 * values.std(axis=0, ddof=min(1, len(values) - 1))
        epochs = np.arange(len(mean))
        color = _COLORS[number]
        axes.plot(epochs, mean, color=color, marker="o", markersize=4, label=name_of(number))
        axes.fill_between(epochs, mean - deviation, mean + deviation, color=color, alpha=0.2, linewidth=0)
    axes.set_xlabel("fine-tuning epoch (0: the prior)")
    axes.set_ylabel("test accuracy, %")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def config_table(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Returns headers and rows of the Configs: accuracy and loss on the test split, before fine-tuning and after.

    Args:
        results: of a run.
    """
    accuracy, loss = by_config(results, "test_accuracy"), by_config(results, "test_loss")
    headers = ["Config", "prior, %", "prior, loss", "tuned, %", "tuned, loss"]
    rows = []
    for number in configs_of(results):
        row = [name_of(number)]
        for epoch in (0, -1):
            row += [spread(100 * accuracy[number][:, epoch], 1), spread(loss[number][:, epoch], 3)]
        rows.append(row)
    return headers, rows


def cost_table(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Returns headers and rows of what each Config's prior took: a run of an older version does not say.

    Args:
        results: of a run.
    """
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


def print_table(results: Mapping[str, Any], folder: Path, console: Console) -> None:
    """Prints the tables of the Configs, and where the report lies."""
    caption = f"{_caption(results)}. {OURS}" if 5 in configs_of(results) else _caption(results)
    console.print(rich_table(results["title"], *config_table(results), caption=caption))
    console.print(rich_table("what the prior took", *cost_table(results), caption=PASSES))
    console.print(f"report: {folder / 'report.md'}", highlight=False, soft_wrap=True)


def _caption(results: Mapping[str, Any]) -> str:
    """What the table's figures are."""
    seeds = results["config"]["seeds"]
    over = f"mean ± standard deviation over {len(seeds)} seeds (of target images, minibatches, directions)"
    over = over if len(seeds) > 1 else "one seed"
    epochs = results["config"]["fine_tuning_epochs"]
    what = f"of the blend, and after {epochs} epochs of fine-tuning it"
    return f"test accuracy and test loss (cross-entropy, nats) {what}; {over}"


def _markdown(results: Mapping[str, Any]) -> str:
    """The report."""
    config, data, machine = results["config"], results["data"], results["machine"]
    test = np.array([row["test_accuracy"] for row in results["experts"]])
    has_ours = 5 in configs_of(results)
    *first, last = map(str, learned_configs_of(results))
    learned = f"Configs {', '.join(first)} and {last}"
    sections = [
        f"# {results['title']}",
        f"{data['name']}, {config['network']}, {config['num_experts']} experts of {config['expert_examples']} images "
        f"each ({config['initialization']} initialisation, Dirichlet({config['concentration']:g}) classes), "
        f"{data['target']} target images, {data['validation']} validation images, {data['test']} test images.",
        f"> {' '.join(data['description'].split())}",
        f"Run on {machine}.",
        "## The Configs",
        *([OURS] if has_ours else []),
        f"{_caption(results)[0].upper()}{_caption(results)[1:]}.",
        markdown_table(*config_table(results)),
        f"The experts' own test accuracy: {100 * test.mean():.1f} % on average, {100 * test.max():.1f} % the best. All "
        f"experts have as many images, so Config 1 is the uniform average, where {learned} start.",
        f"What each prior took, means over seeds ± their standard deviation. {PASSES}",
        markdown_table(*cost_table(results)),
        "![test accuracy by fine-tuning epoch](figure1.png)",
        "GLUE (Config 4) against the paper's other Configs, points of test accuracy, means over seeds ± their standard "
        "deviation; epoch 0 is the prior:",
        markdown_table(*leads(results)),
        *_ours(results),
        "## The experts (Table 1)",
        f"Accuracy in percent and loss in nats. {_target_note(results)} {_paper_note(config)}",
        markdown_table(*_expert_table(results)),
        "## The coefficients",
        f"Means over seeds. {learned} keep their best by validation loss: at which of how many steps, for each seed. "
        "'Limit' is a run that reached the most steps before its plateau.",
        markdown_table(*_alpha_table(results)),
        *_mixing(results),
        "![coefficients by step](alpha.png)",
        "## Time",
        markdown_table(["stage", "seconds"], [[name, f"{value:.1f}"] for name, value in results["seconds"].items()]),
        "## Config",
        markdown_table(["field", "value"], [[name, json.dumps(value)] for name, value in config.items()]),
    ]
    return "\n\n".join(sections) + "\n"


def _ours(results: Mapping[str, Any]) -> Iterable[str]:
    """How Config 5 does against the paper's, where it is there."""
    if 5 in configs_of(results):
        yield "Gauss-Newton (Config 5, ours) against each of the paper's Configs, in the same units:"
        yield markdown_table(*leads_of_ours(results))


def _mixing(results: Mapping[str, Any]) -> Iterable[str]:
    """Whether the learned coefficients mix or select, and what their loss gains in accuracy."""
    accuracy, loss, alpha = (by_config(results, field) for field in ("test_accuracy", "test_loss", "alpha"))
    tested = np.array([row["test_accuracy"] for row in results["experts"]])
    rows = [
        [
            name_of(number),
            spread(num_mixed(alpha[number]), 1),
            spread(alpha[number].max(axis=-1), 2),
            ", ".join(map(str, alpha[number].argmax(axis=-1))),
            f"{(loss[number] - loss[1])[:, 0].mean():+.3f}",
            f"{100 * (accuracy[number] - accuracy[1])[:, 0].mean():+.1f}",
            f"{100 * (accuracy[number][:, 0].mean() - tested.max()):+.1f}",
        ]
        for number in learned_configs_of(results)
    ]
    yield (
        "Whether the learned coefficients mix or select: how many experts they mix, exp(entropy) (all if uniform, 1 if "
        "one is selected), their largest, and the expert that has it, seed by seed. Beside it what the prior gains "
        "over Config 1's, in test loss (below 0 is better) and in points of accuracy, and in points over the best "
        "expert's:"
    )
    yield markdown_table(
        ["Config", "mixes", "largest α", "of expert", "loss", "accuracy", "over the best expert"], rows
    )


def _expert_table(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Table 1."""
    splits = ("test", "target", "validation")
    values = [
        [scale * row[f"{split}_{what}"] for split in splits for what, scale in (("accuracy", 100), ("loss", 1))]
        for row in results["experts"]
    ]
    rows = [[str(index), *_numbers(row)] for index, row in enumerate(values)]
    rows.append(["mean", *_numbers(np.mean(values, axis=0))])
    return ["expert", *(f"{split}, {unit}" for split in splits for unit in ("%", "loss"))], rows


def _numbers(row: Sequence[float] | np.ndarray) -> list[str]:
    """Accuracies and losses in turn."""
    return [f"{value:.1f}" if column % 2 == 0 else f"{value:.3f}" for column, value in enumerate(row)]


def _target_note(results: Mapping[str, Any]) -> str:
    """Which target images the experts are measured on, and how many of them they know."""
    share = np.mean([row["target_images_seen"] for row in results["experts"]]) / results["data"]["target"]
    return (
        f"The target images are the first seed's; {100 * share:.1f} % of them, on average, are among the expert's own "
        "training images."
    )


def _paper_note(config: Mapping[str, Any]) -> str:
    """The paper's experts, and whether this run's are trained as they are."""
    experiment = experiment_of(config)
    if experiment is None:
        return f"The paper has no {config['network']} on {config['dataset']}."
    paper = EXPERT_ACCURACY[experiment]
    note = (
        f"The paper's ten experts reach {min(paper):.1f} to {max(paper):.1f} %, {np.mean(paper):.1f} on average "
        "('evaluated on the target training dataset' by its Table 1's caption, test accuracy by its text)."
    )
    if not is_at_its_scale(config):
        note += " This run is of another scale: see its config."
    return note


def _alpha_table(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Each Config's coefficients."""
    headers = ["Config", *(str(index) for index in range(results["config"]["num_experts"])), "best step"]
    rows = []
    for number, alpha in by_config(results, "alpha").items():
        learned = [run for run in results["runs"] if run["config"] == number and "validation_steps" in run]
        ends = ", ".join(_end(run, results["config"]) for run in learned) or "-"
        rows.append([name_of(number), *(f"{value:.3f}" for value in alpha.mean(axis=0)), ends])
    return headers, rows


def _end(run: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """After how many steps a run was at its best, and what stopped it."""
    steps = run["validation_steps"]
    best = steps[int(np.argmin(run["validation_loss"]))]
    return f"{best} of {steps[-1]}" + ("" if steps[-1] < config["alpha_steps"] else " (limit)")


def _accuracy_figure(results: Mapping[str, Any]) -> Figure:
    """A panel of Figure 1."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.subplots()
        draw_accuracy(axes, results)
        axes.set_title(textwrap.fill(unbroken(results["title"]), 76), fontsize=11)
        handles, labels = axes.get_legend_handles_labels()
        title = "mean and standard deviation over seeds" if len(results["config"]["seeds"]) > 1 else None
        figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=10, title=title)
    return figure


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
