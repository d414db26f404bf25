"""The error of the directional derivatives of probes, by the radius of the probes."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from experiments.studies.variance.statistics import Objective, probe

RADII = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0)
"""The radii that are tried, besides the run's own."""


def derivative_errors(
    fun: Objective,
    beta: jax.Array,
    directions: jax.Array,
    radii: Sequence[float],
    *,
    probe_batch_size: int | None = None,
    advance: Callable[[int], None] = lambda units: None,
) -> tuple[list[float], float]:
    """Returns the error of the directional derivatives of probes, by radius.

    Args:
        fun: the loss.
        beta: the point at which the derivatives are taken.
        directions: the directions, `[N, K]`.
        radii: the radii of the probes.
        probe_batch_size: see `glue_jax.estimators.spsa_gradient`.
        advance: a function that is called with the number of directions that were probed.

    Returns:
        The root mean square error for each radius, divided by the root mean square of the exact derivatives; and this
        root mean square itself, in units of the loss.

    Raises:
        FloatingPointError: if a loss is not finite.
    """
    exact = np.asarray(_exact_derivatives(fun, beta, directions), np.float64)
    size = math.sqrt(np.mean(exact**2))
    errors = [
        probe(fun, beta, directions, radius, probe_batch_size=probe_batch_size, advance=advance) - exact
        for radius in radii
    ]
    return [math.sqrt(np.mean(error**2)) / size for error in errors], size


def radius_findings(radii: Sequence[float], errors: Sequence[float], tolerance: float) -> dict[str, Any]:
    """Returns where the error of the directional derivatives is small, and how it grows on either side.

    Args:
        radii: the radii, increasing.
        errors: the errors that `derivative_errors` returned.
        tolerance: the largest error that counts as small.

    Returns:
        `best_radius`, the radius with the smallest error; `good_radii`, the ends of the interval of small errors around
        it, interpolated on logarithmic axes, or None if no error is small; `rounding_power` and `curvature_power`, the
        p of error ∝ radius^p below and above the interval. Each p is fitted from within the interval to the second
        radius beyond it. p is -1 if float32 rounds the losses. p is 2 if the loss is smooth and curves, and less if the
        kinks of ReLUs make the error. p is None if the radii end before the interval does.
    """
    x, y, limit = np.log(radii), np.log(np.maximum(errors, np.finfo(float).tiny)), math.log(tolerance)
    best = int(np.argmin(y))

    def end(step: int) -> tuple[float, float | None]:
        inside = best
        while 0 <= inside + step < len(x) and y[inside + step] <= limit:
            inside += step
        outside = inside + step
        if not 0 <= outside < len(x):
            return float(radii[inside]), None
        share = (limit - y[inside]) / (y[outside] - y[inside])
        far = outside + step if 0 <= outside + step < len(x) else outside
        power = (y[far] - y[inside]) / (x[far] - x[inside])
        return float(np.exp(x[inside] + share * (x[outside] - x[inside]))), float(power)

    found = {"best_radius": float(radii[best]), "good_radii": None, "rounding_power": None, "curvature_power": None}
    if errors[best] <= tolerance:
        (low, rounding_power), (high, curvature_power) = end(-1), end(1)
        found |= {"good_radii": [low, high], "rounding_power": rounding_power, "curvature_power": curvature_power}
    return found


@jax.jit
def _exact_derivatives(fun: Objective, beta: jax.Array, directions: jax.Array) -> jax.Array:
    """Returns the exact derivatives along directions, `[N]`."""
    return jax.lax.map(lambda direction: jax.jvp(fun, (beta,), (direction,))[1], directions)
