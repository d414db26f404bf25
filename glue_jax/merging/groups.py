"""Coefficients by groups: one alpha for each layer, each block, or whatever the paths of a model name."""

import re
from collections.abc import Callable
from typing import NamedTuple

import jax

from glue_jax.checks import compiled
from glue_jax.paths import by_name, leaf_paths
from glue_jax.types import Params, PyTree

REST = "rest"
"""The name of the group of the leaves that a pattern is not in, or that are in no layer."""

NORMS = "norms"
"""The name of the group of all norms."""


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
            `params/blocks/0/conv/kernel` and `batch_stats/blocks/0/norm/mean`. Or a function from path to group, a
            string.

    Returns:
        The groups, numbered in the order in which the leaves come.

    Raises:
        ValueError: a pattern that is in no path, a group without a name, by the leaf's path, as where a pattern's first
            capture group finds nothing (`(w)|(b)`), or experts without leaves.
        TypeError: a function that returns no string.

    Example:
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
        raise ValueError(f"the pattern {pattern!r} is in no path; the paths are {paths}")
    return groups


def by_layer(experts: Params, *, norms: str | None = None, collections: str = "^(?:params|batch_stats)[/.]") -> Groups:
    r"""Groups the leaves of a model by layers, each of which is a kernel with its bias, a norm with its statistics.

    A leaf's layer is its path without its last key, whether the keys are nested (`params/Dense_0/kernel`), are one name
    with dots (`bn1.running_mean`, as in a state dict of PyTorch), or end in the `value` below a variable of an
    `nnx.State`. Leaves above all layers, as a ViT's position embedding, share the group `rest`. See `group_by_path` for
    how to learn by groups.

    Args:
        experts: stacked experts, or one of them.
        norms: a regular expression for the layers that are norms, such as `"(?i)norm|bn"`. They then share one group,
            `norms`. None gives each norm a group of its own.
        collections: a regular expression for what comes before the layer, so that a norm's parameters and its
            statistics are in one group: Flax's collections; for the pairs of `nnx.split(model, nnx.Param,
            nnx.BatchStat)` it is `r"^\d+/"`.

    Returns:
        The groups, numbered in the order in which the leaves come.

    Raises:
        ValueError: experts of which no path has a layer, as `{"w1": ..., "w2": ...}`, or a pattern for norms that is
            in no layer's name.

    Example:
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
            f"no path names a layer; expected 'layer/leaf' or 'layer.leaf', and the paths are {paths} (group_by_path "
            "takes a function from path to group)"
        )
    if norms is not None:
        named = list(dict.fromkeys(layers))
        layers = [NORMS if layer != REST and compiled("norms", norms).search(layer) else layer for layer in layers]
        if NORMS not in layers:
            raise ValueError(f"the pattern {norms!r} of norms is in the name of no layer; the layers are {named}")
    return _numbered(experts, paths, layers)


def _numbered(experts: Params, paths: list[str], labels: list[str]) -> Groups:
    """The groups of these labels, one for each leaf."""
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
    """From a path to what the pattern finds in it."""
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
