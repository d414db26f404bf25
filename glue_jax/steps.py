"""Steps that learn the coefficients, one minibatch each.

All are pure: `step(key, state, experts, batch, *, loss_fn, optimizer, ...) -> (state, metrics)`. Callers jit, and
keep the words that are functions out of the traced arguments by `functools.partial`. A step derives its own
randomness from `fold_in(key, state.step)`: one key serves a whole run.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from glue_jax.coefficients import check_floating
from glue_jax.directions import Directions
from glue_jax.estimators import Estimate, Scale, forward_gradient, full_gradient, spsa_gradient
from glue_jax.experts import blend
from glue_jax.types import Batch, GlueMetrics, GlueState, LinkFn, LossFn, MergeFn, Params, PyTree


def init(num_experts: int, optimizer: optax.GradientTransformation, *, beta: PyTree | None = None) -> GlueState:
    """Returns the state that learning starts from.

    Args:
        num_experts: K.
        optimizer: of beta; the paper's is `optax.adam(1e-2, b1=0.9, b2=0.99)`.
        beta: the start, any pytree of floating-point coefficients. None is zeros `[K]`, under a softmax the
            uniform average. `weights_to_logits` gives a start anywhere inside the simplex.

    Raises:
        ValueError: `num_experts` below 1.
        TypeError: a beta that is not floating point.
    """
    if num_experts < 1:
        raise ValueError(f"num_experts is {num_experts}; expected at least 1")
    start: PyTree = jnp.zeros((num_experts,), jnp.float32) if beta is None else beta
    check_floating(start)
    # A copy, since steps may donate their state; of no weak type, which would change in the first step and retrace.
    start = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.result_type(leaf)), start)
    return GlueState(step=jnp.zeros((), jnp.int32), beta=start, opt_state=optimizer.init(start))


def alpha(state: GlueState, link_fn: LinkFn = jax.nn.softmax) -> PyTree:
    """Returns the coefficients that blend, `link_fn(state.beta)`.

    Args:
        state: of `init` or a step.
        link_fn: the step's.
    """
    return link_fn(state.beta)


def spsa_step(
    key: jax.Array,
    state: GlueState,
    experts: Params,
    batch: Batch,
    *,
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    link_fn: LinkFn = jax.nn.softmax,
    merge_fn: MergeFn = blend,
    radius: ArrayLike | optax.Schedule = 1e-2,
    num_directions: int = 1,
    directions: Directions = "rademacher",
    scale: Scale = "unbiased",
    probe_batch_size: int | None = None,
) -> tuple[GlueState, GlueMetrics]:
    """One step of GLUE: two blended forward passes a direction, no backward pass (Eq. 3-7; the paper's Config 4).

    Args:
        key: a `jax.random.key`, the same for every step.
        state: of `init` or the step before.
        experts: stacked experts, each leaf `[K, ...]`.
        batch: a pytree of arrays `[B, ...]`. Both probes of a pair see it.
        loss_fn: `loss_fn(params, batch) -> scalar`, deterministic (no dropout; BatchNorm by its running statistics, or
            by the minibatch: see `glue_jax.batch_norm`). It is never differentiated.
        optimizer: of beta, the one given to `init`.
        link_fn: `link_fn(beta) -> alpha`. The softmax over the last axis keeps the blend in the experts' convex hull;
            `unconstrained` is the literal Eq. (7).
        merge_fn: `merge_fn(experts, alpha) -> params`.
        radius: the length of a probe's step in beta, or a schedule of it, `radius(step)`.
        num_directions: m.
        directions: see `spsa_gradient`.
        scale: see `spsa_gradient`.
        probe_batch_size: see `spsa_gradient`.

    Returns:
        The next state, and the metrics of the state that went in.

    Raises:
        ValueError: an argument out of its range, coefficients and experts that do not fit, a loss that is no scalar.

    Example:
        >>> from functools import partial
        >>> import jax, jax.numpy as jnp, optax
        >>> import glue_jax
        >>> experts = glue_jax.stack_experts([{"w": jnp.array(0.0)}, {"w": jnp.array(1.0)}])
        >>> optimizer = optax.adam(0.1)
        >>> state = glue_jax.init(2, optimizer)
        >>> step = jax.jit(
        ...     partial(glue_jax.spsa_step, loss_fn=lambda p, b: jnp.mean((p["w"] - b) ** 2), optimizer=optimizer)
        ... )
        >>> for _ in range(50):
        ...     state, metrics = step(jax.random.key(0), state, experts, jnp.array([0.75]))
        >>> bool(jnp.abs(glue_jax.alpha(state)[1] - 0.75) < 0.05)
        True
    """
    estimator = functools.partial(
        spsa_gradient,
        radius=radius(state.step) if callable(radius) else radius,
        num_directions=num_directions,
        directions=directions,
        scale=scale,
        probe_batch_size=probe_batch_size,
    )
    return _step(estimator, key, state, experts, batch, loss_fn, optimizer, link_fn, merge_fn)


def forward_gradient_step(
    key: jax.Array,
    state: GlueState,
    experts: Params,
    batch: Batch,
    *,
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    link_fn: LinkFn = jax.nn.softmax,
    merge_fn: MergeFn = blend,
    num_directions: int = 1,
    directions: Directions = "rademacher",
    scale: Scale = "unbiased",
    probe_batch_size: int | None = None,
) -> tuple[GlueState, GlueMetrics]:
    """One step with exact slopes along random directions, by forward-mode differentiation.

    As `spsa_step`, with `forward_gradient` in place of `spsa_gradient`; no radius.

    Args:
        key: as for `spsa_step`.
        state: as for `spsa_step`.
        experts: as for `spsa_step`.
        batch: as for `spsa_step`.
        loss_fn: as for `spsa_step`, and differentiable.
        optimizer: as for `spsa_step`.
        link_fn: as for `spsa_step`.
        merge_fn: as for `spsa_step`.
        num_directions: m.
        directions: see `spsa_gradient`.
        scale: see `spsa_gradient`.
        probe_batch_size: see `forward_gradient`.

    Returns:
        The next state, and the metrics of the state that went in.

    Raises:
        ValueError: as for `spsa_step`.
    """
    estimator = functools.partial(
        forward_gradient,
        num_directions=num_directions,
        directions=directions,
        scale=scale,
        probe_batch_size=probe_batch_size,
    )
    return _step(estimator, key, state, experts, batch, loss_fn, optimizer, link_fn, merge_fn)


def full_gradient_step(
    key: jax.Array,
    state: GlueState,
    experts: Params,
    batch: Batch,
    *,
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    link_fn: LinkFn = jax.nn.softmax,
    merge_fn: MergeFn = blend,
) -> tuple[GlueState, GlueMetrics]:
    """One step with the gradient by backpropagation through the blended network: the paper's Config 3.

    Args:
        key: not used; the steps share one contract.
        state: as for `spsa_step`.
        experts: as for `spsa_step`.
        batch: as for `spsa_step`.
        loss_fn: as for `spsa_step`, and differentiable.
        optimizer: as for `spsa_step`.
        link_fn: as for `spsa_step`.
        merge_fn: as for `spsa_step`.

    Returns:
        The next state, and the metrics of the state that went in.

    Raises:
        ValueError: as for `spsa_step`.
    """
    return _step(full_gradient, key, state, experts, batch, loss_fn, optimizer, link_fn, merge_fn)


def _step(
    estimator: Callable[..., Estimate],
    key: jax.Array,
    state: GlueState,
    experts: Params,
    batch: Batch,
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    link_fn: LinkFn,
    merge_fn: MergeFn,
) -> tuple[GlueState, GlueMetrics]:
    """One update of beta by any estimator."""

    def objective(beta: PyTree) -> jax.Array:
        return loss_fn(merge_fn(experts, link_fn(beta)), batch)

    estimate = estimator(jax.random.fold_in(key, state.step), objective, state.beta)
    return update(estimate, state, optimizer, link_fn)


def update(
    estimate: Estimate, state: GlueState, optimizer: optax.GradientTransformation, link_fn: LinkFn
) -> tuple[GlueState, GlueMetrics]:
    """The step that an estimate says: the next state, and the metrics of the one that went in."""
    updates, opt_state = optimizer.update(estimate.gradient, state.opt_state, state.beta)
    metrics = GlueMetrics(
        loss=estimate.value,
        alpha=link_fn(state.beta),
        gradient_norm=optax.tree.norm(estimate.gradient),
        probe_losses=estimate.probe_values,
    )
    beta = optax.apply_updates(state.beta, updates)
    return GlueState(step=state.step + 1, beta=beta, opt_state=opt_state), metrics
