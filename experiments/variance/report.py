"""The report of `experiments.variance`: tables, a picture, and a table for the terminal."""

import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.presentation import markdown_table, png
from experiments.stages import write_json, write_whole
from experiments.variance.figure import draw
from experiments.variance.settings import TOLERANCE

Rows = Sequence[Mapping[str, Any]]

# Of fewer estimates a standard error is itself too uncertain to count deviations by.
_ENOUGH = 30


def write(results: Mapping[str, Any], folder: Path) -> None:
    """Writes `results.json`, `report.md` and `variance.png`, each whole or not at all.

    Args:
        results: of `experiments.variance.measurement.measure`, with its `title` and `command`.
        folder: where to.
    """
    picture, markdown = png(draw(results)), _markdown(results)
    write_json(folder / "results.json", results)
    write_whole(folder / "variance.png", functools.partial(Path.write_bytes, data=picture))
    write_whole(folder / "report.md", functools.partial(Path.write_text, data=markdown))


def print_table(results: Mapping[str, Any], folder: Path, console: Console) -> None:
    """Prints the errors in alpha and in beta at the uniform average, and where the report lies."""
    k = results["config"]["num_experts"]
    headers, rows = _summary_table(results)
    caption = f"E‖ḡ − g‖²/‖g‖² at the uniform average of {k} experts: the paper's in α, the unbiased in β"
    table = Table(title=results["title"], caption=caption)
    for header in headers:
        table.add_column(header, justify="right")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for sentence in _radius_sentences(results):
        console.print(sentence, highlight=False, soft_wrap=True)
    console.print(f"report: {folder / 'report.md'}", highlight=False, soft_wrap=True)


def _select(rows: Rows, **values: Any) -> Rows:
    """The rows that have these values."""
    return [row for row in rows if all(row[name] == value for name, value in values.items())]


def _summary_table(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Each estimator's error at the uniform average of all experts, a row for each m."""
    chosen = _select(results["errors"], place="uniform", K=results["config"]["num_experts"])
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
    k, corner = config["num_experts"], _select(results["places"], place="corner")[0]
    sections = [
        f"# {results['title']}",
        f"    {results['command']}",
        f"{results['data']['name']}, {config['network']}, {k} experts of {config['expert_examples']} images each "
        f"({config['initialization']} initialisation). The loss is the mean cross-entropy of {settings['examples']} "
        f"target images. Probes have radius {config['radius']:g}, in {settings['probes']} directions for each place, K "
        f"and distribution. Run on {results['machine']}, {sum(results['seconds'].values()):.0f} seconds in all.",
        "![error, cosine and slope error](variance.png)",
        "Errors are E‖ḡ − g‖²/‖g‖², ḡ the estimate and g the true gradient, ± one standard error. What is called exact "
        f"is so in the limit of radius 0 (`glue_jax.theory`). {_deviations(errors)}",
        "## The places",
        f"Uniform: α = 1/K, of all experts and of the first K. Learned: after {results['learning_steps']} steps of "
        f"GLUE. Corner: {max(corner['alpha']):g} on the expert with the lowest loss. Of ∇αL the softmax sees the "
        "zero-sum part alone. Θ holds all that is blended, the parameters and BatchNorm's statistics, and so does "
        "∇θL. The last column is the bound of Eq. (20) over ‖∇αL‖².",
        markdown_table(*_place_table(results["places"])),
        "## The paper's estimate in α (Eq. 11-20)",
        *_alpha_sentences(results),
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
        "The root mean square error of the slopes (L₊ − L₋)/(2 radius) in β, relative to the exact ones' size, along "
        f"{settings['slope_directions']} directions on the sphere; the exact ones are forward-mode derivatives. Where "
        "float32 rounds the losses the error is ∝ 1/radius, where the loss is smooth and curves ∝ radius²; the kinks "
        "of piecewise linear activations leave an error that grows more slowly than that.",
        *_radius_sentences(results),
        markdown_table(*_radius_table(results["radii"])),
        "p of error ∝ radius^p below the best radius, around it, and above it; and the rounding error of a loss that "
        "the smallest radius implies.",
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


def _alpha_sentences(results: Mapping[str, Any]) -> Iterable[str]:
    """What averaging does to the paper's error, beside Eq. (18), (19) and (13)."""
    k = results["config"]["num_experts"]
    rows = _select(results["errors"], space="alpha", K=k)
    uniform = _select(rows, place="uniform")
    for position in dict.fromkeys((0, len(uniform) - 1)):
        row = uniform[position]
        yield (
            f"At the uniform average of K = {k}, m = {row['m']}: measured {_measured(row)}, exact {row['exact']:.3f}, "
            f"Eq. ({18 if row['m'] == 1 else 19}) {row['equation_19']:.3g}; of it variance "
            f"{_measured(row, 'variance')}, exact (K − 1)/(mK²) = {row['exact_variance']:.3g}."
        )
    yield (
        f"The rest is the square of the bias, (1 − 1/K)² = {(1 - 1 / k) ** 2:.3f}: the paper's estimate has mean g/K, "
        "and no averaging lowers that. Eq. (19) divides it by m, too."
    )
    ratios = {at["m"]: [row["bound"] / row["error"] for row in _select(rows, m=at["m"])] for at in uniform}
    meetings = ", ".join(f"{_meeting(row):.0f} ({row['place']})" for row in _select(results["places"], K=k))
    yield (
        "Proposition 1's bound, Eq. (13), over the measured error: "
        + ", ".join(f"{min(values):.3g} to {max(values):.3g} at m = {m}" for m, values in ratios.items())
        + ". It falls as 1/m, the exact error no lower than the square of the bias; by the formulas the two meet at "
        f"m = {meetings}."
    )


def _slack(place: Mapping[str, Any]) -> float:
    """sigma_max(Theta)² ||grad_theta L||² over ||g||², at least 1 by Eq. (20)."""
    return (place["experts_spectral_norm"] * place["parameter_gradient_norm"] / place["alpha_gradient_norm"]) ** 2


def _meeting(place: Mapping[str, Any]) -> float:
    """The m at which slack (K - 1)/(m K) is (1 - 1/K)² + (K - 1)/(m K²)."""
    return (_slack(place) * place["K"] - 1) / (place["K"] - 1)


def _radius_sentences(results: Mapping[str, Any]) -> Iterable[str]:
    """Where the radius is good, and whether the run's is."""
    radius = results["config"]["radius"]
    for row in results["radii"]:
        good, error = row["good_radii"], 100 * row["error_at_radius"]
        limit = f"{100 * TOLERANCE:g} %"
        where = f"at most {limit} from radius {good[0]:.2g} to {good[1]:.2g}" if good else f"nowhere at most {limit}"
        inside = good is not None and good[0] <= radius <= good[1]
        yield (
            f"{row['place'].capitalize()}: the slopes' error is {where}; at the run's radius, {radius:g}, "
            f"{'inside' if inside else 'outside'}, it is {error:.2g} %."
        )


def _measured(row: Mapping[str, Any], name: str = "error") -> str:
    """A mean with its standard error, to two digits of the latter."""
    value, error = row[name], row[f"{name}_se"]
    if value < 1e-5 or error < 1e-4 * value:
        return f"{value:.4g}" if value > 1e-5 else f"{value:.0e}"
    digits = max(0, 1 - int(np.floor(np.log10(error))))
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def _place_table(places: Rows) -> tuple[list[str], list[list[str]]]:
    """The places and their norms."""
    headers = [
        "place",
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
            row["place"],
            str(row["K"]),
            f"{row['loss']:.3f}",
            f"{max(row['alpha']):.3f}",
            *(f"{row[f'{name}_norm']:.3g}" for name in norms),
            f"{_slack(row):.3g}",
        ]
        for row in places
    ]


def _alpha_table(rows: Rows) -> tuple[list[str], list[list[str]]]:
    """The paper's estimate at each place, for each K and m."""
    headers = ["place", "K", "m", "estimates", "measured", "exact", "(measured − exact)/s.e.", "Eq. (18), (19)"]
    return [*headers, "Eq. (13) / measured", "variance", "exact variance"], [
        [
            row["place"],
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
    """The unbiased estimate's error for each distribution, at each place, for each K and m."""
    names = list(dict.fromkeys(row["directions"] for row in rows))
    table: dict[tuple[str, int, int], list[str]] = {}
    for row in rows:
        cells = table.setdefault((row["place"], row["K"], row["m"]), [])
        cells.append(f"{_measured(row)} ({row['exact']:.3g})")
    return ["place", "K", "m", *names], [[place, str(k), str(m), *cells] for (place, k, m), cells in table.items()]


def _cosine_table(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The mean cosine for each estimator and m."""
    chosen = _select(results["errors"], place="uniform", K=results["config"]["num_experts"])
    table: dict[int, list[str]] = {}
    for row in chosen:
        expected = f" ({row['expected_cosine']:.3f})" if row["expected_cosine"] is not None else ""
        table.setdefault(row["m"], []).append(_measured(row, "cosine") + expected)
    names = dict.fromkeys(f"{row['space']}, {row['directions']}" for row in chosen)
    return ["m", *names], [[str(m), *cells] for m, cells in table.items()]


def _radius_table(rows: Rows) -> tuple[list[str], list[list[str]]]:
    """The slopes' relative error in percent, for each radius."""
    errors = np.array([row["errors"] for row in rows]).T
    table = [
        [f"{radius:g}", *(f"{100 * e:.2g}" for e in line)]
        for radius, line in zip(rows[0]["radii"], errors, strict=True)
    ]
    return ["radius", *(f"{row['place']}, %" for row in rows)], table


def _findings_table(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """How the slopes' error grows on either side, and the rounding of the losses that it implies."""
    headers = ["place", "rms slope", "best radius", "p below", "p around", "p above"]
    losses = {row["place"]: row["loss"] for row in results["places"] if row["K"] == results["config"]["num_experts"]}
    table = []
    for row in results["radii"]:
        spacing = np.spacing(np.float32(losses[row["place"]]))
        powers = (row["rounding_power"], row["middle_power"], row["curvature_power"])
        cells = [row["place"], f"{row['slope']:.3g}", f"{row['best_radius']:g}"]
        cells += ["-" if power is None else f"{power:.2f}" for power in powers]
        table.append([*cells, f"{row['loss_rounding']:.2g}", f"{row['loss_rounding'] / spacing:.1f}"])
    return [*headers, "rounding of a loss, nats", "in float32 spacings"], table
