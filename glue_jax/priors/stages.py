"""A stage of `build_prior`: the coefficients that it learns, and the steps that learn them."""

import dataclasses
import functools
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

from glue_jax.gauss_newton import gauss_newton_step
from glue_jax.steps import init, spsa_step
from glue_jax.types import GlueState, LearnResult, LinkFn, MergeFn, PyTree, StepFn

SOFTMAX_RADIUS = 0.3
"""SPSA's radius under a softmax. A metric that counts errors changes at this radius, and a smooth loss is right too."""

# Gauss-Newton looks along at most so many directions in a step. On the digits by layer all 50 directions were better
# than 20 of them, and more directions take more passes.
_MOST_DIRECTIONS = 128
_GAUSS_NEWTON_IN_PART = functools.partial(gauss_newton_step, num_directions=_MOST_DIRECTIONS)
# SPSA's radius for free coefficients. Adam's learning rates, which fall to a fiftieth by a cosine.
_FREE_RADIUS, _SOFTMAX_RATE, _FREE_RATE, _LAST_RATE = 0.1, 0.3, 1e-2, 0.02


@dataclasses.dataclass(frozen=True)
class Stage:
    """What one stage learns.

    Attributes:
        name: the name of the stage, and of its candidate.
        shape: the shape of the coefficients: `[K]` under a softmax, or `[G, K]` if they are free.
        link_fn: the link.
        merge_fn: the merge.
    """

    name: str
    shape: tuple[int, ...]
    link_fn: LinkFn
    merge_fn: MergeFn

    def first_state(self, alpha: PyTree, optimizer: optax.GradientTransformation | None) -> GlueState:
        """Returns the state of step 0. Free coefficients start at `alpha`, `[K]`; a softmax starts at 1/K."""
        beta = jnp.zeros(self.shape) if alpha is None else jnp.broadcast_to(alpha, self.shape)
        return init(self.shape[-1], optimizer, beta=beta, link_fn=self.link_fn)

    @property
    def directions(self) -> int:
        """The number of directions along which a step of Gauss-Newton looks."""
        count = math.prod(self.shape)
        return min(count, _MOST_DIRECTIONS) if len(self.shape) > 1 else count - 1

    def gauss_newton(self) -> StepFn:
        """Returns the step of Gauss-Newton, always the same object for the same number of coefficients."""
        is_all = len(self.shape) == 1 or math.prod(self.shape) <= _MOST_DIRECTIONS
        return gauss_newton_step if is_all else _GAUSS_NEWTON_IN_PART

    def spsa(self, max_steps: int) -> tuple[StepFn, optax.GradientTransformation]:
        """Returns SPSA's step and its optimizer, always the same objects for the same arguments."""
        return _spsa(len(self.shape) > 1, self.shape[-1], max_steps)


def out_of_patience(result: LearnResult, patience: int | None) -> bool:
    """Returns whether `patience` validations came after the best one."""
    values = result.history.validation_values
    return patience is not None and len(values) > 0 and len(values) - 1 - int(np.argmin(values)) >= patience


@functools.cache
def _spsa(is_free: bool, k: int, max_steps: int) -> tuple[Any, optax.GradientTransformation]:
    """Returns K - 1 directions on the simplex with a softmax, and 2 K directions with free coefficients."""
    rate, radius, directions = (_FREE_RATE, _FREE_RADIUS, 2 * k) if is_free else (_SOFTMAX_RATE, SOFTMAX_RADIUS, k - 1)
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, max_steps, _LAST_RATE), b1=0.9, b2=0.99)
    return functools.partial(spsa_step, radius=radius, num_directions=directions), optimizer
