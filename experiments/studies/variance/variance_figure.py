"""The picture of `experiments.studies.variance`: errors, cosines and derivatives, measured and expected."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.reporting.presentation import STYLE
from experiments.studies.variance.settings import TOLERANCE
from experiments.studies.variance.statistics import expected_cosine
from glue_jax import theory
from glue_jax.directions import DirectionName, dimension

Rows = Sequence[Mapping[str, Any]]

_POINT_COLORS = {"uniform": "#0072b2", "learned": "#d55e00", "corner": "#009e73"}
_DIRECTION_COLORS: Mapping[DirectionName, str] = {
    "rademacher": "#e69f00",
    "sphere": "#0072b2",
    "orthogonal": "#009e73",
    "simplex_orthogonal": "#d55e00",
}
_MARKERS: Mapping[DirectionName, str] = {"rademacher": "s", "sphere": "o", "orthogonal": "^", "simplex_orthogonal": "D"}
_ERROR = "E‖ḡ − g‖² / ‖g‖²"


def draw(results: Mapping[str, Any]) -> Figure:
    """Returns the picture of the results of `experiments.studies.variance.estimate_errors.measure`."""
    k = results["config"]["num_experts"]
    errors = results["errors"]
    of_all = [row for row in errors if row["K"] == k]
    with mpl.rc_context({**STYLE, "font.size": 12, "legend.fontsize": 10}):
        figure = Figure(figsize=(15, 9), layout="constrained")
        panels = figure.subplots(2, 3)
        _alpha_panel(panels[0, 0], of_all, k)
        _beta_panel(panels[0, 1], of_all, k)
        _experts_panel(panels[0, 2], errors)
        _bound_panel(panels[1, 0], of_all, k)
        _cosine_panel(panels[1, 1], of_all, k)
        _radius_panel(panels[1, 2], results["radii"], results["config"]["radius"])
        figure.suptitle(f"{results['title']}; bars: 2 standard errors")
    return figure


def _alpha_panel(axes: Axes, rows: Rows, k: int) -> None:
    """The paper's error against m."""
    m = _numbers(rows)
    gradient = np.ones(k)
    exact = [theory.estimator_mean_squared_error(gradient, int(n), "sphere", scale="paper") / k for n in m]
    axes.plot(m, exact, color="black", label="exact")
    axes.plot(m, [theory.paper_mean_squared_error(gradient, int(n)) / k for n in m], "k--", label="Eq. (18), (19)")
    for offset, (point, color) in zip((0.93, 1, 1.07), _POINT_COLORS.items(), strict=True):
        chosen = [row for row in rows if row["space"] == "alpha" and row["point"] == point]
        _draw_means(axes, [offset * row["m"] for row in chosen], chosen, "error", color=color, marker="o", label=point)
    axes.set(xscale="log", xlabel="directions averaged, m", ylabel=_ERROR, ylim=(0, 1.1))
    axes.set_title(f"In α, the paper's scale, K = {k}")
    axes.legend()


def _beta_panel(axes: Axes, rows: Rows, k: int) -> None:
    """The unbiased error against m."""
    m = _numbers(rows)
    for name, color in _DIRECTION_COLORS.items():
        chosen = [
            row for row in rows if row["space"] == "beta" and row["point"] == "uniform" and row["directions"] == name
        ]
        d = dimension(np.zeros(k), name)
        exact = np.array([theory.relative_variance(d, int(n), name) for n in m])
        axes.plot(m, np.where(exact > 0, exact, np.nan), ".-", color=color, linewidth=1, markersize=3)
        random = [row for row in chosen if row["exact_variance"] > 0]
        _draw_means(axes, [row["m"] for row in random], random, "error", color=color, marker=_MARKERS[name], label=name)
    axes.set(xscale="log", yscale="log", xlabel="directions averaged, m", ylabel=_ERROR)
    axes.set_title(f"In β, unbiased, K = {k}, uniform\n(lines exact; orthogonal: 0 in whole blocks)")
    axes.legend()


def _experts_panel(axes: Axes, rows: Rows) -> None:
    """The errors against K, of one direction and of more."""
    uniform = [row for row in rows if row["point"] == "uniform" and row["directions"] == "sphere"]
    ks = sorted({row["K"] for row in uniform})
    ms = sorted(set.intersection(*({row["m"] for row in uniform if row["K"] == k} for k in ks)))
    grid = np.arange(2, max(ks) + 1)
    colors = itertools.cycle(["#0072b2", "#d55e00"])
    for m in sorted({ms[0], ms[len(ms) // 2]}):
        color = next(colors)
        for space, marker in (("beta", "s"), ("alpha", "o")):
            chosen = sorted(
                (row for row in uniform if row["space"] == space and row["m"] == m), key=lambda row: row["K"]
            )
            scale = chosen[0]["scale"]
            exact = [theory.estimator_mean_squared_error(np.ones(n), m, "sphere", scale=scale) / n for n in grid]
            axes.plot(grid, exact, color=color, linewidth=1)
            what = "β, unbiased" if space == "beta" else "α, paper's"
            _draw_means(
                axes,
                [row["K"] for row in chosen],
                chosen,
                "error",
                color=color,
                marker=marker,
                label=f"{what}, m = {m}",
            )
        axes.plot(grid, [theory.paper_mean_squared_error(np.ones(n), m) / n for n in grid], color=color, linestyle="--")
    axes.plot([], [], "k--", label="Eq. (18), (19)")
    axes.set(yscale="log", xlabel="experts, K", ylabel=_ERROR, ylim=(2e-3, None))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title("Uniform average, sphere\n(lines exact)")
    axes.legend(loc="lower right", ncols=2, columnspacing=0.8, handletextpad=0.4)


def _bound_panel(axes: Axes, rows: Rows, k: int) -> None:
    """Proposition 1 over the measured error."""
    for point, color in _POINT_COLORS.items():
        chosen = [row for row in rows if row["space"] == "alpha" and row["point"] == point]
        m = [row["m"] for row in chosen]
        axes.plot(m, [row["bound"] / row["error"] for row in chosen], "o", color=color, label=f"{point}, measured")
        axes.plot(m, [row["bound"] / row["exact"] for row in chosen], color=color, linewidth=1)
    axes.axhline(1, color="black", linestyle=":")
    axes.set(xscale="log", yscale="log", xlabel="directions averaged, m", ylabel="bound / error")
    axes.set_title(f"Proposition 1, Eq. (13), over the error\nin α, K = {k} (lines: over the exact error)")
    axes.legend()


def _cosine_panel(axes: Axes, rows: Rows, k: int) -> None:
    """The cosine to the true gradient against m."""
    uniform = [row for row in rows if row["point"] == "uniform"]
    names: tuple[DirectionName, ...] = ("sphere", "orthogonal", "simplex_orthogonal")
    for name in names:
        color, d = _DIRECTION_COLORS[name], dimension(np.zeros(k), name)
        chosen = [row for row in uniform if row["directions"] == name and row["space"] == "beta"]
        ms = [row["m"] for row in chosen]
        expected = [(m, expected_cosine(d, m, name)) for m in (ms if name == "sphere" else range(1, d + 1))]
        axes.plot(*np.array(expected, float).T, color=color, linewidth=1)
        _draw_means(axes, ms, chosen, "cosine", color=color, marker=_MARKERS[name], label=f"β, {name}")
    in_alpha = [row for row in uniform if row["space"] == "alpha"]
    _draw_means(
        axes, [row["m"] for row in in_alpha], in_alpha, "cosine", color="#999999", marker="x", label="α, sphere"
    )
    m = np.arange(1, k + 1)
    axes.plot(m, np.sqrt(m / k), "k:", label="√(m/K)")
    axes.set(xscale="log", xlabel="directions averaged, m", ylabel="mean cosine to g", ylim=(0, 1.05))
    axes.set_title(f"Direction of the estimate, K = {k}, uniform\n(lines expected)")
    axes.legend()


def _radius_panel(axes: Axes, rows: Rows, radius: float) -> None:
    """The directional derivatives' error against the radius."""
    for row in rows:
        color = _POINT_COLORS[row["point"]]
        axes.plot(row["radii"], row["errors"], "o-", color=color, markersize=4, label=row["point"])
    radii, errors = np.array(rows[0]["radii"]), np.array(rows[0]["errors"])
    low, high = radii[radii <= 1e-4], radii[radii >= 0.3]
    axes.plot(low, 4 * errors[0] * radii[0] / low, "k--", linewidth=1)
    axes.plot(high, 0.1 * errors[-1] * (high / high[-1]) ** 2, "k--", linewidth=1)
    axes.axhline(TOLERANCE, color="black", linestyle=":", linewidth=1)
    axes.axvline(radius, color="black", linestyle=":", linewidth=1)
    words: dict[str, Any] = {"textcoords": "offset points", "fontsize": 10}
    axes.annotate("∝ 1/radius", (low[0], 4 * errors[0]), xytext=(8, 2), **words)
    axes.text(0.99, 0.02, "∝ radius²", fontsize=10, ha="right", transform=axes.transAxes)
    axes.annotate(f"radius {radius:g}", (radius, max(errors)), xytext=(4, -4), **words)
    axes.annotate(f"{100 * TOLERANCE:g} %", (radii[0], TOLERANCE), xytext=(0, 3), **words)
    axes.set(xscale="log", yscale="log", xlabel="radius of a probe in β", ylabel="relative rms error")
    axes.set_title("Directional derivatives (L₊ − L₋)/(2 radius)")
    axes.legend(loc="lower left")


def _numbers(rows: Rows) -> np.ndarray:
    """All m up to the largest measured."""
    return np.arange(1, max(row["m"] for row in rows) + 1)


def _draw_means(axes: Axes, x: Sequence[float], rows: Rows, name: str, *, color: str, marker: str, label: str) -> None:
    """Measured means with 2 standard errors."""
    bars = [2 * row[f"{name}_se"] for row in rows]
    axes.errorbar(x, [row[name] for row in rows], bars, color=color, fmt=marker, markersize=5, capsize=2, label=label)
