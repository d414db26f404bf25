"""The steps `spsa_step`, `forward_gradient_step` and `full_gradient_step`.

Each step is a pure function: `step(key, state, experts, batch, *, loss_fn, optimizer, ...) -> (state, metrics)`. The
caller jits it. Bind the keyword arguments that are functions with `functools.partial` before `jax.jit`. A step draws
its random numbers from `fold_in(key, state.step)`, so one key serves a whole run.
"""

import functools
import warnings
from collections.abc import Callable

import jax
import numpy as np
import optax
from jax.typing import ArrayLike

from glue_jax.blending import blend, merge_for_learning
from glue_jax.checks import check_callable, check_optimizer, check_state
from glue_jax.directions import Directions
from glue_jax.estimators import Estimate, Scale, forward_gradient, full_gradient, spsa_gradient
from glue_jax.links import apply_link, directions_of, radius_of
from glue_jax.precision import SHORT_FACTOR, matmul_precision_of, multiplies_short_floats
from glue_jax.types import Batch, GlueMetrics, GlueState, LinkFn, LossFn, MergeFn, Params, PyTree


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
    """Takes one step of GLUE: two blended forward passes per direction, no backward pass (Eq. 3-7).

    The paper's Config 4 has `directions="sphere"` and the optimizer `optax.adam(1e-2, b1=0.9, b2=0.99)`. The paper
    names no radius; our experiments take 0.01. The estimate here is d times the paper's Eq. (6), unless `scale` is
    `paper`. Adam divides a gradient by its size, so Adam's steps are the same with either `scale`. Here d is the
    dimension of the space from which the directions are drawn. For `simplex_orthogonal`, which is the default under a
    softmax, d is K - 1, or G (K - 1) with G groups. A learned temperature (`glue_jax.links.tempered_link`) makes d
    larger by 1. For other directions d is the size of beta.

    Args:
        key: a `jax.random.key`. Pass the same key at every step.
        state: the state from `init` or from the step before.
        experts: stacked experts, each leaf `[K, ...]`.
        batch: one minibatch, a pytree of arrays `[B, ...]`. All probes see this minibatch.
        loss_fn: `loss_fn(params, batch) -> scalar`. It must be deterministic: no dropout, and BatchNorm with its
            running statistics or with the minibatch's (see `glue_jax.merging.batch_norm`). `params` is the blend. Its
            blended arrays are at least float32, also for experts of bfloat16 or float16. The step never differentiates
            `loss_fn`.
        optimizer: the optimizer of beta that was given to `init`.
        link_fn: `link_fn(beta) -> alpha`. The softmax over the last axis keeps the blend in the convex hull of the
            experts. `unconstrained` is the literal Eq. (7).
        merge_fn: `merge_fn(experts, alpha) -> params`.
        radius: the Euclidean distance of a probe from beta, or a schedule `radius(step)`. For `gaussian` directions it
            is the root mean square of the distance over draws. The default depends on the link. For the softmax it is
            0.1. For a `glue_jax.links.Link` it is the link's attribute `radius`. For any other function it is 0.01.
            There is one exception, of which the step warns: the default radius is ten times as large if the network
            itself multiplies bfloat16 or float16 arrays, and the link is the softmax or another one whose default
            directions are `simplex_orthogonal`. Neither the dtype of the experts nor the argument `directions` matters.
            See `glue_jax.precision`.
        num_directions: m, the number of directions.
        directions: `rademacher`, `sphere`, `gaussian`, `orthogonal`, `simplex_orthogonal`, or a function (see
            `glue_jax.directions`). The default depends on the link. For the softmax it is `simplex_orthogonal`, because
            adding one number to all of beta does not change a softmax. For a `Link` it is the link's attribute
            `directions`. For any other function it is `orthogonal`.
        scale: `unbiased`, or `paper` for the literal Eq. (5) and (6).
        probe_batch_size: how many of the 2m probes are evaluated at once, by `vmap`. By default an accelerator
            evaluates all of them at once, and a CPU one after another.
        matmul_precision: the precision of matrix products in `loss_fn`, `merge_fn` and `link_fn`, a value of
            `jax.default_matmul_precision`. A product that sets its own precision keeps it. With JAX's own setting, an
            accelerator rounds the weights of both probes to bfloat16 or TF32, which destroys most of their difference.
            `highest` prevents this and costs more time. With None, JAX's setting stays. If the network casts to
            bfloat16 itself, use `forward_gradient_step`.
        diagnostics: whether the metrics include `diagnostics`. This takes 2m + 1 more forward passes.

    Returns:
        The next state, and the metrics of the state that was given.

    Raises:
        ValueError: if an argument is out of its range, or if the loss is no scalar.
        ValueError: if the coefficients do not fit the experts, or if `optimizer` makes a state of another structure.
        TypeError: if an argument has the wrong type.

    Warns:
        UserWarning: if `radius` is None, the default of `directions` is `simplex_orthogonal`, and `loss_fn` multiplies
            bfloat16 or float16 arrays.

    Examples:
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

    return step_by(
        estimator, key, state, experts, batch, loss_fn=loss_fn, optimizer=optimizer, link_fn=link_fn, merge_fn=merge_fn
    )


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
    """Takes one step with exact slopes along random directions, by forward-mode differentiation.

    It works like `spsa_step`, with `forward_gradient` in place of `spsa_gradient`. It needs no radius and subtracts no
    losses. Its slopes are as exact as the network's own number format, even if that format is bfloat16 or TF32.

    Args:
        key: as for `spsa_step`.
        state: as for `spsa_step`.
        experts: as for `spsa_step`.
        batch: as for `spsa_step`.
        loss_fn: as for `spsa_step`, but this step differentiates it in forward mode.
        optimizer: as for `spsa_step`.
        link_fn: as for `spsa_step`.
        merge_fn: as for `spsa_step`.
        num_directions: m, the number of directions.
        directions: as for `spsa_step`.
        scale: as for `spsa_gradient`.
        probe_batch_size: as for `forward_gradient`.

    Returns:
        The next state, and the metrics of the state that was given.

    Raises:
        ValueError: as for `spsa_step`.
        TypeError: as for `spsa_step`.
    """
    estimator = functools.partial(
        forward_gradient,
        num_directions=num_directions,
        directions=directions or directions_of(link_fn),
        scale=scale,
        probe_batch_size=probe_batch_size,
    )
    return step_by(
        estimator, key, state, experts, batch, loss_fn=loss_fn, optimizer=optimizer, link_fn=link_fn, merge_fn=merge_fn
    )


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
    """Takes one step with the exact gradient, by backpropagation through the blended network: the paper's Config 3.

    Args:
        key: not used. It is here because all steps have the same form.
        state: as for `spsa_step`.
        experts: as for `spsa_step`.
        batch: as for `spsa_step`.
        loss_fn: as for `spsa_step`, but this step differentiates it.
        optimizer: as for `spsa_step`.
        link_fn: as for `spsa_step`.
        merge_fn: as for `spsa_step`.

    Returns:
        The next state, and the metrics of the state that was given.

    Raises:
        ValueError: as for `spsa_step`.
        TypeError: as for `spsa_step`.
    """
    return step_by(
        full_gradient,
        key,
        state,
        experts,
        batch,
        loss_fn=loss_fn,
        optimizer=optimizer,
        link_fn=link_fn,
        merge_fn=merge_fn,
    )


def step_by(
    estimator: Callable[[jax.Array, Callable[[PyTree], jax.Array], PyTree], Estimate],
    key: jax.Array,
    state: GlueState,
    experts: Params,
    batch: Batch,
    *,
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    link_fn: LinkFn,
    merge_fn: MergeFn,
) -> tuple[GlueState, GlueMetrics]:
    """Takes one step with an estimator of the gradient. A step of your own calls this function.

    Args:
        estimator: `estimator(key, fun, beta)` estimates the gradient of `fun` at beta. Its key belongs to this step
            alone. `fun(beta)` is the loss of the blend on the batch, a scalar. It has JAX's present precision of
            products. An estimator that subtracts losses calls it under `jax.default_matmul_precision("highest")`.
        key: as for `spsa_step`.
        state: as for `spsa_step`.
        experts: as for `spsa_step`.
        batch: as for `spsa_step`.
        loss_fn: as for `spsa_step`.
        optimizer: as for `spsa_step`.
        link_fn: as for `spsa_step`.
        merge_fn: as for `spsa_step`.

    Returns:
        The next state, and the metrics of the state that was given.

    Raises:
        ValueError: if the coefficients do not fit the experts, if the gradient does not have the shape of beta, or if
            `optimizer` makes a state of another structure.
        TypeError: if an argument has the wrong type, or if the estimator returns no `Estimate`.
    """
    check_state(state)
    check_optimizer(optimizer, state)
    check_callable(estimator=estimator, loss_fn=loss_fn, link_fn=link_fn, merge_fn=merge_fn)
    merge = merge_for_learning(merge_fn)

    def objective(beta: PyTree) -> jax.Array:
        return loss_fn(merge(experts, apply_link(link_fn, beta)), batch)

    estimate = estimator(jax.random.fold_in(key, state.step), objective, state.beta)
    if not isinstance(estimate, Estimate):
        raise TypeError(f"estimator returned a {type(estimate).__name__}; expected a glue_jax.estimators.Estimate")
    found, expected = (jax.tree.map(np.shape, tree) for tree in (estimate.gradient, state.beta))
    if found != expected:
        raise ValueError(f"estimator returned a gradient of shape {found}; expected that of beta, {expected}")
    return update(estimate, state, optimizer, apply_link(link_fn, state.beta))


def _radius(
    radius: ArrayLike | optax.Schedule | None,
    step: jax.Array,
    objective: Callable[[PyTree], jax.Array],
    beta: PyTree,
    link_fn: LinkFn,
) -> ArrayLike:
    """Returns the radius of one step."""
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
    """Returns the next state, and the metrics of `state`, from an estimate of the gradient at `state.beta`.

    The optimizer is given the loss too, which `optax.polyak_sgd` and `optax.contrib.reduce_on_plateau` need. `alpha`
    are the coefficients of `state`.
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
