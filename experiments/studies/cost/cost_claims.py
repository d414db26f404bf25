"""The paper's claims about the cost of a step, in its sections 4.1 and 6, each beside what was measured."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from experiments.reporting.presentation import Claim, TableCells, grouped, number

Row = Mapping[str, Any]
Rows = Sequence[Row]

SAME_ORDER = 10
"""Two costs are of the same order where neither is more than so many times the other."""
EXPLANATION = (
    "The claims are in the paper's words. A verdict is 'yes' where a claim holds in every row that it is about, and "
    f"'no' where it holds in none. 'Of the same order' means within a factor of {SAME_ORDER}. 'Dominates' means larger "
    "than the rest. 'As networks grow' compares each network with the one that has the next more parameters, at the "
    "same batch size. These networks are of different kinds, with images of different sizes: it is not one network "
    "that grows."
)
"""How `claims` judges."""


def claims(rows: Rows, num_experts: int) -> Iterator[Claim]:
    """Yields the paper's claims.

    Those about the growth of networks take the rows of one direction and `num_experts` experts.
    """
    timed = [row for row in rows if row["times"] is not None]
    pairs = [row for row in timed if row["num_directions"] == 1]
    met = [row for row in pairs if row["times"]["predicted_cheaper"]]
    gammas = [row["times"]["backward_ratio"] for row in timed]
    yield Claim(
        "'the cost of the backward pass is typically more than 2F (γ ≥ 2)'",
        "4.1",
        "γ",
        gammas,
        [gamma >= 2 for gamma in gammas],
    )
    ratios = [row["times"]["seconds"]["inner_products"] / row["times"]["seconds"]["blend"] for row in timed]
    yield Claim(
        "'the inner product cost D_α is typically of the same order as the mixing cost C_mix'",
        "4.1",
        "D_α / C_mix",
        ratios,
        [1 / SAME_ORDER <= ratio <= SAME_ORDER for ratio in ratios],
    )
    yield Claim(
        "'the condition is easily met', C_mix < (γ − 1)F + D_α, Eq. (10), for m = 1",
        "4.1",
        "its right side over C_mix",
        [
            (_backward_term(row) + row["times"]["seconds"]["inner_products"]) / row["times"]["seconds"]["blend"]
            for row in pairs
        ],
        [row["times"]["predicted_cheaper"] for row in pairs],
    )
    yield Claim(
        "'whenever' it is met, 'a single SPSA pair is cheaper than a full-gradient step'",
        "4.1",
        "SPSA step / full step, time",
        [row["times"]["spsa_over_full"] for row in met],
        [row["times"]["cheaper"] for row in met],
    )
    sizes = by_size(rows, num_experts)
    timed_sizes = {batch_size: [row for row in group if row["times"]] for batch_size, group in sizes.items()}
    growing = [row for group in timed_sizes.values() if len(group) > 1 for row in group]
    dominance = [_backward_term(row) / max(abs(_others(row)), 1e-12) for row in growing]
    yield Claim(
        "'as networks grow, the backward term (γ − 1)F dominates' T_full − T_SPSA, Eq. (21)",
        "6",
        "(γ − 1)F over the size of D_α − C_mix",
        dominance,
        [ratio > 1 for ratio in dominance],
    )
    for groups, gap, quantity in (
        (timed_sizes, _time_gap, "growth of T_full − T_SPSA from each network to the next, ms"),
        (sizes, _flops_gap, "growth of the FLOPs of full − SPSA, all probes vmapped, GFLOP"),
    ):
        grown = [gap(more) - gap(less) for group in groups.values() for less, more in itertools.pairwise(group)]
        claim = "'so the gap widens in favor of SPSA'"
        yield Claim(claim, "6", quantity, grown, [value > 0 for value in grown])


def by_size(rows: Rows, num_experts: int) -> dict[int, list[Row]]:
    """Returns the rows of one direction and `num_experts` experts by batch size. The fewest parameters come first."""
    base = [row for row in rows if row["num_experts"] == num_experts and row["num_directions"] == 1]
    return grouped(sorted(base, key=lambda row: (row["batch_size"], row["parameters"])), "batch_size")


def growth_table(rows: Rows, num_experts: int) -> TableCells:
    """Returns headers and cells: the terms of Eq. (21), and the gap as measured, by the networks' parameters."""
    headers = ["network", "parameters", "batch", "(γ − 1)F, ms", "D_α − C_mix, ms", "T_full − T_SPSA, ms"]
    headers += ["SPSA / full", "full − SPSA, GFLOP", "SPSA / full"]
    table = []
    for row in itertools.chain.from_iterable(by_size(rows, num_experts).values()):
        flops, cells = row["flops"], ["-"] * 4
        if row["times"]:
            cells = [number(value) for value in (1000 * _backward_term(row), 1000 * _others(row), _time_gap(row))]
            cells.append(f"{row['times']['spsa_over_full']:.3f}")
        ratio = flops["spsa_step_vmapped"] / flops["full_step"]
        cells += [number(_flops_gap(row)), f"{ratio:.3f}"]
        table.append([row["network"], f"{row['parameters']:,}", str(row["batch_size"]), *cells])
    return headers, table


def _backward_term(row: Row) -> float:
    """Returns (γ − 1)F, in seconds."""
    return (row["times"]["backward_ratio"] - 1) * row["times"]["seconds"]["forward"]


def _others(row: Row) -> float:
    """Returns D_α − C_mix, in seconds."""
    return row["times"]["seconds"]["inner_products"] - row["times"]["seconds"]["blend"]


def _time_gap(row: Row) -> float:
    """Returns T_full − T_SPSA as measured, in milliseconds."""
    return 1000 * (row["times"]["seconds"]["full_step"] - row["times"]["seconds"]["spsa_step"])


def _flops_gap(row: Row) -> float:
    """Returns the difference between the compiled steps, in GFLOP."""
    return (row["flops"]["full_step"] - row["flops"]["spsa_step_vmapped"]) / 1e9
