"""`refresh_statistics`: BatchNorm statistics for a blend.

The average of networks has other activations than the networks. So the average of their running means and variances
does not describe them (Jordan et al., 2023, https://arxiv.org/abs/2211.08403). There are two remedies, and both need
only forward passes:

- After learning, `refresh_statistics` estimates the statistics anew on target batches.
- During learning, use a `loss_fn` that normalises by its own minibatch: run the network in training mode, and drop its
  updated statistics. Then the loss is that of the repaired blend. It is deterministic, and the same for both probes of
  a pair.
"""

import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from glue_jax.batches import num_examples
from glue_jax.checks import check_callable, check_counts, compiled
from glue_jax.paths import by_name
from glue_jax.types import Batch, Params, PyTree

STATISTICS = r"^batch_stats/|^(?!params/)(?=(?:.*[./])?running_(?:mean|var)$)"
"""The paths of BatchNorm's statistics in Flax's variables, and in a state dict of PyTorch."""


def refresh_statistics(
    params: Params,
    batches: Iterable[Batch],
    statistics_fn: Callable[[Params, Batch], PyTree],
    *,
    collection: str = STATISTICS,
    mean: str = "mean$",
    var: str = "var$",
    num_batches: int | None = None,
) -> Params:
    """Repairs the BatchNorm statistics of a blend: estimates them anew on target batches.

    The new mean is the mean of the batches' means, weighted by their sizes. The new variance follows the law of total
    variance: the mean of the batches' variances plus the variance of their means. With one batch, the result is the
    statistics of that batch.

    `collection`, `mean` and `var` are regular expressions for paths (`glue_jax.paths`). The path of a variable of an
    `nnx.State` ends in `/value`. Leave this ending out of these three expressions. The defaults find the statistics in
    Flax's variables, such as `batch_stats/norm/mean`, and in a state dict of PyTorch, such as `norm.running_mean`.

    Args:
        params: the model, with its old statistics. They are replaced, and may be None.
        batches: a list, or another iterable, of pytrees of arrays `[B, ...]`.
        statistics_fn: `statistics_fn(params, batch)` runs the network in training mode, and returns the statistics of
            that batch alone. They are a tree. Each statistic has the same path as in `params`, or a shorter one, see
            `collection`. With Flax, run a BatchNorm with momentum 0 and return its updated statistics. (In Flax the
            momentum is the share of the old statistics, in PyTorch that of the new ones.) For a PyTorch module,
            `glue_jax.checkpoints.torch_modules.module_functions` makes this function. Jit it.
        collection: a regular expression that matches the paths of statistics in `params`, and no paths of parameters.
            The tree of `statistics_fn` may have shorter paths, without the text that `collection` matches. For
            `batch_stats/norm/mean` the path `norm/mean` is enough. If the paths have no part that marks statistics, as
            in `nnx.to_pure_dict(nnx.state(model))`, pass "". Then only `mean` and `var` find the statistics.
        mean: a regular expression for the paths of means. A mean and a variance form a pair if their paths differ only
            in the text that `mean` and `var` match, as in `norm1/mean` and `norm1/var`.
        var: a regular expression for the paths of variances. `statistics_fn` must return biased variances, which divide
            a sum of n squares by n.
        num_batches: the largest number of batches to take, for a loader without an end. With None, all are taken.

    Returns:
        `params` with the new statistics, in the dtypes of `statistics_fn`. They are pooled in at least float32.

    Raises:
        TypeError: if `batches` is an array or a mapping, which is a single batch, or if a statistic is no
            floating-point array.
        ValueError: if there are no batches.
        ValueError: if a statistic is neither a mean nor a variance, if a mean or a variance stands alone, if a
            statistic has no place in `params`, or if `statistics_fn` leaves out a statistic of `params`. This error
            comes after the first batch.
        ValueError: if a variance is negative or NaN, or if `statistics_fn` returns no statistics.
    """
    if hasattr(batches, "shape") or hasattr(batches, "_fields") or isinstance(batches, Mapping):
        raise TypeError(
            f"batches is a {type(batches).__name__}; expected an iterable of batches (for a single batch, pass [batch])"
        )
    check_callable(statistics_fn=statistics_fn)
    for name, pattern in {"collection": collection, "mean": mean, "var": var}.items():
        compiled(name, pattern)
    if num_batches is not None:
        check_counts(num_batches=num_batches)
    pooled: dict[str, jax.Array] = {}
    dtypes: dict[str, Any] = {}
    means: dict[str, str] = {}
    seen = 0
    for batch in itertools.islice(batches, num_batches):
        found = _statistics(statistics_fn(params, batch), collection)
        if not found:
            raise ValueError(
                "statistics_fn returned no statistics; expected those of the batch, in the tree of the collection"
            )
        accurate = {path: jnp.asarray(leaf, jnp.promote_types(leaf.dtype, jnp.float32)) for path, leaf in found.items()}
        size = num_examples("batches", batch)
        seen += size
        if not pooled:
            means = _means_of_variances(found, mean, var)
            dtypes = {path: leaf.dtype for path, leaf in found.items()}
            _put(params, collection, accurate, f"{mean}|{var}")
        elif accurate.keys() != pooled.keys():
            raise ValueError(
                f"statistics_fn returned {list(found)} for one batch and {list(pooled)} for those before; expected the "
                "same"
            )
        for path in means:
            if not isinstance(accurate[path], Tracer) and not (accurate[path] >= 0).all():
                raise ValueError(
                    f"statistics_fn returned the variance {jnp.min(accurate[path])} at {path}; expected at least 0"
                )
        pooled = _pool(pooled, accurate, size / seen, means) if pooled else accurate
    if not seen:
        raise ValueError("batches is empty: expected at least one")
    return _put(params, collection, {path: leaf.astype(dtypes[path]) for path, leaf in pooled.items()}, f"{mean}|{var}")


def _statistics(tree: PyTree, collection: str) -> dict[str, Any]:
    """Returns one batch's statistics by their paths without the collection."""
    found = {_without(collection, path): leaf for path, leaf in by_name(tree).items()}
    for path, leaf in found.items():
        kind = getattr(leaf, "dtype", type(leaf).__name__)
        if not hasattr(leaf, "dtype") or not jnp.issubdtype(kind, jnp.floating):
            raise TypeError(f"statistics_fn returned {kind} at {path}; expected an array of a floating-point dtype")
    return found


def _without(pattern: str, path: str) -> str:
    """Returns a path without the last match of a pattern."""
    for found in [*re.finditer(pattern, path)][-1:]:
        path = path[: found.start()] + path[found.end() :]
    return path.strip("/.")


def _means_of_variances(paths: Iterable[str], mean: str, var: str) -> dict[str, str]:
    """Returns, for the path of each variance, the path of its mean. Each statistic must belong to one pair."""
    paths = list(paths)
    means, variances = (
        {_without(pattern, path): path for path in paths if re.search(pattern, path)} for pattern in (mean, var)
    )
    pairs = {variance: means[norm] for norm, variance in variances.items() if norm in means}
    paired = [*pairs, *pairs.values()]
    for path in paths:
        if paired.count(path) != 1:
            raise ValueError(
                f"statistics_fn returned {paths}; expected pairs of a mean ({mean!r}) and a variance ({var!r}), whose "
                f"paths are the same without the text that these patterns match; {path} has no partner"
            )
    return pairs


def _pool(
    pooled: dict[str, jax.Array], found: dict[str, jax.Array], weight: float, means: dict[str, str]
) -> dict[str, jax.Array]:
    """Pools the statistics so far with those of one more batch (Chan et al., 1979).

    Args:
        pooled: the statistics so far.
        found: the statistics of the batch.
        weight: the batch's share of all examples so far.
        means: the path of the mean for the path of each variance.
    """
    result = {path: before + weight * (found[path] - before) for path, before in pooled.items()}
    for path, mean in means.items():
        result[path] += weight * (1 - weight) * jnp.square(found[mean] - pooled[mean])
    return result


def _put(params: Params, collection: str, statistics: Mapping[str, jax.Array], pattern: str) -> Params:
    """Returns `params` with the new statistics in their places.

    Where the collection matches no text, `pattern` tells statistics from parameters.
    """
    leaves = by_name(params, keep_none=True)
    missing = set(statistics)

    def put(path: str, leaf: Any) -> Any:
        found, at = re.search(collection, path), _without(collection, path)
        if found is None:
            return leaf
        if at not in statistics:
            if not found[0] and not re.search(pattern, path):
                return leaf
            raise ValueError(f"statistics_fn returned nothing for {path}; it returned only {list(statistics)}")
        if leaf is not None and np.shape(leaf) != np.shape(statistics[at]):
            raise ValueError(
                f"statistics_fn returned shape {np.shape(statistics[at])} for {path}; expected {np.shape(leaf)}"
            )
        missing.discard(at)
        return statistics[at]

    result = [put(path, leaf) for path, leaf in leaves.items()]
    if missing:
        raise ValueError(f"params has no place for {sorted(missing)}; collection is {collection!r}")
    return jax.tree.unflatten(jax.tree.structure(params, is_leaf=lambda leaf: leaf is None), result)
