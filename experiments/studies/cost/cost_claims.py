"""The paper's claims about the cost of a step, in its sections 4.1 and 6, each beside what was measured."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from experiments.reporting.presentation import ends, number, verdict

Row = Mapping[str, Any]
Rows = Sequence[Row]

SAME_ORDER = 10
"""Two costs are of the same order where neither is more than so many times the other."""
EXPLANATION = (
    "In the paper's words. A verdict is 'yes' where a claim holds in every row that it is about, 'no' where in none; "
    f"'of the same order' is taken as within a factor of {SAME_ORDER}, 'dominates' as being more than the rest. As "
    "networks grow: from each network to the one with the next more parameters, at the same batch size. They are of "
    "different kinds, and their images of different sizes: it is not one network that grows."
)
"""How `claims` judges."""


def claims(rows: Rows, num_experts: int) -> list[dict[str, str]]:
    """Returns the paper's claims, those about the growth of networks of one direction and `num_experts` experts.

    Args:
        rows: of `experiments.studies.cost.step_costs.measure`.
        num_experts: K.

    Returns:
        A dict for each: the `claim`; the paper's `section`; `measured`, each network's range over its rows; `verdict`.
    """
    timed = [row for row in rows if row["times"] is not None]
    pairs = [row for row in timed if row["num_directions"] == 1]
    met = [row for row in pairs if row["times"]["predicted_cheaper"]]
    sizes = by_size(rows, num_experts)
    timed_sizes = {batch_size: [row for row in group if row["times"]] for batch_size, group in sizes.items()}
    found = [
        (
            "4.1",
            "'the cost of the backward pass is typically more than 2F (γ ≥ 2)'",
            f"γ: {_ranges(timed, _gamma)}",
            [_gamma(row) >= 2 for row in timed],
        ),
        (
            "4.1",
            "'the inner product cost D_α is typically of the same order as the mixing cost C_mix'",
            f"D_α / C_mix: {_ranges(timed, _inner_products_over_blend)}",
            [1 / SAME_ORDER <= _inner_products_over_blend(row) <= SAME_ORDER for row in timed],
        ),
        (
            "4.1",
            "'the condition is easily met', C_mix < (γ − 1)F + D_α, Eq. (10), for m = 1",
            f"its right side over C_mix: {_ranges(pairs, _margin)}",
            [row["times"]["predicted_cheaper"] for row in pairs],
        ),
        (
            "4.1",
            "'whenever' it is met, 'a single SPSA pair is cheaper than a full-gradient step'",
            f"SPSA step / full step, time: {_ranges(met, lambda row: row['times']['spsa_over_full'])}",
            [row["times"]["cheaper"] for row in met],
        ),
        (
            "6",
            "'as networks grow, the backward term (γ − 1)F dominates' T_full − T_SPSA, Eq. (21)",
            f"(γ − 1)F over the size of D_α − C_mix: {_by_batch_size(timed_sizes, _dominance, '')}",
            [_dominance(row) > 1 for group in timed_sizes.values() if len(group) > 1 for row in group],
        ),
        (
            "6",
            "'so the gap widens in favor of SPSA', by time",
            f"T_full − T_SPSA: {_by_batch_size(timed_sizes, _time_gap, ' ms')}",
            _widens(timed_sizes, _time_gap),
        ),
        (
            "6",
            "'so the gap widens in favor of SPSA', by FLOPs of the compiled steps, all probes vmapped",
            f"full − SPSA: {_by_batch_size(sizes, _flops_gap, ' GFLOP')}",
            _widens(sizes, _flops_gap),
        ),
    ]
    return [
        {"claim": claim, "section": section, "measured": measured, "verdict": verdict(holds)}
        for section, claim, measured, holds in found
    ]


def by_size(rows: Rows, num_experts: int) -> dict[int, Rows]:
    """Returns the rows of one direction and `num_experts` experts by batch size, fewest parameters first."""
    base = [row for row in rows if row["num_experts"] == num_experts and row["num_directions"] == 1]
    sizes: dict[int, list[Row]] = {}
    for row in sorted(base, key=lambda row: (row["batch_size"], row["parameters"])):
        sizes.setdefault(row["batch_size"], []).append(row)
    return dict(sizes)


def growth_table(rows: Rows, num_experts: int) -> tuple[list[str], list[list[str]]]:
    """Returns headers and cells: the terms of Eq. (21), and the gap as measured, by the networks' parameters.

    Args:
        rows: of `experiments.studies.cost.step_costs.measure`.
        num_experts: K.
    """
    headers = ["network", "parameters", "batch", "(γ − 1)F, ms", "D_α − C_mix, ms", "T_full − T_SPSA, ms"]
    headers += ["SPSA / full", "full − SPSA, GFLOP", "SPSA / full"]
    table = []
    for row in itertools.chain.from_iterable(by_size(rows, num_experts).values()):
        flops, cells = row["flops"], ["-"] * 4
        if row["times"]:
            values = (1000 * _backward_term(row), 1000 * _others(row), _time_gap(row))
            cells = [*map(number, values), f"{row['times']['spsa_over_full']:.3f}"]
        ratio = flops["spsa_step_vmapped"] / flops["full_step"]
        cells += [number(_flops_gap(row)), f"{ratio:.3f}"]
        table.append([row["network"], f"{row['parameters']:,}", str(row["batch_size"]), *cells])
    return headers, table


def _ranges(rows: Rows, value: Callable[[Row], float]) -> str:
    """Least and most of each network's rows."""
    groups: dict[str, list[float]] = {}
    for row in rows:
        groups.setdefault(row["network"], []).append(value(row))
    parts = ", ".join(f"{name} {ends(values)}" for name, values in groups.items())
    return f"{parts} ({len(rows)} rows)" if rows else "no row"


def _by_batch_size(sizes: Mapping[int, Rows], value: Callable[[Row], float], unit: str) -> str:
    """Each network's value, at the batch sizes that have several networks."""
    parts = []
    for batch_size, group in sizes.items():
        if len(group) > 1:
            values = ", ".join(f"{row['network']} {number(value(row))}{unit}" for row in group)
            parts.append(f"{values} at batch {batch_size}")
    return "; ".join(parts) or "one network alone"


def _widens(sizes: Mapping[int, Rows], value: Callable[[Row], float]) -> list[bool]:
    """Whether a value grows from each network to the next."""
    return [value(smaller) < value(larger) for group in sizes.values() for smaller, larger in itertools.pairwise(group)]


def _gamma(row: Row) -> float:
    return row["times"]["backward_ratio"]


def _inner_products_over_blend(row: Row) -> float:
    return row["times"]["seconds"]["inner_products"] / row["times"]["seconds"]["blend"]


def _backward_term(row: Row) -> float:
    """(γ − 1)F, in seconds."""
    return (_gamma(row) - 1) * row["times"]["seconds"]["forward"]


def _others(row: Row) -> float:
    """D_α − C_mix, in seconds."""
    return row["times"]["seconds"]["inner_products"] - row["times"]["seconds"]["blend"]


def _margin(row: Row) -> float:
    """The right side of Eq. (10) over the left."""
    seconds = row["times"]["seconds"]
    return (_backward_term(row) + seconds["inner_products"]) / seconds["blend"]


def _dominance(row: Row) -> float:
    """The first term of Eq. (21) over the others."""
    return _backward_term(row) / max(abs(_others(row)), 1e-12)


def _time_gap(row: Row) -> float:
    """T_full − T_SPSA as measured, in milliseconds."""
    return 1000 * (row["times"]["seconds"]["full_step"] - row["times"]["seconds"]["spsa_step"])


def _flops_gap(row: Row) -> float:
    """Of the compiled steps, in GFLOP."""
    return (row["flops"]["full_step"] - row["flops"]["spsa_step_vmapped"]) / 1e9
