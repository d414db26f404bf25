"""Coefficients for parts of a model: `group_by_path` and `by_layer` make groups of leaves, each with its own alpha."""

import re
from collections.abc import Callable
from typing import NamedTuple

import jax

from glue_jax.checks import compiled
from glue_jax.paths import by_name, leaf_paths
from glue_jax.types import Params, PyTree

REST = "rest"
"""The name of the group of all leaves that the pattern does not match, or that belong to no layer."""

NORMS = "norms"
"""The name of the common group of all norms."""


class Groups(NamedTuple):
    """Groups of leaves: which row of alpha `[G, K]` blends which leaf.

    Attributes:
        rows: the number of the row for each leaf, with the structure of the experts. It is the `groups` of `blend`.
        names: the names of the G rows.
    """

    rows: PyTree
    names: tuple[str, ...]


def group_by_path(experts: Params, pattern: str | Callable[[str], str]) -> Groups:
    r"""Groups the leaves of a model by their paths.

    To learn by groups, use `merge_fn=functools.partial(blend, groups=groups.rows)`. Under a softmax, start from
    `init(K, optimizer, beta=jnp.zeros((len(groups.names), K)))`. Free coefficients start at
    `jnp.full((len(groups.names), K), 1 / K)`. SPSA then learns d numbers: d is G (K - 1) under a softmax, and G K for
    free coefficients. With m orthogonal directions, m at most d, the relative squared error of an estimate is d/m - 1
    (`glue_jax.theory`). So with more groups, take more directions, or more and smaller steps.

    Args:
        experts: stacked experts, or one of them.
        pattern: a regular expression, or a function from a path to the name of its group. The group of a leaf is the
            text that the expression matches in the leaf's path (`glue_jax.paths`). If the expression has a capture
            group, the first capture group counts. All leaves without a match share the group `rest`. Put BatchNorm
            statistics into the group of their layer. For example, `blocks/\d+` matches both
            `params/blocks/0/conv/kernel` and `batch_stats/blocks/0/norm/mean`.

    Returns:
        The groups, numbered in the order of the leaves.

    Raises:
        ValueError: if the pattern matches no path or is malformed, or if the experts have no leaves.
        ValueError: if a group has an empty name, as when the first capture group of `(w)|(b)` matches nothing.
        TypeError: if the function returns no string, or if the pattern is neither a string nor a function.

    Examples:
        >>> import glue_jax
        >>> experts = {"blocks": [{"w": 0.0, "b": 0.0}, {"w": 0.0, "b": 0.0}], "head": 0.0}
        >>> groups = glue_jax.merging.group_by_path(experts, r"blocks/\d+")
        >>> groups.names
        ('blocks/0', 'blocks/1', 'rest')
        >>> groups.rows
        {'blocks': [{'b': 0, 'w': 0}, {'b': 1, 'w': 1}], 'head': 2}
    """
    label = pattern if callable(pattern) else _by_pattern(pattern)
    paths = jax.tree.leaves(leaf_paths(experts))
    groups = _numbered(experts, paths, [label(path) for path in paths])
    if groups.names == (REST,) and not callable(pattern):
        raise ValueError(f"the pattern {pattern!r} matches no path; the paths are {paths}")
    return groups


def by_layer(experts: Params, *, norms: str | None = None, collections: str = "^(?:params|batch_stats)[/.]") -> Groups:
    r"""Groups the leaves of a model by layers. A layer is a kernel with its bias, or a norm with its statistics.

    The layer of a leaf is its path without the last key. This works for nested keys (`params/Dense_0/kernel`), for keys
    with dots (`bn1.running_mean`, as in a state dict of PyTorch), and for the variables of an `nnx.State`, whose paths
    end in `value`. Leaves that belong to no layer, such as a ViT's position embedding, share the group `rest`.
    `group_by_path` explains how to learn by groups.

    Args:
        experts: stacked experts, or one of them.
        norms: a regular expression for the names of layers that are norms, such as `"(?i)norm|bn"`. All norms then
            share one group, `norms`. With None, each norm has its own group.
        collections: a regular expression for the part of a path before the layer. This part is removed, so a norm's
            parameters and its statistics fall into one group. The default matches Flax's collections. For the pairs of
            `nnx.split(model, nnx.Param, nnx.BatchStat)`, pass `r"^\d+/"`.

    Returns:
        The groups, numbered in the order of the leaves.

    Raises:
        ValueError: if no path contains a layer, as in `{"w1": ..., "w2": ...}`, or if `norms` matches no layer or is
            malformed.
        TypeError: if `norms` is no string.

    Examples:
        >>> import glue_jax
        >>> experts = {"conv1.weight": 0.0, "bn1.weight": 0.0, "bn1.running_mean": 0.0, "fc.bias": 0.0}
        >>> glue_jax.merging.by_layer(experts).names
        ('bn1', 'conv1', 'fc')
        >>> glue_jax.merging.by_layer({"params": {"Dense_0": {"kernel": 0.0}, "Norm_0": 0.0}}).names
        ('Dense_0', 'rest')
    """
    paths = list(by_name(experts))
    layers = [re.sub(collections, "", path, count=1) for path in paths]
    layers = [found[1] if (found := re.match("(.+)[/.]", layer)) else REST for layer in layers]
    if not set(layers) - {REST}:
        raise ValueError(
            f"no path names a layer; expected 'layer/leaf' or 'layer.leaf', but the paths are {paths} (otherwise "
            "give group_by_path a function from path to group)"
        )
    if norms is not None:
        named = list(dict.fromkeys(layers))
        layers = [NORMS if layer != REST and compiled("norms", norms).search(layer) else layer for layer in layers]
        if NORMS not in layers:
            raise ValueError(f"norms is {norms!r}, which matches no layer; the layers are {named}")
    return _numbered(experts, paths, layers)


def _numbered(experts: Params, paths: list[str], labels: list[str]) -> Groups:
    """Returns the groups of these labels, one label for each leaf."""
    if not paths:
        raise ValueError("the experts hold no arrays: expected a pytree with at least one leaf")
    for path, label in zip(paths, labels, strict=True):
        if not isinstance(label, str):
            raise TypeError(f"the group of {path} is {label!r}; expected a string")
        if not label:
            raise ValueError(f"the group of {path} is an empty string; expected a name")
    names = tuple(dict.fromkeys(labels))
    return Groups(rows=jax.tree.unflatten(jax.tree.structure(experts), map(names.index, labels)), names=names)


def _by_pattern(pattern: str) -> Callable[[str], str]:
    """Returns a function from a path to the text that the pattern matches in it."""
    expression = compiled("pattern", pattern)

    def label(path: str) -> str:
        found = expression.search(path)
        if found is None:
            return REST
        name = found[1] if expression.groups else found[0]
        if not name:
            part = "its first capture group" if expression.groups else "it"
            raise ValueError(
                f"the pattern {pattern!r} is in {path}, but {part} matches nothing there; expected the name of a group"
            )
        return name

    return label
