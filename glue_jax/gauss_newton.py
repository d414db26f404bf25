"""Gauss-Newton for the coefficients, from forward passes alone.

A forward pass gives more than one loss: it gives the outputs of every example. The outputs of d + 1 nearby blends say
how the outputs change with the d coefficients, the Jacobian J. The loss's own derivatives for the outputs, l' and l'',
complete the gradient `J^T l'` and the Gauss-Newton curvature `J^T l'' J`. A damped step then solves d equations
(after Levenberg, 1944, and Marquardt, 1963). The network is never differentiated backwards.

Minibatches are noisy, so two things are done with them. The model of the loss is a running mean over the minibatches so
far, each carried over to the present coefficients, as in recursive least squares. And a step is proposed only: the next
minibatch, which the model has not seen, accepts the proposal or turns it down.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from glue_jax.blending import blend, merge_for_learning
from glue_jax.checks import check_callable, check_counts, check_positive, check_state
from glue_jax.directions import basis, dimension
from glue_jax.estimators import map_probes
from glue_jax.links import apply_link, directions_of, radius_of
from glue_jax.objectives import LossOfOutputs, OutputLoss
from glue_jax.precision import matmul_precision_of, multiplies_short_floats
from glue_jax.types import Batch, GlueMetrics, GlueState, LinkFn, MergeFn, Params, PyTree

Tangents = Literal["differences", "forward_mode"]

_HIGHEST = jax.lax.Precision.HIGHEST
# Learning starts with much damping, so with short steps. The loss of a blend has several minima, and long steps from
# the uniform blend end in one of a few experts that happened to be near.
_FIRST_DAMPING, _LEAST_DAMPING, _MOST_DAMPING = 10.0, 3e-3, 100.0
# What damping is multiplied by after a proposal that was turned down, and after one whose fall of the loss was at least
# a quarter of the predicted one. Minibatches turn down about half of the proposals near a minimum, whatever the
# damping; so it rises by less than it falls.
_MORE, _LESS, _ENOUGH = 1.5, 0.5, 0.25
# The least damping of a coefficient that no output depends on, as a share of the mean coefficient's.
_FLOOR = 1e-3
# The weight of a minibatch against the one after it: at first this, at step t of many t / (t + _FORGETTING).
_LEAST_MEMORY, _FORGETTING = 0.8, 3.0


class GaussNewtonState(NamedTuple):
    """What Gauss-Newton carries on beside beta: a quadratic model of the loss around beta, and a proposed step.

    Vectors are coordinates in `glue_jax.directions.basis`, d of them.

    Attributes:
        proposal: the step from beta that the next minibatch judges, `[d]`.
        gradient: of the model at beta, `[d]`.
        curvature: of the model, `[d, d]`.
        weight: how many minibatches the model is the mean of, older ones counted less, `[]`.
        damping: how much is added to the curvature, `[]`. Of one coefficient it adds this multiple of the geometric
            mean of the coefficient's own curvature and all coefficients' mean curvature.
    """

    proposal: jax.Array
    gradient: jax.Array
    curvature: jax.Array
    weight: jax.Array
    damping: jax.Array


def start(beta: PyTree, link_fn: LinkFn) -> GaussNewtonState:
    """Returns the state in which nothing is known and nothing is proposed.

    Args:
        beta: where learning starts.
        link_fn: of the steps. It says which directions matter.

    Raises:
        ValueError: nothing to learn, as with one expert under a softmax.
    """
    d = dimension(beta, directions_of(link_fn))
    return GaussNewtonState(
        proposal=jnp.zeros((d,)),
        gradient=jnp.zeros((d,)),
        curvature=jnp.zeros((d, d)),
        weight=jnp.zeros(()),
        damping=jnp.full((), _FIRST_DAMPING),
    )


def gauss_newton_step(
    key: jax.Array | None,
    state: GlueState,
    experts: Params,
    batch: Batch,
    *,
    loss_fn: OutputLoss,
    link_fn: LinkFn = jax.nn.softmax,
    merge_fn: MergeFn = blend,
    tangents: Tangents | None = None,
    radius: ArrayLike | None = None,
    probe_batch_size: int | None = None,
    matmul_precision: str | None = "highest",
) -> tuple[GlueState, GlueMetrics]:
    """One damped Gauss-Newton step: d + 2 blended forward passes, no backward pass, no learning rate.

    The minibatch first judges the step that the minibatch before it proposed: beta moves where its loss does not grow
    by that. It then refines the model of the loss, which proposes the next step. So `beta` lags one step behind, and
    the first step leaves it where it is.

    There is no optimizer. `init(num_experts)` makes the state.

    Args:
        key: not used; the steps share one contract.
        state: of `init(num_experts, link_fn=link_fn)` or the step before.
        experts: as for `spsa_step`.
        batch: as for `spsa_step`. Small minibatches, of 16 to 32 examples, take the fewest passes: the model is a mean
            over minibatches, and more steps bring it nearer. A minibatch should hold more outputs, examples times
            classes, than there are directions.
        loss_fn: an `OutputLoss`, deterministic as for `spsa_step`. Its `outputs_fn` is never differentiated backwards,
            and with `differences` not at all.
        link_fn: as for `spsa_step`. Under a softmax d is K - 1, else the number of coefficients.
        merge_fn: as for `spsa_step`.
        tangents: how J is computed: by one-sided `differences` of the outputs, or in `forward_mode` by `jax.jvp`, at
            about twice the time, which is right in every number format. None is `differences`, or `forward_mode`
            where the network multiplies bfloat16 or float16 arrays by itself.
        radius: the length of a difference's step in beta. None is what suits the link, as for `spsa_step`.
        probe_batch_size: how many of the d + 2 blends go forward together; see `spsa_gradient`. In `forward_mode`, how
            many of the d tangents; the default is all of them, which share one forward pass.
        matmul_precision: as for `spsa_step`.

    Returns:
        The next state, and the metrics of the state that went in. Their `gradient_norm` is of the model's gradient.

    Raises:
        ValueError: an argument out of its range, coefficients and experts that do not fit, a loss that is no scalar,
            outputs without an axis of examples.
        TypeError: a `loss_fn` that is no `OutputLoss`, a state of an optimizer, an argument of another type.

    Example:
        >>> from functools import partial
        >>> import jax, jax.numpy as jnp
        >>> import glue_jax
        >>> experts = glue_jax.stack_experts([{"w": jnp.array([0.0, 2.0])}, {"w": jnp.array([1.0, 0.0])}])
        >>> batch = {"x": jnp.eye(2), "y": jnp.array([0.25, 1.5])}
        >>> loss_fn = glue_jax.OutputLoss(
        ...     lambda params, batch: batch["x"] @ params["w"], lambda out, batch: jnp.mean((out - batch["y"]) ** 2)
        ... )
        >>> state = glue_jax.init(2)
        >>> step = jax.jit(partial(glue_jax.gauss_newton_step, loss_fn=loss_fn))
        >>> for _ in range(15):
        ...     state, metrics = step(None, state, experts, batch)
        >>> bool(jnp.abs(glue_jax.alpha(state)[1] - 0.25) < 0.01)
        True
    """
    del key
    check_output_loss(loss_fn)
    check_callable(link_fn=link_fn, merge_fn=merge_fn)
    model = check_gauss_newton_state(state, link_fn)
    if tangents is not None and tangents not in get_args(Tangents):
        raise ValueError(f"tangents is {tangents!r}; expected one of {get_args(Tangents)} or None")
    if probe_batch_size is not None:
        check_counts(probe_batch_size=probe_batch_size)
    radius = radius_of(link_fn) if radius is None else radius
    check_positive("radius", radius)
    merge = merge_for_learning(merge_fn)

    def outputs_of(beta: PyTree) -> Any:
        with matmul_precision_of(matmul_precision):
            return _checked_outputs(loss_fn.outputs_fn(merge(experts, apply_link(link_fn, beta)), batch))

    if tangents is None:
        tangents = "forward_mode" if multiplies_short_floats(outputs_of, state.beta) else "differences"
    points = probe_points(state.beta, model, link_fn, radius)
    if tangents == "differences":
        outputs = map_probes(outputs_of, points, probe_batch_size)
    else:
        outputs = _by_forward_mode(outputs_of, points, state.beta, link_fn, radius, probe_batch_size)
    return move(state, outputs, batch, radius, link_fn=link_fn, loss=loss_fn.loss)


def probe_points(beta: PyTree, model: GaussNewtonState, link_fn: LinkFn, radius: ArrayLike) -> PyTree:
    """The coefficients whose outputs a step wants: beta, the proposal, and the proposal a radius along each direction.

    Returns:
        A pytree of beta's structure with leaves `[d + 2, ...]`.
    """

    def points(leaf: jax.Array, directions: jax.Array, move: jax.Array) -> jax.Array:
        at_proposal = leaf + move
        around = at_proposal[None] + (jnp.asarray(radius) * directions).astype(leaf.dtype)
        return jnp.concatenate([leaf[None], at_proposal[None], around])

    directions = basis(beta, directions_of(link_fn))
    return jax.tree.map(points, beta, directions, _lift(model.proposal, directions))


def move(
    state: GlueState, outputs: Any, batch: Batch, radius: ArrayLike, *, link_fn: LinkFn, loss: LossOfOutputs
) -> tuple[GlueState, GlueMetrics]:
    """Judges the proposal, refines the model and proposes the next step, from the outputs at `probe_points`.

    Args:
        state: before the step.
        outputs: leaves `[d + 2, B, ...]`.
        batch: for `loss`.
        radius: of the differences.
        link_fn: of the step.
        loss: of an `OutputLoss`.

    Returns:
        The next state, and the metrics of the state that went in.
    """
    before, at_proposal = (jax.tree.map(lambda leaf, i=i: leaf[i], outputs) for i in range(2))
    jacobian = jax.tree.map(lambda leaf, base: (leaf[2:] - base[None]) / jnp.asarray(radius), outputs, at_proposal)

    def loss_of(outputs: Any) -> jax.Array:
        value = loss(outputs, batch)
        if jnp.shape(value) != () or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
            raise ValueError(
                f"the loss of the outputs is {jax.tree.map(jnp.shape, value)}, {jnp.result_type(value)}; expected one "
                "floating-point scalar, the mean over the minibatch"
            )
        return value

    loss_before, loss_after = loss_of(before), loss_of(at_proposal)
    accepted, model = _judged(state.opt_state, loss_before - loss_after)
    memory = jnp.maximum(_LEAST_MEMORY, state.step / (state.step + _FORGETTING))
    model = _refined(model, *_quadratic(loss_of, at_proposal, jacobian), accepted=accepted, memory=memory)
    directions = basis(state.beta, directions_of(link_fn))
    model = _with_proposal(model, directions)
    step = jnp.where(accepted, state.opt_state.proposal, 0)
    beta = jax.tree.map(lambda leaf, move: leaf + move, state.beta, _lift(step, directions))
    metrics = GlueMetrics(
        loss=loss_before,
        alpha=apply_link(link_fn, state.beta),
        gradient_norm=jnp.linalg.norm(model.gradient),
        probe_losses=None,
    )
    return GlueState(step=state.step + 1, beta=beta, opt_state=model), metrics


def check_output_loss(loss_fn: Any) -> None:
    """Refuses a loss whose outputs cannot be had apart."""
    if not isinstance(loss_fn, OutputLoss):
        raise TypeError(
            f"loss_fn is {loss_fn!r}; expected a glue_jax.OutputLoss(outputs_fn, loss), since Gauss-Newton needs the "
            "outputs apart from their loss (a loss in one part is learned by spsa_step or full_gradient_step)"
        )


def check_gauss_newton_state(state: Any, link_fn: LinkFn) -> GaussNewtonState:
    """Returns the model of a state; refuses a state of an optimizer, or of a link with other directions."""
    check_state(state)
    model = state.opt_state
    if not isinstance(model, GaussNewtonState):
        raise TypeError(
            f"state.opt_state is a {type(model).__name__}; expected that of glue_jax.init(num_experts) without an "
            "optimizer, which Gauss-Newton does not have"
        )
    d = dimension(state.beta, directions_of(link_fn))
    if model.gradient.shape != (d,):
        raise ValueError(
            f"state is of {model.gradient.shape[0]} directions, where beta has {d} under this link_fn: make the state "
            "by init(num_experts, link_fn=link_fn) with the link_fn of the step"
        )
    return model


def _checked_outputs(outputs: Any) -> Any:
    """The outputs in at least float32; refuses those that are not floating point, or have no axis of examples."""
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(outputs)]
    if not leaves or any(not leaf.ndim or not jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves):
        found = jax.tree.map(lambda leaf: f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}", outputs)
        raise ValueError(f"outputs_fn returned {found}; expected floating-point outputs [B, ...] of each example")
    return jax.tree.map(lambda leaf: leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)), outputs)


def _by_forward_mode(
    outputs_of: Callable[[PyTree], Any],
    points: PyTree,
    beta: PyTree,
    link_fn: LinkFn,
    radius: ArrayLike,
    probe_batch_size: int | None,
) -> Any:
    """What `map_probes(outputs_of, points, ...)` returns, were the outputs linear around the proposal."""
    before, at_proposal = (jax.tree.map(lambda leaf, i=i: leaf[i], points) for i in range(2))
    directions = basis(beta, directions_of(link_fn))
    d = len(jax.tree.leaves(directions)[0])

    def tangent(direction: PyTree) -> tuple[Any, Any]:
        return jax.jvp(outputs_of, (at_proposal,), (direction,))

    if probe_batch_size is None or probe_batch_size >= d:
        outputs, tangents = jax.vmap(tangent, out_axes=(None, 0))(directions)
    else:
        outputs, tangents = map_probes(tangent, directions, probe_batch_size)
        outputs = jax.tree.map(lambda leaf: leaf[0], outputs)

    def joined(first: jax.Array, second: jax.Array, tangents: jax.Array) -> jax.Array:
        return jnp.concatenate([first[None], second[None], second[None] + jnp.asarray(radius) * tangents])

    return jax.tree.map(joined, outputs_of(before), outputs, tangents)


def _judged(model: GaussNewtonState, fall: jax.Array) -> tuple[jax.Array, GaussNewtonState]:
    """Whether the proposal is accepted, and the model with the damping that follows.

    Args:
        model: with the proposal.
        fall: of the loss, on a minibatch that the model has not seen. It is NaN where a loss is not finite.
    """
    accepted = fall >= 0
    predicted = -model.proposal @ (model.gradient + 0.5 * _product(model.curvature, model.proposal))
    factor = jnp.where(accepted, jnp.where(fall > _ENOUGH * predicted, _LESS, 1.0), _MORE)
    damping = jnp.clip(model.damping * factor, _LEAST_DAMPING, _MOST_DAMPING)
    # At the first step nothing was proposed.
    return accepted, model._replace(damping=jnp.where(model.weight > 0, damping, model.damping))


def _quadratic(loss_of: Callable[[Any], jax.Array], outputs: Any, jacobian: Any) -> tuple[jax.Array, jax.Array]:
    """Gradient `[d]` and Gauss-Newton curvature `[d, d]` of a minibatch's loss, from J with leaves `[d, B, ...]`."""
    gradient_fn = jax.grad(loss_of)
    # The loss's own second derivative, times each row of J: the network has no part in it.
    curved = jax.vmap(lambda row: jax.jvp(gradient_fn, (outputs,), (row,))[1])(jacobian)
    slopes = jax.tree.map(lambda leaf: leaf[None], gradient_fn(outputs))
    return _over_outputs(jacobian, slopes)[:, 0], _over_outputs(jacobian, curved)


def _refined(
    model: GaussNewtonState, gradient: jax.Array, curvature: jax.Array, *, accepted: jax.Array, memory: jax.Array
) -> GaussNewtonState:
    """The model around the next beta, with a minibatch taken into its mean.

    Args:
        model: around the beta before.
        gradient: of the minibatch at the proposal, `[d]`.
        curvature: of the minibatch at the proposal, `[d, d]`.
        accepted: whether the next beta is the proposal.
        memory: the weight of the minibatches before, against this one.
    """
    weight = memory * model.weight + 1
    old, new = memory * model.weight / weight, 1 / weight
    at_proposal = model.gradient + _product(model.curvature, model.proposal)
    mean_gradient = old * at_proposal + new * gradient
    mean_curvature = old * model.curvature + new * 0.5 * (curvature + curvature.T)
    # An output that is not finite tells nothing.
    known = jnp.isfinite(gradient).all() & jnp.isfinite(curvature).all()
    mean_gradient = jnp.where(known, mean_gradient, at_proposal)
    mean_curvature = jnp.where(known, mean_curvature, model.curvature)
    back_at_beta = mean_gradient - _product(mean_curvature, model.proposal)
    return model._replace(
        gradient=jnp.where(accepted, mean_gradient, back_at_beta),
        curvature=mean_curvature,
        weight=jnp.where(known, weight, model.weight),
    )


def _with_proposal(model: GaussNewtonState, directions: PyTree) -> GaussNewtonState:
    """The model with its damped minimum as the proposal."""
    added = model.damping * _damped(model.curvature, directions)
    step = -jnp.linalg.solve(model.curvature + added, model.gradient)
    return model._replace(proposal=jnp.where(jnp.isfinite(step).all(), step, 0))


def _damped(curvature: jax.Array, directions: PyTree) -> jax.Array:
    """What a damping of one adds to the curvature, `[d, d]`.

    Levenberg damps all directions alike. Then the steepest coefficients alone move. Marquardt damps each coefficient
    by its own curvature. Then a coefficient that hardly matters leaps on noise. The geometric mean lies between: under
    a softmax an expert's curvature falls with the square of its alpha, as its gradient falls with its alpha; so a step
    of beta is as long for an expert of small alpha as for one of large.

    Args:
        curvature: in coordinates of the directions, `[d, d]`.
        directions: the basis, leaves `[d, ...]`.
    """
    d = len(curvature)
    rows = jnp.concatenate([leaf.reshape(d, -1) for leaf in jax.tree.leaves(directions)], axis=1)
    own = jnp.maximum(jnp.sum(rows * _product(curvature, rows), axis=0), 0)
    mean = jnp.mean(own)
    # Where no output changes at all, any damping will do.
    entries = jnp.where(mean > 0, jnp.sqrt(own * mean) + _FLOOR * mean, 1.0)
    return _product(rows * entries[None], rows.T)


def _over_outputs(first: Any, second: Any) -> jax.Array:
    """The products `[m, n]` of outputs with leaves `[m, B, ...]` and `[n, B, ...]`, summed over all but the first."""
    products = jax.tree.map(
        lambda a, b: jnp.matmul(a.reshape(len(a), -1), b.reshape(len(b), -1).T, precision=_HIGHEST), first, second
    )
    return functools.reduce(jnp.add, jax.tree.leaves(products))


def _product(first: jax.Array, second: jax.Array) -> jax.Array:
    """A product that is not rounded."""
    return jnp.matmul(first, second, precision=_HIGHEST)


def _lift(coordinates: jax.Array, directions: PyTree) -> PyTree:
    """From coordinates `[d]` to a step of beta's structure."""
    return jax.tree.map(
        lambda leaf: jnp.tensordot(coordinates, leaf, axes=1, precision=_HIGHEST).astype(leaf.dtype), directions
    )
