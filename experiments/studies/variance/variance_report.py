"""The report of `experiments.studies.variance`: tables, a picture, and a table for the terminal."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from experiments.reporting.presentation import claim_table, markdown_table, rich_table, write_report
from experiments.studies.variance.settings import TOLERANCE
from experiments.studies.variance.variance_claims import explanation, slack
from experiments.studies.variance.variance_figure import draw

Rows = Sequence[Mapping[str, Any]]

# Of fewer estimates a standard error is itself too uncertain to count deviations by.
_ENOUGH = 30


def write(results: Mapping[str, Any], folder: Path) -> None:
    """Writes `results.json`, `report.md` and `variance.png`.

    Args:
        results: of `experiments.studies.variance.__main__.main`.
        folder: where to.
    """
    write_report(folder, results, _markdown(results), {"variance.png": draw(results)})


def print_table(results: Mapping[str, Any], folder: Path, console: Console) -> None:
    """Prints the errors in alpha and in beta at the uniform average, and where the report lies.

    Args:
        results: of `experiments.studies.variance.__main__.main`.
        folder: where the report lies.
        console: where to print.
    """
    k = results["config"]["num_experts"]
    headers, rows = _summary_table(results)
    caption = f"E‖ḡ − g‖²/‖g‖² at the uniform average of {k} experts: the paper's in α, the unbiased in β"
    console.print(rich_table(results["title"], headers, rows, caption))
    for sentence in _radius_sentences(results):
        console.print(sentence, highlight=False, soft_wrap=True)
    console.print(f"report: {folder / 'report.md'}", highlight=False, soft_wrap=True)


def _select(rows: Rows, **values: Any) -> Rows:
    """The rows that have these values."""
    return [row for row in rows if all(row[name] == value for name, value in values.items())]


def _summary_table(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Each estimator's error at the uniform average of all experts, a row for each m."""
    chosen = _select(results["errors"], point="uniform", K=results["config"]["num_experts"])
    # The sphere's exact error is Rademacher's; the two would not fit a terminal's width.
    names = ("sphere", "orthogonal", "simplex_orthogonal")
    headers = ["m", "α", "exact", "(19)", "(13)/α", *(f"β {name.removesuffix('_orthogonal')}" for name in names)]
    table = []
    for row in _select(chosen, space="alpha"):
        in_beta = [_select(chosen, space="beta", directions=name, m=row["m"])[0] for name in names]
        values = [row["error"], row["exact"], row["equation_19"], row["bound"] / row["error"]]
        values += [other["error"] for other in in_beta]
        table.append([str(row["m"]), *(f"{value:.2g}" if value > 1e-4 else f"{value:.0e}" for value in values)])
    return headers, table


def _markdown(results: Mapping[str, Any]) -> str:
    """The report."""
    config, settings, errors = results["config"], results["settings"], results["errors"]
    k, corner = config["num_experts"], _select(results["points"], point="corner")[0]
    sections = [
        f"# {results['title']}",
        f"    {results['command']}",
        f"{results['data']['name']}, {config['network']}, {k} experts of {config['expert_examples']} images each "
        f"({config['initialization']} initialisation). The loss is the mean cross-entropy of {settings['examples']} "
        f"target images. Probes have radius {config['radius']:g}, in {settings['probes']} directions for each point, K "
        f"and distribution. Run on {results['machine']}, {sum(results['seconds'].values()):.0f} seconds in all.",
        "![error, cosine and error of the directional derivatives](variance.png)",
        "Errors are E‖ḡ − g‖²/‖g‖², ḡ the estimate and g the true gradient, ± one standard error. What is called exact "
        f"is so in the limit of radius 0 (`glue_jax.theory`). {_deviations(errors)}",
        "## The points",
        f"Uniform: α = 1/K, of all experts and of the first K. Learned: after {results['learning_steps']} steps of "
        f"GLUE. Corner: {max(corner['alpha']):g} on the expert with the lowest loss. Of ∇αL the softmax sees the "
        "zero-sum part alone. Θ holds all that is blended, the parameters and BatchNorm's statistics, and so does "
        "∇θL. The last column is the bound of Eq. (20) over ‖∇αL‖².",
        markdown_table(*_point_table(results["points"])),
        "## The claims of section 4.2",
        explanation(results),
        markdown_table(*claim_table(results["claims"])),
        "## The paper's estimate in α (Eq. 11-20)",
        "Its mean is g/K, so that no averaging lowers the error below (1 − 1/K)², which Eq. (19) divides by m, too.",
        markdown_table(*_alpha_table(_select(errors, space="alpha"))),
        "## The unbiased estimate in β, through the softmax",
        "Exact values in parentheses. Whole blocks of orthogonal directions (K, or K − 1 of those that sum to zero) "
        "leave no error but the radius' own.",
        markdown_table(*_beta_table(_select(errors, space="beta"))),
        "## The cosine to the true gradient",
        f"At the uniform average of K = {k}; expected values in parentheses (orthogonal ones about √(m/d), d the "
        "dimension probed; more than one on the sphere by simulated directions).",
        markdown_table(*_cosine_table(results)),
        "## The radius",
        "The root mean square error of the directional derivatives (L₊ − L₋)/(2 radius) in β, over that of the exact "
        f"ones (by forward mode), along {settings['radius_directions']} directions on the sphere. Where float32 rounds "
        "the losses the error is ∝ 1/radius, where the loss is smooth and curves ∝ radius²; the kinks of piecewise "
        "linear activations leave an error that grows more slowly than that.",
        *_radius_sentences(results),
        markdown_table(*_radius_table(results["radii"])),
        f"p of error ∝ radius^p where the error leaves {100 * TOLERANCE:g} %, to the second radius below and above; "
        "and the rounding error of a loss that the smallest radius implies.",
        markdown_table(*_findings_table(results)),
    ]
    return "\n\n".join(sections) + "\n"


def _deviations(rows: Rows) -> str:
    """How well measured errors agree with exact ones, in standard errors."""
    values = np.abs([row["deviation"] for row in rows if row["deviation"] is not None and row["estimates"] >= _ENOUGH])
    if not len(values):
        return ""
    return (
        f"Of {len(values)} errors of at least {_ENOUGH} estimates each, {100 * np.mean(values <= 2):.0f} % lie within "
        f"2 standard errors of the exact one, the farthest {values.max():.1f} away (the m of a cell share its probes)."
    )


def _radius_sentences(results: Mapping[str, Any]) -> Iterable[str]:
    """Where the radius is good, and whether the run's is."""
    radius = results["config"]["radius"]
    for row in results["radii"]:
        good, error = row["good_radii"], 100 * row["error_at_radius"]
        limit = f"{100 * TOLERANCE:g} %"
        where = f"at most {limit} from radius {good[0]:.2g} to {good[1]:.2g}" if good else f"nowhere at most {limit}"
        inside = good is not None and good[0] <= radius <= good[1]
        yield (
            f"{row['point'].capitalize()}: the directional derivatives' error is {where}; at the run's radius, "
            f"{radius:g}, {'inside' if inside else 'outside'}, it is {error:.2g} %."
        )


def _measured(row: Mapping[str, Any], name: str = "error") -> str:
    """A mean with its standard error, to two digits of the latter."""
    value, error = row[name], row[f"{name}_se"]
    if value < 1e-5 or error < 1e-4 * value:
        return f"{value:.4g}" if value > 1e-5 else f"{value:.0e}"
    digits = max(0, 1 - int(np.floor(np.log10(error))))
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def _point_table(points: Rows) -> tuple[list[str], list[list[str]]]:
    """The points and their norms."""
    headers = [
        "point",
        "K",
        "loss",
        "largest α",
        "‖∇αL‖",
        "its zero-sum part",
        "‖∇βL‖",
        "‖∇θL‖",
        "σ_max(Θ)",
        "σ²‖∇θL‖²/‖∇αL‖²",
    ]
    norms = ("alpha_gradient", "zero_sum_gradient", "beta_gradient", "parameter_gradient", "experts_spectral")
    return headers, [
        [
            row["point"],
            str(row["K"]),
            f"{row['loss']:.3f}",
            f"{max(row['alpha']):.3f}",
            *(f"{row[f'{name}_norm']:.3g}" for name in norms),
            f"{slack(row):.3g}",
        ]
        for row in points
    ]


def _alpha_table(rows: Rows) -> tuple[list[str], list[list[str]]]:
    """The paper's estimate at each point, for each K and m."""
    headers = ["point", "K", "m", "estimates", "measured", "exact", "(measured − exact)/s.e.", "Eq. (18), (19)"]
    return [*headers, "Eq. (13) / measured", "variance", "exact variance"], [
        [
            row["point"],
            str(row["K"]),
            str(row["m"]),
            str(row["estimates"]),
            _measured(row),
            f"{row['exact']:.4f}",
            f"{row['deviation']:+.1f}",
            f"{row['equation_19']:.3g}",
            f"{row['bound'] / row['error']:.3g}",
            _measured(row, "variance"),
            f"{row['exact_variance']:.3g}",
        ]
        for row in rows
    ]


def _beta_table(rows: Rows) -> tuple[list[str], list[list[str]]]:
    """The unbiased estimate's error for each distribution, at each point, for each K and m."""
    names = list(dict.fromkeys(row["directions"] for row in rows))
    table: dict[tuple[str, int, int], list[str]] = {}
    for row in rows:
        cells = table.setdefault((row["point"], row["K"], row["m"]), [])
        cells.append(f"{_measured(row)} ({row['exact']:.3g})")
    return ["point", "K", "m", *names], [[point, str(k), str(m), *cells] for (point, k, m), cells in table.items()]


def _cosine_table(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The mean cosine for each estimator and m."""
    chosen = _select(results["errors"], point="uniform", K=results["config"]["num_experts"])
    table: dict[int, list[str]] = {}
    for row in chosen:
        expected = f" ({row['expected_cosine']:.3f})" if row["expected_cosine"] is not None else ""
        table.setdefault(row["m"], []).append(_measured(row, "cosine") + expected)
    names = dict.fromkeys(f"{row['space']}, {row['directions']}" for row in chosen)
    return ["m", *names], [[str(m), *cells] for m, cells in table.items()]


def _radius_table(rows: Rows) -> tuple[list[str], list[list[str]]]:
    """The relative error in percent, for each radius."""
    errors = np.array([row["errors"] for row in rows]).T
    table = [
        [f"{radius:g}", *(f"{100 * e:.2g}" for e in line)]
        for radius, line in zip(rows[0]["radii"], errors, strict=True)
    ]
    return ["radius", *(f"{row['point']}, %" for row in rows)], table


def _findings_table(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """How the error grows on either side, and the rounding of the losses that it implies."""
    headers = ["point", "rms derivative", "best radius", "p below", "p above"]
    losses = {row["point"]: row["loss"] for row in results["points"] if row["K"] == results["config"]["num_experts"]}
    table = []
    for row in results["radii"]:
        spacing = np.spacing(np.float32(losses[row["point"]]))
        powers = (row["rounding_power"], row["curvature_power"])
        cells = [row["point"], f"{row['rms_derivative']:.3g}", f"{row['best_radius']:g}"]
        cells += ["-" if power is None else f"{power:.2f}" for power in powers]
        table.append([*cells, f"{row['loss_rounding']:.2g}", f"{row['loss_rounding'] / spacing:.1f}"])
    return [*headers, "rounding of a loss, nats", "in float32 spacings"], table
