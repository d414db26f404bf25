"""BatchNorm statistics of a blend.

An average of networks has activations of its own, which the average of their running means and variances does not
describe (Jordan et al., 2023, https://arxiv.org/abs/2211.08403). Two remedies, both of forward passes alone:

- after learning, `refresh_statistics` estimates them anew on target batches;
- in learning, a `loss_fn` that normalises by its own minibatch (the network in training mode, its updated statistics
  thrown away) judges the blend as it will be after that. It is deterministic, the same for both probes of a pair.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from glue_jax.batches import num_examples
from glue_jax.paths import slashed
from glue_jax.types import Batch, Params, PyTree


def refresh_statistics(
    params: Params,
    batches: Iterable[Batch],
    statistics_fn: Callable[[Params, Batch], PyTree],
    *,
    collection: str = "batch_stats",
    mean: str = "mean",
    var: str = "var",
) -> Params:
    """Estimates the BatchNorm statistics of a model anew.

    The mean over all batches is that of the batches' means, weighted by their sizes; the variance, by the law of
    total variance, the mean of their variances plus the variance of their means. With one batch it is that batch's.

    Args:
        params: the model, with its statistics below `collection`; what they hold, None included, is replaced.
        batches: pytrees of arrays `[B, ...]`.
        statistics_fn: `statistics_fn(params, batch)`, the statistics of that batch alone in training mode, a tree of
            the structure of the collection: with Flax, what a BatchNorm of momentum 0 has updated them to (of momentum
            0.99, they would be 99 % of what they were before). Jit it.
        collection: the path of the statistics in `params`, keys joined by slashes; "" where they lie among the
            parameters, as in `nnx.to_pure_dict(nnx.state(model))`.
        mean: the last key of the leaves that are means.
        var: the last key of the leaves that are (biased) variances.

    Returns:
        `params` with the new statistics, in the dtypes of `statistics_fn`; they are pooled in float32 at least.

    Raises:
        ValueError: no batches, a statistic that is neither mean nor variance, or one that `params` has no place for,
            with the first batch.
    """
    pooled: dict[str, jax.Array] = {}
    found: dict[str, jax.Array] = {}
    seen = 0
    for batch in batches:
        found = {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(statistics_fn(params, batch))}
        accurate = {path: jnp.asarray(leaf, jnp.promote_types(leaf.dtype, jnp.float32)) for path, leaf in found.items()}
        size = num_examples("batches", batch)
        seen += size
        if not pooled:
            pooled = _checked(accurate, mean, var)
            _put(params, collection, pooled)
        elif accurate.keys() != pooled.keys():
            raise ValueError(f"statistics_fn returned {list(found)} for one batch and {list(pooled)} for those before")
        else:
            pooled = _pool(pooled, accurate, size / seen, mean, var)
    if not seen:
        raise ValueError("batches is empty: expected at least one")
    return _put(params, collection, {path: leaf.astype(found[path].dtype) for path, leaf in pooled.items()})


def _checked(statistics: dict[str, jax.Array], mean: str, var: str) -> dict[str, jax.Array]:
    """The first batch's statistics, each of which must be one of a pair."""
    for path in statistics:
        prefix, _, key = path.rpartition("/")
        other = {mean: var, var: mean}.get(key)
        partner = f"{prefix}/{other}".removeprefix("/")
        if other is None or partner not in statistics:
            raise ValueError(
                f"statistics_fn returned {list(statistics)}; expected pairs of leaves named {mean!r} and {var!r}, and "
                f"{path} has no partner"
            )
    return statistics


def _pool(
    pooled: dict[str, jax.Array], found: dict[str, jax.Array], weight: float, mean: str, var: str
) -> dict[str, jax.Array]:
    """Statistics of what came before and of one more batch, which is `weight` of all (Chan et al., 1979)."""
    result = {}
    for path, before in pooled.items():
        prefix, _, key = path.rpartition("/")
        result[path] = before + weight * (found[path] - before)
        if key == var:
            at = f"{prefix}/{mean}".removeprefix("/")
            result[path] += weight * (1 - weight) * jnp.square(found[at] - pooled[at])
    return result


def _name(path: tuple[Any, ...]) -> str:
    """A leaf's keys joined by slashes, without the one below each variable of an `nnx.State`."""
    return slashed(path).removesuffix("/value")


def _put(params: Params, collection: str, statistics: dict[str, jax.Array]) -> Params:
    """`params` with the statistics at their places."""
    start = f"{collection}/" if collection else ""
    missing = set(statistics)

    def put(path: tuple[Any, ...], leaf: Any) -> Any:
        name = _name(path)
        at = name.removeprefix(start)
        if not name.startswith(start) or (not collection and at not in statistics):
            return leaf
        if at not in statistics:
            raise ValueError(f"statistics_fn returned nothing for {name}; it returned {list(statistics)}")
        if leaf is not None and np.shape(leaf) != np.shape(statistics[at]):
            raise ValueError(
                f"statistics_fn returned shape {np.shape(statistics[at])} for {name}; expected {np.shape(leaf)}"
            )
        missing.discard(at)
        return statistics[at]

    result = jax.tree_util.tree_map_with_path(put, params, is_leaf=lambda leaf: leaf is None)
    if missing:
        raise ValueError(f"params has no place for {sorted(missing)} below {collection!r}")
    return result
