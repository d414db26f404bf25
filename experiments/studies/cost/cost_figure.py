"""The picture of `experiments.studies.cost`."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from experiments.reporting.presentation import STYLE

_COLORS = {"forward": "#0072b2", "backward": "#e69f00", "blend": "#009e73", "inner products": "#cc79a7"}
_LABELS = {
    "forward": "forward passes, F",
    "backward": "backward pass, γF",
    "blend": "blends, C_mix",
    "inner products": "inner products, D_α",
}


def draw(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Draws the times of the steps by Eq. (9) and as measured, for the first row of each network."""
    first: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        if row["times"] is not None:
            first.setdefault(row["network"], row)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(1 + 3.4 * max(len(first), 2), 4.6), layout="constrained")
        if not first:
            figure.suptitle("no row was timed")
            return figure
        panels = figure.subplots(1, len(first), squeeze=False)[0]
        for axes, row in zip(panels, first.values(), strict=True):
            _draw_row(axes, row)
        panels[0].set_ylabel("time of a step, ms")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3)
        row = next(iter(first.values()))
        setting = f"K = {row['num_experts']}, m = {row['num_directions']}"
        figure.suptitle(f"One step, by Eq. (9) from its parts and as measured ({setting})", fontsize=12)
    return figure


def _draw_row(axes: Any, row: Mapping[str, Any]) -> None:
    """Four bars."""
    times, evaluations = row["times"], 2 * row["num_directions"]
    seconds = times["seconds"]
    full = {
        "forward": seconds["forward"],
        "backward": times["backward_ratio"] * seconds["forward"],
        "blend": seconds["blend"],
        "inner products": seconds["inner_products"],
    }
    spsa = {name: evaluations * seconds[name] for name in ("forward", "blend")}
    for place, parts in ((0, full), (2.4, spsa)):
        bottom = 0.0
        for name, value in parts.items():
            label = _LABELS[name] if place == 0 else None
            axes.bar(place, 1000 * value, bottom=1000 * bottom, width=0.9, color=_COLORS[name], label=label)
            bottom += value
    for place, name in ((1, "full_step"), (3.4, "spsa_step")):
        label = "measured" if place == 1 else None
        axes.bar(place, 1000 * seconds[name], width=0.9, color="#666666", label=label)
    axes.annotate(
        f"{times['spsa_over_full']:.2f}\nof full",
        (3.4, 1000 * seconds["spsa_step"]),
        xytext=(0, 4),
        textcoords="offset points",
        ha="center",
    )
    labels = [f"{step}\n{source}" for step in ("full", "SPSA") for source in ("Eq. (9)", "measured")]
    axes.set_xticks([0, 1, 2.4, 3.4], labels, fontsize=10)
    axes.set_title(f"{row['network']}, batch {row['batch_size']}", fontsize=11)
    axes.grid(axis="x", visible=False)
