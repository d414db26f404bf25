"""Three estimators of the gradient of a function of few coefficients: SPSA, forward mode and backpropagation.

All have one form, `estimator(key, fun, beta, ...) -> Estimate`. Here `fun(beta) -> scalar` is any function, and `beta`
is any pytree of floating-point coefficients.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from glue_jax.checks import check_callable, check_counts, check_positive
from glue_jax.coefficients import check_floating
from glue_jax.directions import Directions, dimension, sample_directions
from glue_jax.loops import loop
from glue_jax.precision import DEFAULT_RADIUS
from glue_jax.types import Diagnostics, PyTree

__all__ = ["Estimate", "Scale", "forward_gradient", "full_gradient", "spsa_gradient"]

Scale = Literal["unbiased", "paper"]
"""What multiplies Eq. (6): d for `unbiased`, 1 for `paper`."""


class Estimate(NamedTuple):
    """The estimate of a gradient.

    Attributes:
        value: the function's value, `[]`. SPSA gives the mean of its 2m probes.
        gradient: the estimated gradient, with the structure of beta.
        probe_values: the values at `beta + radius u` and `beta - radius u` for each direction u (Eq. 3), `[m, 2]`. Only
            SPSA has them; the other estimators give None.
        diagnostics: how good the estimate is. It is None unless `spsa_gradient` was called with `diagnostics=True`.
    """

    value: jax.Array
    gradient: PyTree
    probe_values: jax.Array | None
    diagnostics: Diagnostics | None = None


def spsa_gradient(
    key: jax.Array,
    fun: Callable[[PyTree], jax.Array],
    beta: PyTree,
    *,
    radius: ArrayLike = DEFAULT_RADIUS,
    num_directions: int = 1,
    directions: Directions = "rademacher",
    scale: Scale = "unbiased",
    probe_batch_size: int | None = None,
    diagnostics: bool = False,
) -> Estimate:
    """Estimates a gradient from two evaluations per direction. It never differentiates the function (Eq. 3-6).

    Let L+ and L- be `fun(beta + radius u)` and `fun(beta - radius u)`. Each direction u gives the vector `(L+ - L-) /
    (2 radius) u`. The estimate is the mean of these vectors over m directions. With `scale="unbiased"` the mean is
    multiplied by d, the dimension of the space that the directions cover. The expected estimate is then the gradient g
    in this space, up to O(radius²). With `scale="paper"` the estimate is the paper's literal Eq. (6), and its
    expectation is g/d. `glue_jax.theory` gives the mean squared errors.

    Args:
        key: a `jax.random.key`.
        fun: `fun(beta) -> scalar`. Rounding can hide the difference of two probes. To prevent this, blend with
            `glue_jax.blend(..., min_dtype=jnp.float32)` inside `fun`. On an accelerator, also call `spsa_gradient`
            under `jax.default_matmul_precision("highest")`. `spsa_step` does both.
        beta: the point at which to estimate, any pytree of floating-point coefficients.
        radius: the root mean square distance of a probe from beta, above 0.
        num_directions: m, the number of directions.
        directions: the name of a distribution (see `glue_jax.directions`), or a function.
        scale: `unbiased`, or `paper` for the literal Eq. (5) and (6).
        probe_batch_size: the number of probes that `vmap` evaluates together, out of 2m. By default, an accelerator
            evaluates all probes together. A CPU evaluates one after another, because it is slow at a convolution with a
            different kernel for each probe.
        diagnostics: whether to measure how good the estimate is. This takes 2m + 1 more evaluations.

    Returns:
        An `Estimate` with `probe_values` `[m, 2]`.

    Raises:
        ValueError: if an argument is out of its range, or if `fun` returns no scalar.
        TypeError: if the coefficients are not floating point.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> import glue_jax
        >>> beta = jnp.array([1.0, 2.0])
        >>> estimate = glue_jax.estimators.spsa_gradient(
        ...     jax.random.key(0), lambda b: b @ b, beta, num_directions=2, directions="orthogonal"
        ... )
        >>> jnp.allclose(estimate.gradient, 2 * beta, atol=1e-3)
        Array(True, dtype=bool)
    """
    check_positive("radius", radius)
    factor = scale_factor(scale, dimension(beta, directions))
    u = sample_directions(key, beta, num_directions, directions)
    fun = scalar_valued(fun)
    values = map_probes(fun, spsa_probes(beta, u, radius), probe_batch_size)
    estimate = spsa_estimate(values, u, radius, factor)
    if not diagnostics:
        return estimate
    double = 2 * jnp.asarray(radius)
    wide = map_probes(fun, spsa_probes(beta, u, double), probe_batch_size)
    return estimate._replace(diagnostics=_diagnose(values, wide, fun(beta), radius))


def forward_gradient(
    key: jax.Array,
    fun: Callable[[PyTree], jax.Array],
    beta: PyTree,
    *,
    num_directions: int = 1,
    directions: Directions = "rademacher",
    scale: Scale = "unbiased",
    probe_batch_size: int | None = None,
) -> Estimate:
    """Estimates a gradient from exact slopes along random directions, by forward-mode differentiation.

    It is the limit of `spsa_gradient` at radius 0. Each direction takes one `jax.jvp` instead of two evaluations
    (Baydin et al., 2022, https://arxiv.org/abs/2202.08587).

    Args:
        key: a `jax.random.key`.
        fun: `fun(beta) -> scalar`, differentiable.
        beta: the point at which to estimate, any pytree of floating-point coefficients.
        num_directions: m, the number of directions.
        directions: as for `spsa_gradient`.
        scale: as for `spsa_gradient`.
        probe_batch_size: the number of slopes that are computed together, out of m. The default is as for
            `spsa_gradient`.

    Returns:
        An `Estimate` whose `value` is `fun(beta)`.

    Raises:
        ValueError: if an argument is out of its range, or if `fun` returns an integer or what is no scalar.
        TypeError: if the coefficients are not floating point.
    """
    factor = scale_factor(scale, dimension(beta, directions))
    u = sample_directions(key, beta, num_directions, directions)
    slope_along = functools.partial(jax.jvp, scalar_valued(fun, differentiable=True), (beta,))
    values, slopes = map_probes(lambda direction: slope_along((direction,)), u, probe_batch_size)
    return Estimate(value=values[0], gradient=combine_slopes(slopes, u, factor), probe_values=None)


def full_gradient(key: jax.Array | None, fun: Callable[[PyTree], jax.Array], beta: PyTree) -> Estimate:
    """Computes a gradient by `jax.grad`, with backpropagation through all of `fun`. This is the paper's Config 3.

    Args:
        key: not used. It is here because all estimators have the same form.
        fun: `fun(beta) -> scalar`, differentiable.
        beta: the point at which to differentiate, any pytree of floating-point coefficients.

    Returns:
        An `Estimate` whose `value` is `fun(beta)`.

    Raises:
        ValueError: if `fun` returns no scalar or an integer.
        TypeError: if the coefficients are not floating point.
    """
    del key
    check_floating(beta)
    value, gradient = jax.value_and_grad(scalar_valued(fun, differentiable=True))(beta)
    return Estimate(value=value, gradient=gradient, probe_values=None)


def spsa_probes(beta: PyTree, directions: PyTree, radius: ArrayLike) -> PyTree:
    """Returns SPSA's points `[2m, ...]`: for each direction in turn, `beta + radius u` and `beta - radius u`."""

    def perturbed(leaf: jax.Array, directions: jax.Array) -> jax.Array:
        step = (jnp.asarray(radius) * directions).astype(leaf.dtype)
        return jnp.stack([leaf[None] + step, leaf[None] - step], axis=1).reshape(-1, *leaf.shape)

    return jax.tree.map(perturbed, jax.tree.map(jnp.asarray, beta), directions)


def spsa_estimate(values: jax.Array, directions: PyTree, radius: ArrayLike, factor: float) -> Estimate:
    """Returns SPSA's estimate (Eq. 3-6) from the values `[2m]` at the points of `spsa_probes`."""
    pairs = values.reshape(-1, 2)
    gradient = combine_slopes(_slopes(values, radius), directions, factor)
    return Estimate(value=jnp.mean(pairs), gradient=gradient, probe_values=pairs)


def _slopes(values: jax.Array, radius: ArrayLike) -> jax.Array:
    """Returns the slopes of Eq. (4), `[m]`, from the values `[2m]` at the points of `spsa_probes`."""
    pairs = values.reshape(-1, 2)
    return (pairs[:, 0] - pairs[:, 1]) / (2 * jnp.asarray(radius))


def _diagnose(values: jax.Array, wide: jax.Array, centre: jax.Array, radius: ArrayLike) -> Diagnostics:
    """Compares the slopes at the radius with those at twice the radius.

    Args:
        values: the values at the radius, `[2m]`.
        wide: the values at twice the radius, `[2m]`.
        centre: the value at beta, `[]`.
        radius: the radius.
    """
    near, far = _slopes(values, radius), _slopes(wide, 2 * jnp.asarray(radius))
    size, difference = (jnp.sqrt(jnp.mean(jnp.square(part))) for part in (far, near - far))
    return Diagnostics(disagreement=difference / size, curvature=2 * (jnp.mean(values) - centre) / jnp.square(radius))


def map_probes(fun: Callable[[PyTree], Any], probes: PyTree, probe_batch_size: int | None) -> Any:
    """Returns `fun` of each probe along the leading axis, evaluated together or some at a time."""
    all_at_once = jax.vmap(fun)
    num_probes = jax.tree.leaves(probes)[0].shape[0]
    if probe_batch_size is None:
        if num_probes == 1:
            return all_at_once(probes)
        return jax.lax.platform_dependent(probes, cpu=functools.partial(loop, fun), default=all_at_once)
    check_counts(probe_batch_size=probe_batch_size)
    if probe_batch_size >= num_probes:
        return all_at_once(probes)
    return loop(fun, probes, None if probe_batch_size == 1 else probe_batch_size)


def combine_slopes(slopes: jax.Array, directions: PyTree, factor: float) -> PyTree:
    """Returns Eq. (6): the mean of slope times direction, times the factor of the scale."""

    def combine(leaf: jax.Array) -> jax.Array:
        mean = jnp.tensordot(slopes, leaf, axes=1, precision=jax.lax.Precision.HIGHEST) / slopes.shape[0]
        return (factor * mean).astype(leaf.dtype)

    return jax.tree.map(combine, directions)


def scale_factor(scale: Scale, d: int) -> float:
    """Returns the factor that multiplies Eq. (6): d for `unbiased`, 1 for `paper`."""
    if scale not in get_args(Scale):
        raise ValueError(f"scale is {scale!r}; expected one of {get_args(Scale)}")
    return float(d) if scale == "unbiased" else 1.0


def scalar_valued(fun: Callable[[PyTree], jax.Array], *, differentiable: bool = False) -> Callable[[PyTree], jax.Array]:
    """Returns `fun` with its value checked and cast to at least float32.

    The value must be a real scalar. It must also be floating point if `differentiable` is True.
    """
    check_callable(fun=fun)

    def checked(beta: PyTree) -> jax.Array:
        value = fun(beta)
        if value is None or not jax.tree_util.all_leaves([value]) or np.shape(value) != () or jnp.iscomplexobj(value):
            raise ValueError(
                f"the function of the coefficients returned {jax.tree.map(jnp.shape, value)}; expected one real "
                "scalar (reduce the loss over the batch, and return nothing beside it)"
            )
        if differentiable and not jnp.issubdtype(jnp.result_type(value), jnp.floating):
            raise ValueError(
                f"the function of the coefficients returned dtype {jnp.result_type(value)}, whose derivative is 0; "
                "expected floating point (spsa_gradient takes a metric that counts)"
            )
        return jnp.asarray(value, jnp.promote_types(jnp.result_type(value), jnp.float32))

    return checked
