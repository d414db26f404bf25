"""What the library promises of the cost of a step, each beside what was measured."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

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


class Promise(NamedTuple):
    """A promise about one row.

    Attributes:
        what: in words.
        where: network, batch size, and what it was measured on or compiled for.
        limit: the most that is promised.
        measured: None where the row was not measured, or its promise is of another machine.
    """

    what: str
    where: str
    limit: float
    measured: float | None

    @property
    def verdict(self) -> str:
        """Whether it is kept."""
        if self.measured is None:
            return "not measured"
        return "kept" if self.measured <= self.limit else "missed"


def promises(rows: Rows, tpu_rows: Rows, num_experts: int) -> list[Promise]:
    """Returns the promises about the rows of one direction and `num_experts` experts.

    Args:
        rows: of `experiments.cost.measurement.measure`.
        tpu_rows: of `experiments.tpu`.
        num_experts: K.
    """
    base = [row for row in rows if row["num_experts"] == num_experts and row["num_directions"] == 1]
    return [*_times(base), *_flops(base, tpu_rows), *_memory(base, tpu_rows), *_predictions(base)]


def _times(rows: Rows) -> Iterable[Promise]:
    for row in rows:
        timed = row["times"] if row["platform"] == "cpu" else None
        yield Promise("SPSA step / full step, time", _where(row), TIME_LIMIT, timed and timed["spsa_over_full"])


def _flops(rows: Rows, tpu_rows: Rows) -> Iterable[Promise]:
    for row in (*rows, *tpu_rows):
        ratio = row["flops"]["spsa_step_vmapped"] / row["flops"]["full_step"]
        yield Promise("the same, FLOPs, probes vmapped", _where(row), FLOPS_LIMIT, ratio)


def _memory(rows: Rows, tpu_rows: Rows) -> Iterable[Promise]:
    what = "the same, peak temporary memory"
    wanted = {"network": MEMORY_NETWORK, "batch_size": MEMORY_BATCH_SIZE}
    found = [row for row in (*rows, *tpu_rows) if wanted.items() <= row.items()]
    for row in found:
        memory = row["temporary_bytes"]
        yield Promise(what, _where(row), MEMORY_LIMIT, memory["spsa_step"] / memory["full_step"])
    if not found:
        yield Promise(what, f"{MEMORY_NETWORK}, batch {MEMORY_BATCH_SIZE}", MEMORY_LIMIT, None)


def _predictions(rows: Rows) -> Iterable[Promise]:
    for row in rows:
        ratio = row["times"] and row["times"]["over_predicted"]["spsa_step"]
        yield Promise("SPSA step / 2 (F + C_mix), time", _where(row), PREDICTION_LIMIT, ratio)


def _where(row: Mapping[str, Any]) -> str:
    """A row of the base, and its platform."""
    return f"{row['network']}, batch {row['batch_size']}, {row['platform']}"
