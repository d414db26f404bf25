"""The paper's claims about the estimate's error, in its sections 4.2 and 6, each beside what was measured."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from experiments.reporting.presentation import Claim

Row = Mapping[str, Any]
Rows = Sequence[Row]

# A measured mean agrees with a formula if they differ by at most so many standard errors.
_STANDARD_ERRORS = 3

EXPLANATION = (
    "The claims are judged on one draw of experts and one batch of target images, at the points above. Errors and "
    "variances are those of the estimate in α, divided by ‖g‖², unless said otherwise. The variance is the trace of "
    "the covariance matrix, as in the paper. A verdict is 'yes' where a claim holds in every case, and 'no' where it "
    "holds in none. A mean agrees with a formula where it lies within three standard errors of it. O(μ²) is left out."
)
"""How `claims` judges."""


def claims(results: Mapping[str, Any]) -> Iterator[Claim]:
    """Yields the paper's claims."""
    rows = [row for row in results["errors"] if row["space"] == "alpha"]
    yield from _equations(rows)
    yield from _bound(rows)
    yield from _experts(results, rows)
    errors = [row["errors"] for row in results["radii"]]
    smallest = [min(error) / min(error[0], error[-1]) for error in errors]
    yield Claim(
        "'too large radius μ of (6) biases the estimate; too small increases noise'",
        "6",
        "least error of the directional derivatives in β, over the error at the ends of the radii",
        smallest,
        [ratio < 1 for ratio in smallest],
    )


def slack(point: Row) -> float:
    """Returns sigma_max(Theta)² ||grad_theta L||² over ||g||², at least 1 by Eq. (20)."""
    return (point["experts_spectral_norm"] * point["parameter_gradient_norm"] / point["alpha_gradient_norm"]) ** 2


def meeting(point: Row) -> float:
    """Returns the m at which the bound of Eq. (13) meets the exact error: the bound falls as 1/m, the error does not.

    It is the m at which slack (K - 1)/(m K) is (1 - 1/K)² + (K - 1)/(m K²).
    """
    return (slack(point) * point["K"] - 1) / (point["K"] - 1)


def _equations(rows: Rows) -> Iterator[Claim]:
    """Yields what the proof of Proposition 1 says about the estimate's mean and error."""
    single, averaged = ([row for row in rows if (row["m"] == 1) == wanted] for wanted in (True, False))
    yield Claim(
        "'both ĝ and ḡ are also unbiased'",
        "4.2",
        "error less variance, the square of the bias, at m = 1; it is (1 − 1/K)² where the mean is g/K",
        [row["error"] - row["variance"] for row in single],
        [row["error"] - row["variance"] <= _STANDARD_ERRORS * row["error_se"] for row in single],
    )
    for equation, chosen, name, what in (
        ("Eq. (18), E‖ĝ − g‖² = (K − 1)/K ‖g‖²", single, "error", "error over it"),
        ("Eq. (19), Var[ḡ] = (K − 1)/(mK) ‖g‖²", averaged, "error", "error over it, m > 1"),
        ("the same", averaged, "variance", "variance over it, m > 1; exact: 1/K"),
    ):
        ratios = [row[name] / row["equation_19"] for row in chosen]
        agree = [abs(row[name] - row["equation_19"]) <= _STANDARD_ERRORS * row[f"{name}_se"] for row in chosen]
        yield Claim(equation, "4.2", what, ratios, agree)


def _bound(rows: Rows) -> Iterator[Claim]:
    """Yields Proposition 1 for the error and for the variance, and what averaging does."""
    for what, name in (("E‖ḡ − g‖²", "error"), ("the variance", "variance")):
        ratios = [row["bound"] / row[name] for row in rows]
        claim = f"Proposition 1, the bound of Eq. (13), of {what}"
        yield Claim(claim, "4.2", f"bound over {name}", ratios, [ratio >= 1 for ratio in ratios])
    cells: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        cells.setdefault((row["point"], row["K"]), []).append(row)
    left = [cell[-1]["variance"] / cell[0]["variance"] for cell in cells.values()]
    yield Claim(
        "'the variance can be reduced with additional random direction samples (increasing m)'",
        "4.2",
        "variance at the largest m, over the variance at m = 1",
        left,
        [ratio < 1 for ratio in left],
    )


def _experts(results: Mapping[str, Any], rows: Rows) -> Iterator[Claim]:
    """Yields what the number of experts and their alignment do, at the uniform average with one direction."""
    points = {point["K"]: point for point in results["points"] if point["point"] == "uniform"}
    yield Claim(
        "'σ_max(Θ) is small, e.g., the expert parameters are more aligned'",
        "4.2",
        "σ_max(Θ)/‖Θ‖_F; it is 1, its most, where all experts are parallel, and 1/√K where they are orthogonal",
        [point["experts_spectral_norm"] / point["experts_frobenius_norm"] for point in points.values()],
        [False],
    )
    yield Claim(
        "if σ_max(Θ) is small, 'the variance grows slower in the number of experts K'",
        "4.2",
        "not tested; the exact variance over ‖g‖² is (K − 1)/K², whatever σ_max(Θ) is",
        [],
        [],
    )
    unbiased = [row for row in results["errors"] if (row["space"], row["directions"]) == ("beta", "sphere")]
    absolute = {k: row["variance"] * points[k]["alpha_gradient_norm"] ** 2 for k, row in _by_k(rows).items()}
    relative = {k: row["variance"] for k, row in _by_k(unbiased).items()}
    for claim, what, values in (
        ("'variance growing with K'", "variance at m = 1, not divided, from each K to the next: times", absolute),
        ("the same, of the unbiased estimate in β", "variance over ‖∇βL‖² at m = 1: times", relative),
    ):
        growth = [more / less for less, more in itertools.pairwise(values.values())]
        yield Claim(claim, "6", what, growth, [ratio > 1 for ratio in growth])


def _by_k(rows: Rows) -> dict[int, Row]:
    """Returns the rows of one direction at the uniform averages, by K in ascending order."""
    chosen = [row for row in rows if row["point"] == "uniform" and row["m"] == 1]
    return {row["K"]: row for row in sorted(chosen, key=lambda row: row["K"])}
