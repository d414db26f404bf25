"""Types in the library's signatures: trees, functions that a user passes, states, metrics and results."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax
import numpy as np

__all__ = [
    "Batch",
    "Diagnostics",
    "GlueMetrics",
    "GlueState",
    "History",
    "LearnResult",
    "LinkFn",
    "LossFn",
    "MergeFn",
    "Params",
    "Progress",
    "PyTree",
    "StepFn",
]

PyTree: TypeAlias = Any
"""Any pytree of arrays."""

Params: TypeAlias = Any
"""A model as a pytree: its parameters and, if it has them, its BatchNorm statistics."""

Batch: TypeAlias = Any
"""A minibatch as a pytree of arrays `[B, ...]`."""


class LossFn(Protocol):
    """A function `loss_fn(params, batch) -> scalar`. The library needs nothing else from a model (Eq. 2)."""

    def __call__(self, params: Params, batch: Batch, /) -> jax.Array:
        """Returns the mean loss of `params` on `batch`, shape `[]`."""
        ...


class LinkFn(Protocol):
    """A function `link_fn(beta) -> alpha`. It turns the learned beta into the blend's coefficients alpha."""

    def __call__(self, beta: PyTree, /) -> PyTree:
        """Returns alpha. The default link, a softmax, maps `[..., K]` to `[..., K]`."""
        ...


class MergeFn(Protocol):
    """A function `merge_fn(experts, alpha) -> params`. It makes one model from the stacked experts (Eq. 1)."""

    def __call__(self, experts: Params, alpha: PyTree, /) -> Params:
        """Returns the merged model.

        A merge function may have a keyword `min_dtype`, as `blend` has. The steps then call it with
        `min_dtype=jnp.float32`.
        """
        ...


class GlueState(NamedTuple):
    """The state of learning: each step takes one and returns the next one.

    Attributes:
        step: the number of steps taken, int32 `[]`.
        beta: the learned coefficients, `[K]` or any pytree.
        opt_state: the optimizer's state. `gauss_newton_step` keeps a `glue_jax.quadratic_model.GaussNewtonState` here.
    """

    step: jax.Array
    beta: PyTree
    opt_state: Any


class Diagnostics(NamedTuple):
    """Two measures of how good SPSA's slopes are. They need the same slopes at twice the radius.

    Attributes:
        disagreement: how much the slopes change when the radius doubles, `[]`. It is the root mean square of the change
            over the directions, divided by the root mean square of the slopes at twice the radius. Rounding errors
            raise it, because they spoil the slopes at the radius. Curvature of the loss raises it, because curvature
            spoils the slopes at twice the radius. A radius is good if this value is below 0.1. `calibrate` finds a
            better radius.
        curvature: the second derivative along a direction, `(L+ + L- - 2 L) / radius^2`, averaged over the directions,
            `[]`.
    """

    disagreement: jax.Array
    curvature: jax.Array


class GlueMetrics(NamedTuple):
    """What a step measured.

    The values describe the state that the step was given. The `gradient_norm` of `gauss_newton_step` is the exception.

    Attributes:
        loss: the loss on the minibatch, `[]`. `spsa_step` reports the mean loss of its probes. The other steps report
            the loss of the unperturbed blend.
        alpha: the blend's coefficients, `[K]` or any pytree.
        gradient_norm: the Euclidean norm of the estimated gradient with respect to `beta`, `[]`. `gauss_newton_step`
            reports the norm of the gradient of its quadratic model at the next beta.
        probe_losses: the losses `L+` and `L-` along each of m directions (Eq. 3), `[m, 2]`. Only SPSA has them; the
            other estimators give None.
        diagnostics: how good SPSA's estimate is. It is None unless the step was `spsa_step(..., diagnostics=True)`.
    """

    loss: jax.Array
    alpha: PyTree
    gradient_norm: jax.Array
    probe_losses: jax.Array | None
    diagnostics: Diagnostics | None = None


StepFn: TypeAlias = Callable[..., tuple[GlueState, GlueMetrics]]
"""One of the steps, perhaps with some keyword arguments filled in by `functools.partial`.

`learn` calls it as `step_fn(key, state, experts, batch, loss_fn=, link_fn=, merge_fn=)`. If `learn` was given an
optimizer, it passes `optimizer=` too.
"""


class History(NamedTuple):
    """The history of a run of `learn`, as NumPy arrays: S steps and V validations.

    Attributes:
        metrics: the metrics of all steps, stacked: `loss` is `[S]`, `alpha` is `[S, ...]`, and so on.
        validation_steps: the number of steps taken before each validation, int `[V]`. The first validation judges the
            start.
        validation_values: the value of each validation, `[V]`.
    """

    metrics: GlueMetrics
    validation_steps: np.ndarray
    validation_values: np.ndarray


class LearnResult(NamedTuple):
    """The result of `learn`.

    `learn(..., state=result)` continues the run as if it had never stopped. It keeps the best coefficients, the
    patience and the history. `learn(..., state=result.state)` starts from the last coefficients with a new history.

    Attributes:
        alpha: the coefficients with the best validation value. Without validation data, these are the last
            coefficients.
        beta: the beta that gives `alpha`. `init(..., beta=...)` can start from it.
        last_alpha: the coefficients after the last step.
        state: the state after the last step.
        history: the metrics and the validations of the run.
        start: the index of the best start, if the result comes from `learn_from_starts`. `learn` gives None.
    """

    alpha: PyTree
    beta: PyTree
    last_alpha: PyTree
    state: GlueState
    history: History
    start: int | None = None


class Progress(NamedTuple):
    """What `learn` tells a callback after each chunk of steps.

    Attributes:
        step: the number of steps taken in this call.
        max_steps: the largest number of steps that this call takes.
        metrics: the metrics of the last step, as NumPy arrays.
        validation_value: the validation value after the last step. It is None without validation data.
        best_value: the lowest validation value so far. It is None without validation data.
        result: the result so far, as `learn` would return it now.
    """

    step: int
    max_steps: int
    metrics: GlueMetrics
    validation_value: float | None
    best_value: float | None
    result: LearnResult
