"""Coefficients by groups: one alpha for each layer, each block, or whatever the paths of a model name."""

import re
from collections.abc import Callable
from typing import NamedTuple

import jax

from glue_jax.paths import leaf_paths
from glue_jax.types import Params, PyTree

REST = "rest"
"""The name of the group of the leaves that a pattern is not in."""


class Groups(NamedTuple):
    """Which row of alpha `[G, K]` blends which leaf.

    Attributes:
        rows: of the experts' structure, the row of each leaf: the `groups` of `blend`.
        names: of the G rows.
    """

    rows: PyTree
    names: tuple[str, ...]


def group_by_path(experts: Params, pattern: str | Callable[[str], str]) -> Groups:
    r"""Groups the leaves of a model by their paths.

    Learn with it by `merge_fn=functools.partial(blend, groups=groups.rows)` from
    `init(K, optimizer, beta=jnp.zeros((len(groups.names), K)))`. SPSA then learns G K numbers: the relative squared
    error of an estimate from m orthogonal directions is G K / m - 1 (`glue_jax.theory`), so that more groups want
    more directions, or more and smaller steps.

    Args:
        experts: stacked experts, or one of them.
        pattern: a regular expression. A leaf's group is what it finds in the leaf's path (`glue_jax.paths`): its
            first capture group where it has one, else all that it matches; leaves in whose paths it is not share
            the group `rest`. BatchNorm statistics should go with their layer: `blocks/\d+` finds both
            `params/blocks/0/conv/kernel` and `batch_stats/blocks/0/norm/mean`. Or a function from path to group.

    Returns:
        The groups, numbered in the order in which the leaves come.

    Raises:
        ValueError: a pattern that is in no path.

    Example:
        >>> import glue_jax
        >>> experts = {"blocks": [{"w": 0.0, "b": 0.0}, {"w": 0.0, "b": 0.0}], "head": 0.0}
        >>> groups = glue_jax.group_by_path(experts, r"blocks/\d+")
        >>> groups.names
        ('blocks/0', 'blocks/1', 'rest')
        >>> groups.rows
        {'blocks': [{'b': 0, 'w': 0}, {'b': 1, 'w': 1}], 'head': 2}
    """
    label = pattern if callable(pattern) else _by_pattern(pattern)
    labels = jax.tree.map(label, leaf_paths(experts))
    names = tuple(dict.fromkeys(jax.tree.leaves(labels)))
    if names == (REST,) and not callable(pattern):
        raise ValueError(f"the pattern {pattern!r} is in no path; the paths are {jax.tree.leaves(leaf_paths(experts))}")
    return Groups(rows=jax.tree.map(names.index, labels), names=names)


def _by_pattern(pattern: str) -> Callable[[str], str]:
    """From a path to what the pattern finds in it."""
    compiled = re.compile(pattern)

    def label(path: str) -> str:
        found = compiled.search(path)
        if found is None:
            return REST
        return (found[1] if compiled.groups else found[0]) or REST

    return label
