"""`NonFiniteLossError`, and the advice in its message: why a loss, a gradient or beta may not be finite."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from glue_jax.types import LearnResult, PyTree, StepFn

LOOK_FOR = (
    "look in the functions and the labels for a division by 0, a logarithm of 0, an overflow, or a label of no class"
)
"""The advice for a value that is infinite or NaN at once."""
# A message names at most so many paths.
_MOST_PATHS = 3


class NonFiniteLossError(FloatingPointError):
    """A loss, a gradient norm, a validation value or beta became infinite or NaN.

    Attributes:
        what: which of these it was.
        step: the number of the step.
        value: the value that was not finite.
        advice: the likely reason.
        result: the `LearnResult` at the last validation or callback before that step.
            `learn(..., state=error.result)` continues from it.
    """

    result: LearnResult

    def __init__(self, what: str, step: int, value: float, advice: str):
        """Builds the message from its parts."""
        super().__init__(f"the {what} is {value} at step {step}: expected a finite number ({advice})")
        self.what, self.step, self.value, self.advice = what, step, value, advice

    def __reduce__(self) -> tuple[Any, ...]:
        """Returns the parts from which `copy` and `pickle` rebuild the error."""
        return type(self), (self.what, self.step, self.value, self.advice), self.__dict__


def explain(what: str, step: int, *, first_step: int, step_fn: StepFn, inputs: dict[str, PyTree]) -> str:
    """Returns the likely reason, and what to do.

    Args:
        what: the name of the value that is not finite.
        step: the number of the step.
        first_step: the number of the run's first step. The learning rate has had no effect at that step.
        step_fn: the step, perhaps a `functools.partial` with a radius.
        inputs: the arrays from which the loss was computed, by name.
    """
    if _radius_is_zero(step_fn, step) and what == "gradient_norm":
        return "the radius is 0 there, and the probes' difference is divided by it"
    reasons = []
    if bad := [path for name, tree in inputs.items() for path in _non_finite(name, tree)]:
        more = f" and {len(bad) - _MOST_PATHS} more" if len(bad) > _MOST_PATHS else ""
        reasons.append(f"not finite: {', '.join(bad[:_MOST_PATHS])}{more}")
    elif what == "gradient_norm":
        reasons.append(
            "the loss is finite there, but its derivative is not: look, for example, for a square root or a norm of 0"
        )
    elif step == first_step and what != "new beta":
        reasons.append(f"{', '.join(inputs)} are finite: {LOOK_FOR}")
    if step > first_step or what == "new beta":
        reasons.append("a smaller learning rate may help")
    return "; ".join(reasons)


def _non_finite(name: str, tree: PyTree) -> list[str]:
    """Returns the names of the leaves that are not finite, each with its path and its first bad row."""
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            continue
        rows = np.flatnonzero(_rows_non_finite(leaf))
        if rows.size:
            found.append(f"{name}{jax.tree_util.keystr(path)}" + (f"[{rows[0]}]" if leaf.ndim else ""))
    return found


@jax.jit
def _rows_non_finite(leaf: jax.Array) -> jax.Array:
    """Returns which entries along the leading axis are not finite."""
    return ~jnp.all(jnp.isfinite(leaf), axis=tuple(range(1, leaf.ndim)))


def _radius_is_zero(step_fn: StepFn, step: int) -> bool:
    """Returns whether a partial gives its step a radius of 0."""
    radius = step_fn.keywords.get("radius") if isinstance(step_fn, functools.partial) else None
    found = radius(step) if callable(radius) else radius
    return found is not None and bool(np.all(np.asarray(found) == 0))
