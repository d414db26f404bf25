"""Permutation alignment of experts by weight matching.

A network computes the same function when the units of a hidden layer change places, so experts from separate
initialisations have theirs in places of their own, and an average mixes units that have nothing to do with one another.
Weight matching (Ainsworth et al., 2023, Algorithms 1 and 3, https://arxiv.org/abs/2209.04836) finds, without data, the
permutations that bring experts' weights closest together.

What may be permuted is data, a `PermutationSpec`: for each leaf, by its path (`glue_jax.paths`), what runs along each
of its axes. Of a network with two dense layers:

    spec = {"dense1/kernel": (None, "hidden"), "dense1/bias": ("hidden",), "dense2/kernel": ("hidden", None)}

`chain_spec` writes it for a plain chain of layers.

An axis whose units belong to several permutations, as behind a concatenation or a shortcut that pads with zeros, is a
tuple of segments `(name, start, stop)` of them, in their order on the axis.

Where experts' heads differ, `partition` them off, align the rest by a spec without their paths, and `combine` the blend
with the head of the expert that the others were aligned to: its units kept their places, so that its head fits.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import linear_sum_assignment

from glue_jax.experts import num_experts
from glue_jax.paths import leaf_paths
from glue_jax.types import Params

Segment: TypeAlias = tuple[str, int, int]
Axis: TypeAlias = str | tuple[Segment, ...] | None
PermutationSpec: TypeAlias = Mapping[str, tuple[Axis, ...]]
"""For each leaf's path, what is permuted along each of its axes; None, or a path left out, is nothing."""

Permutations: TypeAlias = dict[str, np.ndarray]
"""By name, an int `[n]`: unit j comes from place `permutation[j]`."""


class Alignment(NamedTuple):
    """What `align_experts` found.

    Attributes:
        experts: each computes the function that it did before, leaves `[K, ...]`.
        permutations: of each expert.
    """

    experts: Params
    permutations: list[Permutations]


def chain_spec(params: Params, layers: Sequence[str]) -> PermutationSpec:
    """Returns what may be permuted in an MLP, or in a CNN without shortcuts: the units of each layer but the last.

    Args:
        params: one model, with kernels whose last two axes are inputs and outputs, as Flax has them.
        layers: for each layer, from input to output, a regular expression for the paths of its leaves: its kernel,
            and what runs along its outputs, such as its bias, and the scales and the statistics of a norm behind it.

    Returns:
        The spec of all leaves of these layers, with the units of the layer at index i as `"units{i}"`.

    Raises:
        ValueError: a pattern that is in no path, a path that two have, or a leaf without axes.

    Example:
        >>> import jax.numpy as jnp
        >>> import glue_jax
        >>> dense1, dense2 = {"kernel": jnp.zeros((5, 3)), "bias": jnp.zeros(3)}, {"kernel": jnp.zeros((3, 2))}
        >>> glue_jax.chain_spec({"dense1": dense1, "dense2": dense2}, ["dense1", "dense2"])
        {'dense1/bias': ('units0',), 'dense1/kernel': (None, 'units0'), 'dense2/kernel': ('units0', None)}
    """
    shapes = {path: np.shape(leaf) for path, leaf in _by_path(params).items()}
    spec: dict[str, tuple[Axis, ...]] = {}
    for index, layer in enumerate(layers):
        inputs = f"units{index - 1}" if index else None
        outputs = f"units{index}" if index < len(layers) - 1 else None
        paths = [path for path in shapes if re.search(layer, path)]
        if not paths:
            raise ValueError(f"the pattern {layer!r} is in no path; the paths are {list(shapes)}")
        for path in paths:
            axes = len(shapes[path])
            if path in spec or not axes:
                reason = "of an earlier layer, too" if path in spec else "without axes"
                raise ValueError(f"the pattern {layer!r} finds {path!r}, which is {reason}")
            spec[path] = (outputs,) if axes == 1 else (*[None] * (axes - 2), inputs, outputs)
    return spec


def permute(params: Params, spec: PermutationSpec, permutations: Mapping[str, np.ndarray]) -> Params:
    """Returns a model whose units changed places; it computes the same function.

    Args:
        params: one model.
        spec: what may be permuted.
        permutations: by name; those left out leave their units where they are.

    Raises:
        ValueError: a spec that does not fit the model, by path; a permutation that the spec does not name, or that is
            none.
    """
    layout = _Layout(spec, params)
    layout.check(permutations)
    by_path = {path: layout.permuted(path, leaf, permutations) for path, leaf in _by_path(params).items()}
    return jax.tree.map(by_path.__getitem__, leaf_paths(params))


def align(
    params: Params,
    reference: Params,
    spec: PermutationSpec,
    *,
    ignore: str | None = "^batch_stats/",
    seed: int = 0,
    max_sweeps: int = 100,
) -> Permutations:
    """Returns the permutations that bring a model's weights closest to a reference's (Algorithm 1).

    Coordinate ascent over the permutations in random order, each an assignment problem, until none improves. It ends in
    a local optimum, so it is begun twice, and the better end kept: from all units as they are, and from a first pass
    through the network, in which each permutation is matched by the weights whose other ends are in their places.

    Args:
        params: the model to permute.
        reference: of its structure and shapes.
        spec: what may be permuted.
        ignore: a regular expression for paths of leaves that are permuted and not compared: BatchNorm statistics.
        seed: of the order.
        max_sweeps: over all permutations.

    Returns:
        `permute(params, spec, permutations)` is close to `reference`.

    Raises:
        ValueError: a spec that does not fit the model, by path, or a reference of other leaves or shapes.
    """
    layout = _Layout(spec, reference)
    ours, theirs = _by_path(params), _by_path(reference)
    for path in ours.keys() | theirs.keys():
        shapes = [np.shape(leaves[path]) if path in leaves else "no leaf" for leaves in (ours, theirs)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"params has {shapes[0]} at {path!r}, and reference {shapes[1]}: expected the same")
    compared = [path for path in ours if not (ignore and re.search(ignore, path))]

    def match(name: str, permutations: Permutations, paths: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The inner products of each two units, all others being where the permutations put them; the assignment."""
        identity = np.arange(layout.sizes[name])
        gain = np.zeros((len(identity),) * 2)
        for path in paths:
            for axis, places in layout.places(path, name):
                moved = layout.permuted(
                    path,
                    ours[path],
                    {**permutations, name: identity},
                    elsewhere={name: permutations.get(name, identity)},
                    axis=axis,
                )
                gain += _units(theirs[path], axis, places) @ _units(moved, axis, places).T
        return gain, linear_sum_assignment(gain, maximize=True)[1]

    def first_pass() -> Permutations:
        permutations: Permutations = {}
        with_name = {name: [path for path in compared if layout.places(path, name)] for name in layout.sizes}

        def settled(name: str) -> list[str]:
            return [path for path in with_name[name] if layout.names(path) - {name} <= permutations.keys()]

        def share(name: str) -> float:
            weights = [sum(np.size(ours[path]) for path in paths) for paths in (settled(name), with_name[name])]
            return weights[0] / max(weights[1], 1)

        while remaining := sorted(layout.sizes.keys() - permutations.keys()):
            name = max(remaining, key=share)
            permutations[name] = match(name, permutations, settled(name) or with_name[name])[1]
        return permutations

    def ascend(permutations: Permutations) -> Permutations:
        order = np.random.default_rng(seed)
        for _ in range(max_sweeps):
            improved = False
            for name in order.permutation(sorted(permutations)):
                gain, found = match(name, permutations, compared)
                rows = np.arange(len(found))
                before, after = gain[rows, permutations[name]].sum(), gain[rows, found].sum()
                if after > before + 1e-6 * abs(before):
                    permutations[name], improved = found, True
            if not improved:
                break
        return permutations

    def closeness(permutations: Permutations) -> float:
        moved = {path: layout.permuted(path, ours[path], permutations) for path in compared}
        return sum(float(np.vdot(theirs[path], leaf)) for path, leaf in moved.items())

    as_they_are = {name: np.arange(size) for name, size in layout.sizes.items()}
    return max((ascend(start) for start in (as_they_are, first_pass())), key=closeness)


def align_experts(
    experts: Params,
    spec: PermutationSpec,
    *,
    reference: int | None = 0,
    ignore: str | None = "^batch_stats/",
    seed: int = 0,
    max_rounds: int = 20,
) -> Alignment:
    """Aligns K experts, to one of them or to one another.

    Args:
        experts: stacked, each leaf `[K, ...]`.
        spec: what may be permuted.
        reference: the expert that all others are aligned to. None goes on from the alignment to the first: each in turn
            to the mean of the others, round after round until none moves (Algorithm 3, MergeMany).
        ignore: as for `align`.
        seed: of the orders.
        max_rounds: of aligning each to the mean of the others.

    Raises:
        ValueError: a spec that does not fit, by path, or a reference that is no expert's number.
    """
    k = num_experts(experts)
    models = [jax.tree.map(lambda leaf, index=index: np.asarray(leaf[index]), experts) for index in range(k)]
    if reference is not None and reference not in range(k):
        raise ValueError(f"reference is {reference}; expected the number of one of {k} experts, or None")
    layout = _Layout(spec, models[0])
    total = [{name: np.arange(size) for name, size in layout.sizes.items()} for _ in models]

    def move(index: int, target: Params) -> bool:
        found = align(models[index], target, spec, ignore=ignore, seed=seed)
        moved = any((permutation != np.arange(len(permutation))).any() for permutation in found.values())
        if moved:
            models[index] = permute(models[index], spec, found)
            total[index] = {name: total[index][name][permutation] for name, permutation in found.items()}
        return moved

    for index in set(range(k)) - {reference or 0}:
        move(index, models[reference or 0])
    if reference is None and k > 1:
        order = np.random.default_rng(seed)
        for _ in range(max_rounds):
            moved = [move(index, _mean_of_others(models, index)) for index in order.permutation(k)]
            if not any(moved):
                break
    return Alignment(jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *models), total)


class _Layout:
    """Where the units of each permutation are on the axes of each leaf, checked against a model."""

    def __init__(self, spec: PermutationSpec, params: Params):
        """Refuses a spec that does not fit."""
        shapes = {path: np.shape(leaf) for path, leaf in _by_path(params).items()}
        self.sizes: dict[str, int] = {}
        self._places: dict[str, list[dict[str, np.ndarray]]] = {}
        for path, axes in spec.items():
            if path not in shapes:
                raise ValueError(f"the spec names {path!r}, where the model has no leaf; its paths are {list(shapes)}")
            if len(axes) != len(shapes[path]):
                raise ValueError(f"the spec has {len(axes)} axes for {path}, whose shape is {shapes[path]}")
            self._places[path] = [_places_on(path, axis, size) for axis, size in zip(axes, shapes[path], strict=True)]
            for places in self._places[path]:
                for name, found in places.items():
                    if self.sizes.setdefault(name, len(found)) != len(found):
                        raise ValueError(
                            f"permutation {name!r} has {len(found)} units at {path} and {self.sizes[name]} elsewhere"
                        )

    def check(self, permutations: Mapping[str, np.ndarray]) -> None:
        """Refuses what is no permutation of the spec's."""
        for name, permutation in permutations.items():
            if name not in self.sizes:
                raise ValueError(f"permutations has {name!r}; expected names of the spec, {sorted(self.sizes)}")
            if not np.array_equal(np.sort(permutation), np.arange(self.sizes[name])):
                raise ValueError(
                    f"permutation {name!r} is {np.asarray(permutation).tolist()}; expected each of 0 to "
                    f"{self.sizes[name] - 1} once"
                )

    def places(self, path: str, name: str) -> list[tuple[int, np.ndarray]]:
        """Axis and places of a permutation's units, for each axis of a leaf that they are on."""
        axes = self._places.get(path, [])
        return [(axis, places[name]) for axis, places in enumerate(axes) if name in places]

    def names(self, path: str) -> set[str]:
        """The permutations of a leaf."""
        return {name for places in self._places.get(path, []) for name in places}

    def permuted(
        self,
        path: str,
        leaf: Any,
        permutations: Mapping[str, np.ndarray],
        *,
        elsewhere: Mapping[str, np.ndarray] | None = None,
        axis: int | None = None,
    ) -> np.ndarray:
        """A leaf with its units moved; on all axes but `axis`, by those of `elsewhere` where it has them."""
        leaf = np.asarray(leaf)
        for number, places in enumerate(self._places.get(path, [])):
            chosen = permutations if elsewhere is None or number == axis else {**permutations, **elsewhere}
            index = np.arange(leaf.shape[number])
            for name, found in places.items():
                if name in chosen:
                    index[found] = found[chosen[name]]
            leaf = np.take(leaf, index, axis=number)
        return leaf


def _places_on(path: str, axis: Axis, size: int) -> dict[str, np.ndarray]:
    """The places of the units of each permutation along one axis."""
    if axis is None:
        return {}
    if isinstance(axis, str):
        return {axis: np.arange(size)}
    if sum(stop - start for _, start, stop in axis) != size:
        raise ValueError(f"the segments {axis} of the spec do not fill an axis of {path}, whose length is {size}")
    units: dict[str, dict[int, int]] = {}
    place = 0
    for name, start, stop in axis:
        units.setdefault(name, {}).update({unit: place + unit - start for unit in range(start, stop)})
        place += stop - start
    for name, found in units.items():
        if sorted(found) != list(range(len(found))):
            raise ValueError(f"the segments {axis} of the spec for {path} leave out units of {name!r}, or repeat them")
    return {name: np.array([found[unit] for unit in range(len(found))]) for name, found in units.items()}


def _units(leaf: Any, axis: int, places: np.ndarray) -> np.ndarray:
    """The weights of each unit, `[n, ...]` flattened to `[n, weights]`."""
    return np.moveaxis(np.asarray(leaf, np.float64), axis, 0)[places].reshape(len(places), -1)


def _by_path(params: Params) -> dict[str, Any]:
    """The leaves by their paths."""
    return dict(zip(jax.tree.leaves(leaf_paths(params)), jax.tree.leaves(params), strict=True))


def _mean_of_others(models: list[Params], index: int) -> Params:
    """The mean of all models but one."""
    others = [model for number, model in enumerate(models) if number != index]
    return jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *others)
