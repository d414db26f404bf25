"""Parts of a pytree, named by the paths of its leaves.

A leaf's path is its keys joined by slashes, `params/blocks/0/conv1/kernel`, and a pattern is a regular expression that
is searched for in it (`re.search`): `^batch_stats/` is a collection, `head` whatever has it in its path.
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


def leaf_paths(tree: PyTree) -> PyTree:
    """Returns `tree` with each leaf's path in its place.

    Example:
        >>> import glue_jax
        >>> glue_jax.paths.leaf_paths({"params": {"head": {"bias": 0.0}}})
        {'params': {'head': {'bias': 'params/head/bias'}}}
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: slashed(path), tree)


def partition(tree: PyTree, pattern: str) -> tuple[PyTree, PyTree]:
    """Splits a tree in two, for what is not to be blended: a head, BatchNorm statistics.

    Args:
        tree: any pytree of arrays.
        pattern: a regular expression for the paths of the first part.

    Returns:
        The part whose paths the pattern is in, and the rest, in the order of Equinox's `partition`. Both have the
        structure of `tree`, with None in place of the other's leaves. JAX takes None for a tree without leaves, so each
        can be stacked and blended by itself; `combine` puts them together.

    Raises:
        ValueError: a pattern that is in no path.

    Example:
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
    """Puts together what `partition` split.

    Args:
        part: a tree with None in place of some leaves.
        rest: a tree of that structure whose leaves are there. The two may change places.

    Returns:
        The tree with both trees' leaves.

    Raises:
        ValueError: trees of different structures, or a leaf that both have, by its path.

    Example:
        >>> import glue_jax
        >>> glue_jax.combine({"body": None, "head": 2.0}, {"body": 1.0, "head": None})
        {'body': 1.0, 'head': 2.0}
    """

    def either(path: tuple[Any, ...], first: Any, second: Any) -> Any:
        # Both are None where the tree that was split held None.
        if first is not None and second is not None:
            raise ValueError(f"each of the two trees has a leaf at {slashed(path)}")
        return second if first is None else first

    return jax.tree_util.tree_map_with_path(either, part, rest, is_leaf=lambda leaf: leaf is None)


def matching(tree: PyTree, pattern: str) -> PyTree:
    """Returns `tree` with a bool in place of each leaf: whether the pattern is in its path; refuses one in no path."""
    paths = leaf_paths(tree)
    expression = compiled("the pattern", pattern)
    found = jax.tree.map(lambda path: expression.search(path) is not None, paths)
    if not any(jax.tree.leaves(found)):
        raise ValueError(f"the pattern {pattern!r} is in no path; the paths are {jax.tree.leaves(paths)}")
    return found


def slashed(path: tuple[Any, ...]) -> str:
    """Returns a path of `jax.tree_util` as its keys joined by slashes."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def by_path(tree: PyTree, *, keep_none: bool = False) -> dict[str, Any]:
    """Returns the leaves by their paths, in the order in which they come.

    Args:
        tree: any pytree.
        keep_none: whether None is a leaf.

    Raises:
        ValueError: two leaves of one path, as of `{"a/b": ..., "a": {"b": ...}}`.
    """
    is_leaf = (lambda leaf: leaf is None) if keep_none else None
    leaves = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf):
        if slashed(path) in leaves:
            raise ValueError(f"two leaves have the path {slashed(path)!r}; expected one, so rename a key of the tree")
        leaves[slashed(path)] = leaf
    return leaves


def by_name(tree: PyTree, *, keep_none: bool = False) -> dict[str, Any]:
    """Returns the leaves as `by_path` does, without the `/value` that Flax NNX has below each variable of a `State`.

    A leaf `attention/value` that has siblings keeps its name.
    """
    leaves = by_path(tree, keep_none=keep_none)
    above = [path[: found.start()] for path in leaves for found in re.finditer("/", path)]
    count = collections.Counter(above)

    def name(path: str) -> str:
        shorter = path.removesuffix("/value")
        return shorter if count[shorter] == 1 and shorter not in leaves else path

    return {name(path): leaf for path, leaf in leaves.items()}


def check_finite(name: str, tree: PyTree, *, stacked: bool = False) -> None:
    """Refuses floating-point leaves with infinite or NaN entries; a traced leaf is not looked at.

    Args:
        name: of the argument.
        tree: any pytree of arrays.
        stacked: whether leaves are `[K, ...]`, so that the error names the expert.

    Raises:
        ValueError: such a leaf, by its path.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if isinstance(leaf, Tracer) or not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            continue
        # NumPy's are not brought to JAX, which would make float64 float32.
        finite = (jnp if isinstance(leaf, jax.Array) else np).isfinite(leaf)
        if not finite.all():
            finite = np.asarray(finite)
            where = f"expert {np.argwhere(~finite)[0][0]} of {name}" if stacked else name
            raise ValueError(
                f"{where} holds {np.asarray(leaf)[~finite][0]} at {slashed(path) or 'the root'}; "
                "expected finite numbers"
            )
