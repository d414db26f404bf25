"""BatchNorm's statistics of a blend, estimated anew on images."""

import functools
from collections.abc import Callable
from typing import Any

import jax

import glue_jax
from experiments.models.network import Variables
from experiments.protocol.training import Problem

REFRESH_BATCH, REFRESH_IMAGES = 256, 2048
"""The size of a batch, and the largest number of the images, that statistics and Gram matrices are estimated on."""


def refresh_batches(images: jax.Array) -> list[jax.Array]:
    """Returns the first images, `[N, H, W, C]`, as batches `[B, H, W, C]`. The last batch may be smaller."""
    last = min(len(images), REFRESH_IMAGES)
    return [images[at : min(at + REFRESH_BATCH, last)] for at in range(0, last, REFRESH_BATCH)]


@functools.cache
def has_statistics(problem: Problem) -> bool:
    """Whether the network has BatchNorm. The ViT has none."""
    return bool(jax.tree.leaves(jax.eval_shape(problem.network.init, jax.random.key(0))["batch_stats"]))


def refreshed(problem: Problem, variables: Variables, images: jax.Array) -> Variables:
    """Returns a model with the statistics of the first images. A network without BatchNorm is returned as it is."""
    if not has_statistics(problem):
        return variables
    return glue_jax.merging.refresh_statistics(variables, refresh_batches(images), _statistics_fn(problem))


@functools.cache
def _statistics_fn(problem: Problem) -> Callable[[Variables, jax.Array], Any]:
    """BatchNorm's statistics of a minibatch of images, compiled once for a problem."""
    return jax.jit(problem.minibatch_statistics)
