"""The report that `glue_jax.plan` returns: its types, and its text."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from glue_jax.types import StepFn

__all__ = ["LeftOut", "Plan", "PlannedStep"]


class PlannedStep(NamedTuple):
    """One step, and its cost.

    Attributes:
        name: the name of the estimator.
        step_fn: the step with its options filled in, for `learn(..., step_fn=...)`.
        probe_batch_size: how many models or tangents are computed together. It is None for the full gradient.
        forward_passes: the number of forward passes in a step. Each goes through one blended model.
        tangents: the number of tangents in a step. A tangent is the derivative of a forward pass along one direction
            (`jax.jvp`).
        backward_passes: the number of backward passes in a step.
        steps: how many of these steps make as much progress as one step with the exact gradient (see `plan`).
        assumed: whether `steps` is an assumption, as for Gauss-Newton.
        seconds: the median time of one step, in seconds.
        temporary_bytes: the memory that the compiled step takes beside its arguments and results. It is None if the
            backend does not say.
    """

    name: str
    step_fn: StepFn
    probe_batch_size: int | None
    forward_passes: int
    tangents: int
    backward_passes: int
    steps: float
    assumed: bool = False
    seconds: float = math.nan
    temporary_bytes: int | None = None

    @property
    def progress_seconds(self) -> float:
        """The cost: the seconds for as much progress as one step with the exact gradient makes."""
        return self.steps * self.seconds


class LeftOut(NamedTuple):
    """A step that does not run here.

    Attributes:
        name: the name of the estimator.
        probe_batch_size: how many models or tangents would be computed together.
        reason: why the step does not run.
    """

    name: str
    probe_batch_size: int | None
    reason: str


class Plan(NamedTuple):
    """The measurements of `plan`, and its recommendation. `print(plan)` shows them as a table.

    Attributes:
        best: the step with the least `progress_seconds`.
        steps: all steps that ran, in the order in which they were measured.
        left_out: the steps that did not run, with the reasons.
        device: the devices of the experts, in words.
        dimension: d, the number of independent directions that change the blend.
        forward: F, the seconds for the loss of one model.
        blend: C_mix, the seconds to make one model of the experts.
        backward_ratio: gamma; a backward pass takes gamma F. It is None if the loss cannot be differentiated.
        inner_products: D_alpha, the seconds to turn a gradient for the model into a gradient for alpha. It is None if
            the loss cannot be differentiated.
        spsa_is_cheaper: whether Eq. (10) holds, `C_mix < (gamma - 1) F + D_alpha`. If it holds, one direction of SPSA
            takes less time than a full gradient. It is None if the loss cannot be differentiated.
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
        """Returns the plan as text: each estimator at its best `probe_batch_size`, and the recommendation."""
        return "\n".join([*_table(self), "", *_eq_10(self), "", *_advice(self)])


def _table(plan: Plan) -> list[str]:
    """Returns the table: one row for each estimator at its cheapest size."""
    cheapest: dict[str, PlannedStep] = {}
    for step in sorted(plan.steps, key=lambda step: step.progress_seconds, reverse=True):
        cheapest[step.name] = step
    rows = [("step", "probe_batch_size", "memory, MB", "seconds", "cost, seconds")]
    for step in sorted(cheapest.values(), key=lambda step: step.progress_seconds):
        memory = "?" if step.temporary_bytes is None else f"{step.temporary_bytes / 1e6:.4g}"
        size = "-" if step.probe_batch_size is None else str(step.probe_batch_size)
        cost = f"{step.progress_seconds:.3g}"
        rows.append((step.name, size, memory, f"{step.seconds:.3g}", cost))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        f"Measured on {plan.device}, with d = {plan.dimension} directions to learn. The cost is the time to make as",
        "much progress as one step with the exact gradient: the seconds of one step, times the number of steps.",
        "",
    ]
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    return lines


def _eq_10(plan: Plan) -> list[str]:
    """Returns the terms of Eq. (9), and whether Eq. (10) holds."""
    lines = [f"One forward pass F = {plan.forward:.3g} s, one blend C_mix = {plan.blend:.3g} s."]
    if plan.backward_ratio is None or plan.inner_products is None:
        return [*lines, "Eq. (10) has no answer: the full gradient was not measured."]
    right = (plan.backward_ratio - 1) * plan.forward + plan.inner_products
    verdict = ("holds", "less") if plan.spsa_is_cheaper else ("does not hold", "no less")
    return [
        *lines,
        f"A backward pass takes gamma = {plan.backward_ratio:.3g} times F. The inner products take D_alpha = "
        f"{plan.inner_products:.3g} s.",
        f"Eq. (10), C_mix < (gamma - 1) F + D_alpha, {verdict[0]}: {plan.blend:.3g} s against {right:.3g} s.",
        f"So one SPSA direction takes {verdict[1]} time than a full gradient. (It makes 1/d of the progress.)",
    ]


def _advice(plan: Plan) -> list[str]:
    """Returns the recommendation, what it assumes of Gauss-Newton, and the steps that were left out."""

    def named(step: PlannedStep) -> str:
        return (
            step.name if step.probe_batch_size is None else f"{step.name} with probe_batch_size={step.probe_batch_size}"
        )

    best = plan.best
    lines = [f"Cheapest: {named(best)}, {best.progress_seconds:.3g} s."]
    others = [step for step in plan.steps if step.assumed != best.assumed]
    if others:
        other = min(others, key=lambda step: step.progress_seconds)
        assumed, exact = (best, other) if best.assumed else (other, best)
        lines += [
            "This counts a Gauss-Newton step as one gradient step. It is worth less in the first steps, and more near "
            "the minimum.",
            f"If it is worth more than {assumed.progress_seconds / exact.progress_seconds:.3g} gradient steps, "
            f"{named(assumed)} is the cheapest. Otherwise {named(exact)} is.",
        ]
    return lines + (["", *reasons(plan.left_out)] if plan.left_out else [])


def reasons(left_out: Sequence[LeftOut]) -> list[str]:
    """Returns the steps that were left out, one line for each estimator and reason."""
    sizes: dict[tuple[str, str], list[str]] = {}
    for step in left_out:
        known = [] if step.probe_batch_size is None else [str(step.probe_batch_size)]
        sizes.setdefault((step.name, step.reason), []).extend(known)
    return [
        f"Left out: {name}" + (f" (probe_batch_size {', '.join(found)})" if found else "") + f": {reason}"
        for (name, reason), found in sizes.items()
    ]
