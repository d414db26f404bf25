"""From what is learned to the coefficients that blend: `link_fn`s beside the softmax.

Outside the convex hull of the experts (all of these but a box within [0, 1] whose coefficients happen to sum to 1) a
blended variance of BatchNorm can be negative. Keep the statistics out of the blend there, by
`partition(experts, "^batch_stats/")`: a `loss_fn` that normalises by the minibatch does not need them, and
`refresh_statistics` gives the result its own.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from glue_jax.paths import matching
from glue_jax.types import LinkFn, MergeFn, Params, PyTree


def unconstrained(beta: PyTree) -> PyTree:
    """Returns `beta` itself: the `link_fn` of Eq. (7), which updates alpha without the softmax.

    Start it inside the hull: `init(k, optimizer, beta=uniform(k))`.
    """
    return beta


def box(beta: jax.Array, *, low: float = 0.0, high: float = 1.0) -> jax.Array:
    """Returns coefficients between two bounds, each by itself: `low + (high - low) sigmoid(beta)`.

    Args:
        beta: `[..., K]`.
        low: the lower bound; may be negative.
        high: the upper bound, above it.

    Raises:
        ValueError: bounds that are not in this order.

    Example:
        >>> import jax.numpy as jnp
        >>> import glue_jax
        >>> glue_jax.box(jnp.zeros(2), low=-0.5, high=1.5)
        Array([0.5, 0.5], dtype=float32)
    """
    if not low < high:
        raise ValueError(f"low is {low} and high is {high}; expected low < high")
    return low + (high - low) * jax.nn.sigmoid(beta)


def task_vector_weights(scales: jax.Array) -> jax.Array:
    """Returns the blend of an origin and K experts that is `theta_0 + sum_i lambda_i (theta_i - theta_0)`.

    Task arithmetic (Ilharco et al., 2023, https://arxiv.org/abs/2212.04089), as a blend: of the models that
    `stack_experts([origin, *experts])` holds, with the coefficients `1 - sum(lambda)` and `lambda`. With a box:
    `link_fn=lambda beta: task_vector_weights(box(beta))`.

    Args:
        scales: lambda, `[..., K]`.

    Returns:
        Coefficients `[..., K+1]` with sum 1, the origin's first.

    Example:
        >>> import jax.numpy as jnp
        >>> import glue_jax
        >>> glue_jax.task_vector_weights(jnp.array([0.5, 1.0]))
        Array([-0.5,  0.5,  1. ], dtype=float32)
    """
    return jnp.concatenate([1 - jnp.sum(scales, axis=-1, keepdims=True), scales], axis=-1)


class Tempered(NamedTuple):
    """Coefficients and a temperature, learned together.

    Attributes:
        coefficients: beta, or alpha.
        temperature: `[]`: its logarithm in beta (0 to start), itself in alpha.
    """

    coefficients: PyTree
    temperature: jax.Array


def tempered_link(link_fn: LinkFn = jax.nn.softmax) -> LinkFn:
    """Returns a `link_fn` of `Tempered` coefficients.

    Args:
        link_fn: of the coefficients beside the temperature.
    """

    def link(beta: Tempered) -> Tempered:
        return Tempered(link_fn(beta.coefficients), jnp.exp(beta.temperature))

    return link


def tempered_merge(merge_fn: MergeFn, *, head: str) -> MergeFn:
    """Returns a `merge_fn` of `Tempered` coefficients that divides the logits by the temperature.

    An average of networks is under-confident, its logits too small. The temperature is folded into the last layer, so
    that the merged model is one of the experts' architecture and needs nothing beside.

    Args:
        merge_fn: of the coefficients beside the temperature.
        head: a regular expression for the paths of the last layer's kernel and bias (`glue_jax.paths`).

    Returns:
        The `merge_fn`, which raises a ValueError where no path has `head` in it.
    """

    def merge(experts: Params, alpha: Tempered) -> Params:
        params = merge_fn(experts, alpha.coefficients)
        chosen = matching(params, head)
        return jax.tree.map(
            lambda leaf, is_head: (leaf / alpha.temperature).astype(leaf.dtype) if is_head else leaf, params, chosen
        )

    return merge
