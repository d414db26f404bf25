"""What the library promises of the cost of a step, each beside what was measured."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Rows = Sequence[Mapping[str, Any]]

TIME_LIMIT = 0.5
"""Of one SPSA step over one full-gradient step, on a CPU."""
FLOPS_LIMIT = 0.67
"""The same by FLOPs, all probes in one vmapped forward."""
MEMORY_LIMIT = 0.2
"""The same by peak temporary memory, on `MEMORY_NETWORK` at `MEMORY_BATCH_SIZE`."""
PREDICTION_LIMIT = 1.05
"""Of the SPSA step over 2 (F + C_mix)."""
MEMORY_NETWORK, MEMORY_BATCH_SIZE = "resnet20", 512


def promises(rows: Rows, tpu_rows: Rows, num_experts: int) -> list[dict[str, Any]]:
    """Returns the promises about the rows of one direction and `num_experts` experts.

    Args:
        rows: of `experiments.studies.cost.step_costs.measure`.
        tpu_rows: of `experiments.studies.cost.tpu`, which were not run: no promise about time is theirs.
        num_experts: K.

    Returns:
        A dict for each promise and row, that JSON holds: `what`; `where`, its network, batch size and platform;
        `limit`, the most that is promised, a ratio; `measured`, None where that was not done; `verdict`.
    """

    def of_base(rows: Rows) -> Rows:
        return [row for row in rows if row["num_experts"] == num_experts and row["num_directions"] == 1]

    measured, compiled = of_base(rows), of_base(tpu_rows)
    return [
        *_times(measured),
        *_flops([*measured, *compiled]),
        *_memory([*measured, *compiled]),
        *_predictions(measured),
    ]


def _times(rows: Rows) -> Iterator[dict[str, Any]]:
    for row in rows:
        if row["platform"] == "cpu":
            ratio = row["times"] and row["times"]["spsa_over_full"]
            yield _promise("SPSA step / full step, time", _where(row), TIME_LIMIT, ratio)


def _flops(rows: Rows) -> Iterator[dict[str, Any]]:
    for row in rows:
        ratio = row["flops"]["spsa_step_vmapped"] / row["flops"]["full_step"]
        yield _promise("SPSA step / full step, FLOPs, all probes vmapped", _where(row), FLOPS_LIMIT, ratio)


def _memory(rows: Rows) -> Iterator[dict[str, Any]]:
    what = "SPSA step / full step, peak temporary memory"
    wanted = {"network": MEMORY_NETWORK, "batch_size": MEMORY_BATCH_SIZE}
    found = [row for row in rows if wanted.items() <= row.items()]
    for row in found:
        memory = row["temporary_bytes"]
        yield _promise(what, _where(row), MEMORY_LIMIT, memory["spsa_step"] / memory["full_step"])
    if not found:
        yield _promise(what, f"{MEMORY_NETWORK}, batch {MEMORY_BATCH_SIZE}", MEMORY_LIMIT, None)


def _predictions(rows: Rows) -> Iterator[dict[str, Any]]:
    for row in rows:
        ratio = row["times"] and row["times"]["over_predicted"]["spsa_step"]
        yield _promise("SPSA step / 2 (F + C_mix), time", _where(row), PREDICTION_LIMIT, ratio)


def _promise(what: str, where: str, limit: float, measured: float | None) -> dict[str, Any]:
    """A promise, and whether it is kept."""
    verdict = "not measured" if measured is None else "kept" if measured <= limit else "missed"
    return {"what": what, "where": where, "limit": limit, "measured": measured, "verdict": verdict}


def _where(row: Mapping[str, Any]) -> str:
    """A row of the base, and its platform."""
    return f"{row['network']}, batch {row['batch_size']}, {row['platform']}"
