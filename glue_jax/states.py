"""The state of learning: `init` makes it, and `alpha` reads its coefficients."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from glue_jax import quadratic_model
from glue_jax.checks import check_counts, check_optimizer
from glue_jax.coefficients import check_floating
from glue_jax.gauss_newton import check_gauss_newton_state
from glue_jax.links import apply_link, start_of
from glue_jax.paths import check_finite
from glue_jax.types import GlueState, LearnResult, LinkFn, PyTree


def init(
    num_experts: int,
    optimizer: optax.GradientTransformation | None = None,
    *,
    beta: PyTree | None = None,
    link_fn: LinkFn | None = None,
) -> GlueState:
    """Returns the state that learning starts from.

    Args:
        num_experts: K, the number of experts.
        optimizer: the optimizer that updates beta. The paper uses `optax.adam(1e-2, b1=0.9, b2=0.99)`. Pass None for
            `gauss_newton_step`, which needs no optimizer.
        beta: the start, any pytree of floating-point coefficients. `weights_to_logits` gives a start anywhere inside
            the simplex. With None it is the link's own start. For the softmax this is zeros `[K]`, which give the
            uniform average. A link that the library does not know also starts from zeros `[K]`.
        link_fn: the `link_fn` of the steps. With None it is the softmax.

    Returns:
        The state of step 0.

    Raises:
        ValueError: if `num_experts` is below 1, if beta is empty or not finite, or if beta belongs to another number of
            experts.
        ValueError: if beta is None and the link turns zeros `[K]` into coefficients that are all 0, or if there is no
            optimizer and nothing to learn, as with one expert under a softmax.
        TypeError: if `num_experts` is no integer, if beta is not floating point of at least 32 bits, or if the
            optimizer is not one of optax.
    """
    check_counts(num_experts=num_experts)
    if optimizer is not None:
        check_optimizer(optimizer)
    start: PyTree = start_of(link_fn or jax.nn.softmax, num_experts) if beta is None else beta
    check_floating(start, least_bits=32)
    check_finite("beta", start)
    given = jax.eval_shape(link_fn, start) if link_fn else start
    found = [jnp.shape(leaf) for leaf in jax.tree.leaves(given)]
    if not found or any(shape and shape[-1] != num_experts for shape in found):
        raise ValueError(
            f"beta gives coefficients of shape {jax.tree.map(jnp.shape, given)}; expected a last axis of num_experts = "
            f"{num_experts}"
            + ("" if link_fn else " (if beta has another shape on purpose, pass the link_fn that takes it)")
        )
    # A copy, because a step may donate its state. A weak type would change in the first step and retrace.
    start = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.result_type(leaf)), start)
    return GlueState(jnp.zeros((), jnp.int32), start, opt_state_of(start, optimizer, link_fn or jax.nn.softmax))


def opt_state_of(beta: PyTree, optimizer: optax.GradientTransformation | None, link_fn: LinkFn) -> Any:
    """Returns the initial `opt_state`: the optimizer's, or Gauss-Newton's if there is no optimizer."""
    return quadratic_model.start(beta, link_fn) if optimizer is None else optimizer.init(beta)


def beside(state: GlueState, trees: PyTree) -> GlueState:
    """Returns the state on the devices of these arrays, where a step would return it, so that no step compiles anew."""
    shardings = [leaf.sharding for leaf in jax.tree.leaves(trees) if leaf.committed]
    if not shardings:
        return state
    mesh = getattr(shardings[0], "mesh", None)
    return jax.device_put(state, NamedSharding(mesh, PartitionSpec()) if mesh else shardings[0])


def alpha(state: GlueState | LearnResult, link_fn: LinkFn = jax.nn.softmax) -> PyTree:
    """Returns the coefficients that blend the experts, `link_fn(state.beta)`.

    Args:
        state: a state from `init` or a step, or a result of `learn`.
        link_fn: the `link_fn` of the steps. A result of `learn` needs none: the function returns `state.alpha`.

    Returns:
        The coefficients, `[K]` or any pytree that the link returns.

    Raises:
        TypeError: if `state` is neither a state nor a result, or if the link does not take this beta.
        ValueError: if a state of `gauss_newton_step` has directions of another link. The function cannot see the link
            of another state, so pass the right one.
    """
    if isinstance(state, LearnResult):
        return state.alpha
    if not hasattr(state, "beta"):
        raise TypeError(f"state is a {type(state).__name__}; expected a GlueState or a LearnResult")
    if isinstance(state.opt_state, quadratic_model.GaussNewtonState):
        check_gauss_newton_state(state, link_fn)
    return apply_link(link_fn, state.beta)
