"""The step of GLUE cut in two, for losses that JAX does not compute: another framework, a served model, a metric.

for _ in range(100):
    probes = glue_jax.ask(key, state)
    losses = [evaluate(alpha) for alpha in np.asarray(probes.alpha)]  # anything, lower is better
    state, metrics = glue_jax.tell(probes, losses, optimizer=optimizer)

`ask_outputs` and `tell_outputs` are the same for Gauss-Newton, which wants the outputs in place of their losses.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from glue_jax import gauss_newton
from glue_jax.checks import as_numbers, check_callable, check_optimizer, check_positive, check_state
from glue_jax.directions import Directions, dimension, sample_directions
from glue_jax.estimators import (
    Estimate,
    Scale,
    combine_slopes,
    scale_factor,
    spsa_probes,
)
from glue_jax.links import apply_link, directions_of, radius_of
from glue_jax.objectives import LossOfOutputs
from glue_jax.steps import update
from glue_jax.types import Batch, GlueMetrics, GlueState, LinkFn, PyTree


class Probes(NamedTuple):
    """The coefficients whose losses `tell` needs, and the rest of what it needs.

    Attributes:
        alpha: the coefficients of each probe, leaves `[2m, ...]`. For each direction u there are two rows: at
            `beta + radius u`, then at `beta - radius u`.
        state: the state that was given to `ask`.
        directions: the directions u, of beta's structure, leaves `[m, ...]`.
        radius: the radius of the probes, `[]`.
        factor: the factor that the scale applies to Eq. (6): d for `unbiased`, 1 for `paper`.
        alpha_of_state: the coefficients of `state`.
    """

    alpha: PyTree
    state: GlueState
    directions: PyTree
    radius: ArrayLike
    factor: float
    alpha_of_state: PyTree


def ask(
    key: jax.Array,
    state: GlueState,
    *,
    link_fn: LinkFn = jax.nn.softmax,
    radius: ArrayLike | optax.Schedule | None = None,
    num_directions: int = 1,
    directions: Directions | None = None,
    scale: Scale = "unbiased",
) -> Probes:
    """Returns the coefficients whose losses `tell` needs: the first half of `spsa_step`.

    Args:
        key: as for `spsa_step`, the same for every step.
        state: the state from `init` or `tell`.
        link_fn: as for `spsa_step`.
        radius: as for `spsa_step`, but without the exception for bfloat16 and float16: `ask` does not see the loss. A
            loss that is known to few digits needs a large radius. So does a metric that counts errors.
        num_directions: m, the number of directions.
        directions: as for `spsa_step`.
        scale: as for `spsa_step`.

    Returns:
        The probes, for `tell`.

    Raises:
        ValueError: if an argument is out of its range.
        TypeError: if `state` is no GlueState, if `radius` is no number, or if beta is not floating point.

    Examples:
        >>> import jax, optax
        >>> import glue_jax
        >>> optimizer = optax.adam(0.1)
        >>> key, state = jax.random.key(0), glue_jax.init(2, optimizer)
        >>> for _ in range(50):
        ...     probes = glue_jax.ask(key, state)
        ...     losses = [(float(alpha[1]) - 0.75) ** 2 for alpha in probes.alpha]
        ...     state, metrics = glue_jax.tell(probes, losses, optimizer=optimizer)
        >>> bool(abs(glue_jax.alpha(state)[1] - 0.75) < 0.05)
        True
    """
    check_state(state)
    radius = radius_of(link_fn) if radius is None else radius
    radius = radius(state.step) if callable(radius) else radius
    check_positive("radius", radius)
    directions = directions or directions_of(link_fn)
    u = sample_directions(jax.random.fold_in(key, state.step), state.beta, num_directions, directions)
    with jax.default_matmul_precision("highest"):
        alpha = jax.vmap(functools.partial(apply_link, link_fn))(spsa_probes(state.beta, u, radius))
    return Probes(
        alpha=alpha,
        state=state,
        directions=u,
        radius=radius,
        factor=scale_factor(scale, dimension(state.beta, directions)),
        alpha_of_state=apply_link(link_fn, state.beta),
    )


def tell(
    probes: Probes, losses: ArrayLike | Sequence[float | None], *, optimizer: optax.GradientTransformation
) -> tuple[GlueState, GlueMetrics]:
    """Takes the step that follows from the losses of the probes: the second half of `spsa_step`.

    The losses are subtracted in float64. There are two probes for each direction. A probe that could not be evaluated
    has the loss None. `tell` then ignores both probes of that direction. If no direction is left, only the step number
    changes, and the next `ask` draws other directions.

    Args:
        probes: the probes from `ask`.
        losses: the losses in the order of `probes.alpha`, `[2m]`. Lower is better. None stands for a probe that failed.
        optimizer: the optimizer that you gave to `init`.

    Returns:
        The next state, and the metrics of the state that went in, as `spsa_step` returns them. The losses of a pair
        that was left out are NaN there.

    Raises:
        ValueError: if losses have another shape, or are infinite or NaN, or if `optimizer` makes a state of another
            structure.
        TypeError: if losses are no real numbers, if `probes` did not come from `ask`, or if `optimizer` is not one of
            optax.
    """
    if not isinstance(probes, Probes):
        raise TypeError(f"probes is a {type(probes).__name__}; expected the Probes that glue_jax.ask returned")
    check_optimizer(optimizer, probes.state)
    count = len(jax.tree.leaves(probes.directions)[0])
    if isinstance(losses, Sequence):
        failed = np.array([loss is None for loss in losses], bool)
        values = as_numbers("losses", [math.nan if loss is None else loss for loss in losses])
    else:
        failed, values = np.False_, as_numbers("losses", losses)
    if values.shape != (2 * count,):
        raise ValueError(f"losses have shape {values.shape}; expected [2m] = ({2 * count},), one for each probe")
    if not (np.isfinite(values) | failed).all():
        raise ValueError(f"losses are {values.tolist()}; expected finite real numbers, or None for a probe that failed")
    pairs = values.reshape(-1, 2)
    state = probes.state
    complete = np.asarray(np.isfinite(pairs).all(axis=1))
    slopes = np.where(complete, (pairs[:, 0] - pairs[:, 1]) / (2 * float(np.asarray(probes.radius))), 0.0)
    # The mean over all directions becomes that over the complete ones.
    slopes *= count / max(complete.sum(), 1)
    pairs = np.where(complete[:, None], pairs, np.nan)
    estimate = Estimate(
        value=jnp.asarray(np.mean(pairs[complete]) if complete.any() else np.nan, jnp.float32),
        gradient=combine_slopes(jnp.asarray(slopes, jnp.float32), probes.directions, probes.factor),
        probe_values=jnp.asarray(pairs, jnp.float32),
    )
    next_state, metrics = update(estimate, state, optimizer, probes.alpha_of_state)
    return (next_state if complete.any() else state._replace(step=state.step + 1)), metrics


class OutputProbes(NamedTuple):
    """The coefficients whose outputs `tell_outputs` needs, and the rest of what it needs.

    Attributes:
        alpha: the coefficients of each probe, leaves `[m + 2, ...]`. Row 0 is at beta. Row 1 is at the proposal. The
            other rows are around the proposal, one along each of the m directions. With all directions, m is d.
        state: the state that was given to `ask_outputs`.
        radius: how far beta moves between two probes whose outputs are subtracted, `[]`.
        rows: the directions, `[m, d]`, as coordinates in `glue_jax.directions.basis`. With None they are all
            directions.
        link_fn: the link that was given to `ask_outputs`.
    """

    alpha: PyTree
    state: GlueState
    radius: ArrayLike
    rows: jax.Array | None
    link_fn: LinkFn


def ask_outputs(
    key: jax.Array | None,
    state: GlueState,
    *,
    link_fn: LinkFn = jax.nn.softmax,
    radius: ArrayLike | None = None,
    num_directions: int | None = None,
) -> OutputProbes:
    """Returns the coefficients whose outputs `tell_outputs` wants: the first half of `gauss_newton_step`.

    Args:
        key: as for `gauss_newton_step`. It may be None without `num_directions`.
        state: a state from `init(num_experts, link_fn=link_fn)` or from `tell_outputs`.
        link_fn: as for `gauss_newton_step`.
        radius: as for `gauss_newton_step`. Outputs with few digits need a larger radius.
        num_directions: as for `gauss_newton_step`.

    Returns:
        The probes, for `tell_outputs`: beta, the proposal of the step before, and for each direction a point beside the
        proposal. The first step has no proposal yet, so its first two probes are equal.

    Raises:
        ValueError: if an argument is out of its range, or if the state has another number of directions than `link_fn`.
        TypeError: if `state` is no GlueState or has the state of an optimizer, or if `num_directions` is given and
            `key` is None.

    Examples:
        >>> import jax, jax.numpy as jnp, numpy as np
        >>> import glue_jax
        >>> state, batch = glue_jax.init(2), np.array([0.2, 0.3])
        >>> loss = lambda outputs, batch: jnp.mean((outputs - batch) ** 2)
        >>> for _ in range(15):
        ...     probes = glue_jax.ask_outputs(None, state)
        ...     outputs = [np.full(2, alpha[1]) for alpha in probes.alpha]
        ...     state, metrics = glue_jax.tell_outputs(probes, outputs, batch, loss=loss)
        >>> bool(abs(glue_jax.alpha(state)[1] - 0.25) < 0.01)
        True
    """
    model = gauss_newton.check_gauss_newton_state(state, link_fn)
    radius = gauss_newton.difference_radius(link_fn) if radius is None else radius
    check_positive("radius", radius)
    rows = gauss_newton.subspace(key, state, model, num_directions)
    with jax.default_matmul_precision("highest"):
        points = gauss_newton.probe_points(state.beta, model, link_fn, radius, rows)
        alpha = jax.vmap(functools.partial(apply_link, link_fn))(points)
    return OutputProbes(alpha=alpha, state=state, radius=radius, rows=rows, link_fn=link_fn)


def tell_outputs(
    probes: OutputProbes, outputs: PyTree, batch: Batch, *, loss: LossOfOutputs
) -> tuple[GlueState, GlueMetrics]:
    """Takes the step that follows from the outputs of the probes: the second half of `gauss_newton_step`.

    The outputs are subtracted in float64.

    Args:
        probes: the probes from `ask_outputs`.
        outputs: the outputs of all probes in their order, on one minibatch. The first probe is at beta, the second at
            the proposal, and the others along the directions. Pass arrays `[m + 2, B, ...]`, or a list of m + 2 outputs
            `[B, ...]`. A tuple is not such a list: it is a pytree of arrays `[m + 2, B, ...]`. In a list, None stands
            for a blend that could not be evaluated. If the output of the proposal is None, the step turns the proposal
            down. If one along a direction is None, the proposal is still tested, but this minibatch does not change the
            quadratic model of the loss.
        batch: the minibatch for `loss`, such as the labels.
        loss: `loss(outputs, batch) -> scalar`, the second part of an `OutputLoss`. Build it once, or each step
            compiles anew.

    Returns:
        The next state, and the metrics of the state that went in.

    Raises:
        ValueError: if outputs differ in number or shape, if they are not floating point, if the outputs of beta itself
            are missing or not finite, or if the loss is no scalar.
        TypeError: if `probes` did not come from `ask_outputs`.
    """
    if not isinstance(probes, OutputProbes):
        raise TypeError(f"probes is a {type(probes).__name__}; expected what glue_jax.ask_outputs returned")
    check_callable(loss=loss)
    count = len(jax.tree.leaves(probes.alpha)[0])
    if isinstance(outputs, list):
        known = next((given for given in outputs if given is not None), None)
        if known is None or outputs[0] is None:
            raise ValueError("the outputs of beta itself, outputs[0], are None: evaluate it again")
        missing = jax.tree.map(lambda leaf: np.full(np.shape(leaf), np.nan, np.float32), known)
        given = [missing if out is None else out for out in outputs]
        found = [jax.tree.map(np.shape, out) for out in given]
        if any(shapes != found[0] for shapes in found):
            raise ValueError(f"outputs have shapes {found}; expected the same of each probe")
        outputs = jax.tree.map(lambda *leaves: np.stack(leaves), *given)
    leaves = jax.tree.leaves(outputs)
    if not leaves or any(
        np.ndim(leaf) < 2 or len(leaf) != count or not jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
        for leaf in leaves
    ):
        shapes = jax.tree.map(lambda leaf: f"{jnp.result_type(leaf)}{list(np.shape(leaf))}", outputs)
        raise ValueError(f"outputs are {shapes}; expected floating point [m + 2, B, ...] with m + 2 = {count}")
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), outputs)
    if not all(np.isfinite(leaf[0]).all() for leaf in jax.tree.leaves(wide)):
        raise ValueError("the outputs of beta itself, outputs[0], are not finite: evaluate it again")
    parts = gauss_newton.differences(wide, float(np.asarray(probes.radius)))
    return _tell(probes.state, *parts, batch, probes.rows, link_fn=probes.link_fn, loss=loss)


_tell = jax.jit(gauss_newton.move, static_argnames=("link_fn", "loss"))
