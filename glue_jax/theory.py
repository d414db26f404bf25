"""The paper's formulas for cost and error, and the exact formulas where they differ.

Costs (section 4.1) are Eq. (9), (10) and (21). All costs have one unit, such as seconds or FLOPs. `forward` is F, the
cost of a forward pass. `backward_ratio` is gamma: a backward pass costs gamma F. `blend` is C_mix, the cost of one
blend. `inner_products` is D_alpha, the cost to turn a gradient for the model into a gradient for alpha.

Errors (section 4.2) are the mean and the mean squared error of each estimator in the limit of radius 0. They are exact
for each distribution of directions. The paper's Eq. (13) and (18)-(20) stand beside them. Let g be the gradient, d the
dimension of the space probed, P the projection on this space, and m the number of directions. The unbiased estimate has
mean Pg. Its mean squared error about that mean is V(m, d) ||Pg||²:

| directions | V |
| --- | --- |
| `rademacher`, `sphere` | (d - 1)/m |
| `gaussian` | (d + 1)/m |
| `orthogonal`, `simplex_orthogonal` | (d/m)² (r/d) (1 - r/d), r = m mod d |

The paper's estimate is the unbiased one divided by d. Its mean is Pg/d, and its variance is V/d² ||Pg||². So Eq. (18)
is the mean squared error of one direction; it is not a variance. Eq. (19) divides this error by m. That also divides
the bias, although averaging does not lower a bias. With d = K = 10 and m = 1, 2, 10, the error relative to ||g||² is
0.90, 0.855, 0.819. Eq. (19) gives 0.90, 0.45, 0.09. Eq. (13) follows from (19) and (20), so for m > 1 it is not proved.
It may still hold, because the slack of (20) may cover the true error.
"""

from typing import get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from glue_jax.checks import as_numbers, check_counts
from glue_jax.directions import DirectionName, dimension
from glue_jax.estimators import Scale, scale_factor

__all__ = [
    "estimator_mean",
    "estimator_mean_squared_error",
    "full_gradient_cost",
    "paper_mean_squared_error",
    "proposition_1_bound",
    "relative_variance",
    "spsa_cost",
    "spsa_is_cheaper",
]


def full_gradient_cost(forward: float, backward_ratio: float, blend: float, inner_products: float) -> float:
    """Returns T_full = (1 + gamma) F + C_mix + D_alpha, the cost of a full gradient (Eq. 9).

    Args:
        forward: F, the cost of a forward pass.
        backward_ratio: gamma; a backward pass costs gamma F.
        blend: C_mix, the cost of one blend.
        inner_products: D_alpha, the cost to turn a gradient for the model into a gradient for alpha.
    """
    return (1 + backward_ratio) * forward + blend + inner_products


def spsa_cost(forward: float, blend: float, *, num_directions: int = 1) -> float:
    """Returns T_SPSA = 2 m (F + C_mix), the cost of SPSA with m directions (Eq. 9).

    Args:
        forward: F, the cost of a forward pass.
        blend: C_mix, the cost of one blend.
        num_directions: m, the number of directions.

    Raises:
        ValueError: if `num_directions` is below 1.
        TypeError: if `num_directions` is no integer.
    """
    check_counts(num_directions=num_directions)
    return 2 * num_directions * (forward + blend)


def spsa_is_cheaper(forward: float, backward_ratio: float, blend: float, inner_products: float) -> bool:
    """Returns whether C_mix < (gamma - 1) F + D_alpha: one direction of SPSA costs less than a full gradient (Eq. 10).

    Args:
        forward: F, the cost of a forward pass.
        backward_ratio: gamma; a backward pass costs gamma F.
        blend: C_mix, the cost of one blend.
        inner_products: D_alpha, the cost to turn a gradient for the model into a gradient for alpha.
    """
    return blend < (backward_ratio - 1) * forward + inner_products


def relative_variance(d: int, num_directions: int, directions: DirectionName = "rademacher") -> float:
    """Returns V(m, d): the unbiased estimate's mean squared error about its mean, divided by ||Pg||².

    The table of `glue_jax.theory` gives the formulas.

    Args:
        d: the dimension of the space probed, `glue_jax.directions.dimension(beta, directions)`.
        num_directions: m, the number of directions.
        directions: the name of the distribution.

    Raises:
        ValueError: if a count is below 1, or if the name is unknown.
        TypeError: if a count is no integer.
    """
    check_counts(d=d, num_directions=num_directions)
    _check_name(directions)
    m = num_directions
    if directions in ("orthogonal", "simplex_orthogonal"):
        partial = (m % d) / d
        return (d / m) ** 2 * partial * (1 - partial)
    return (d + 1 if directions == "gaussian" else d - 1) / m


def estimator_mean(
    gradient: ArrayLike, directions: DirectionName = "rademacher", *, scale: Scale = "unbiased"
) -> NDArray[np.float64]:
    """Returns the mean of the estimate in the limit of radius 0: Pg, or Pg/d for the paper's scale.

    Args:
        gradient: the true gradient g, `[K]` or `[G, K]`.
        directions: the name of the distribution.
        scale: `unbiased` or `paper`.

    Returns:
        The mean, float64, with the shape of `gradient`.

    Raises:
        ValueError: if the name is unknown, or if the gradient has no entries.
        TypeError: if the gradient holds no real numbers.
    """
    _check_name(directions)
    d = dimension(_as_gradient(gradient), directions)
    return _projected(gradient, directions) * (scale_factor(scale, d) / d)


def estimator_mean_squared_error(
    gradient: ArrayLike,
    num_directions: int,
    directions: DirectionName = "rademacher",
    *,
    scale: Scale = "unbiased",
) -> float:
    """Returns E||estimate - g||² in the limit of radius 0, exact for each distribution and each m.

    Args:
        gradient: the true gradient g, `[K]` or `[G, K]`.
        num_directions: m, the number of directions.
        directions: the name of the distribution.
        scale: `unbiased` or `paper`.

    Raises:
        ValueError: if `num_directions` is below 1, if the name is unknown, or if the gradient has no entries.
        TypeError: if the gradient holds no real numbers, or if `num_directions` is no integer.
    """
    g = _as_gradient(gradient)
    d = dimension(g, directions)
    bias = estimator_mean(g, directions, scale=scale) - g
    variance = relative_variance(d, num_directions, directions) * np.sum(_projected(g, directions) ** 2)
    return float(np.sum(bias**2) + variance / (d**2 if scale == "paper" else 1))


def paper_mean_squared_error(gradient: ArrayLike, num_directions: int = 1) -> float:
    """Returns (K - 1)/(m K) ||g||²: Eq. (18) for m = 1, and Eq. (19) for m > 1.

    Eq. (18) is exact. Eq. (19) is too small, because it divides the bias by m (see `glue_jax.theory`).

    Args:
        gradient: the true gradient g, `[K]`.
        num_directions: m, the number of directions.

    Raises:
        ValueError: if `num_directions` is below 1, or if the gradient has no entries.
        TypeError: if the gradient holds no real numbers, or if `num_directions` is no integer.
    """
    g = _as_gradient(gradient)
    check_counts(num_directions=num_directions, **{"the gradient's size": g.size})
    return float((g.size - 1) / (num_directions * g.size) * np.sum(g**2))


def proposition_1_bound(
    num_experts: int, num_directions: int, experts_spectral_norm: float, parameter_gradient_norm: float
) -> float:
    """Returns the bound of Proposition 1, Eq. (13): (K - 1)/(m K) sigma_max(Theta)² ||grad_theta L||².

    The bound is for the mean squared error of the paper's estimate of the gradient with respect to alpha (Eq. 12). It
    rests on Eq. (19) and (20). The exact error is `estimator_mean_squared_error(..., "sphere", scale="paper")`.

    Args:
        num_experts: K, the number of experts.
        num_directions: m, the number of directions.
        experts_spectral_norm: sigma_max(Theta), the largest singular value of Theta = [theta_1, ..., theta_K].
        parameter_gradient_norm: the norm of the loss's gradient with respect to the blended parameters.

    Raises:
        ValueError: if a count is below 1.
        TypeError: if a count is no integer.
    """
    check_counts(num_experts=num_experts, num_directions=num_directions)
    k = num_experts
    return (k - 1) / (num_directions * k) * experts_spectral_norm**2 * parameter_gradient_norm**2


def _projected(gradient: ArrayLike, directions: DirectionName) -> NDArray[np.float64]:
    """Returns Pg."""
    g = _as_gradient(gradient)
    return g - g.mean(axis=-1, keepdims=True) if directions == "simplex_orthogonal" else g


def _as_gradient(gradient: ArrayLike) -> NDArray[np.float64]:
    """Returns the gradient as float64 `[K]` or `[G, K]`."""
    g = as_numbers("gradient", gradient)
    if not g.ndim:
        raise ValueError(f"gradient is {gradient}; expected [K] or [G, K]")
    return g


def _check_name(directions: DirectionName) -> None:
    """Refuses an unknown name of a distribution."""
    if directions not in get_args(DirectionName):
        raise ValueError(f"directions is {directions!r}; expected one of {get_args(DirectionName)}")
