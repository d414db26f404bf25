"""The step of GLUE cut in two, for losses that JAX does not compute: another framework, a served model, a metric.

for _ in range(100):
    alphas = glue_jax.ask(key, state)                            # [2m, K]
    losses = [evaluate(alpha) for alpha in np.asarray(alphas)]   # anything, lower is better
    state, metrics = glue_jax.tell(key, state, losses, optimizer=optimizer)
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.typing import ArrayLike

from glue_jax.coefficients import check_floating
from glue_jax.directions import Directions, dimension, sample_directions
from glue_jax.estimators import Scale, check_radius, scale_factor, spsa_estimate, spsa_probes
from glue_jax.steps import update
from glue_jax.types import GlueMetrics, GlueState, LinkFn, PyTree


def ask(
    key: jax.Array,
    state: GlueState,
    *,
    link_fn: LinkFn = jax.nn.softmax,
    radius: ArrayLike | optax.Schedule = 1e-2,
    num_directions: int = 1,
    directions: Directions = "rademacher",
) -> PyTree:
    """Returns the coefficients whose losses `tell` wants: the first half of `spsa_step`.

    Args:
        key: as for `spsa_step`, the same for every step.
        state: of `init` or `tell`.
        link_fn: as for `spsa_step`.
        radius: as for `spsa_step`.
        num_directions: m.
        directions: as for `spsa_step`.

    Returns:
        alpha of each probe, leaves `[2m, ...]`: at `beta + radius u` and `beta - radius u` of each direction in turn.

    Raises:
        ValueError: an argument out of its range.

    Example:
        >>> import jax, optax
        >>> import glue_jax
        >>> optimizer = optax.adam(0.1)
        >>> key, state = jax.random.key(0), glue_jax.init(2, optimizer)
        >>> for _ in range(50):
        ...     alphas = glue_jax.ask(key, state)
        ...     losses = [(float(alpha[1]) - 0.75) ** 2 for alpha in alphas]
        ...     state, metrics = glue_jax.tell(key, state, losses, optimizer=optimizer)
        >>> bool(abs(glue_jax.alpha(state)[1] - 0.75) < 0.05)
        True
    """
    check_floating(state.beta)
    check_radius(radius)  # pyright: ignore[reportArgumentType]
    radius = radius(state.step) if callable(radius) else radius
    u = sample_directions(jax.random.fold_in(key, state.step), state.beta, num_directions, directions)
    return jax.vmap(link_fn)(spsa_probes(state.beta, u, radius))


def tell(
    key: jax.Array,
    state: GlueState,
    losses: ArrayLike | Sequence[float],
    *,
    optimizer: optax.GradientTransformation,
    link_fn: LinkFn = jax.nn.softmax,
    radius: ArrayLike | optax.Schedule = 1e-2,
    num_directions: int = 1,
    directions: Directions = "rademacher",
    scale: Scale = "unbiased",
) -> tuple[GlueState, GlueMetrics]:
    """Takes the step that the losses of the coefficients of `ask` say: the second half of `spsa_step`.

    Args:
        key: the one given to `ask`: the directions are drawn again from it and the state's step.
        state: the one given to `ask`.
        losses: of the probes in the order of `ask`, `[2m]`, lower is better.
        optimizer: of beta, the one given to `init`.
        link_fn: the one given to `ask`.
        radius: the one given to `ask`.
        num_directions: m.
        directions: those given to `ask`.
        scale: as for `spsa_step`.

    Returns:
        The next state, and the metrics of the state that went in, as `spsa_step` does.

    Raises:
        ValueError: losses of another shape, or, outside `jit`, that are infinite or not a number; an argument out of
            its range.
    """
    check_radius(radius)  # pyright: ignore[reportArgumentType]
    losses = jnp.asarray(losses)
    losses = losses.astype(jnp.promote_types(losses.dtype, jnp.float32))
    if losses.shape != (2 * num_directions,):
        raise ValueError(
            f"losses have shape {losses.shape}; expected [2m] = ({2 * num_directions},), one for each probe"
        )
    if not isinstance(losses, Tracer) and not np.isfinite(losses).all():
        raise ValueError(f"losses are {losses.tolist()}; expected finite numbers")
    factor = scale_factor(scale, dimension(state.beta, directions))
    radius = radius(state.step) if callable(radius) else radius
    u = sample_directions(jax.random.fold_in(key, state.step), state.beta, num_directions, directions)
    return update(spsa_estimate(losses, u, radius, factor), state, optimizer, link_fn)
