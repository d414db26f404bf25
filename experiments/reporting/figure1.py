"""Figure 1 of the paper: test accuracy by fine-tuning epoch, with a panel for each run and a line for each Config."""

from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.reporting.analysis import by_config, name_of
from experiments.reporting.presentation import STYLE

_COLORS = {1: "#999999", 2: "#e69f00", 3: "#0072b2", 4: "#d55e00", 5: "#009e73"}


def figure1(runs: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Returns the picture of some runs, from the left: the results of each run, by the title of its panel."""
    count = len(runs)
    size, of_title, of_legend = ((4.6 * count + 0.4, 4.4), 10, 11) if count > 1 else ((7, 4.5), 11, 10)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        for axes, (title, results) in zip(figure.subplots(1, count, squeeze=False)[0], runs.items(), strict=True):
            _draw(axes, results)
            axes.set_title(title, fontsize=of_title)
        lines = {str(line.get_label()): line for axes in figure.axes for line in axes.lines}
        columns = len(lines) if count > 2 else 3
        over_seeds = any(len(results["config"]["seeds"]) > 1 for results in runs.values())
        title = "mean and standard deviation over seeds" if over_seeds else None
        words = {"loc": "outside lower center", "ncols": columns, "fontsize": of_legend, "title": title}
        figure.legend(list(lines.values()), list(lines), **words)
    return figure


def _draw(axes: Axes, results: Mapping[str, Any]) -> None:
    """Draws the panel of a run."""
    for number, values in by_config(results, "test_accuracy").items():
        mean, deviation = 100 * values.mean(axis=0), 100 * values.std(axis=0, ddof=min(1, len(values) - 1))
        epochs = np.arange(len(mean))
        color = _COLORS[number]
        axes.plot(epochs, mean, color=color, marker="o", markersize=4, label=name_of(number))
        axes.fill_between(epochs, mean - deviation, mean + deviation, color=color, alpha=0.2, linewidth=0)
    axes.set_xlabel("fine-tuning epoch (0: the prior)")
    axes.set_ylabel("test accuracy, %")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
