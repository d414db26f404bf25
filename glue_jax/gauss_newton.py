"""Gauss-Newton for the coefficients, from forward passes alone.

A forward pass gives more than one loss: it gives the outputs of every example. The outputs of d + 1 nearby blends tell
how the outputs change with the d coefficients. This is the Jacobian J. Let l' and l'' be the derivatives of the loss
with respect to the outputs. The gradient for the coefficients is `J^T l'`, and the Gauss-Newton curvature is
`J^T l'' J`. A damped step then solves d equations. The network is never differentiated backwards.

Minibatches are noisy. So the gradient and the curvature are running means over the minibatches so far. And a step is
only proposed: the next minibatch accepts the proposal or turns it down. `glue_jax.quadratic_model` does both.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from glue_jax.blending import blend, merge_for_learning
from glue_jax.checks import check_callable, check_counts, check_positive, check_state
from glue_jax.directions import basis, dimension, sample_directions
from glue_jax.estimators import map_probes
from glue_jax.links import apply_link, directions_of, radius_of
from glue_jax.objectives import LossOfOutputs, OutputLoss
from glue_jax.precision import matmul_precision_of, multiplies_short_floats
from glue_jax.quadratic_model import GaussNewtonState, judged, lift, product, refined, with_proposal
from glue_jax.types import Batch, GlueMetrics, GlueState, LinkFn, MergeFn, Params, PyTree

Tangents = Literal["differences", "forward_mode"]

# The error of one-sided differences is proportional to the radius. The error of SPSA's pairs is proportional to its
# square. So one-sided differences need a shorter radius than the link's.
_ONE_SIDED = 0.1


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
    num_directions: int | None = None,
    probe_batch_size: int | None = None,
    matmul_precision: str | None = "highest",
) -> tuple[GlueState, GlueMetrics]:
    """Takes one damped Gauss-Newton step: d + 2 blended forward passes, no backward pass and no learning rate.

    d is the number of directions that change the blend. Under `jax.nn.softmax`, and under a `Link` whose attribute
    `directions` is `simplex_orthogonal`, d is K - 1, or G (K - 1) with G groups. Under such a link, a learned
    temperature (`glue_jax.links.tempered_link`) makes d larger by 1. For any other link d is the size of beta.

    Each call does three things. It tests the move that the previous call proposed, and beta makes this move unless the
    loss on the minibatch rises. It refines a quadratic model of the loss. The model proposes the next move. So the
    first call does not change beta.

    There is no optimizer. `init(num_experts, link_fn=link_fn)` makes the state. A call holds the outputs of d + 2
    blends in memory. While it computes the curvature, it needs about three times this memory.

    Args:
        key: a `jax.random.key` that draws the directions, if `num_directions` is given. Otherwise it is not used and
            may be None.
        state: the state from `init(num_experts, link_fn=link_fn)` or from the previous step.
        experts: as for `spsa_step`.
        batch: as for `spsa_step`. The cost of learning is the number of examples, times the number of models that
            evaluate each example. Minibatches of 16 to 32 examples reach a given loss at the lowest cost. Small
            minibatches give more steps for the same number of examples. Their noise does little harm, because the
            quadratic model is a mean over minibatches. So pass `batch_size=32` to `learn`, whose default is 64. The
            number of outputs (examples times classes) should exceed the number of directions.
        loss_fn: an `OutputLoss`, deterministic as for `spsa_step`. Its `outputs_fn` needs no backward pass. JAX
            differentiates it in forward mode, or not at all; `tangents` says which.
        link_fn: as for `spsa_step`.
        merge_fn: as for `spsa_step`.
        tangents: how the Jacobian of the outputs is computed. `differences` takes one-sided differences, and JAX does
            not differentiate the network. `forward_mode` takes `jax.jvp`, which needs about twice the time and is right
            in every number format. With None it is `forward_mode` if the network itself multiplies bfloat16 or float16
            arrays, and `differences` otherwise.
        radius: the distance in beta between the two blends of a finite difference. It does not limit the move of beta.
            It is a number, not a schedule. With None it is a tenth of the radius that `spsa_step` takes for the link.
            In `forward_mode` the radius has no effect.
        num_directions: m, the number of random directions that a step looks along, at most d. Then a step takes m + 2
            forward passes. The next steps draw other directions. The quadratic model is a mean over steps, so in time
            it knows the slopes along all d directions. `experiments.studies.budget` compares steps with all d
            directions and steps with 16 directions, for d = 30, 50 and 390. Both have the same limit of forward passes.
            Within this limit, the steps with all directions end at a lower loss. With None a step takes all d
            directions.
        probe_batch_size: how many of the blends are evaluated at once; see `spsa_gradient`. In `forward_mode` it is the
            number of directions whose derivatives are computed together, by default all directions. They share one
            forward pass.
        matmul_precision: the precision of matrix products in `outputs_fn`, `merge_fn` and `link_fn`, as for
            `spsa_step`. The products in `loss` have JAX's own precision.

    Returns:
        The next state, and the metrics of the state that went in. There is one exception: `gradient_norm` is the norm
        of the quadratic model's gradient at the next beta.

    Raises:
        ValueError: if an argument is out of its range, if the coefficients do not fit the experts, if the loss is no
            scalar, if the outputs have no axis of examples, or if `num_directions` exceeds d.
        TypeError: if `loss_fn` is no `OutputLoss`, if the state has the state of an optimizer, if `num_directions` is
            given and `key` is None, or if an argument has the wrong type.

    Examples:
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
    check_output_loss(loss_fn)
    check_callable(link_fn=link_fn, merge_fn=merge_fn)
    model = check_gauss_newton_state(state, link_fn)
    if tangents is not None and tangents not in get_args(Tangents):
        raise ValueError(f"tangents is {tangents!r}; expected one of {get_args(Tangents)} or None")
    if probe_batch_size is not None:
        check_counts(probe_batch_size=probe_batch_size)
    radius = difference_radius(link_fn) if radius is None else radius
    check_positive("radius", radius)
    rows = subspace(key, state, model, num_directions)
    merge = merge_for_learning(merge_fn)

    def outputs_of(beta: PyTree) -> Any:
        with matmul_precision_of(matmul_precision):
            return _checked_outputs(loss_fn.outputs_fn(merge(experts, apply_link(link_fn, beta)), batch))

    if tangents is None:
        tangents = "forward_mode" if multiplies_short_floats(outputs_of, state.beta) else "differences"
    points = probe_points(state.beta, model, link_fn, radius, rows)
    if tangents == "differences":
        outputs = differences(map_probes(outputs_of, points, probe_batch_size), radius)
    else:
        outputs = _by_forward_mode(outputs_of, points, _directions(state.beta, link_fn, rows), probe_batch_size)
    return move(state, *outputs, batch, rows, link_fn=link_fn, loss=loss_fn.loss)


def difference_radius(link_fn: LinkFn) -> float:
    """Returns the length of a difference's step in beta that suits a link."""
    return _ONE_SIDED * radius_of(link_fn)


def subspace(
    key: jax.Array | None, state: GlueState, model: GaussNewtonState, num_directions: int | None
) -> jax.Array | None:
    """Returns the directions of a step as orthonormal rows `[m, d]` of coordinates. None stands for all d directions.

    Raises:
        ValueError: if there are not so many directions.
        TypeError: if the number of directions is no integer, or if there is no key to draw them.
    """
    if num_directions is None:
        return None
    check_counts(num_directions=num_directions)
    d = len(model.gradient)
    if num_directions > d:
        raise ValueError(f"num_directions is {num_directions}; expected at most d = {d}, or None for all of them")
    kinds = (jax.dtypes.prng_key, jnp.uint32)
    if key is None or not any(jnp.issubdtype(jnp.result_type(key), kind) for kind in kinds):
        raise TypeError(f"key is {key!r}; expected a jax.random.key, from which num_directions draws directions")
    return sample_directions(jax.random.fold_in(key, state.step), jnp.zeros((d,)), num_directions, "orthogonal")


def probe_points(
    beta: PyTree, model: GaussNewtonState, link_fn: LinkFn, radius: ArrayLike, rows: jax.Array | None
) -> PyTree:
    """Returns the points whose outputs a step needs: beta, the proposal, and a point around it along each direction.

    Returns:
        A pytree with the structure of beta, and leaves `[m + 2, ...]`.
    """

    def points(leaf: jax.Array, directions: jax.Array, step: jax.Array) -> jax.Array:
        at_proposal = leaf + step
        around = at_proposal[None] + (jnp.asarray(radius) * directions).astype(leaf.dtype)
        return jnp.concatenate([leaf[None], at_proposal[None], around])

    proposal = lift(model.proposal, _directions(beta, link_fn, None))
    return jax.tree.map(points, beta, _directions(beta, link_fn, rows), proposal)


def differences(outputs: Any, radius: ArrayLike) -> tuple[Any, Any, Any]:
    """Returns the outputs at beta and at the proposal, and the Jacobian by one-sided differences.

    Args:
        outputs: the outputs at `probe_points`, leaves `[m + 2, B, ...]`, of JAX or of NumPy.
        radius: the radius of the points.
    """
    before, at_proposal = (jax.tree.map(lambda leaf, i=i: leaf[i], outputs) for i in range(2))
    return before, at_proposal, jax.tree.map(lambda leaf: (leaf[2:] - leaf[1:2]) / radius, outputs)


def move(
    state: GlueState,
    before: Any,
    at_proposal: Any,
    jacobian: Any,
    batch: Batch,
    rows: jax.Array | None,
    *,
    link_fn: LinkFn,
    loss: LossOfOutputs,
) -> tuple[GlueState, GlueMetrics]:
    """Judges the proposal, refines the model, and proposes the next step.

    Args:
        state: the state before the step.
        before: the outputs at beta, leaves `[B, ...]`.
        at_proposal: the outputs at the proposal, leaves `[B, ...]`.
        jacobian: the derivatives of the outputs at the proposal along the directions, leaves `[m, B, ...]`.
        batch: the minibatch, for `loss`.
        rows: the directions, from `subspace`.
        link_fn: the link of the step.
        loss: the second part of an `OutputLoss`.

    Returns:
        The next state, and the metrics of the state that went in.
    """

    def loss_of(outputs: Any) -> jax.Array:
        value = loss(outputs, batch)
        if jnp.shape(value) != () or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
            raise ValueError(
                f"the loss of the outputs is {jax.tree.map(jnp.shape, value)}, {jnp.result_type(value)}; expected one "
                "floating-point scalar, the mean over the minibatch"
            )
        return value

    loss_before, loss_after = loss_of(before), loss_of(at_proposal)
    accepted, model = judged(state.opt_state, loss_before - loss_after)
    along = _quadratic(loss_of, at_proposal, jacobian)
    model = refined(model, *along, rows, step=state.step, accepted=accepted)
    directions = _directions(state.beta, link_fn, None)
    model = with_proposal(model, directions)
    step = jnp.where(accepted, state.opt_state.proposal, 0)
    beta = jax.tree.map(jnp.add, state.beta, lift(step, directions))
    metrics = GlueMetrics(
        loss=loss_before,
        alpha=apply_link(link_fn, state.beta),
        gradient_norm=jnp.linalg.norm(model.gradient),
        probe_losses=None,
    )
    return GlueState(step=state.step + 1, beta=beta, opt_state=model), metrics


def check_output_loss(loss_fn: Any) -> None:
    """Refuses a loss that does not have the outputs as a part of its own."""
    if not isinstance(loss_fn, OutputLoss):
        raise TypeError(
            f"loss_fn is {loss_fn!r}; expected a glue_jax.OutputLoss(outputs_fn, loss), because Gauss-Newton needs "
            "the outputs apart from their loss (for a loss in one part, use spsa_step or full_gradient_step)"
        )


def check_gauss_newton_state(state: Any, link_fn: LinkFn) -> GaussNewtonState:
    """Returns the model of a state. Refuses a state of an optimizer, and a state of a link with other directions."""
    check_state(state)
    model = state.opt_state
    if not isinstance(model, GaussNewtonState):
        raise TypeError(
            f"state.opt_state is a {type(model).__name__}; expected that of glue_jax.init(num_experts) without an "
            "optimizer, because Gauss-Newton has none"
        )
    d = dimension(state.beta, directions_of(link_fn))
    if model.gradient.shape != (d,):
        raise ValueError(
            f"state has {model.gradient.shape[0]} directions, but beta has {d} under this link_fn: pass the link_fn of "
            "init, or make the state by init(num_experts, link_fn=link_fn)"
        )
    return model


def _checked_outputs(outputs: Any) -> Any:
    """Returns outputs in at least float32. Refuses outputs that are not floating point, or have no axis of examples."""
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(outputs)]
    if not leaves or any(not leaf.ndim or not jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves):
        found = jax.tree.map(lambda leaf: f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}", outputs)
        raise ValueError(f"outputs_fn returned {found}; expected floating-point outputs [B, ...] of each example")
    return jax.tree.map(lambda leaf: leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)), outputs)


def _directions(beta: PyTree, link_fn: LinkFn, rows: jax.Array | None) -> PyTree:
    """Returns the directions of a step, leaves `[m, ...]`. If `rows` is None, they are the whole basis."""
    whole = basis(beta, directions_of(link_fn))
    return whole if rows is None else jax.vmap(lift, (0, None))(rows, whole)


def _by_forward_mode(
    outputs_of: Callable[[PyTree], Any], points: PyTree, directions: PyTree, probe_batch_size: int | None
) -> tuple[Any, Any, Any]:
    """Returns the outputs at beta and at the proposal, and the exact Jacobian at the proposal."""
    before, at_proposal = (jax.tree.map(lambda leaf, i=i: leaf[i], points) for i in range(2))
    count = len(jax.tree.leaves(directions)[0])

    def tangent(direction: PyTree) -> tuple[Any, Any]:
        return jax.jvp(outputs_of, (at_proposal,), (direction,))

    if probe_batch_size is None or probe_batch_size >= count:
        outputs, jacobian = jax.vmap(tangent, out_axes=(None, 0))(directions)
    else:
        outputs, jacobian = map_probes(tangent, directions, probe_batch_size)
        outputs = jax.tree.map(lambda leaf: leaf[0], outputs)
    return outputs_of(before), outputs, jacobian


def _quadratic(loss_of: Callable[[Any], jax.Array], outputs: Any, jacobian: Any) -> tuple[jax.Array, jax.Array]:
    """Returns the gradient `[d]` and the curvature `[d, d]` of a minibatch's loss, from J with leaves `[d, B, ...]`."""
    gradient_fn = jax.grad(loss_of)
    # This is the second derivative of the loss alone, times each row of J. It does not differentiate the network.
    curved = jax.vmap(lambda row: jax.jvp(gradient_fn, (outputs,), (row,))[1])(jacobian)
    slopes = jax.tree.map(lambda leaf: leaf[None], gradient_fn(outputs))
    return _over_outputs(jacobian, slopes)[:, 0], _over_outputs(jacobian, curved)


def _over_outputs(first: Any, second: Any) -> jax.Array:
    """Returns the inner products `[m, n]` of outputs, from leaves `[m, B, ...]` and leaves `[n, B, ...]`."""
    products = jax.tree.map(lambda a, b: product(a.reshape(len(a), -1), b.reshape(len(b), -1).T), first, second)
    return functools.reduce(jnp.add, jax.tree.leaves(products))
