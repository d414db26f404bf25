"""Which radius and learning rate SPSA needs."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from glue_jax import theory
from glue_jax.checks import as_numbers, check_counts, check_positive
from glue_jax.coefficients import check_floating
from glue_jax.directions import Directions, dimension, sample_directions
from glue_jax.estimators import map_probes, scalar_valued, spsa_probes
from glue_jax.types import PyTree


class Calibration(NamedTuple):
    """What `calibrate` proposes, and what it saw; R radii.

    Attributes:
        radius: the proposal for `spsa_step`.
        interior: whether larger and smaller radii than the proposal were tried. If not, try more.
        learning_rate: for plain SGD, the one at which the first step's root mean square over the entries of beta is
            about `first_step`, as far as so few directions tell. Adam's first step is its learning rate, whatever the
            gradient's size: pass it `first_step`.
        radii: tried, ascending, `[R]`.
        disagreement: of the slopes at a radius and at its neighbours, relative to their size, `[R]`: rounding or steps
            in the loss below the best radius, its curvature above.
    """

    radius: float
    interior: bool
    learning_rate: float
    radii: np.ndarray
    disagreement: np.ndarray


def calibrate(
    key: jax.Array,
    fun: Callable[[PyTree], jax.Array],
    beta: PyTree,
    *,
    radii: Sequence[float] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0),
    num_directions: int = 4,
    directions: Directions = "orthogonal",
    first_step: float = 1e-2,
    step_directions: int = 1,
    probe_batch_size: int | None = None,
) -> Calibration:
    """Proposes a radius and a learning rate from probe pairs along a few directions, each at all radii.

    As Qiskit's SPSA calibrates its first step, and as a step size for finite differences is chosen: where slopes along
    one direction agree from radius to radius, neither rounding (or, of a metric that counts, its steps) nor
    curvature spoils them. `2 R m` evaluations, 72 by default.

    Args:
        key: a `jax.random.key`.
        fun: `fun(beta) -> scalar`, the objective on one batch, a large one if the metric counts.
            Let it blend by `glue_jax.blend(..., min_dtype=jnp.float32)`, and wrap it in
            `jax.default_matmul_precision("highest")` on an accelerator, as `spsa_step` does: rounding hides the
            difference of two probes otherwise.
        beta: where learning starts.
        radii: to try, at least three, ascending.
        num_directions: m.
        directions: those of the step, as for `spsa_gradient`.
        first_step: the root mean square that the first step is to have, in units of beta.
        step_directions: m of the steps that the learning rate is for; their directions are of the same distribution,
            their scale is `unbiased`.
        probe_batch_size: as for `spsa_gradient`; on an accelerator all `2 R m` models are in memory at once otherwise.

    Returns:
        The proposal.

    Raises:
        ValueError: radii that are not finite, positive and ascending, a count below 1, a function whose value is no
            scalar, or that has the same value at all probes.
        TypeError: coefficients that are not floating point.
    """
    check_floating(beta)
    check_counts(num_directions=num_directions, step_directions=step_directions)
    beta = jax.tree.map(jnp.asarray, beta)
    tried = as_numbers("radii", radii)
    if tried.ndim != 1 or len(tried) < 3 or not (tried[0] > 0 and tried[-1] < math.inf and (np.diff(tried) > 0).all()):
        raise ValueError(f"radii are {list(radii)}; expected at least three finite numbers above 0, ascending")
    check_positive("first_step", first_step)
    u = sample_directions(key, beta, num_directions, directions)
    at_all = jax.tree.map(
        lambda *leaves: jnp.concatenate(leaves), *(spsa_probes(beta, u, float(radius)) for radius in tried)
    )
    values = as_numbers("the value of fun", map_probes(scalar_valued(fun), at_all, probe_batch_size))
    pairs = values.reshape(len(tried), num_directions, 2)
    # Of probes that are infinite there is no slope.
    with np.errstate(divide="ignore", invalid="ignore"):
        slopes = (pairs[..., 0] - pairs[..., 1]) / (2 * tried[:, None])
        disagreement = _disagreement(slopes)
    if not np.isfinite(disagreement).any():
        raise ValueError(
            f"the function has the same value, or none that is finite, at all probes of radii {list(radii)}: expected "
            "one that the coefficients change; try larger radii or a larger batch"
        )
    best = int(np.argmin(np.where(np.isfinite(disagreement), disagreement, np.inf)))
    d, size = dimension(beta, directions), sum(leaf.size for leaf in jax.tree.leaves(beta))
    # Directions u have E[u u^T] = I / d, so that the mean of squared slopes is the squared norm of the gradient over d.
    squared_norm = d * np.mean(slopes[best] ** 2)
    name = directions if isinstance(directions, str) else "sphere"
    of_estimate = (1 + theory.relative_variance(d, step_directions, name)) * squared_norm
    return Calibration(
        radius=float(tried[best]),
        interior=0 < best < len(tried) - 1,
        learning_rate=first_step * math.sqrt(size / of_estimate),
        radii=tried,
        disagreement=disagreement,
    )


def _disagreement(slopes: np.ndarray) -> np.ndarray:
    """From slopes `[R, m]`, how far those of a radius are from its neighbours', over their own size, `[R]`."""
    squares = np.mean(np.diff(slopes, axis=0) ** 2, axis=1)
    to_neighbours = (np.append(squares, squares[-1]) + np.insert(squares, 0, squares[0])) / 2
    return np.sqrt(to_neighbours / np.mean(slopes**2, axis=1))
