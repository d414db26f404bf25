"""`calibrate`: the radius and the learning rate that SPSA needs."""

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
    """The proposal of `calibrate`, and the measurements behind it. R is the number of radii.

    Attributes:
        radius: the proposed radius for `spsa_step`.
        interior: whether larger and smaller radii than the proposal were tried. If it is False, try more radii.
        learning_rate: the proposed learning rate for plain SGD. With this learning rate, the first step changes the
            entries of beta by about `first_step` (root mean square). This is a rough estimate, because it rests on few
            directions. Adam needs no such value: its first step is its learning rate, so give Adam `first_step` itself.
        radii: the radii that were tried, ascending, `[R]`.
        disagreement: how much the slopes at each radius differ from the slopes at the neighbouring radii, relative to
            their size, `[R]`. Below the best radius it is large because of rounding, or because the loss has steps.
            Above the best radius it is large because the loss is curved.
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
    """Proposes a radius and a learning rate. It measures slopes along a few directions, each at all radii.

    If the slopes along one direction agree between neighbouring radii, neither rounding nor curvature spoils them. Step
    sizes for finite differences are often chosen by this comparison. If `fun` is an error rate, it changes in jumps,
    and these jumps act like rounding. The learning rate is for plain gradient descent. With it the first step has the
    size `first_step`, as in Qiskit's SPSA. With R radii and m directions, the call takes `2 R m` evaluations, 72 by
    default.

    Args:
        key: a `jax.random.key`.
        fun: `fun(beta) -> scalar`, the objective on one batch. If it counts errors, use a large batch. Rounding can
            hide the difference of two probes. To prevent this, blend with `glue_jax.blend(..., min_dtype=jnp.float32)`
            inside `fun`. On an accelerator, also call `calibrate` under `jax.default_matmul_precision("highest")`.
            `spsa_step` does both.
        beta: the point where learning starts, any pytree of floating-point coefficients.
        radii: the R radii to try, at least three, ascending.
        num_directions: m, the number of directions.
        directions: the directions of the step, as for `spsa_gradient`. Under a softmax pass `simplex_orthogonal`.
        first_step: how far the first step should move an entry of beta: the root mean square over the entries.
        step_directions: the `num_directions` that you will pass to `spsa_step` with this learning rate. The learning
            rate assumes that these steps draw their directions as `directions` says, and that their scale is
            `unbiased`. If `directions` is a function, `calibrate` cannot know how noisy the steps' estimates are. It
            assumes that they are as noisy as with `sphere`.
        probe_batch_size: as for `spsa_gradient`. By default, an accelerator holds all `2 R m` models in memory at once.

    Returns:
        The proposal and the measurements.

    Raises:
        ValueError: if the radii are not finite, positive and ascending, if `first_step` is not positive, or if a count
            is below 1.
        ValueError: if `fun` returns no scalar, or the same value at all probes.
        TypeError: if the coefficients are not floating point.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> import glue_jax
        >>> found = glue_jax.calibrate(jax.random.key(0), lambda beta: jnp.sum(jnp.exp(beta)), jnp.zeros(3))
        >>> bool(1e-3 < found.radius < 0.1)
        True
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
    # Infinite probes have no slope.
    with np.errstate(divide="ignore", invalid="ignore"):
        slopes = (pairs[..., 0] - pairs[..., 1]) / (2 * tried[:, None])
        disagreement = _disagreement(slopes)
    if not np.isfinite(disagreement).any():
        raise ValueError(
            f"fun has the same value, or no finite value, at all probes of radii {list(radii)}; expected a function "
            "that the coefficients change: try larger radii or a larger batch"
        )
    best = int(np.argmin(np.where(np.isfinite(disagreement), disagreement, np.inf)))
    d, size = dimension(beta, directions), sum(leaf.size for leaf in jax.tree.leaves(beta))
    # Since E[u u^T] = I / d, the mean of the squared slopes is the squared norm of the gradient, divided by d.
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
    """Returns how much the slopes at each radius differ from the neighbours', relative to their size.

    Args:
        slopes: the slopes, `[R, m]`.

    Returns:
        The disagreement, `[R]`.
    """
    squares = np.mean(np.diff(slopes, axis=0) ** 2, axis=1)
    to_neighbours = (np.append(squares, squares[-1]) + np.insert(squares, 0, squares[0])) / 2
    return np.sqrt(to_neighbours / np.mean(slopes**2, axis=1))
