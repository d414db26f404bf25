"""The paper's formulas, and the exact ones where they differ.

Costs (section 4.1): Eq. (9), (10) and (21), in any one unit (seconds, FLOPs) for `forward` F, `backward_ratio` gamma
(a backward pass costs gamma F), `blend` C_mix and `inner_products` D_alpha.

Errors (section 4.2): the mean and the mean squared error of the estimators in the limit of radius 0, exact for
each distribution of directions, and the paper's Eq. (18)-(20) and (13) beside them. Let g be the gradient, d the
dimension probed, P the projection on the space probed, and m directions be averaged. The unbiased estimate
has mean Pg and error V(m, d) ||Pg||² about it:

| directions | V |
| --- | --- |
| `rademacher`, `sphere` | (d - 1)/m |
| `gaussian` | (d + 1)/m |
| `orthogonal`, `simplex_orthogonal` | (d/m)² (r/d) (1 - r/d), r = m mod d |

The paper's estimate is the unbiased one over d: its mean is Pg/d, its variance V/d² ||Pg||². So Eq. (18) is the mean
squared error of one direction, not a variance, and Eq. (19), which divides all of it by m, also divides the bias,
which averaging does not lower: with d = K = 10 the error relative to ||g||² is 0.90, 0.855, 0.819 for m = 1, 2, 10,
not 0.90, 0.45, 0.09. Eq. (13) rests on (19) and (20): for m > 1 it is not proved, though the slack of (20) may still
cover the true error.
"""

from typing import get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from glue_jax.checks import as_numbers, check_counts
from glue_jax.directions import DirectionName, dimension
from glue_jax.estimators import Scale, scale_factor


def full_gradient_cost(forward: float, backward_ratio: float, blend: float, inner_products: float) -> float:
    """Returns T_full = (1 + gamma) F + C_mix + D_alpha, Eq. (9)."""
    return (1 + backward_ratio) * forward + blend + inner_products


def spsa_cost(forward: float, blend: float, *, num_directions: int = 1) -> float:
    """Returns T_SPSA = 2 m (F + C_mix), Eq. (9) for m directions.

    Raises:
        ValueError: `num_directions` below 1.
        TypeError: `num_directions` that is no integer.
    """
    check_counts(num_directions=num_directions)
    return 2 * num_directions * (forward + blend)


def spsa_saving(forward: float, backward_ratio: float, blend: float, inner_products: float) -> float:
    """Returns T_full - T_SPSA = (gamma - 1) F - C_mix + D_alpha, Eq. (21), for one direction."""
    return (backward_ratio - 1) * forward - blend + inner_products


def spsa_is_cheaper(forward: float, backward_ratio: float, blend: float, inner_products: float) -> bool:
    """Returns whether C_mix < (gamma - 1) F + D_alpha, Eq. (10), for one direction."""
    return blend < (backward_ratio - 1) * forward + inner_products


def relative_variance(d: int, num_directions: int, directions: DirectionName = "rademacher") -> float:
    """Returns V(m, d), the unbiased estimate's mean squared error about its mean, over ||Pg||² (see the module).

    Args:
        d: the dimension probed, `glue_jax.directions.dimension(beta, directions)`.
        num_directions: m.
        directions: the distribution's name.

    Raises:
        ValueError: a count below 1, or an unknown name.
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
    """Returns the estimate's mean in the limit of radius 0: Pg, or Pg/d for the paper's scale.

    Args:
        gradient: the true gradient g, `[K]` or `[G, K]`.
        directions: the distribution's name.
        scale: `unbiased` or `paper`.

    Raises:
        ValueError: an unknown name, or a gradient without entries.
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
    """Returns E||estimate - g||² in the limit of radius 0, exact for each distribution and m.

    Args:
        gradient: the true gradient g, `[K]` or `[G, K]`.
        num_directions: m.
        directions: the distribution's name.
        scale: `unbiased` or `paper`.

    Raises:
        ValueError: `num_directions` below 1, an unknown name, or a gradient without
            entries.
    """
    g = _as_gradient(gradient)
    d = dimension(g, directions)
    bias = estimator_mean(g, directions, scale=scale) - g
    variance = relative_variance(d, num_directions, directions) * np.sum(_projected(g, directions) ** 2)
    return float(np.sum(bias**2) + variance / (d**2 if scale == "paper" else 1))


def paper_mean_squared_error(gradient: ArrayLike, num_directions: int = 1) -> float:
    """Returns (K - 1)/(m K) ||g||²: Eq. (18) for m = 1, where it is exact, and Eq. (19) for more, where it is not.

    Raises:
        ValueError: `num_directions` below 1, or a gradient without entries.
    """
    g = _as_gradient(gradient)
    check_counts(num_directions=num_directions, **{"the gradient's size": g.size})
    return float((g.size - 1) / (num_directions * g.size) * np.sum(g**2))


def proposition_1_bound(
    num_experts: int, num_directions: int, experts_spectral_norm: float, parameter_gradient_norm: float
) -> float:
    """Returns the bound of Proposition 1, Eq. (13): (K - 1)/(m K) sigma_max(Theta)² ||grad_theta L||².

    It bounds the error of the paper's estimate in alpha (Eq. 12), where Eq. (20) holds, through Eq. (19); the exact
    error is `estimator_mean_squared_error(..., "sphere", scale="paper")`.

    Args:
        num_experts: K.
        num_directions: m.
        experts_spectral_norm: sigma_max of Theta = [theta_1, ..., theta_K].
        parameter_gradient_norm: the norm of the loss's gradient for the blended parameters.

    Raises:
        ValueError: a count below 1.
    """
    check_counts(num_experts=num_experts, num_directions=num_directions)
    k = num_experts
    return (k - 1) / (num_directions * k) * experts_spectral_norm**2 * parameter_gradient_norm**2


def _projected(gradient: ArrayLike, directions: DirectionName) -> NDArray[np.float64]:
    """Pg."""
    g = _as_gradient(gradient)
    return g - g.mean(axis=-1, keepdims=True) if directions == "simplex_orthogonal" else g


def _as_gradient(gradient: ArrayLike) -> NDArray[np.float64]:
    """The gradient as float64 `[K]` or `[G, K]`."""
    g = as_numbers("gradient", gradient)
    if not g.ndim:
        raise ValueError(f"gradient is {gradient}; expected [K] or [G, K]")
    return g


def _check_name(directions: DirectionName) -> None:
    """Refuses what is no distribution's name."""
    if directions not in get_args(DirectionName):
        raise ValueError(f"directions is {directions!r}; expected one of {get_args(DirectionName)}")
