"""Links from the learned beta to the coefficients alpha, beside the softmax: unconstrained, box, temperature.

Only the temperature around a softmax stays in the convex hull of the experts. The other links can leave it. Outside
the hull a blended BatchNorm variance can be negative. So keep the statistics out of the blend there, with
`partition(experts, "^batch_stats/")`. A `loss_fn` that normalises by the minibatch does not need them.
`refresh_statistics` computes new statistics for the finished model.
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

__all__ = ["Link", "Tempered", "box", "task_vector_weights", "tempered_link", "tempered_merge", "unconstrained"]


@dataclasses.dataclass(frozen=True)
class Link:
    """A `link_fn` with its own start, directions and radius.

    `box` and `tempered_link` return the same object for the same arguments, so nothing is compiled twice.

    Attributes:
        fn: `fn(beta) -> alpha`.
        start: `start(num_experts) -> beta`, the beta at which `init` starts.
        directions: the default directions of the steps, of `ask` and of `plan`.
        radius: the default radius of `spsa_step` and `ask`, in units of beta. That of `gauss_newton_step` is a tenth.
    """

    fn: LinkFn
    start: Callable[[int], PyTree]
    directions: DirectionName = "orthogonal"
    radius: float = DEFAULT_RADIUS

    def __call__(self, beta: PyTree, /) -> PyTree:
        """Returns alpha, as `fn` does."""
        return self.fn(beta)


def start_of(link_fn: LinkFn, num_experts: int) -> PyTree:
    """Returns the beta that learning starts from: the link's own start, or zeros, float32 `[K]`."""
    if isinstance(link_fn, Link):
        return link_fn.start(num_experts)
    zeros = jnp.zeros((num_experts,), jnp.float32)
    is_zero = False
    # A link that takes another kind of beta raises its own error when it is used.
    with contextlib.suppress(Exception), jax.ensure_compile_time_eval():
        is_zero = not any(np.any(leaf) for leaf in jax.tree.leaves(link_fn(zeros)))
    if is_zero:
        raise ValueError(
            "link_fn makes every coefficient 0 at its start, zeros [K], and the blend is then a network of zeros: pass "
            "beta, or use glue_jax.unconstrained for alpha = beta"
        )
    return zeros


def directions_of(link_fn: LinkFn) -> DirectionName:
    """Returns the default directions for a link.

    Adding one number to all of beta does not change a softmax, and `simplex_orthogonal` leaves this change out. With
    two experts, random signs would waste half of the steps on it. A link that the library does not know gets
    `orthogonal`, which probes everything.
    """
    if isinstance(link_fn, Link):
        return link_fn.directions
    return "simplex_orthogonal" if _is_softmax(link_fn) else "orthogonal"


def radius_of(link_fn: LinkFn) -> float:
    """Returns the default radius for a link, in units of beta. `glue_jax.precision` explains the values."""
    if isinstance(link_fn, Link):
        return link_fn.radius
    return SOFTMAX_RADIUS if _is_softmax(link_fn) else DEFAULT_RADIUS


def _is_softmax(link_fn: LinkFn) -> bool:
    """Whether a link is the softmax over the experts."""
    if isinstance(link_fn, functools.partial) and link_fn.keywords.get("axis", -1) == -1:
        link_fn = link_fn.func
    return link_fn is jax.nn.softmax


def apply_link(link_fn: LinkFn, beta: PyTree) -> PyTree:
    """Returns alpha. Refuses a link that returns no coefficients, and the softmax of a beta that is no array."""
    check_callable(link_fn=link_fn)
    if link_fn is jax.nn.softmax and not jax.tree_util.all_leaves([beta]):
        raise TypeError(
            f"beta is a {type(beta).__name__}; the softmax takes one array: pass the link_fn that takes this beta"
        )
    alpha = link_fn(beta)
    if not jax.tree.leaves(alpha):
        raise TypeError(f"link_fn returned {alpha!r}; expected coefficients")
    return alpha


def _identity(beta: PyTree) -> PyTree:
    """Returns beta unchanged."""
    return beta


unconstrained = Link(_identity, uniform)
"""The `link_fn` of Eq. (7): alpha is beta, without a softmax. Learning starts at 1/K."""


def box(*, low: float = 0.0, high: float = 1.0) -> Link:
    """Returns a link that keeps each coefficient between two bounds: `low + (high - low) sigmoid(beta)`.

    Learning starts at 1/K. If 1/K is not between the bounds, learning starts in the middle.

    Args:
        low: the lower bound. It may be negative.
        high: the upper bound, greater than `low`.

    Returns:
        The link. It maps `[K]` to `[K]`, and any pytree leaf by leaf.

    Raises:
        ValueError: if a bound is not a finite scalar, or if `low` is not below `high`.
        TypeError: if a bound is no real number.

    Examples:
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
    """Returns the link of these bounds, always the same object for the same bounds."""
    return Link(functools.partial(_in_box, low=low, high=high), functools.partial(_box_start, low=low, high=high))


def _in_box(beta: PyTree, *, low: float, high: float) -> PyTree:
    """Returns the coefficients between the bounds."""
    return jax.tree.map(lambda leaf: low + (high - low) * jax.nn.sigmoid(leaf), beta)


def _box_start(num_experts: int, *, low: float, high: float) -> jax.Array:
    """Returns the beta that makes every coefficient 1/K, or else 0, the middle of the box."""
    fraction = (1 / num_experts - low) / (high - low)
    return jnp.full((num_experts,), math.log(fraction / (1 - fraction)) if 0 < fraction < 1 else 0.0, jnp.float32)


def task_vector_weights(scales: jax.Array) -> jax.Array:
    """Returns the blend coefficients that give `theta_0 + sum_i lambda_i (theta_i - theta_0)`.

    This is task arithmetic (Ilharco et al., 2023, https://arxiv.org/abs/2212.04089), written as a blend. Stack the
    origin theta_0 and the K experts with `stack_experts([origin, *experts])`. The coefficients are `1 - sum(lambda)`
    for the origin and `lambda` for the experts. To keep each lambda between 0 and 1, pass
    `link_fn=lambda beta: task_vector_weights(box(low=0.0, high=1.0)(beta))` to the steps and to `init`. The beta of
    this link is `[K]`, but the stack has K + 1 models. So make the state by `init(K + 1, ..., beta=jnp.zeros(K))`, and
    pass this state to `learn`.

    Args:
        scales: lambda, `[..., K]`.

    Returns:
        Coefficients `[..., K+1]` that sum to 1. The origin's coefficient comes first.

    Raises:
        ValueError: if `scales` has no axis.

    Examples:
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
    """Coefficients and a temperature that are learned together.

    Attributes:
        coefficients: the coefficients: beta before the link, alpha after it.
        temperature: before the link, the logarithm of the temperature, which starts at 0. After the link, the
            temperature itself. Its shape is `[]`.
    """

    coefficients: PyTree
    temperature: jax.Array


def tempered_link(link_fn: LinkFn = jax.nn.softmax) -> Link:
    """Returns a link for `Tempered` coefficients. Learning starts where `link_fn` starts, at temperature 1.

    Args:
        link_fn: the link of the coefficients.

    Returns:
        The link. It maps a `Tempered` beta to a `Tempered` alpha.

    Raises:
        TypeError: if `link_fn` is no function.
    """
    check_callable(link_fn=link_fn)
    return _tempered_link(link_fn)


@functools.cache
def _tempered_link(link_fn: LinkFn) -> Link:
    """Returns the link around `link_fn`, always the same object for the same `link_fn`."""
    return Link(
        functools.partial(_tempered, link_fn=link_fn),
        functools.partial(_tempered_start, link_fn=link_fn),
        directions_of(link_fn),
        radius_of(link_fn),
    )


def _tempered(beta: PyTree, *, link_fn: LinkFn) -> Tempered:
    """Returns alpha and the temperature."""
    if not isinstance(beta, Tempered):
        raise TypeError(
            f"beta is a {type(beta).__name__}; expected glue_jax.links.Tempered(coefficients, temperature): make the "
            "state by glue_jax.init(..., link_fn=tempered_link(...))"
        )
    return Tempered(link_fn(beta.coefficients), jnp.exp(beta.temperature))


def _tempered_start(num_experts: int, *, link_fn: LinkFn) -> Tempered:
    """Returns the start of `link_fn`, and 0, the logarithm of temperature 1."""
    return Tempered(start_of(link_fn, num_experts), jnp.zeros(()))


def tempered_merge(merge_fn: MergeFn, *, head: str) -> MergeFn:
    """Returns a `merge_fn` for `Tempered` coefficients that divides the logits by the temperature.

    An average of networks is often under-confident, because its logits are too small. The merge divides the weights of
    the last layer by the temperature. So the merged model keeps the experts' architecture and needs nothing else.

    Args:
        merge_fn: the merge that this merge calls. It gets the experts and `Tempered.coefficients`.
        head: a regular expression for the paths of the last layer's kernel and bias (`glue_jax.paths`).

    Returns:
        The `merge_fn`. It raises a ValueError if `head` matches no path, and a TypeError if the coefficients are not
        `Tempered`. It takes the keyword `min_dtype`, which the steps pass. With any `min_dtype`, the merged model is at
        least float32.
    """

    def merge(experts: Params, alpha: PyTree, *, min_dtype: DTypeLike | None = None) -> Params:
        if not isinstance(alpha, Tempered):
            raise TypeError(
                f"alpha is a {type(alpha).__name__}; expected glue_jax.links.Tempered, which tempered_link returns"
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
