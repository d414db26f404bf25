"""The paper's claims about the estimate's error, in its sections 4.2 and 6, each beside what was measured."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from experiments.reporting.presentation import ends, number, verdict

Row = Mapping[str, Any]
Rows = Sequence[Row]

# Within so many standard errors a measured mean agrees with a formula.
_STANDARD_ERRORS = 3


def explanation(results: Mapping[str, Any]) -> str:
    """Returns what the claims are measured on, and how `claims` judges.

    Args:
        results: of `experiments.studies.variance.estimate_errors.measure`.
    """
    config, points = results["config"], results["points"]
    where = ", ".join(f"{point['point']} of K = {point['K']}" for point in points)
    what = f"{config['num_experts']} experts ({config['network']}, {results['data']['name']})"
    return (
        f"On one draw of {what} and one batch of {results['settings']['examples']} target images, at {len(points)} "
        f"points ({where}): the verdicts go no further. Errors and variances are those of the estimate in α, over "
        "‖g‖², unless said otherwise; 'variance' is the trace of the covariance matrix, as in the paper. A verdict "
        "is 'yes' where a claim holds in every case, 'no' where in none. A mean agrees with a formula where it lies "
        f"within {_STANDARD_ERRORS} standard errors of it. O(μ²) is left out."
    )


def claims(results: Mapping[str, Any]) -> list[dict[str, str]]:
    """Returns the paper's claims.

    Args:
        results: of `experiments.studies.variance.estimate_errors.measure`.

    Returns:
        A dict for each: the `claim`; the paper's `section`; `measured`; `verdict`.
    """
    rows = [row for row in results["errors"] if row["space"] == "alpha"]
    unbiased = [row for row in results["errors"] if (row["space"], row["directions"]) == ("beta", "sphere")]
    points = {(point["point"], point["K"]): point for point in results["points"]}
    found = [
        *_equations(rows),
        *_bound(rows, points),
        *_averaging(rows),
        *_experts(_single_by_k(rows), _single_by_k(unbiased), points),
        _radius(results["radii"]),
    ]
    names = ("claim", "section", "measured", "verdict")
    return [dict(zip(names, claim, strict=True)) for claim in found]


def slack(point: Row) -> float:
    """Returns sigma_max(Theta)² ||grad_theta L||² over ||g||², at least 1 by Eq. (20).

    Args:
        point: a row of `points` of `experiments.studies.variance.estimate_errors.measure`.
    """
    return (point["experts_spectral_norm"] * point["parameter_gradient_norm"] / point["alpha_gradient_norm"]) ** 2


def _equations(rows: Rows) -> Iterator[tuple[str, ...]]:
    """What the proof of Proposition 1 says of the estimate's mean and error."""
    single, averaged = ([row for row in rows if (row["m"] == 1) == wanted] for wanted in (True, False))
    bias = {k: row["error"] - row["variance"] for k, row in _single_by_k(rows).items()}
    yield (
        "'both ĝ and ḡ are also unbiased'",
        "4.2",
        f"error less variance, the square of the bias: {_by_k(bias)}; of a mean of g/K it is (1 − 1/K)², "
        f"{_by_k({k: (1 - 1 / k) ** 2 for k in bias})}",
        verdict([row["error"] - row["variance"] <= _STANDARD_ERRORS * row["error_se"] for row in single]),
    )
    yield (
        "Eq. (18), E‖ĝ − g‖² = (K − 1)/K ‖g‖²",
        "4.2",
        f"error over it: {ends(row['error'] / row['equation_19'] for row in single)}",
        verdict([_agrees(row, "error", row["equation_19"]) for row in single]),
    )
    yield (
        "Eq. (19), Var[ḡ] = (K − 1)/(mK) ‖g‖², for m > 1",
        "4.2",
        f"error over it: {ends(row['error'] / row['equation_19'] for row in averaged)}; variance over it: "
        f"{ends(row['variance'] / row['equation_19'] for row in averaged)}, exact 1/K",
        verdict([_agrees(row, name, row["equation_19"]) for row in averaged for name in ("error", "variance")]),
    )


def _bound(rows: Rows, points: Mapping[tuple[str, int], Row]) -> Iterator[tuple[str, ...]]:
    """Proposition 1, of the error that it writes and of the variance that its text means."""
    ms = (min(row["m"] for row in rows), max(row["m"] for row in rows))
    meetings = ", ".join(f"{_meeting(point):.0f} ({name}, K = {k})" for (name, k), point in points.items())
    meet = f"; it falls as 1/m, the error does not: by the formulas they meet at m = {meetings}"
    for what, name, more in (("E‖ḡ − g‖²", "error", meet), ("the variance", "variance", "")):
        ratios = (
            f"{ends(row['bound'] / row[name] for row in rows if row['m'] == m)} at m = {m}" for m in dict.fromkeys(ms)
        )
        yield (
            f"Proposition 1, the bound of Eq. (13), of {what}",
            "4.2",
            f"bound over {name}: {', '.join(ratios)}{more}",
            verdict([row["bound"] >= row[name] for row in rows]),
        )


def _averaging(rows: Rows) -> Iterator[tuple[str, ...]]:
    """What more directions do."""
    cells: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        cells.setdefault((row["point"], row["K"]), []).append(row)
    (point, k), (first, *_, last) = next(iter(cells.items()))
    changes = [f"{name} {number(first[name])} to {number(last[name])}" for name in ("variance", "error")]
    yield (
        "'the variance can be reduced with additional random direction samples (increasing m)'",
        "4.2",
        f"from m = {first['m']} to {last['m']} ({point}, K = {k}): {', '.join(changes)}",
        verdict([cell[-1]["variance"] < cell[0]["variance"] for cell in cells.values()]),
    )


def _experts(
    in_alpha: Mapping[int, Row], in_beta: Mapping[int, Row], points: Mapping[tuple[str, int], Row]
) -> Iterator[tuple[str, ...]]:
    """What the number of experts and their alignment do, at the uniform average with one direction."""
    uniform = {k: points["uniform", k] for k in in_alpha}
    norms = {k: point["experts_spectral_norm"] for k, point in uniform.items()}
    shares = {k: norms[k] / point["experts_frobenius_norm"] for k, point in uniform.items()}
    variance = {k: row["variance"] for k, row in in_alpha.items()}
    absolute = {k: variance[k] * point["alpha_gradient_norm"] ** 2 for k, point in uniform.items()}
    unbiased = {k: row["variance"] for k, row in in_beta.items()}
    yield (
        "'σ_max(Θ) is small, e.g., the expert parameters are more aligned'",
        "4.2",
        f"σ_max(Θ)/‖Θ‖_F: {_by_k(shares)}; it is 1, its most, where all experts are parallel, and 1/√K where they are "
        "orthogonal and of one length",
        "no",
    )
    yield (
        "if σ_max(Θ) is small, 'the variance grows slower in the number of experts K'",
        "4.2",
        f"σ_max(Θ): {_by_k(norms)}; variance, m = 1: {_by_k(variance)}, exact (K − 1)/K² whatever σ_max(Θ) is; not "
        "tested on experts of another σ_max(Θ)",
        "-",
    )
    yield (
        "'variance growing with K'",
        "6",
        f"m = 1, not over ‖g‖²: {_by_k(absolute)}; of the unbiased estimate in β, over ‖∇βL‖²: {_by_k(unbiased)}, "
        "exact K − 1",
        verdict([less < more for values in (absolute, unbiased) for less, more in itertools.pairwise(values.values())]),
    )


def _radius(rows: Rows) -> tuple[str, ...]:
    """What a radius does that is too large, or too small."""
    errors = (
        f"{row['point']} {_percent(row['errors'][0])} at {row['radii'][0]:g}, {_percent(min(row['errors']))} at "
        f"{row['best_radius']:g}, {_percent(row['errors'][-1])} at {row['radii'][-1]:g}"
        for row in rows
    )
    return (
        "'too large radius μ of (6) biases the estimate; too small increases noise'",
        "6",
        f"relative error of the directional derivatives in β: {'; '.join(errors)}",
        verdict([min(row["errors"]) < min(row["errors"][0], row["errors"][-1]) for row in rows]),
    )


def _single_by_k(rows: Rows) -> dict[int, Row]:
    """One direction at the uniform averages, by K."""
    chosen = [row for row in rows if row["point"] == "uniform" and row["m"] == 1]
    return {row["K"]: row for row in sorted(chosen, key=lambda row: row["K"])}


def _agrees(row: Row, name: str, value: float) -> bool:
    """Whether a measured mean is a value, as far as its standard error tells."""
    return abs(row[name] - value) <= _STANDARD_ERRORS * row[f"{name}_se"]


def _meeting(point: Row) -> float:
    """The m at which slack (K - 1)/(m K) is (1 - 1/K)² + (K - 1)/(m K²)."""
    return (slack(point) * point["K"] - 1) / (point["K"] - 1)


def _by_k(values: Mapping[int, float]) -> str:
    """Values, each with its K."""
    return ", ".join(f"{number(value)} (K = {k})" for k, value in values.items())


def _percent(share: float) -> str:
    return f"{number(100 * share)} %"
