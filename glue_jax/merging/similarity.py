"""Whether experts can be averaged at all, from their weights, and from the loss between them."""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from glue_jax.blending import blend
from glue_jax.checks import as_number, as_numbers, check_callable, check_counts
from glue_jax.experts import num_experts
from glue_jax.merging.groups import Groups
from glue_jax.paths import by_path, leaf_paths
from glue_jax.types import Params


class Similarity(NamedTuple):
    """How alike experts are, group by group.

    Attributes:
        names: of the G groups.
        cosine: of the angles between their weights, `[G, K, K]`. Near 1 they are close to one another; about 0 they
            have nothing in common, as kernels from separate initialisations (scales of norms are near 1 in all).
        distance: from the origin over its length, `[G, K]`, infinite where that is 0, as of biases; without an origin,
            from their mean over its length.
        cosine_from_origin: of the angles between what they learned, their differences from the origin, `[G, K, K]`;
            None without one. Near 1 they learned the same; at 0 what they learned does not conflict.
    """

    names: tuple[str, ...]
    cosine: np.ndarray
    distance: np.ndarray
    cosine_from_origin: np.ndarray | None


def weight_similarity(experts: Params, groups: Groups | None = None, *, origin: Params | None = None) -> Similarity:
    """Compares experts by their weights alone.

    Args:
        experts: stacked, each leaf `[K, ...]`. Leave out BatchNorm statistics (`partition`), which are no weights.
        groups: of `group_by_path` or `by_layer`; None is one group of all.
        origin: the common initialisation, if there is one: of the structure of one expert.

    Returns:
        NumPy arrays, float64. One leaf at a time is copied to the host, in float64.

    Raises:
        ValueError: an origin that is not of the structure and the shapes of one expert, or groups of another tree or
            with rows that have no name.
        TypeError: groups that are no `Groups`, or complex weights.
    """
    k = num_experts(experts)
    count = len(jax.tree.leaves(experts))
    rows = [0] * count if groups is None else _rows(groups, experts)
    names = ("all",) if groups is None else groups.names
    if origin is not None and jax.tree.map(np.shape, origin) != jax.tree.map(lambda leaf: np.shape(leaf)[1:], experts):
        raise ValueError("origin is not of the structure and the shapes of one expert")
    starts = [None] * count if origin is None else jax.tree.leaves(origin)
    inner, moved = np.zeros((2, len(names), k, k))
    length = np.zeros(len(names))
    for row, (path, leaf), start in zip(rows, by_path(experts).items(), starts, strict=True):
        weights = as_numbers(f"experts at {path}", leaf).reshape(k, -1)
        inner[row] += weights @ weights.T
        centre = weights.mean(axis=0) if start is None else np.asarray(start, np.float64).ravel()
        length[row] += centre @ centre
        weights -= centre
        moved[row] += weights @ weights.T
    with np.errstate(invalid="ignore", divide="ignore"):
        distances = np.sqrt(np.diagonal(moved, axis1=1, axis2=2) / length[:, None])
    return Similarity(names, _cosine(inner), distances, None if origin is None else _cosine(moved))


def loss_barriers(
    experts: Params, loss_fn: Callable[[Params], jax.Array | float], *, num_points: int = 5
) -> np.ndarray:
    """Returns how far the loss rises on the line between each two experts (Entezari et al., 2022).

    The largest of `L((1 - t) a + t b) - (1 - t) L(a) - t L(b)` over t in [0, 1] (https://arxiv.org/abs/2110.06296).
    About 0, the two lie in one valley, and their average is as good as they are.

    Args:
        experts: stacked, each leaf `[K, ...]`.
        loss_fn: `loss_fn(params)`, the loss of one model. Jit it: it is called for each expert, and `num_points` times
            for each two.
        num_points: inside the line, evenly spaced.

    Returns:
        `[K, K]`, symmetric, 0 on the diagonal and at least 0.

    Raises:
        ValueError: `num_points` below 1, or a loss that is no scalar.
        TypeError: `num_points` that is no integer, or a loss that is no real number.
        FloatingPointError: a loss that is infinite or not a number, with the experts that it lies between.
    """
    check_counts(num_points=num_points)
    check_callable(loss_fn=loss_fn)
    k = num_experts(experts)

    def loss(first: int, second: int, t: float) -> float:
        params = blend(experts, jnp.zeros(k).at[first].add(1 - t).at[second].add(t))
        value = as_number("the value of loss_fn", loss_fn(params))
        if not math.isfinite(value):
            raise FloatingPointError(f"the loss is {value} at {t:.2f} of the way from expert {first} to {second}")
        return value

    ends = [loss(expert, expert, 0) for expert in range(k)]
    barriers = np.zeros((k, k))
    for first, second in itertools.combinations(range(k), 2):
        for t in np.arange(1, num_points + 1) / (num_points + 1):
            rise = loss(first, second, t) - (1 - t) * ends[first] - t * ends[second]
            barriers[first, second] = barriers[second, first] = max(barriers[first, second], rise)
    return barriers


def _rows(groups: Groups, experts: Params) -> list[int]:
    """The row of each leaf, checked."""
    if not isinstance(groups, Groups):
        raise TypeError(f"groups is a {type(groups).__name__}; expected a Groups, of group_by_path or by_layer")
    if jax.tree.structure(groups.rows) != jax.tree.structure(experts):
        ours, theirs = (jax.tree.leaves(leaf_paths(tree)) for tree in (groups.rows, experts))
        raise ValueError(f"groups are of another tree than experts: they have rows for {ours}; expected {theirs}")
    for path, row in by_path(groups.rows).items():
        if row not in range(len(groups.names)):
            raise ValueError(f"groups has row {row} at {path}; expected one of the {len(groups.names)} that have names")
    return jax.tree.leaves(groups.rows)


def _cosine(inner: np.ndarray) -> np.ndarray:
    """Inner products over lengths."""
    lengths = np.sqrt(np.diagonal(inner, axis1=1, axis2=2))
    with np.errstate(invalid="ignore", divide="ignore"):
        return inner / (lengths[:, :, None] * lengths[:, None, :])
