"""The types that the library's functions share."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax
import numpy as np

PyTree: TypeAlias = Any
"""Any pytree of arrays."""

Params: TypeAlias = Any
"""A model as a pytree: its parameters and, where it has them, its BatchNorm statistics."""

Batch: TypeAlias = Any
"""A minibatch as a pytree of arrays `[B, ...]`."""


class LossFn(Protocol):
    """`loss_fn(params, batch) -> scalar`: all that the library asks of a model (Eq. 2)."""

    def __call__(self, params: Params, batch: Batch, /) -> jax.Array:
        """Returns the mean loss of `params` on `batch`, shape `[]`."""
        ...


class LinkFn(Protocol):
    """`link_fn(beta) -> alpha`: from the coefficients that are learned to those that blend."""

    def __call__(self, beta: PyTree, /) -> PyTree:
        """Returns alpha; `[..., K]` from `[..., K]` for the default, a softmax."""
        ...


class MergeFn(Protocol):
    """`merge_fn(experts, alpha) -> params`: one model from the stacked experts (Eq. 1)."""

    def __call__(self, experts: Params, alpha: PyTree, /) -> Params:
        """Returns the merged model.

        A merge that has a keyword `min_dtype`, as `blend`, is called with float32 while the coefficients are learned.
        """
        ...


class GlueState(NamedTuple):
    """What a step carries on.

    Attributes:
        step: steps taken, int32 `[]`.
        beta: the learned coefficients, `[K]` or any pytree.
        opt_state: the state of the optimizer of `beta`; for `gauss_newton_step` its `GaussNewtonState`.
    """

    step: jax.Array
    beta: PyTree
    opt_state: Any


class Diagnostics(NamedTuple):
    """How good the slopes of SPSA are, by the same slopes measured again at twice the radius.

    Attributes:
        disagreement: how far the slopes at the radius are from those at twice the radius, root mean squares over
            directions, as a fraction of the latter's size, `[]`. It sees every kind of rounding, which spoils the
            slope at the radius, and the loss's bends, which spoil the slope at twice the radius. Below 0.1 the radius
            is good; `calibrate` looks for a better one.
        curvature: the mean over directions of `(L+ + L- - 2 L) / radius^2`, the second derivative along a direction,
            `[]`.
    """

    disagreement: jax.Array
    curvature: jax.Array


class GlueMetrics(NamedTuple):
    """What a step measured. All of it belongs to the state that went in.

    Attributes:
        loss: the loss on the minibatch, `[]`; for SPSA the mean of its probes, for the others the loss of the
            unperturbed blend.
        alpha: the blend's coefficients, `[K]` or any pytree.
        gradient_norm: the Euclidean norm of the estimated gradient for `beta`, `[]`; for Gauss-Newton that of its model
            of the loss.
        probe_losses: `[m, 2]`, the losses `L+` and `L-` of each direction (Eq. 3); None for the other estimators.
        diagnostics: how good SPSA's estimate is; None but from `spsa_step(..., diagnostics=True)`.
    """

    loss: jax.Array
    alpha: PyTree
    gradient_norm: jax.Array
    probe_losses: jax.Array | None
    diagnostics: Diagnostics | None = None


StepFn: TypeAlias = Callable[..., tuple[GlueState, GlueMetrics]]
"""One of the steps, perhaps with some words filled in.

`learn` calls it as `step_fn(key, state, experts, batch, loss_fn=, link_fn=, merge_fn=)`, and with `optimizer=` where it
was given one.
"""


class History(NamedTuple):
    """What `learn` saw, as NumPy arrays; S steps, V validations.

    Attributes:
        metrics: those of each step, stacked: `loss` `[S]`, `alpha` `[S, ...]`, and so on.
        validation_steps: the steps taken before each validation, int `[V]`; the first is of the start.
        validation_values: what each validation returned, `[V]`.
    """

    metrics: GlueMetrics
    validation_steps: np.ndarray
    validation_values: np.ndarray


class LearnResult(NamedTuple):
    """What `learn` found.

    Attributes:
        alpha: the coefficients of the best validation; without validation data, the last ones.
        beta: what `alpha` comes from, a start for `init(..., beta=...)`.
        last_alpha: the coefficients after the last step.
        state: after the last step.
        history: what was seen on the way.
        start: from `learn_from_starts`, which of the starts this is; None from `learn`.

    `learn(..., state=result)` goes on as if it had never stopped: with the best coefficients, the patience and the
    history. `learn(..., state=result.state)` begins a history of its own there.
    """

    alpha: PyTree
    beta: PyTree
    last_alpha: PyTree
    state: GlueState
    history: History
    start: int | None = None


class Progress(NamedTuple):
    """What a callback is told after each chunk of steps.

    Attributes:
        step: steps taken in this call.
        max_steps: the most that it takes.
        metrics: of the last step, as NumPy arrays.
        validation_value: of the state after the last step; None without validation data.
        best_value: the lowest so far; None without validation data.
        result: all that was learned so far, as `learn` would return it now.
    """

    step: int
    max_steps: int
    metrics: GlueMetrics
    validation_value: float | None
    best_value: float | None
    result: LearnResult
