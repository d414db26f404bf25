"""Steps that learn the coefficients, one minibatch each.

All are pure: `step(key, state, experts, batch, *, loss_fn, optimizer, ...) -> (state, metrics)`. Callers jit, and
keep the words that are functions out of the traced arguments by `functools.partial`. A step derives its own
randomness from `fold_in(key, state.step)`: one key serves a whole run.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from glue_jax import quadratic_model
from glue_jax.blending import blend, merge_for_learning
from glue_jax.checks import check_callable, check_counts, check_optimizer, check_state
from glue_jax.coefficients import check_floating
from glue_jax.directions import Directions
from glue_jax.estimators import Estimate, Scale, forward_gradient, full_gradient, spsa_gradient
from glue_jax.links import apply_link, directions_of, radius_of, start_of
from glue_jax.paths import check_finite
from glue_jax.precision import SHORT_FACTOR, matmul_precision_of, multiplies_short_floats
from glue_jax.types import Batch, GlueMetrics, GlueState, LearnResult, LinkFn, LossFn, MergeFn, Params, PyTree


def init(
    num_experts: int,
    optimizer: optax.GradientTransformation | None = None,
    *,
    beta: PyTree | None = None,
    link_fn: LinkFn | None = None,
) -> GlueState:
    """Returns the state that learning starts from.

    Args:
        num_experts: K.
        optimizer: of beta; the paper's is `optax.adam(1e-2, b1=0.9, b2=0.99)`. None is for `gauss_newton_step`, which
            has none.
        beta: the start, any pytree of floating-point coefficients. None is the link's own start: zeros `[K]` for the
            softmax, which are the uniform average, and for a function that is not known. `weights_to_logits` gives a
            start anywhere inside the simplex.
        link_fn: the steps'; None is the softmax.

    Returns:
        The state of step 0.

    Raises:
        ValueError: `num_experts` below 1, a beta that is empty or not finite, or coefficients of another number of
            experts.
        TypeError: `num_experts` that is no integer, a beta that is not floating point, or an optimizer that is none.
    """
    check_counts(num_experts=num_experts)
    if optimizer is not None:
        check_optimizer(optimizer)
    start: PyTree = start_of(link_fn or jax.nn.softmax, num_experts) if beta is None else beta
    check_floating(start)
    check_finite("beta", start)
    given = jax.eval_shape(link_fn, start) if link_fn else start
    found = [jnp.shape(leaf) for leaf in jax.tree.leaves(given)]
    if not found or any(shape and shape[-1] != num_experts for shape in found):
        raise ValueError(
            f"beta gives coefficients of shape {jax.tree.map(jnp.shape, given)}; expected a last axis of num_experts = "
            f"{num_experts}"
            + ("" if link_fn else " (pass link_fn where it makes the coefficients from a beta of another shape)")
        )
    # A copy, since steps may donate their state; of no weak type, which would change in the first step and retrace.
    start = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.result_type(leaf)), start)
    return GlueState(jnp.zeros((), jnp.int32), start, opt_state_of(start, optimizer, link_fn or jax.nn.softmax))


def opt_state_of(beta: PyTree, optimizer: optax.GradientTransformation | None, link_fn: LinkFn) -> Any:
    """Returns what learning carries on beside beta, at its start; without an optimizer, Gauss-Newton's."""
    return quadratic_model.start(beta, link_fn) if optimizer is None else optimizer.init(beta)


def alpha(state: GlueState | LearnResult, link_fn: LinkFn = jax.nn.softmax) -> PyTree:
    """Returns the coefficients that blend, `link_fn(state.beta)`.

    Args:
        state: of `init` or a step; or a result of `learn`, whose own alpha is returned.
        link_fn: the step's. A result of `learn` needs none.

    Raises:
        TypeError: a state that is none, or a beta that the link does not take.
    """
    if isinstance(state, LearnResult):
        return state.alpha
    if not hasattr(state, "beta"):
        raise TypeError(f"state is a {type(state).__name__}; expected a GlueState or a LearnResult")
    return apply_link(link_fn, state.beta)


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
    radius: ArrayLike | optax.Schedule | None = None,
    num_directions: int = 1,
    directions: Directions | None = None,
    scale: Scale = "unbiased",
    probe_batch_size: int | None = None,
    matmul_precision: str | None = "highest",
    diagnostics: bool = False,
) -> tuple[GlueState, GlueMetrics]:
    """One step of GLUE: two blended forward passes a direction, no backward pass (Eq. 3-7; the paper's Config 4).

    Args:
        key: a `jax.random.key`, the same for every step.
        state: of `init` or the step before.
        experts: stacked experts, each leaf `[K, ...]`.
        batch: a pytree of arrays `[B, ...]`. Both probes of a pair see it.
        loss_fn: `loss_fn(params, batch) -> scalar`, of params that are at least float32, whatever the experts' dtype;
            deterministic (no dropout; BatchNorm by its running statistics, or
            by the minibatch: see `glue_jax.merging.batch_norm`). It is never differentiated.
        optimizer: of beta, the one given to `init`.
        link_fn: `link_fn(beta) -> alpha`. The softmax over the last axis keeps the blend in the experts' convex hull;
            `unconstrained` is the literal Eq. (7).
        merge_fn: `merge_fn(experts, alpha) -> params`.
        radius: the length of a probe's step in beta, or a schedule of it, `radius(step)`. None is what suits the link:
            0.1 for the softmax, 0.01 for others. Under a softmax, None is 1, with a warning, where `loss_fn` multiplies
            bfloat16 or float16 arrays (see `glue_jax.precision`).
        num_directions: m.
        directions: see `spsa_gradient`. None is what suits the link: `simplex_orthogonal` for the softmax, which does
            not see a common change of all coefficients, and `orthogonal` for others.
        scale: see `spsa_gradient`.
        probe_batch_size: see `spsa_gradient`.
        matmul_precision: of the products in `loss_fn`, `merge_fn` and `link_fn` that name no precision of their own, a
            value of `jax.default_matmul_precision`. An accelerator's default rounds the weights of both probes to
            bfloat16 or TF32, and most of their difference with them. The highest precision costs more. None leaves
            JAX's setting as it is. A network that computes in bfloat16 by itself is not helped: see
            `forward_gradient_step`.
        diagnostics: whether the metrics have `diagnostics`, for 2m + 1 forward passes more.

    Returns:
        The next state, and the metrics of the state that went in.

    Raises:
        ValueError: an argument out of its range, coefficients and experts that do not fit, a loss that is no scalar, a
            state of another optimizer.
        TypeError: an argument of another type.

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

    def estimator(key: jax.Array, objective: Callable[[PyTree], jax.Array], beta: PyTree) -> Estimate:
        def precise(beta: PyTree) -> jax.Array:
            with matmul_precision_of(matmul_precision):
                return objective(beta)

        return spsa_gradient(
            key,
            precise,
            beta,
            radius=_radius(radius, state.step, precise, beta, link_fn),
            num_directions=num_directions,
            directions=directions or directions_of(link_fn),
            scale=scale,
            probe_batch_size=probe_batch_size,
            diagnostics=diagnostics,
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
    directions: Directions | None = None,
    scale: Scale = "unbiased",
    probe_batch_size: int | None = None,
) -> tuple[GlueState, GlueMetrics]:
    """One step with exact slopes along random directions, by forward-mode differentiation.

    As `spsa_step`, with `forward_gradient` in place of `spsa_gradient`: no radius, and no difference of two losses. Its
    slopes are as exact as the network's own number format, also where that is bfloat16 or TF32, at the device's default
    precision.

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
        directions=directions or directions_of(link_fn),
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
    check_state(state)
    check_optimizer(optimizer, state)
    check_callable(loss_fn=loss_fn, link_fn=link_fn, merge_fn=merge_fn)
    merge = merge_for_learning(merge_fn)

    def objective(beta: PyTree) -> jax.Array:
        return loss_fn(merge(experts, apply_link(link_fn, beta)), batch)

    estimate = estimator(jax.random.fold_in(key, state.step), objective, state.beta)
    return update(estimate, state, optimizer, apply_link(link_fn, state.beta))


def _radius(
    radius: ArrayLike | optax.Schedule | None,
    step: jax.Array,
    objective: Callable[[PyTree], jax.Array],
    beta: PyTree,
    link_fn: LinkFn,
) -> ArrayLike:
    """The radius of one step."""
    if radius is not None:
        return radius(step) if callable(radius) else radius
    suited = radius_of(link_fn)
    if directions_of(link_fn) != "simplex_orthogonal" or not multiplies_short_floats(objective, beta):
        return suited
    warnings.warn(
        "loss_fn multiplies bfloat16 or float16 arrays, which rounds away most of the difference of two nearby models. "
        f"spsa_step takes the radius {SHORT_FACTOR * suited:g}, whose slopes are off by several percent at least. "
        "forward_gradient_step is right there. Or compute in float32, or give a radius (glue_jax.calibrate finds one).",
        stacklevel=5,
    )
    return SHORT_FACTOR * suited


def update(
    estimate: Estimate, state: GlueState, optimizer: optax.GradientTransformation, alpha: PyTree
) -> tuple[GlueState, GlueMetrics]:
    """Takes the step that an estimate says.

    Args:
        estimate: of the gradient at `state.beta`.
        state: before the step.
        optimizer: of beta. One that wants the loss (`optax.polyak_sgd`, `optax.contrib.reduce_on_plateau`) is given it.
        alpha: of `state`.

    Returns:
        The next state, and the metrics of the state that went in.
    """
    updates, opt_state = optax.with_extra_args_support(optimizer).update(
        estimate.gradient, state.opt_state, state.beta, value=estimate.value, grad=estimate.gradient
    )
    metrics = GlueMetrics(
        loss=estimate.value,
        alpha=alpha,
        gradient_norm=optax.tree.norm(estimate.gradient),
        probe_losses=estimate.probe_values,
        diagnostics=estimate.diagnostics,
    )
    beta = optax.apply_updates(state.beta, updates)
    return GlueState(step=state.step + 1, beta=beta, opt_state=opt_state), metrics
