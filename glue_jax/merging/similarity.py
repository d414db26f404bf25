"""Can the experts be averaged? `weight_similarity` compares their weights, `loss_barriers` the losses between them."""

import itertools
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from glue_jax.blending import blend
from glue_jax.checks import as_number, as_numbers, check_callable, check_counts
from glue_jax.experts import num_experts
from glue_jax.merging.groups import Groups
from glue_jax.paths import by_path, leaf_paths
from glue_jax.types import Params

# Weights of each expert that are compared at once, half a megabyte in float64.
_PORTION = 2**16


class Similarity(NamedTuple):
    """How similar the experts are, group by group.

    Attributes:
        names: the names of the G groups.
        cosine: the cosines of the angles between the experts' weights, `[G, K, K]`. Near 1, the weights are close. Near
            0, they have nothing in common, as for kernels from separate initialisations. The scales of normalisation
            layers are near 1 in every network, so their cosine is near 1 in any case.
        distance: each expert's distance from the common initialisation, divided by the norm of that initialisation,
            `[G, K]`. If the norm is 0, as for biases, the distance is infinite, or NaN for an expert that did not move.
            Without an initialisation, the experts' mean takes its place.
        cosine_from_origin: the cosines of the angles between the experts' differences from the common initialisation,
            `[G, K, K]`. Such a difference is what an expert learned. Near 1, two experts learned the same. Near 0, the
            things that they learned do not conflict. It is None without an initialisation.
    """

    names: tuple[str, ...]
    cosine: np.ndarray
    distance: np.ndarray
    cosine_from_origin: np.ndarray | None


def weight_similarity(experts: Params, groups: Groups | None = None, *, origin: Params | None = None) -> Similarity:
    """Compares experts by their weights alone.

    Args:
        experts: stacked experts, each leaf `[K, ...]`. Split off BatchNorm statistics with `partition`, because they
            are no weights. Leaves that are not floating point, such as counters, do not count.
        groups: groups from `group_by_path` or `by_layer`. With None, all leaves are one group.
        origin: the common initialisation of the experts, if there is one, with the structure of one expert.

    Returns:
        The similarities, as float64 NumPy arrays. The function copies one leaf at a time to the host, as float64.

    Raises:
        ValueError: if the origin does not have the structure and shapes of one expert.
        ValueError: if the groups belong to another tree, or if `groups.names` has no entry for a number in
            `groups.rows`.
        TypeError: if `groups` is no `Groups`, or if weights are complex.
    """
    k = num_experts(experts)
    count = len(jax.tree.leaves(experts))
    rows = [0] * count if groups is None else _rows(groups, experts)
    names = ("all",) if groups is None else groups.names
    if origin is not None and jax.tree.map(np.shape, origin) != jax.tree.map(lambda leaf: np.shape(leaf)[1:], experts):
        raise ValueError("origin does not fit; expected the structure and the shapes of one expert")
    starts = [None] * count if origin is None else jax.tree.leaves(origin)
    leaves = zip(rows, by_path(experts).items(), starts, strict=True)
    weights = (
        (row, as_numbers(f"experts at {path}", leaf), start)
        for row, (path, leaf), start in leaves
        if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
    )
    return similarity_of_leaves(names, k, weights, has_origin=origin is not None)


def similarity_of_leaves(
    names: tuple[str, ...], k: int, leaves: Iterable[tuple[int, np.ndarray, ArrayLike | None]], *, has_origin: bool
) -> Similarity:
    """Compares experts leaf by leaf, so that the leaves need not be in memory together.

    Args:
        names: the names of the G groups.
        k: the number of experts.
        leaves: for each leaf the row of its group, the weights of all experts `[K, ...]`, and the origin's `[...]` or
            None.
        has_origin: whether there is an origin.
    """
    inner, moved = np.zeros((2, len(names), k, k))
    length = np.zeros(len(names))
    for row, leaf, start in leaves:
        flat = leaf.reshape(k, -1)
        origin = None if start is None else np.ravel(start)
        for begin in range(0, flat.shape[1], _PORTION):
            weights = flat[:, begin : begin + _PORTION].astype(np.float64, copy=False)
            inner[row] += weights @ weights.T
            centre = weights.mean(axis=0) if origin is None else origin[begin : begin + _PORTION].astype(np.float64)
            length[row] += centre @ centre
            differences = weights - centre
            moved[row] += differences @ differences.T
        # The next leaf is read before these names change.
        del leaf, flat
    with np.errstate(invalid="ignore", divide="ignore"):
        distances = np.sqrt(np.diagonal(moved, axis1=1, axis2=2) / length[:, None])
    return Similarity(names, _cosine(inner), distances, _cosine(moved) if has_origin else None)


def loss_barriers(
    experts: Params, loss_fn: Callable[[Params], jax.Array | float], *, num_points: int = 5
) -> np.ndarray:
    """Returns how much the loss rises on the line between each pair of experts (Entezari et al., 2022).

    The barrier between experts a and b is the largest value of `L((1 - t) a + t b) - (1 - t) L(a) - t L(b)` for t at
    the two ends and at `num_points` points between them. If it is near 0, the two experts lie in one valley of the
    loss, and their average is as good as they are. The source is https://arxiv.org/abs/2110.06296.

    Args:
        experts: stacked experts, each leaf `[K, ...]`.
        loss_fn: `loss_fn(params)`, the loss of one model. Jit it. It is called once for each expert, and `num_points`
            times for each pair.
        num_points: the number of points inside each line, evenly spaced.

    Returns:
        The barriers, float64 `[K, K]`: symmetric, 0 on the diagonal, and at least 0.

    Raises:
        ValueError: if `num_points` is below 1, or if a loss is no scalar.
        TypeError: if `num_points` is no integer, or if a loss is no real number.
        FloatingPointError: if a loss is infinite or NaN; the error names the two experts.
    """
    check_counts(num_points=num_points)
    check_callable(loss_fn=loss_fn)
    k = num_experts(experts)

    def loss(first: int, second: int, t: float) -> float:
        params = blend(experts, jnp.zeros(k).at[first].add(1 - t).at[second].add(t))
        value = as_number("the value of loss_fn", loss_fn(params))
        if not math.isfinite(value):
            raise FloatingPointError(
                f"loss_fn returned {value} at {t:.2f} of the way from expert {first} to {second}; "
                "expected a finite loss"
            )
        return value

    ends = [loss(expert, expert, 0) for expert in range(k)]
    barriers = np.zeros((k, k))
    for first, second in itertools.combinations(range(k), 2):
        for t in np.arange(1, num_points + 1) / (num_points + 1):
            rise = loss(first, second, t) - (1 - t) * ends[first] - t * ends[second]
            barriers[first, second] = barriers[second, first] = max(barriers[first, second], rise)
    return barriers


def _rows(groups: Groups, experts: Params) -> list[int]:
    """Returns the row of each leaf, checked."""
    if not isinstance(groups, Groups):
        raise TypeError(
            f"groups is a {type(groups).__name__}; expected the Groups that group_by_path or by_layer returns"
        )
    if jax.tree.structure(groups.rows) != jax.tree.structure(experts):
        ours, theirs = (jax.tree.leaves(leaf_paths(tree)) for tree in (groups.rows, experts))
        raise ValueError(f"groups have rows for {ours}; expected rows for the leaves of the experts, {theirs}")
    for path, row in by_path(groups.rows).items():
        if row not in range(len(groups.names)):
            raise ValueError(f"groups has row {row} at {path}; expected one of the {len(groups.names)} rows with names")
    return jax.tree.leaves(groups.rows)


def _cosine(inner: np.ndarray) -> np.ndarray:
    """Returns the inner products divided by the lengths."""
    lengths = np.sqrt(np.diagonal(inner, axis1=1, axis2=2))
    with np.errstate(invalid="ignore", divide="ignore"):
        return inner / (lengths[:, :, None] * lengths[:, None, :])
