"""BatchNorm statistics of a blend.

An average of networks has activations of its own, which the average of their running means and variances does not
describe (Jordan et al., 2023, https://arxiv.org/abs/2211.08403). Two remedies, both of forward passes alone:

- after learning, `refresh_statistics` estimates them anew on target batches;
- in learning, a `loss_fn` that normalises by its own minibatch (the network in training mode, its updated statistics
  thrown away) judges the blend as it will be after that. It is deterministic, the same for both probes of a pair.
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


def refresh_statistics(
    params: Params,
    batches: Iterable[Batch],
    statistics_fn: Callable[[Params, Batch], PyTree],
    *,
    collection: str = "^batch_stats/",
    mean: str = "mean$",
    var: str = "var$",
    num_batches: int | None = None,
) -> Params:
    """Estimates the BatchNorm statistics of a model anew.

    The mean over all batches is that of the batches' means, weighted by their sizes; the variance, by the law of
    total variance, the mean of their variances plus the variance of their means. With one batch it is that batch's.

    `collection`, `mean` and `var` are regular expressions that are searched for in paths (`glue_jax.paths`); the path
    of a variable of an `nnx.State` is without `/value`. In a state dict of PyTorch, with keys like `bn1.running_mean`,
    the statistics are found by `collection=""` alone.

    Args:
        params: the model, with its statistics in `collection`; what they hold, None included, is replaced.
        batches: a list, or another iterable, of pytrees of arrays `[B, ...]`.
        statistics_fn: `statistics_fn(params, batch)`, the statistics of that batch alone in training mode, a tree of
            the structure of the collection: with Flax, what a BatchNorm of momentum 0 has updated them to (of momentum
            0.99, they would be 99 % of what they were before). Jit it.
        collection: what tells the paths of statistics in `params` from those of parameters. The tree of
            `statistics_fn` may hold it or leave it out. "" where the statistics lie among the parameters, as in
            `nnx.to_pure_dict(nnx.state(model))`.
        mean: which leaves are means. A mean and a variance are a pair if their paths are the same without what these
            patterns match (`norm1/mean` and `norm1/var`).
        var: which leaves are (biased) variances.
        num_batches: the most batches to take, as from a loader without an end. None takes all.

    Returns:
        `params` with the new statistics, in the dtypes of `statistics_fn`; they are pooled in float32 at least.

    Raises:
        TypeError: batches that are an array or a mapping, which is one batch; statistics that are no floating-point
            arrays.
        ValueError: no batches; a statistic that is no mean or variance, or that `params` has no place for; one in
            `params` that `statistics_fn` leaves out (all with the first batch); a variance that is negative or NaN.
    """
    if hasattr(batches, "shape") or hasattr(batches, "_fields") or isinstance(batches, Mapping):
        raise TypeError(f"batches is a {type(batches).__name__}; expected an iterable of batches: one batch is [batch]")
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
        accurate = {path: jnp.asarray(leaf, jnp.promote_types(leaf.dtype, jnp.float32)) for path, leaf in found.items()}
        size = num_examples("batches", batch)
        seen += size
        if not pooled:
            means = _means_of_variances(found, mean, var)
            dtypes = {path: leaf.dtype for path, leaf in found.items()}
            _put(params, collection, accurate, f"{mean}|{var}")
        elif accurate.keys() != pooled.keys():
            raise ValueError(f"statistics_fn returned {list(found)} for one batch and {list(pooled)} for those before")
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
    """One batch's statistics by their paths without the collection."""
    found = {_without(collection, path): leaf for path, leaf in by_name(tree).items()}
    for path, leaf in found.items():
        kind = getattr(leaf, "dtype", type(leaf).__name__)
        if not hasattr(leaf, "dtype") or not jnp.issubdtype(kind, jnp.floating):
            raise TypeError(f"statistics_fn returned {kind} at {path}; expected an array of a floating-point dtype")
    return found


def _without(pattern: str, path: str) -> str:
    """A path without the last match of a pattern."""
    for found in [*re.finditer(pattern, path)][-1:]:
        path = path[: found.start()] + path[found.end() :]
    return path.strip("/.")


def _means_of_variances(paths: Iterable[str], mean: str, var: str) -> dict[str, str]:
    """For each variance's path that of its mean; each statistic must be one of such a pair."""
    paths = list(paths)
    means, variances = (
        {_without(pattern, path): path for path in paths if re.search(pattern, path)} for pattern in (mean, var)
    )
    pairs = {variance: means[norm] for norm, variance in variances.items() if norm in means}
    paired = [*pairs, *pairs.values()]
    for path in paths:
        if paired.count(path) != 1:
            raise ValueError(
                f"statistics_fn returned {paths}; expected pairs of a mean ({mean!r}) and a variance ({var!r}), their "
                f"paths the same without what these patterns match, and {path} has no partner"
            )
    return pairs


def _pool(
    pooled: dict[str, jax.Array], found: dict[str, jax.Array], weight: float, means: dict[str, str]
) -> dict[str, jax.Array]:
    """Statistics of what came before and of one more batch, which is `weight` of all (Chan et al., 1979)."""
    result = {path: before + weight * (found[path] - before) for path, before in pooled.items()}
    for path, mean in means.items():
        result[path] += weight * (1 - weight) * jnp.square(found[mean] - pooled[mean])
    return result


def _put(params: Params, collection: str, statistics: Mapping[str, jax.Array], pattern: str) -> Params:
    """`params` with the statistics at their places; `pattern` is in the paths of statistics among the parameters."""
    leaves = by_name(params, keep_none=True)
    missing = set(statistics)

    def put(path: str, leaf: Any) -> Any:
        found, at = re.search(collection, path), _without(collection, path)
        if found is None:
            return leaf
        if at not in statistics:
            if not found[0] and not re.search(pattern, path):
                return leaf
            raise ValueError(f"statistics_fn returned nothing for {path}; it returned {list(statistics)}")
        if leaf is not None and np.shape(leaf) != np.shape(statistics[at]):
            raise ValueError(
                f"statistics_fn returned shape {np.shape(statistics[at])} for {path}; expected {np.shape(leaf)}"
            )
        missing.discard(at)
        return statistics[at]

    result = [put(path, leaf) for path, leaf in leaves.items()]
    if missing:
        raise ValueError(f"params has no place for {sorted(missing)} where the collection is {collection!r}")
    return jax.tree.unflatten(jax.tree.structure(params, is_leaf=lambda leaf: leaf is None), result)
