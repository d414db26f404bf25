"""What `glue_jax.plan` returns, and how it reads as text."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from glue_jax.types import StepFn


class PlannedStep(NamedTuple):
    """One step, and what it costs here.

    Attributes:
        name: of the estimator.
        step_fn: the step with its words filled in, for `learn(..., step_fn=...)`.
        probe_batch_size: how many models or tangents are computed together; None for the full gradient.
        forward_passes: of a step, each through one blended model.
        tangents: derivatives of a forward pass along one direction (`jax.jvp`), of a step.
        backward_passes: of a step.
        steps: of this kind that are worth one step with the exact gradient (see `plan`).
        at_most: whether `steps` is an upper bound only, as of Gauss-Newton.
        seconds: of one step, a median.
        temporary_bytes: what the compiled step takes beside its arguments and results; None where the backend does not
            say.
    """

    name: str
    step_fn: StepFn
    probe_batch_size: int | None
    forward_passes: int
    tangents: int
    backward_passes: int
    steps: float
    at_most: bool = False
    seconds: float = math.nan
    temporary_bytes: int | None = None

    @property
    def progress_seconds(self) -> float:
        """The seconds for as much progress as a step with the exact gradient makes."""
        return self.steps * self.seconds


class LeftOut(NamedTuple):
    """A step that does not run here.

    Attributes:
        name: of the estimator.
        probe_batch_size: as of a `PlannedStep`.
        reason: why.
    """

    name: str
    probe_batch_size: int | None
    reason: str


class Plan(NamedTuple):
    """What `plan` measured, and what follows. `print(plan)` shows it as a table.

    Attributes:
        best: the step with the least `progress_seconds`.
        steps: all that ran, in the order in which they were measured.
        left_out: those that did not, with the reason.
        device: what they ran on.
        dimension: d, how many directions change the blend.
        forward: F, seconds of the loss of one model.
        blend: C_mix, seconds to make one model of the experts.
        backward_ratio: gamma, such that a backward pass takes gamma F; None if the loss cannot be differentiated.
        inner_products: D_alpha, seconds from the gradient for the model to that for alpha; None as before.
        spsa_is_cheaper: whether Eq. (10) holds, `C_mix < (gamma - 1) F + D_alpha`: whether the two blends and forward
            passes of one SPSA direction take less than a full gradient does; None as before.
    """

    best: PlannedStep
    steps: tuple[PlannedStep, ...]
    left_out: tuple[LeftOut, ...]
    device: str
    dimension: int
    forward: float
    blend: float
    backward_ratio: float | None
    inner_products: float | None
    spsa_is_cheaper: bool | None

    def __str__(self) -> str:
        """Returns the plan as text: each estimator at its best `probe_batch_size`, and what follows."""
        return "\n".join([*_table(self), "", *_eq_10(self), "", *_advice(self)])


def _table(plan: Plan) -> list[str]:
    """A row for each estimator at its cheapest size."""
    cheapest: dict[str, PlannedStep] = {}
    for step in sorted(plan.steps, key=lambda step: step.progress_seconds, reverse=True):
        cheapest[step.name] = step
    rows = [("step", "probe_batch_size", "memory, MB", "seconds", "cost, seconds")]
    for step in sorted(cheapest.values(), key=lambda step: step.progress_seconds):
        memory = "?" if step.temporary_bytes is None else f"{step.temporary_bytes / 1e6:.4g}"
        size = "-" if step.probe_batch_size is None else str(step.probe_batch_size)
        cost = f"{'<= ' if step.at_most else ''}{step.progress_seconds:.3g}"
        rows.append((step.name, size, memory, f"{step.seconds:.3g}", cost))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        f"On {plan.device}, with d = {plan.dimension} directions to learn. The cost is the time for as much progress",
        "as one step with the exact gradient makes: the seconds of a step, times how many such steps that takes.",
        "",
    ]
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    return lines


def _eq_10(plan: Plan) -> list[str]:
    """The parts of Eq. (9), and what Eq. (10) says."""
    lines = [f"One forward pass F = {plan.forward:.3g} s, one blend C_mix = {plan.blend:.3g} s."]
    if plan.backward_ratio is None or plan.inner_products is None:
        return [*lines, "Eq. (10) has no answer: the full gradient was not measured."]
    right = (plan.backward_ratio - 1) * plan.forward + plan.inner_products
    verdict = ("holds", "less") if plan.spsa_is_cheaper else ("does not hold", "no less")
    return [
        *lines,
        f"A backward pass is gamma = {plan.backward_ratio:.3g} times F, the inner products D_alpha = "
        f"{plan.inner_products:.3g} s.",
        f"Eq. (10), C_mix < (gamma - 1) F + D_alpha, {verdict[0]}: {plan.blend:.3g} s against {right:.3g} s. By these "
        f"parts, one SPSA",
        f"direction takes {verdict[1]} time than a full gradient. (It makes 1/d of the progress.)",
    ]


def _advice(plan: Plan) -> list[str]:
    """The recommendation, from which worth on Gauss-Newton is it, and what was left out."""
    best = plan.best
    size = "" if best.probe_batch_size is None else f" with probe_batch_size={best.probe_batch_size}"
    at_most = "at most " if best.at_most else ""
    lines = [f"Cheapest: {best.name}{size}, {at_most}{best.progress_seconds:.3g} s."]
    others = [step for step in plan.steps if step.at_most]
    if others and not at_most:
        other = min(others, key=lambda step: step.progress_seconds)
        lines += [
            "A Gauss-Newton step is counted as one gradient step, and is worth at least that. Where it is worth more "
            "than",
            f"{other.progress_seconds / best.progress_seconds:.3g} of them, {other.name} with "
            f"probe_batch_size={other.probe_batch_size} is the cheapest.",
        ]
    return lines + (["", *reasons(plan.left_out)] if plan.left_out else [])


def reasons(left_out: Sequence[LeftOut]) -> list[str]:
    """Returns what was left out, a line for each estimator and reason."""
    sizes: dict[tuple[str, str], list[str]] = {}
    for step in left_out:
        known = [] if step.probe_batch_size is None else [str(step.probe_batch_size)]
        sizes.setdefault((step.name, step.reason), []).extend(known)
    return [
        f"Left out: {name}" + (f" (probe_batch_size {', '.join(found)})" if found else "") + f": {reason}"
        for (name, reason), found in sizes.items()
    ]
