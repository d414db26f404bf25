"""Parts of a pytree, named by the paths of its leaves.

The path of a leaf joins its keys by slashes, as in `params/blocks/0/conv1/kernel`. A pattern is a regular expression.
It matches a path if it occurs anywhere in the path (`re.search`). So `^batch_stats/` matches a collection, and `head`
matches every path that contains "head".
"""

import collections
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from glue_jax.checks import compiled
from glue_jax.types import PyTree

__all__ = ["combine", "leaf_paths", "partition"]


def leaf_paths(tree: PyTree) -> PyTree:
    """Returns `tree` with each leaf replaced by its path, a string.

    Args:
        tree: any pytree.

    Examples:
        >>> import glue_jax
        >>> glue_jax.paths.leaf_paths({"params": {"head": {"bias": 0.0}}})
        {'params': {'head': {'bias': 'params/head/bias'}}}
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: slashed(path), tree)


def partition(tree: PyTree, pattern: str) -> tuple[PyTree, PyTree]:
    """Splits a tree into two parts, to keep a part out of the blend, such as a head or BatchNorm statistics.

    Args:
        tree: any pytree of arrays.
        pattern: a regular expression for the paths of the first part.

    Returns:
        The part whose paths match the pattern, and the rest, in the order of Equinox's `partition`. Both parts have the
        structure of `tree`, with None for each leaf of the other part. JAX treats None as an empty tree, so each part
        can be stacked and blended alone. `combine` joins the two.

    Raises:
        ValueError: if the pattern matches no path, or is malformed.
        TypeError: if the pattern is no string.

    Examples:
        >>> import glue_jax
        >>> glue_jax.partition({"body": 1.0, "head": 2.0}, "^head")
        ({'body': None, 'head': 2.0}, {'body': 1.0, 'head': None})
    """
    chosen = jax.tree.leaves(matching(tree, pattern))
    leaves, treedef = jax.tree.flatten(tree)

    def part(keep: bool) -> PyTree:
        kept = [leaf if is_chosen is keep else None for leaf, is_chosen in zip(leaves, chosen, strict=True)]
        return jax.tree.unflatten(treedef, kept)

    return part(True), part(False)


def combine(part: PyTree, rest: PyTree) -> PyTree:
    """Joins two parts that `partition` split.

    Args:
        part: a tree with None for some leaves.
        rest: a tree of the same structure that holds the other leaves. The order of the two does not matter.

    Returns:
        The tree with the leaves of both parts.

    Raises:
        ValueError: if the structures differ, or if both parts have the same leaf; the error names its path.

    Examples:
        >>> import glue_jax
        >>> glue_jax.combine({"body": None, "head": 2.0}, {"body": 1.0, "head": None})
        {'body': 1.0, 'head': 2.0}
    """

    def either(path: tuple[Any, ...], first: Any, second: Any) -> Any:
        # Both are None if the tree held None before it was split.
        if first is not None and second is not None:
            raise ValueError(f"each of the two trees has a leaf at {slashed(path)}; expected None in one of them")
        return second if first is None else first

    return jax.tree_util.tree_map_with_path(either, part, rest, is_leaf=lambda leaf: leaf is None)


def matching(tree: PyTree, pattern: str) -> PyTree:
    """Returns `tree` with a bool for each leaf: whether the pattern matches its path. At least one path must match."""
    paths = leaf_paths(tree)
    expression = compiled("the pattern", pattern)
    found = jax.tree.map(lambda path: expression.search(path) is not None, paths)
    if not any(jax.tree.leaves(found)):
        raise ValueError(f"the pattern {pattern!r} matches no path; the paths are {jax.tree.leaves(paths)}")
    return found


def slashed(path: tuple[Any, ...]) -> str:
    """Returns a path of `jax.tree_util` as keys joined by slashes."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def by_path(tree: PyTree, *, keep_none: bool = False) -> dict[str, Any]:
    """Returns the leaves in a dict by their paths, in the order of the tree.

    Args:
        tree: any pytree.
        keep_none: whether None counts as a leaf.

    Raises:
        ValueError: if two leaves have the same path, as in `{"a/b": ..., "a": {"b": ...}}`.
    """
    is_leaf = (lambda leaf: leaf is None) if keep_none else None
    leaves = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf):
        if slashed(path) in leaves:
            raise ValueError(f"two leaves have the path {slashed(path)!r}; expected one: rename a key of the tree")
        leaves[slashed(path)] = leaf
    return leaves


def by_name(tree: PyTree, *, keep_none: bool = False) -> dict[str, Any]:
    """Returns the leaves as `by_path` does, without the `/value` that Flax NNX adds to each variable of a `State`.

    A leaf such as `attention/value` keeps its name if it has siblings.
    """
    leaves = by_path(tree, keep_none=keep_none)
    above = [path[: found.start()] for path in leaves for found in re.finditer("/", path)]
    count = collections.Counter(above)

    def name(path: str) -> str:
        shorter = path.removesuffix("/value")
        return shorter if count[shorter] == 1 and shorter not in leaves else path

    return {name(path): leaf for path, leaf in leaves.items()}


def check_finite(name: str, tree: PyTree, *, stacked: bool = False) -> None:
    """Refuses floating-point leaves with infinite or NaN entries. It skips traced leaves.

    Args:
        name: the name of the argument.
        tree: any pytree of arrays.
        stacked: whether the leaves are `[K, ...]`. The error then names the expert.

    Raises:
        ValueError: if a leaf is not finite; the error names its path.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if isinstance(leaf, Tracer) or not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            continue
        # NumPy checks its own arrays, because JAX would turn float64 into float32.
        finite = (jnp if isinstance(leaf, jax.Array) else np).isfinite(leaf)
        if not finite.all():
            finite = np.asarray(finite)
            where = f"expert {np.argwhere(~finite)[0][0]} of {name}" if stacked else name
            raise ValueError(
                f"{where} holds {np.asarray(leaf)[~finite][0]} at {slashed(path) or 'the root'}; "
                "expected finite numbers"
            )
