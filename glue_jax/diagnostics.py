"""How good SPSA's estimates are, and which radius and learning rate they need."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from glue_jax.coefficients import check_floating
from glue_jax.directions import Directions, dimension, sample_directions
from glue_jax.estimators import map_probes, scale_factor, spsa_estimate, spsa_probes
from glue_jax.types import PyTree


class Diagnostics(NamedTuple):
    """What the probes of a step tell beside its gradient.

    Attributes:
        signal_to_noise: the root mean square over directions of `(L+ - L-) / 2`, in units of the spacing of floating
            point at the loss, `[]`. Where it is small the radius is, too: a network's rounding errors add up.
        curvature: the mean over directions of `(L+ + L- - 2 L) / radius^2`, the second derivative along a direction,
            `[]`.
        bend: the root mean square of `(L+ + L-) / 2 - L` over that of `(L+ - L-) / 2`, `[]`. Well above 1, the loss
            bends within the radius more than it falls: the radius is large, or a minimum near.
    """

    signal_to_noise: jax.Array
    curvature: jax.Array
    bend: jax.Array


def probe_diagnostics(probe_losses: jax.Array, loss: jax.Array, radius: jax.typing.ArrayLike) -> Diagnostics:
    """Returns what a step's probes tell beside its gradient.

    Args:
        probe_losses: `metrics.probe_losses`, `[m, 2]`.
        loss: of the unperturbed blend on the same minibatch, `[]`: one forward pass more.
        radius: the step's.
    """
    odd = (probe_losses[:, 0] - probe_losses[:, 1]) / 2
    even = (probe_losses[:, 0] + probe_losses[:, 1]) / 2 - loss
    signal, bend = (jnp.sqrt(jnp.mean(jnp.square(values))) for values in (odd, even))
    return Diagnostics(
        signal_to_noise=signal / (jnp.finfo(probe_losses.dtype).eps * jnp.abs(loss)),
        curvature=jnp.mean(2 * even) / jnp.square(radius),
        bend=bend / signal,
    )


class Calibration(NamedTuple):
    """What `calibrate` proposes, and what it saw; R radii.

    Attributes:
        radius: the proposal for `spsa_step`.
        learning_rate: for plain SGD, the one at which the first step's root mean square over the entries of beta is
            `first_step`. Adam's first step is its learning rate, whatever the gradient's size: pass it `first_step`.
        radii: tried, ascending, `[R]`.
        disagreement: of the slopes at a radius and at its neighbours, relative to their size, `[R]`: rounding or steps
            in the loss below the best radius, its curvature above.
    """

    radius: float
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
    directions: Directions = "rademacher",
    first_step: float = 1e-2,
) -> Calibration:
    """Proposes a radius and a learning rate from probe pairs along a few directions, each at all radii.

    As Qiskit's SPSA calibrates its first step, and as a step size for finite differences is chosen: where slopes along
    one direction agree from radius to radius, neither rounding (or, of a metric that counts, its steps) nor
    curvature spoils them. `2 R m` evaluations, 72 by default.

    Args:
        key: a `jax.random.key`.
        fun: `fun(beta) -> scalar`, the objective on one batch, a large one if the metric counts.
        beta: where learning starts.
        radii: to try, at least three, ascending.
        num_directions: m.
        directions: as for `spsa_gradient`.
        first_step: the root mean square that the first step is to have, in units of beta.

    Returns:
        The proposal.

    Raises:
        ValueError: radii that are not finite, positive and ascending, a count below 1, or a function that is the same
            at all probes.
        TypeError: coefficients that are not floating point.
    """
    check_floating(beta)
    tried = np.asarray(radii, np.float64)
    if tried.ndim != 1 or len(tried) < 3 or not (tried[0] > 0 and tried[-1] < math.inf and (np.diff(tried) > 0).all()):
        raise ValueError(f"radii are {list(radii)}; expected at least three finite numbers above 0, ascending")
    if not 0 < first_step < math.inf:
        raise ValueError(f"first_step is {first_step}; expected a finite number above 0")
    u = sample_directions(key, beta, num_directions, directions)
    at_all = jax.tree.map(
        lambda *leaves: jnp.concatenate(leaves), *(spsa_probes(beta, u, float(radius)) for radius in tried)
    )
    values = np.asarray(map_probes(fun, at_all, None), np.float64).reshape(len(tried), num_directions, 2)
    slopes = (values[..., 0] - values[..., 1]) / (2 * tried[:, None])
    disagreement = _disagreement(slopes)
    if not np.isfinite(disagreement).any():
        raise ValueError(
            f"the function has the same value, or none that is finite, at all probes of radii {list(radii)}: expected "
            "one that the coefficients change; try larger radii or a larger batch"
        )
    best = int(np.argmin(np.where(np.isfinite(disagreement), disagreement, np.inf)))
    factor = scale_factor("unbiased", dimension(beta, directions))
    gradient = spsa_estimate(jnp.asarray(values[best].ravel(), jnp.float32), u, tried[best], factor).gradient
    size = sum(leaf.size for leaf in jax.tree.leaves(gradient))
    return Calibration(
        radius=float(tried[best]),
        learning_rate=first_step / float(optax.tree.norm(gradient) / math.sqrt(size)),
        radii=tried,
        disagreement=disagreement,
    )


def _disagreement(slopes: np.ndarray) -> np.ndarray:
    """From slopes `[R, m]`, how far those of a radius are from its neighbours', over their own size, `[R]`."""
    squares = np.mean(np.diff(slopes, axis=0) ** 2, axis=1)
    to_neighbours = (np.append(squares, squares[-1]) + np.insert(squares, 0, squares[0])) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.sqrt(to_neighbours / np.mean(slopes**2, axis=1))
