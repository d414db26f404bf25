"""From what is learned to the coefficients that blend: `link_fn`s beside the softmax.

All of these links leave the convex hull of the experts, where a blended variance of BatchNorm can be negative. Keep
the statistics out of the blend there, by `partition(experts, "^batch_stats/")`. A `loss_fn` that normalises by the
minibatch does not need them, and `refresh_statistics` gives the result its own.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from glue_jax.blending import merge_for_learning
from glue_jax.checks import as_number, check_callable, check_positive
from glue_jax.coefficients import uniform
from glue_jax.directions import DirectionName
from glue_jax.paths import matching
from glue_jax.precision import DEFAULT_RADIUS, SOFTMAX_RADIUS
from glue_jax.types import LinkFn, MergeFn, Params, PyTree


@dataclasses.dataclass(frozen=True)
class Link:
    """A `link_fn` that brings its own start, directions and radius.

    `box` and `tempered_link` return the same link for the same arguments, so that nothing is compiled twice.

    Attributes:
        fn: `fn(beta) -> alpha`.
        start: `start(num_experts) -> beta`, where `init` starts.
        directions: what `spsa_step` and `forward_gradient_step` probe along by default.
        radius: how far `spsa_step` probes by default, in units of beta.
    """

    fn: LinkFn
    start: Callable[[int], PyTree]
    directions: DirectionName = "orthogonal"
    radius: float = DEFAULT_RADIUS

    def __call__(self, beta: PyTree, /) -> PyTree:
        """Returns alpha."""
        return self.fn(beta)


def start_of(link_fn: LinkFn, num_experts: int) -> PyTree:
    """Returns the beta that learning starts from: the link's own, or zeros, float32 `[K]`."""
    if isinstance(link_fn, Link):
        return link_fn.start(num_experts)
    zeros = jnp.zeros((num_experts,), jnp.float32)
    is_zero = False
    # A link of betas of another kind says so where it is used.
    with contextlib.suppress(Exception), jax.ensure_compile_time_eval():
        is_zero = not any(np.any(leaf) for leaf in jax.tree.leaves(link_fn(zeros)))
    if is_zero:
        raise ValueError(
            "link_fn makes every coefficient 0 of its start, zeros [K], which blends a network of zeros: pass beta, or "
            "use glue_jax.unconstrained for alpha = beta"
        )
    return zeros


def directions_of(link_fn: LinkFn) -> DirectionName:
    """Returns the directions that suit a link.

    A softmax does not see a common change of all coefficients: `simplex_orthogonal` leaves it out. With two experts,
    half of the steps along random signs are wasted on it. Of a function that is not known, all is probed.
    """
    if isinstance(link_fn, Link):
        return link_fn.directions
    return "simplex_orthogonal" if _is_softmax(link_fn) else "orthogonal"


def radius_of(link_fn: LinkFn) -> float:
    """Returns how far to probe beta under a link, by the measurements of `glue_jax.precision`."""
    if isinstance(link_fn, Link):
        return link_fn.radius
    return SOFTMAX_RADIUS if _is_softmax(link_fn) else DEFAULT_RADIUS


def _is_softmax(link_fn: LinkFn) -> bool:
    """Whether a link is the softmax over the experts."""
    if isinstance(link_fn, functools.partial) and link_fn.keywords.get("axis", -1) == -1:
        link_fn = link_fn.func
    return link_fn is jax.nn.softmax


def apply_link(link_fn: LinkFn, beta: PyTree) -> PyTree:
    """Returns alpha; refuses a link that returns none, and the softmax of a beta that is no array."""
    check_callable(link_fn=link_fn)
    if link_fn is jax.nn.softmax and not jax.tree_util.all_leaves([beta]):
        raise TypeError(f"beta is a {type(beta).__name__}; the softmax takes one array: pass the link_fn of this beta")
    alpha = link_fn(beta)
    if not jax.tree.leaves(alpha):
        raise TypeError(f"link_fn returned {alpha!r}; expected coefficients")
    return alpha


def _identity(beta: PyTree) -> PyTree:
    """Beta itself."""
    return beta


unconstrained = Link(_identity, uniform)
"""The `link_fn` of Eq. (7), which updates alpha without the softmax: alpha is beta. It starts at 1/K."""


def box(*, low: float = 0.0, high: float = 1.0) -> Link:
    """Returns the link to coefficients between two bounds, each by itself: `low + (high - low) sigmoid(beta)`.

    It starts at 1/K, or in the middle where 1/K is not within the bounds.

    Args:
        low: the lower bound; may be negative.
        high: the upper bound, above it.

    Raises:
        ValueError: bounds that are not finite, not scalars, or not in this order.
        TypeError: bounds that are no real numbers.

    Example:
        >>> import jax.numpy as jnp
        >>> import glue_jax
        >>> glue_jax.links.box(low=-0.5, high=1.5)(jnp.zeros(2))
        Array([0.5, 0.5], dtype=float32)
    """
    low, high = as_number("low", low), as_number("high", high)
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"low is {low} and high is {high}; expected finite numbers, low < high")
    return _box(low, high)


@functools.cache
def _box(low: float, high: float) -> Link:
    """The link of these bounds, one for each pair of them."""
    return Link(functools.partial(_in_box, low=low, high=high), functools.partial(_box_start, low=low, high=high))


def _in_box(beta: PyTree, *, low: float, high: float) -> PyTree:
    """Coefficients between the bounds."""
    return jax.tree.map(lambda leaf: low + (high - low) * jax.nn.sigmoid(leaf), beta)


def _box_start(num_experts: int, *, low: float, high: float) -> jax.Array:
    """Where the coefficients are 1/K, or 0, the middle of the box."""
    fraction = (1 / num_experts - low) / (high - low)
    return jnp.full((num_experts,), math.log(fraction / (1 - fraction)) if 0 < fraction < 1 else 0.0, jnp.float32)


def task_vector_weights(scales: jax.Array) -> jax.Array:
    """Returns the blend of an origin and K experts that is `theta_0 + sum_i lambda_i (theta_i - theta_0)`.

    Task arithmetic (Ilharco et al., 2023, https://arxiv.org/abs/2212.04089), as a blend: of the models that
    `stack_experts([origin, *experts])` holds, with the coefficients `1 - sum(lambda)` and `lambda`. With a box:
    `scales = box(low=0.0, high=1.0)` and `link_fn=lambda beta: task_vector_weights(scales(beta))`.

    Args:
        scales: lambda, `[..., K]`.

    Returns:
        Coefficients `[..., K+1]` with sum 1, the origin's first.

    Raises:
        ValueError: scales without an axis.

    Example:
        >>> import jax.numpy as jnp
        >>> import glue_jax
        >>> glue_jax.links.task_vector_weights(jnp.array([0.5, 1.0]))
        Array([-0.5,  0.5,  1. ], dtype=float32)
    """
    scales = jnp.asarray(scales)
    if not scales.ndim:
        raise ValueError(f"scales have shape {scales.shape}; expected [..., K]")
    return jnp.concatenate([1 - jnp.sum(scales, axis=-1, keepdims=True), scales], axis=-1)


class Tempered(NamedTuple):
    """Coefficients and a temperature, learned together.

    Attributes:
        coefficients: beta, or alpha.
        temperature: `[]`: its logarithm in beta (0 to start), itself in alpha.
    """

    coefficients: PyTree
    temperature: jax.Array


def tempered_link(link_fn: LinkFn = jax.nn.softmax) -> Link:
    """Returns the link of `Tempered` coefficients. It starts where `link_fn` does, at temperature 1.

    Args:
        link_fn: of the coefficients beside the temperature.

    Raises:
        TypeError: a link that is no function.
    """
    check_callable(link_fn=link_fn)
    return _tempered_link(link_fn)


@functools.cache
def _tempered_link(link_fn: LinkFn) -> Link:
    """The link around another one, one for each of them."""
    return Link(
        functools.partial(_tempered, link_fn=link_fn),
        functools.partial(_tempered_start, link_fn=link_fn),
        directions_of(link_fn),
        radius_of(link_fn),
    )


def _tempered(beta: PyTree, *, link_fn: LinkFn) -> Tempered:
    """Alpha with its temperature."""
    if not isinstance(beta, Tempered):
        raise TypeError(
            f"beta is a {type(beta).__name__}; expected glue_jax.links.Tempered(coefficients, temperature), as a state "
            "of glue_jax.init(..., link_fn=tempered_link(...)) has"
        )
    return Tempered(link_fn(beta.coefficients), jnp.exp(beta.temperature))


def _tempered_start(num_experts: int, *, link_fn: LinkFn) -> Tempered:
    """The link's start, and the logarithm of 1."""
    return Tempered(start_of(link_fn, num_experts), jnp.zeros(()))


def tempered_merge(merge_fn: MergeFn, *, head: str) -> MergeFn:
    """Returns a `merge_fn` of `Tempered` coefficients that divides the logits by the temperature.

    An average of networks is under-confident: its logits are too small. The temperature is folded into the last layer,
    so that the merged model is one of the experts' architecture and needs nothing beside.

    Args:
        merge_fn: of the coefficients beside the temperature.
        head: a regular expression for the paths of the last layer's kernel and bias (`glue_jax.paths`).

    Returns:
        The `merge_fn`. It raises a ValueError where no path has `head` in it, and a TypeError for coefficients that
        are not `Tempered`. With any `min_dtype` it keeps at least float32.
    """

    def merge(experts: Params, alpha: PyTree, *, min_dtype: DTypeLike | None = None) -> Params:
        if not isinstance(alpha, Tempered):
            raise TypeError(
                f"alpha is a {type(alpha).__name__}; expected glue_jax.links.Tempered, as tempered_link gives"
            )
        check_positive("the temperature", alpha.temperature)
        if min_dtype is None:
            params = merge_fn(experts, alpha.coefficients)
        else:
            params = merge_for_learning(merge_fn)(experts, alpha.coefficients)
        chosen = matching(params, head)
        return jax.tree.map(
            lambda leaf, is_head: (leaf / alpha.temperature).astype(leaf.dtype) if is_head else leaf, params, chosen
        )

    return merge
