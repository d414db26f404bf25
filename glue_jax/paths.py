"""Parts of a pytree, named by the paths of its leaves.

A leaf's path is its keys joined by slashes, `params/blocks/0/conv1/kernel`, and a pattern is a regular expression that
is searched for in it (`re.search`): `^batch_stats/` is a collection, `head` whatever has it in its path.
"""

import re
from typing import Any

import jax

from glue_jax.types import PyTree


def leaf_paths(tree: PyTree) -> PyTree:
    """Returns `tree` with each leaf's path in its place.

    Example:
        >>> import glue_jax
        >>> glue_jax.leaf_paths({"params": {"head": {"bias": 0.0}}})
        {'params': {'head': {'bias': 'params/head/bias'}}}
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: slashed(path), tree)


def partition(tree: PyTree, pattern: str) -> tuple[PyTree, PyTree]:
    """Splits a tree in two, for what is not to be blended: a head, BatchNorm statistics.

    Args:
        tree: any pytree of arrays.
        pattern: a regular expression for the paths of the second part.

    Returns:
        The rest and the part, both of the structure of `tree` with None in place of the other's leaves. JAX takes None
        for a tree without leaves, so each can be stacked and blended by itself; `combine` puts them together.

    Raises:
        ValueError: a pattern that is in no path.

    Example:
        >>> import glue_jax
        >>> glue_jax.partition({"body": 1.0, "head": 2.0}, "^head")
        ({'body': 1.0, 'head': None}, {'body': None, 'head': 2.0})
    """
    chosen = jax.tree.leaves(matching(tree, pattern))
    leaves, treedef = jax.tree.flatten(tree)

    def part(keep: bool) -> PyTree:
        kept = [leaf if is_chosen is keep else None for leaf, is_chosen in zip(leaves, chosen, strict=True)]
        return jax.tree.unflatten(treedef, kept)

    return part(False), part(True)


def combine(rest: PyTree, part: PyTree) -> PyTree:
    """Puts together what `partition` split.

    Args:
        rest: a tree with None in place of some leaves.
        part: a tree of that structure whose leaves are there.

    Returns:
        The tree with both trees' leaves.

    Raises:
        ValueError: trees of different structures, or a leaf that both have, by its path.

    Example:
        >>> import glue_jax
        >>> glue_jax.combine({"body": 1.0, "head": None}, {"body": None, "head": 2.0})
        {'body': 1.0, 'head': 2.0}
    """

    def either(path: tuple[Any, ...], first: Any, second: Any) -> Any:
        # Both are None where the tree that was split held None.
        if first is not None and second is not None:
            raise ValueError(f"each of the two trees has a leaf at {slashed(path)}")
        return second if first is None else first

    return jax.tree_util.tree_map_with_path(either, rest, part, is_leaf=lambda leaf: leaf is None)


def matching(tree: PyTree, pattern: str) -> PyTree:
    """Returns `tree` with a bool in place of each leaf: whether the pattern is in its path; refuses one in no path."""
    paths = leaf_paths(tree)
    found = jax.tree.map(lambda path: re.search(pattern, path) is not None, paths)
    if not any(jax.tree.leaves(found)):
        raise ValueError(f"the pattern {pattern!r} is in no path; the paths are {jax.tree.leaves(paths)}")
    return found


def slashed(path: tuple[Any, ...]) -> str:
    """Returns a path of `jax.tree_util` as its keys joined by slashes."""
    return jax.tree_util.keystr(path, simple=True, separator="/")
