"""A loss, a gradient or coefficients that are no longer finite, and what may be the reason."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from glue_jax.types import LearnResult, PyTree, StepFn

# The most paths that a message names.
_MOST_PATHS = 3


class NonFiniteLossError(FloatingPointError):
    """A loss, the norm of its gradient, a validation value or beta became infinite or not a number.

    Attributes:
        what: which of them.
        step: the step that it belongs to.
        value: what it was.
        advice: what may be the reason.
        result: the `LearnResult` of what was finite before it; `learn(..., state=error.result)` goes on from there.
    """

    result: LearnResult

    def __init__(self, what: str, step: int, value: float, advice: str):
        """Builds the message from its parts."""
        super().__init__(f"the {what} is {value} at step {step}: expected a finite number ({advice})")
        self.what, self.step, self.value, self.advice = what, step, value, advice

    def __reduce__(self) -> tuple[Any, ...]:
        """Its parts, from which `copy` and `pickle` build it anew."""
        return type(self), (self.what, self.step, self.value, self.advice), self.__dict__


def explain(what: str, step: int, *, first_step: int, step_fn: StepFn, inputs: dict[str, PyTree]) -> str:
    """What may be the reason, and what to do.

    Args:
        what: is not finite.
        step: the one that it belongs to.
        first_step: of the run. A learning rate has done nothing before it.
        step_fn: the step, perhaps a `functools.partial` with a radius.
        inputs: the arrays that the loss was computed from, by name.
    """
    if _radius_is_zero(step_fn, step) and what == "gradient_norm":
        return "the radius is 0 there, and the probes' difference is divided by it"
    reasons = []
    if bad := [path for name, tree in inputs.items() for path in _non_finite(name, tree)]:
        more = f" and {len(bad) - _MOST_PATHS} more" if len(bad) > _MOST_PATHS else ""
        reasons.append(f"not finite: {', '.join(bad[:_MOST_PATHS])}{more}")
    elif what == "gradient_norm":
        reasons.append("the loss is finite there: look for a slope that is not, such as a square root's at 0")
    elif step == first_step and what != "new beta":
        reasons.append(
            f"{', '.join(inputs)} are finite: look in the functions for a division by 0, a logarithm of 0, an overflow"
        )
    if step > first_step or what == "new beta":
        reasons.append("a smaller learning rate may help")
    return "; ".join(reasons)


def _non_finite(name: str, tree: PyTree) -> list[str]:
    """The leaves that are not finite, each by its path and its first such row."""
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
    """Which entries along the leading axis hold what is not finite."""
    return ~jnp.all(jnp.isfinite(leaf), axis=tuple(range(1, leaf.ndim)))


def _radius_is_zero(step_fn: StepFn, step: int) -> bool:
    """Whether a partial gives its step a radius of 0."""
    radius = step_fn.keywords.get("radius") if isinstance(step_fn, functools.partial) else None
    found = radius(step) if callable(radius) else radius
    return found is not None and bool(np.all(np.asarray(found) == 0))
