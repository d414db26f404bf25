"""The report of `experiments.studies.variance`: tables, a picture, and tables for the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.reporting.presentation import Report, TableCells, claim_table, markdown_table, page, table_of
from experiments.studies.variance.settings import TOLERANCE
from experiments.studies.variance.variance_claims import EXPLANATION, claims, meeting, slack
from experiments.studies.variance.variance_figure import draw

Rows = Sequence[Mapping[str, Any]]

# A standard error of fewer estimates is too uncertain to count deviations by.
_ENOUGH = 30


def present(results: Mapping[str, Any]) -> Report:
    """Returns all that is shown of the results of `experiments.studies.variance.__main__.main`."""
    errors = results["errors"]
    headers, rows = _findings_table(results)
    markdown = page(
        results,
        "The loss is the mean cross-entropy of one batch of target images.",
        _setting_table(results),
        "![error, cosine and error of the directional derivatives](variance.png)",
        "An error is E‖ḡ − g‖²/‖g‖², with ḡ the estimate and g the true gradient, ± one standard error. A value is "
        "called exact if it is exact in the limit of radius 0 (`glue_jax.theory`). The next table counts the standard "
        f"errors between measured and exact errors, of at least {_ENOUGH} estimates each. The m of a point share their "
        "probes.",
        markdown_table(*_deviation_table(errors)),
        "## The points",
        "Uniform: α = 1/K, of all experts and of the first K. Learned: after GLUE has learned. Corner: near the expert "
        "with the lowest loss. The softmax sees only the zero-sum part of ∇αL. Θ and ∇θL hold all that is blended: the "
        "parameters and BatchNorm's statistics. σ²‖∇θL‖²/‖∇αL‖² is the bound of Eq. (20) over ‖∇αL‖². In the last "
        "column are the directions m at which the bound of Eq. (13) meets the exact error.",
        markdown_table(*_point_table(results["points"])),
        "## The claims of section 4.2",
        EXPLANATION,
        markdown_table(*claim_table(claims(results))),
        "## The paper's estimate in α (Eq. 11-20)",
        "The mean of the estimate is g/K, so averaging does not lower the error below (1 − 1/K)². Eq. (19) divides "
        "this part by m too.",
        markdown_table(*_alpha_table(_select(errors, space="alpha"))),
        "## The unbiased estimate in β, through the softmax",
        "Exact values are in parentheses. Whole blocks of orthogonal directions leave no error but the radius' own. A "
        "block is K directions, or K − 1 directions of sum zero.",
        markdown_table(*_beta_table(_select(errors, space="beta"))),
        "## The cosine to the true gradient",
        "At the uniform average of all experts. Expected values are in parentheses. Those of orthogonal directions are "
        "about √(m/d), with d the dimension probed. Those of more than one direction on the sphere are simulated.",
        markdown_table(*_cosine_table(results)),
        "## The radius",
        "The table has the root mean square error of the directional derivatives (L₊ − L₋)/(2 radius) in β, divided "
        "by the root mean square of the exact ones (by forward mode), along directions on the sphere. Where float32 "
        "rounds the losses the error is ∝ 1/radius. Where the loss is smooth and curves it is ∝ radius². The kinks of "
        "piecewise linear activations leave an error that grows more slowly than that.",
        markdown_table(*_radius_table(results["radii"])),
        f"A radius is good where the error is at most {100 * TOLERANCE:g} %. p is the power in error ∝ radius^p, from "
        "the last good radius to the second radius beyond it, below and above. The rounding error of a loss is what "
        "the smallest radius implies.",
        markdown_table(headers, rows),
    )
    tables = {
        "E‖ḡ − g‖²/‖g‖² at the uniform average of all experts": _summary_table(results),
        # So many columns fit a terminal.
        "The radius": (headers[:5], [row[:5] for row in rows]),
    }
    return Report(markdown, {"variance.png": draw(results)}, tables)


def _select(rows: Rows, **values: Any) -> Rows:
    """The rows that have these values."""
    return [row for row in rows if all(row[name] == value for name, value in values.items())]


def _summary_table(results: Mapping[str, Any]) -> TableCells:
    """Returns each estimator's error at the uniform average of all experts, with a row for each m."""
    chosen = _select(results["errors"], point="uniform", K=results["config"]["num_experts"])
    # The exact errors of the sphere and of Rademacher are equal, and both would not fit into a terminal's width.
    names = ("sphere", "orthogonal", "simplex_orthogonal")
    headers = ["m", "α", "exact", "(19)", "(13)/α", *(f"β {name.removesuffix('_orthogonal')}" for name in names)]
    table = []
    for row in _select(chosen, space="alpha"):
        in_beta = [_select(chosen, space="beta", directions=name, m=row["m"])[0] for name in names]
        values = [row["error"], row["exact"], row["equation_19"], row["bound"] / row["error"]]
        values += [other["error"] for other in in_beta]
        table.append([str(row["m"]), *(f"{value:.2g}" if value > 1e-4 else f"{value:.0e}" for value in values)])
    return headers, table


def _setting_table(results: Mapping[str, Any]) -> str:
    """Returns what the errors were measured on."""
    config, settings = results["config"], results["settings"]
    values = {
        "data": results["data"]["name"],
        **{name: config[name] for name in ("network", "num_experts", "expert_examples", "initialization", "radius")},
        **settings,
        "learning_steps": results["learning_steps"],
        "seconds": f"{sum(results['seconds'].values()):.0f}",
    }
    return markdown_table(["setting", "value"], [[name, str(value)] for name, value in values.items()])


def _deviation_table(rows: Rows) -> TableCells:
    """Returns how many measured errors are within some standard errors of the exact ones."""
    values = np.abs([row["deviation"] for row in rows if row["deviation"] is not None and row["estimates"] >= _ENOUGH])
    share = f"{100 * np.mean(values <= 2):.0f} %" if len(values) else "-"
    return ["errors", "within 2", "the farthest"], [[str(len(values)), share, f"{max(values, default=0):.1f}"]]


def _measured(row: Mapping[str, Any], name: str = "error") -> str:
    """Returns a mean with its standard error, to two digits of the standard error."""
    value, error = row[name], row[f"{name}_se"]
    if value < 1e-5 or error < 1e-4 * value:
        return f"{value:.4g}" if value > 1e-5 else f"{value:.0e}"
    digits = max(0, 1 - int(np.floor(np.log10(error))))
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def _point_table(points: Rows) -> TableCells:
    """The points and their norms."""
    rows = [{**row, "most": max(row["alpha"]), "slack": slack(row), "m": meeting(row)} for row in points]
    columns = {
        "point": "{point}",
        "K": "{K}",
        "loss": "{loss:.3f}",
        "largest α": "{most:.3f}",
        "‖∇αL‖": "{alpha_gradient_norm:.3g}",
        "its zero-sum part": "{zero_sum_gradient_norm:.3g}",
        "‖∇βL‖": "{beta_gradient_norm:.3g}",
        "‖∇θL‖": "{parameter_gradient_norm:.3g}",
        "σ_max(Θ)": "{experts_spectral_norm:.3g}",
        "σ²‖∇θL‖²/‖∇αL‖²": "{slack:.3g}",
        "Eq. (13) meets at m": "{m:.0f}",
    }
    return table_of(rows, columns)


def _alpha_table(rows: Rows) -> TableCells:
    """The paper's estimate at each point, for each K and m."""
    columns = {
        "point": "{point}",
        "K": "{K}",
        "m": "{m}",
        "estimates": "{estimates}",
        "measured": "{measured}",
        "exact": "{exact:.4f}",
        "(measured − exact)/s.e.": "{deviation:+.1f}",
        "Eq. (18), (19)": "{equation_19:.3g}",
        "Eq. (13) / measured": "{over:.3g}",
        "variance": "{spread}",
        "exact variance": "{exact_variance:.3g}",
    }
    more = (
        {"measured": _measured(row), "over": row["bound"] / row["error"], "spread": _measured(row, "variance")}
        for row in rows
    )
    return table_of(({**row, **fields} for row, fields in zip(rows, more, strict=True)), columns)


def _beta_table(rows: Rows) -> TableCells:
    """The unbiased estimate's error for each distribution, at each point, for each K and m."""
    names = list(dict.fromkeys(row["directions"] for row in rows))
    table: dict[tuple[str, int, int], list[str]] = {}
    for row in rows:
        cells = table.setdefault((row["point"], row["K"], row["m"]), [])
        cells.append(f"{_measured(row)} ({row['exact']:.3g})")
    return ["point", "K", "m", *names], [[point, str(k), str(m), *cells] for (point, k, m), cells in table.items()]


def _cosine_table(results: Mapping[str, Any]) -> TableCells:
    """The mean cosine for each estimator and m."""
    chosen = _select(results["errors"], point="uniform", K=results["config"]["num_experts"])
    table: dict[int, list[str]] = {}
    for row in chosen:
        expected = f" ({row['expected_cosine']:.3f})" if row["expected_cosine"] is not None else ""
        table.setdefault(row["m"], []).append(_measured(row, "cosine") + expected)
    names = dict.fromkeys(f"{row['space']}, {row['directions']}" for row in chosen)
    return ["m", *names], [[str(m), *cells] for m, cells in table.items()]


def _radius_table(rows: Rows) -> TableCells:
    """The relative error in percent, for each radius."""
    errors = np.array([row["errors"] for row in rows]).T
    table = [
        [f"{radius:g}", *(f"{100 * e:.2g}" for e in line)]
        for radius, line in zip(rows[0]["radii"], errors, strict=True)
    ]
    return ["radius", *(f"{row['point']}, %" for row in rows)], table


def _findings_table(results: Mapping[str, Any]) -> TableCells:
    """Returns where the radius is good, how the error grows on either side, and the rounding of the losses."""
    headers = ["point", "error at the run's, %", "best radius", "good from", "good to", "p below", "p above"]
    losses = {row["point"]: row["loss"] for row in results["points"] if row["K"] == results["config"]["num_experts"]}
    table = []
    for row in results["radii"]:
        good = [f"{radius:.2g}" for radius in row["good_radii"] or ()] or ["-", "-"]
        powers = ["-" if power is None else f"{power:.2f}" for power in (row["rounding_power"], row["curvature_power"])]
        cells = [row["point"], f"{100 * row['error_at_radius']:.2g}", f"{row['best_radius']:g}", *good, *powers]
        spacing = np.spacing(np.float32(losses[row["point"]]))
        cells += [f"{row['rms_derivative']:.3g}", f"{row['loss_rounding']:.2g}"]
        table.append([*cells, f"{row['loss_rounding'] / spacing:.1f}"])
    return [*headers, "rms derivative", "rounding of a loss, nats", "in float32 spacings"], table
