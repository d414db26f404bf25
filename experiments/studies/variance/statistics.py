"""The errors of gradient estimates. The probes are made once, and averaged m at a time."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike, NDArray

import glue_jax
from glue_jax import theory
from glue_jax.directions import DirectionName, dimension
from glue_jax.estimators import Scale
from glue_jax.types import Params

Objective: TypeAlias = Callable[[jax.Array], jax.Array]
"""`fun(beta) -> scalar`: a `jax.tree_util.Partial` of a module's function, so that jit does not compile it twice."""

# The progress bar advances after so many directions, which are probed at once.
_CHUNK = 32
# The number of random directions that estimate an expectation without a closed form.
_DRAWS = 1_000_000


class Estimator(NamedTuple):
    """SPSA in one space (`alpha`, `beta`), with one distribution of directions and one scale."""

    space: str
    directions: DirectionName
    scale: Scale


def value_and_gradient(fun: Objective, beta: jax.Array) -> tuple[float, NDArray[np.float64]]:
    """Returns the value and the true gradient `[K]`.

    Raises:
        FloatingPointError: if the value or the gradient is not finite, or if the gradient is zero.
    """
    estimate = _full_gradient(fun, beta)
    value, gradient = float(estimate.value), np.asarray(estimate.gradient, np.float64)
    norm = np.linalg.norm(gradient)
    if not (math.isfinite(value) and 0 < norm < math.inf):
        raise FloatingPointError(
            f"the loss is {value} with a gradient of norm {norm}: expected finite numbers, and a norm above 0"
        )
    return value, gradient


def probe(
    fun: Objective,
    beta: jax.Array,
    directions: jax.Array,
    radius: float,
    *,
    probe_batch_size: int | None = None,
    advance: Callable[[int], None] = lambda units: None,
) -> NDArray[np.float64]:
    """Returns directional derivatives `(L+ - L-) / (2 radius)` `[N]`, as `spsa_gradient` probes them.

    Args:
        fun: the loss.
        beta: the point at which the derivatives are taken.
        directions: `[N, K]`.
        radius: the radius of the probes.
        probe_batch_size: see `glue_jax.estimators.spsa_gradient`.
        advance: a function that is called with the number of directions that were probed.

    Raises:
        FloatingPointError: if a loss is not finite.
    """
    values = []
    for start in range(0, len(directions), _CHUNK):
        chunk = directions[start : start + _CHUNK]
        values.append(np.asarray(_probe_values(fun, beta, chunk, radius, probe_batch_size), np.float64))
        if not np.isfinite(values[-1]).all():
            raise FloatingPointError(f"a probe of radius {radius} has a loss of {values[-1].sum()}")
        advance(len(chunk))
    values = np.concatenate(values)
    return (values[:, 0] - values[:, 1]) / (2 * radius)


def error_rows(
    directions: ArrayLike,
    directional_derivatives: ArrayLike,
    gradient: ArrayLike,
    estimator: Estimator,
    averaged: Sequence[int],
) -> list[dict[str, Any]]:
    """Returns the error, the variance and the cosine of the estimates for each m, beside the theory.

    The estimates of a row are independent, with m directions each. Orthogonal directions are the first of their blocks.

    Args:
        directions: the directions `[N, K]` from one call of `glue_jax.directions.sample_directions`.
        directional_derivatives: the derivatives along these directions, `[N]`.
        gradient: the true gradient g, `[K]`.
        estimator: the estimator.
        averaged: the numbers of directions m. The N directions must be enough for at least two estimates of each m.

    Returns:
        A row for each m, a dict that JSON holds: `m`; `estimates`, their number; `error`, E||estimate - g||², and its
        `exact` value; `deviation`, measured minus exact in standard errors, None if the error is not random;
        `variance`, E||estimate - its mean||², and its `exact_variance`; `cosine`, the mean cosine to g, and the
        `expected_cosine`. Errors and variances are divided by ||g||². A name with `_se` is the standard error of the
        value without it.
    """
    g = np.asarray(gradient, np.float64)
    name, scale = estimator.directions, estimator.scale
    d = dimension(g, name)
    factor = d if scale == "unbiased" else 1
    derivatives = np.asarray(directional_derivatives, np.float64)
    contributions = factor * derivatives[:, None] * np.asarray(directions, np.float64)
    mean = theory.estimator_mean(g, name, scale=scale)
    square = np.sum(g**2)
    rows = []
    for m in averaged:
        estimates = _averages(contributions, m, d if "orthogonal" in name else 1)
        norms = np.linalg.norm(estimates, axis=-1)
        inner = estimates @ g / math.sqrt(square)
        cosines = np.divide(inner, norms, out=np.zeros_like(inner), where=norms > 0)
        error, error_se = _mean(np.sum((estimates - g) ** 2, axis=-1) / square)
        variance, variance_se = _mean(np.sum((estimates - mean) ** 2, axis=-1) / square)
        cosine, cosine_se = _mean(cosines)
        exact = theory.estimator_mean_squared_error(g, m, name, scale=scale) / square
        exact_variance = theory.relative_variance(d, m, name) * factor**2 / d**2
        rows.append(
            {
                "m": m,
                "estimates": len(estimates),
                "error": error,
                "error_se": error_se,
                "exact": exact,
                "deviation": (error - exact) / error_se if _error_is_random(d, m, name, factor) else None,
                "variance": variance,
                "variance_se": variance_se,
                "exact_variance": exact_variance,
                "cosine": cosine,
                "cosine_se": cosine_se,
                "expected_cosine": expected_cosine(d, m, name),
            }
        )
    return rows


def expected_cosine(d: int, num_directions: int, directions: DirectionName) -> float | None:
    """Returns the mean cosine between the estimate and the part of g in the space probed, as the radius goes to 0.

    The estimate is a multiple of U Uᵀ g, where the columns of U are its m directions. Orthonormal directions project g
    on a random subspace. The share of ||g||² in the subspace is the square of the cosine, and is distributed as
    Beta(m/2, (d - m)/2). So the mean cosine is Γ((m+1)/2) Γ(d/2) / (Γ(m/2) Γ((d+1)/2)), a little below √(m/d). For
    whole blocks it is 1. One direction on the sphere is such a case. For more directions on the sphere, a million
    random directions estimate the expectation (the usual √(m/(m + d - 1)) is off by up to 0.03).

    Args:
        d: the dimension of the space that is probed.
        num_directions: m, the number of directions.
        directions: the name of the distribution.

    Returns:
        The mean cosine. It is None for `rademacher` and `gaussian`, and for more than d orthogonal directions that are
        not whole blocks.
    """
    m = num_directions
    if "orthogonal" in directions and m % d == 0:
        return 1.0
    if (directions == "sphere" and m == 1) or ("orthogonal" in directions and m < d):
        return math.exp(sum(map(math.lgamma, ((m + 1) / 2, d / 2))) - sum(map(math.lgamma, (m / 2, (d + 1) / 2))))
    return _simulated_cosine(d, m) if directions == "sphere" else None


def expert_norms(experts: Params) -> tuple[float, float]:
    """Returns sigma_max and the Frobenius norm of Theta = [theta_1, ..., theta_K].

    They are equal if all experts are parallel. If the experts are orthogonal and of the same length, the first is 1/√K
    of the second.

    Args:
        experts: the stacked experts, each leaf `[K, ...]`. Leaves that are not floating point do not count.
    """
    leaves = [leaf for leaf in jax.tree.leaves(experts) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    rows = (np.asarray(leaf, np.float64).reshape(len(leaf), -1) for leaf in leaves)
    inner_products = sum(row @ row.T for row in rows)
    return math.sqrt(np.linalg.eigvalsh(inner_products)[-1]), math.sqrt(np.trace(inner_products))


def _averages(contributions: NDArray[np.float64], m: int, block: int) -> NDArray[np.float64]:
    """Returns means of m contributions each, `[n, K]`.

    The m contributions are the first ones of whole blocks.
    """
    size = -(-m // block) * block
    n = len(contributions) // size
    return contributions[: n * size].reshape(n, size, -1)[:, :m].mean(axis=1)


def _mean(values: NDArray[np.float64]) -> tuple[float, float]:
    """The mean with its standard error."""
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))


def _error_is_random(d: int, m: int, directions: DirectionName, factor: float) -> bool:
    """Returns whether the squared error varies from draw to draw of unit directions, as the radius goes to 0.

    Take b whole blocks, r more orthonormal directions and a factor f. The error is Pg (1 - b f/m) - P_r g f/m. The
    random part of its square is ||P_r g||² (f/m) ((1 + 2 b) f/m - 2). It is 0 for unbiased estimates of half a block
    more, which only reflect Pg. One direction of any distribution is the case b = 0, r = 1.
    """
    whole, more = divmod(m, d)
    if m > 1 and "orthogonal" not in directions:
        return d > 1
    return more > 0 and (1 + 2 * whole) * factor != 2 * m


@functools.cache
def _simulated_cosine(d: int, m: int) -> float:
    """The mean cosine for m directions on the sphere. It is the same for every g, so g is the first axis."""
    directions = np.random.default_rng(0).normal(size=(_DRAWS // m, m, d))
    directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
    estimates = np.einsum("nm,nmd->nd", directions[..., 0], directions)
    return float(np.mean(estimates[:, 0] / np.linalg.norm(estimates, axis=-1)))


@jax.jit
def _full_gradient(fun: Objective, beta: jax.Array) -> glue_jax.estimators.Estimate:
    """The value and the true gradient."""
    return glue_jax.estimators.full_gradient(None, fun, beta)


@functools.partial(jax.jit, static_argnames="probe_batch_size")
def _probe_values(
    fun: Objective, beta: jax.Array, directions: jax.Array, radius: float, probe_batch_size: int | None
) -> jax.Array:
    """Returns the losses at `beta + radius u` and `beta - radius u`, `[N, 2]`."""
    estimate = glue_jax.estimators.spsa_gradient(
        jax.random.key(0),
        fun,
        beta,
        radius=radius,
        num_directions=len(directions),
        directions=lambda key, beta, num_directions: directions,
        probe_batch_size=probe_batch_size,
    )
    assert estimate.probe_values is not None
    return estimate.probe_values
