"""The quadratic model of the loss that Gauss-Newton steps on.

The model is a running mean over the minibatches so far. Each minibatch's part is carried over to the present
coefficients, as in recursive least squares. The model proposes a step. A minibatch that the model has not seen accepts
the proposal or turns it down, and the damping follows (after Levenberg, 1944, and Marquardt, 1963).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from glue_jax.directions import dimension
from glue_jax.links import directions_of
from glue_jax.types import LinkFn, PyTree

_HIGHEST = jax.lax.Precision.HIGHEST
# Learning starts with much damping, so with short steps. The loss of a blend has several minima. Long steps from the
# uniform blend end in the minimum of a few experts that happened to be near.
_FIRST_DAMPING, _LEAST_DAMPING, _MOST_DAMPING = 10.0, 3e-3, 100.0
# If a proposal is turned down, the damping is multiplied by the first number. If the loss falls by at least a quarter
# of the predicted fall, the damping is multiplied by the second number. Near a minimum, minibatches turn down about
# half of the proposals, whatever the damping is. So the damping rises by less than it falls.
_MORE, _LESS, _ENOUGH = 1.5, 0.5, 0.25
# The least damping of a coefficient that no output depends on, as a share of the mean coefficient's.
_FLOOR = 1e-3
# No coefficient moves farther than this in a step, because a small minibatch sometimes accepts a wild step. Under a
# softmax, the ratio of two alphas then changes by at most a factor e^2.
_LONGEST = 1.0
# A minibatch's weight relative to that of the next minibatch is the first number at first, and t / (t + the second
# number) at a late step t.
_LEAST_MEMORY, _FORGETTING = 0.8, 3.0


class GaussNewtonState(NamedTuple):
    """What Gauss-Newton keeps beside beta: a quadratic model of the loss around beta, and a proposed step.

    A vector has d entries, its coordinates in `glue_jax.directions.basis`.

    Attributes:
        proposal: the step from beta that the next minibatch judges, `[d]`.
        gradient: the gradient of the model at beta, `[d]`.
        curvature: the curvature of the model, `[d, d]`.
        weight: over how many minibatches the model is a mean, `[]`. Older minibatches count less.
        damping: how much is added to the curvature, `[]`. To a coefficient's own curvature, the step adds `damping`
            times the geometric mean of that curvature and the mean curvature of all coefficients.
    """

    proposal: jax.Array
    gradient: jax.Array
    curvature: jax.Array
    weight: jax.Array
    damping: jax.Array


def start(beta: PyTree, link_fn: LinkFn) -> GaussNewtonState:
    """Returns the state before the first step: nothing is known, and nothing is proposed.

    Args:
        beta: the coefficients at which learning starts.
        link_fn: the link of the steps. It decides which directions matter.

    Raises:
        ValueError: if there is nothing to learn, as with one expert under a softmax.
    """
    d = dimension(beta, directions_of(link_fn))
    return GaussNewtonState(
        proposal=jnp.zeros((d,)),
        gradient=jnp.zeros((d,)),
        curvature=jnp.zeros((d, d)),
        weight=jnp.zeros(()),
        damping=jnp.full((), _FIRST_DAMPING),
    )


def judged(model: GaussNewtonState, fall: jax.Array) -> tuple[jax.Array, GaussNewtonState]:
    """Returns whether the proposal is accepted, and the model with the damping that follows.

    Args:
        model: the model, with the proposal.
        fall: by how much the proposal lowers the loss of a minibatch that the model has not seen. It is NaN if a loss
            is not finite.
    """
    accepted = fall >= 0
    predicted = -model.proposal @ (model.gradient + 0.5 * product(model.curvature, model.proposal))
    factor = jnp.where(accepted, jnp.where(fall > _ENOUGH * predicted, _LESS, 1.0), _MORE)
    damping = jnp.clip(model.damping * factor, _LEAST_DAMPING, _MOST_DAMPING)
    # A model whose shortest steps are turned down is wrong, as after an outlier. It is forgotten.
    wrong = ~accepted & (model.damping >= _MOST_DAMPING)
    damping = jnp.where(wrong, _FIRST_DAMPING, damping)
    # At the first step nothing was proposed.
    damping = jnp.where(model.weight > 0, damping, model.damping)
    return accepted, model._replace(damping=damping, weight=jnp.where(wrong, 0, model.weight))


def refined(
    model: GaussNewtonState,
    gradient: jax.Array,
    curvature: jax.Array,
    rows: jax.Array | None,
    *,
    step: jax.Array,
    accepted: jax.Array,
) -> GaussNewtonState:
    """Returns the model around the next beta. Its mean includes the new minibatch.

    Args:
        model: the model around the present beta.
        gradient: the minibatch's gradient at the proposal, along the directions of the step, `[m]`.
        curvature: the minibatch's curvature at the proposal, along the directions of the step, `[m, m]`.
        rows: the directions of the step, as orthonormal rows of coordinates, `[m, d]`. None stands for all directions;
            m is then d.
        step: the number of steps taken before.
        accepted: whether the proposal is accepted, so that it is the next beta.
    """
    if rows is not None:
        # With this factor, the mean over random subspaces is the whole gradient. The mean of the curvature is closer to
        # a multiple of the identity than the whole curvature is. This acts as damping.
        m, d = rows.shape
        gradient = d / m * product(rows.T, gradient)
        curvature = d / m * product(rows.T, product(curvature, rows))
    step = jnp.asarray(step, jnp.float32)
    memory = jnp.maximum(_LEAST_MEMORY, step / (step + _FORGETTING))
    weight = memory * model.weight + 1
    old, new = memory * model.weight / weight, 1 / weight
    at_proposal = model.gradient + product(model.curvature, model.proposal)
    mean_gradient = old * at_proposal + new * gradient
    mean_curvature = old * model.curvature + new * 0.5 * (curvature + curvature.T)
    # An output that is not finite tells nothing.
    known = jnp.isfinite(gradient).all() & jnp.isfinite(curvature).all()
    mean_gradient = jnp.where(known, mean_gradient, at_proposal)
    mean_curvature = jnp.where(known, mean_curvature, model.curvature)
    back_at_beta = mean_gradient - product(mean_curvature, model.proposal)
    return model._replace(
        gradient=jnp.where(accepted, mean_gradient, back_at_beta),
        curvature=mean_curvature,
        weight=jnp.where(known, weight, model.weight),
    )


def with_proposal(model: GaussNewtonState, directions: PyTree) -> GaussNewtonState:
    """Returns the model with its damped minimum as the proposal.

    Levenberg damps all directions alike. Then only the steepest coefficients move. Marquardt damps each coefficient by
    its own curvature. Then noise moves a coefficient far that hardly matters. This function takes the geometric mean of
    the two. Under a softmax an expert's curvature falls with the square of its alpha, and its gradient falls with its
    alpha. So the step of beta is as long for an expert of small alpha as for an expert of large alpha.

    Args:
        model: the model, with its gradient and its curvature at the next beta.
        directions: all d directions, leaves `[d, ...]`.
    """
    d = len(model.gradient)
    rows = jnp.concatenate([leaf.reshape(d, -1) for leaf in jax.tree.leaves(directions)], axis=1)
    own = jnp.maximum(jnp.sum(rows * product(model.curvature, rows), axis=0), 0)
    mean = jnp.mean(own)
    # If no output changes at all, any damping will do.
    damped = model.damping * jnp.where(mean > 0, jnp.sqrt(own * mean) + _FLOOR * mean, 1.0)
    step = -jnp.linalg.solve(model.curvature + product(rows * damped[None], rows.T), model.gradient)
    longest = jnp.max(jnp.abs(product(step, rows)))
    step *= _LONGEST / jnp.maximum(longest, _LONGEST)
    return model._replace(proposal=jnp.where(jnp.isfinite(step).all(), step, 0))


def product(first: jax.Array, second: jax.Array) -> jax.Array:
    """Returns a product of full precision."""
    return jnp.matmul(first, second, precision=_HIGHEST)


def lift(coordinates: jax.Array, directions: PyTree) -> PyTree:
    """Returns a step of beta's structure from its coordinates `[d]`."""
    return jax.tree.map(
        lambda leaf: jnp.tensordot(coordinates, leaf, axes=1, precision=_HIGHEST).astype(leaf.dtype), directions
    )
