"""Permutation specs: which axes of which leaves of a network may be permuted, as data.

A `PermutationSpec` names, for the path of each leaf (`glue_jax.paths`), the permutation of each of its axes. For a
network with two dense layers:

    spec = {"dense1/kernel": (None, "hidden"), "dense1/bias": ("hidden",), "dense2/kernel": ("hidden", None)}

`chain_spec` writes the spec of a plain chain of layers.

The units of one axis can belong to several permutations, as after a concatenation, or after a shortcut that pads with
zeros. Such an axis is a tuple of segments `(name, start, stop)`, in their order on the axis.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from glue_jax.checks import compiled
from glue_jax.paths import by_path
from glue_jax.types import Params

Segment: TypeAlias = tuple[str, int, int]
"""The units start to stop of a permutation, `(name, start, stop)`, as a part of an axis."""

Axis: TypeAlias = str | tuple[Segment, ...] | None
"""One axis of a leaf: the name of its permutation, a tuple of segments, or None if its units do not move."""

PermutationSpec: TypeAlias = Mapping[str, tuple[Axis, ...]]
"""For the path of each leaf, what is permuted along each axis. None means nothing, and so does a missing path."""

KernelLayout: TypeAlias = Literal["in_out", "out_in"]
"""The order of a kernel's axes: `in_out` as in Flax and Haiku, or `out_in` as in PyTorch and Equinox.

`in_out` has inputs and outputs on the last two axes. `out_in` has outputs and inputs on the first two axes.
"""


def chain_spec(params: Params, layers: Sequence[str], *, kernel_layout: KernelLayout | None = None) -> PermutationSpec:
    """Returns the spec of an MLP, or of a CNN without shortcuts. The units of each layer but the last may be permuted.

    Args:
        params: one model.
        layers: one regular expression for each layer, from input to output. It matches the paths of the layer's kernel,
            of its bias, and of the scales and statistics of a norm after it.
        kernel_layout: `in_out` for kernels `[..., inputs, outputs]`, as in Flax and Haiku, or `out_in` for `[outputs,
            inputs, ...]`, as in PyTorch and Equinox. None finds the layout from the shapes. You must give it if the
            shapes fit both, for example if all kernels are square. With the wrong layout, units change places but their
            weights do not, and the network computes another function.

    Returns:
        The spec of all leaves of these layers. The units of layer i are named `"units{i}"`.

    Raises:
        ValueError: if there are fewer than two layers.
        ValueError: if a pattern matches no path, or if two patterns match the same path.
        ValueError: if the shapes do not fit the layout, or if they fit both layouts and none is given.
        TypeError: if `layers` is one string.

    Examples:
        >>> import jax.numpy as jnp
        >>> import glue_jax
        >>> dense1, dense2 = {"kernel": jnp.zeros((5, 3)), "bias": jnp.zeros(3)}, {"kernel": jnp.zeros((3, 2))}
        >>> glue_jax.merging.chain_spec({"dense1": dense1, "dense2": dense2}, ["dense1", "dense2"])
        {'dense1/bias': ('units0',), 'dense1/kernel': (None, 'units0'), 'dense2/kernel': ('units0', None)}
    """
    if isinstance(layers, str):
        raise TypeError(f"layers is the string {layers!r}; expected a sequence of patterns, one for each layer")
    if kernel_layout is not None and kernel_layout not in get_args(KernelLayout):
        raise ValueError(f"kernel_layout is {kernel_layout!r}; expected one of {get_args(KernelLayout)}, or None")
    if len(layers) < 2:
        raise ValueError(f"layers is {list(layers)}; expected at least two: the last layer's units stay where they are")
    shapes = {path: np.shape(leaf) for path, leaf in by_path(params).items()}
    layer_of: dict[str, int] = {}
    for index, layer in enumerate(layers):
        expression = compiled("an entry of layers", layer)
        paths = [path for path in shapes if expression.search(path)]
        if not paths:
            raise ValueError(f"the pattern {layer!r} matches no path; the paths are {list(shapes)}")
        for path in paths:
            if path in layer_of:
                raise ValueError(f"the pattern {layer!r} matches {path!r}, which an earlier layer matches too")
            layer_of[path] = index

    specs, reasons = {}, {}
    for layout in get_args(KernelLayout) if kernel_layout is None else (kernel_layout,):
        spec = {
            path: _chain_axes(shapes[path], layout, index, is_last=index == len(layers) - 1)
            for path, index in layer_of.items()
        }
        try:
            Layout(spec, params)
            specs[layout] = spec
        except ValueError as error:
            reasons[layout] = str(error)
    if not specs:
        raise ValueError(
            "the layers are no chain of one model (stacked experts are several models): "
            + "; ".join(f"with kernel_layout {layout!r}, {reason}" for layout, reason in reasons.items())
        )
    if len(specs) > 1 and len({tuple(spec.items()) for spec in specs.values()}) > 1:
        raise ValueError(
            "the shapes fit both layouts of kernels: pass kernel_layout='in_out' (Flax and Haiku) or 'out_in' (PyTorch "
            f"and Equinox); the shapes are {[f'{path} {shapes[path]}' for path in layer_of]}"
        )
    return next(iter(specs.values()))


class Layout:
    """The places of each permutation's units on the axes of each leaf, checked against a model."""

    def __init__(self, spec: PermutationSpec, params: Params):
        """Refuses a spec that does not fit the model."""
        if not isinstance(spec, Mapping):
            raise TypeError(f"spec is a {type(spec).__name__}; expected a mapping from paths to axes (see chain_spec)")
        shapes = {path: np.shape(leaf) for path, leaf in by_path(params).items()}
        self.sizes: dict[str, int] = {}
        self._places: dict[str, list[dict[str, np.ndarray]]] = {}
        for path, axes in spec.items():
            if path not in shapes:
                raise ValueError(f"spec names {path!r}, but the model has no such leaf; its paths are {list(shapes)}")
            if len(axes) != len(shapes[path]):
                raise ValueError(f"spec has {len(axes)} axes for {path}; expected {len(shapes[path])}, {shapes[path]}")
            self._places[path] = [_places_on(path, axis, size) for axis, size in zip(axes, shapes[path], strict=True)]
            for places in self._places[path]:
                for name, found in places.items():
                    if self.sizes.setdefault(name, len(found)) != len(found):
                        raise ValueError(
                            f"permutation {name!r} has {len(found)} units at {path}, but {self.sizes[name]} elsewhere; "
                            "expected the same number"
                        )

    def check(self, permutations: Mapping[str, np.ndarray]) -> None:
        """Refuses a value that is no permutation of the spec."""
        if not isinstance(permutations, Mapping):
            raise TypeError(
                f"permutations is a {type(permutations).__name__}; expected a mapping from names to permutations, "
                "for one model"
            )
        for name, permutation in permutations.items():
            if name not in self.sizes:
                raise ValueError(f"permutations has {name!r}; expected names of the spec, {sorted(self.sizes)}")
            whole = np.issubdtype(np.asarray(permutation).dtype, np.integer)
            if not whole or not np.array_equal(np.sort(permutation), np.arange(self.sizes[name])):
                raise ValueError(
                    f"permutation {name!r} is {np.asarray(permutation).tolist()}; expected each of the integers 0 to "
                    f"{self.sizes[name] - 1} once"
                )

    def places(self, path: str, name: str) -> list[tuple[int, np.ndarray]]:
        """Returns, for each axis of a leaf that has units of a permutation, the axis and the places of these units."""
        axes = self._places.get(path, [])
        return [(axis, places[name]) for axis, places in enumerate(axes) if name in places]

    def names(self, path: str) -> set[str]:
        """Returns the names of a leaf's permutations."""
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
        """Returns a leaf with its units moved.

        Args:
            path: the path of the leaf.
            leaf: the leaf.
            permutations: the permutations by name.
            elsewhere: permutations that replace those of the same name on all axes but `axis`.
            axis: the axis that `elsewhere` leaves alone.
        """
        leaf = np.asarray(leaf)
        for number, places in enumerate(self._places.get(path, [])):
            chosen = permutations if elsewhere is None or number == axis else {**permutations, **elsewhere}
            index = np.arange(leaf.shape[number])
            for name, found in places.items():
                if name in chosen:
                    index[found] = found[chosen[name]]
            leaf = np.take(leaf, index, axis=number)
        return leaf


def _chain_axes(shape: tuple[int, ...], layout: KernelLayout, index: int, *, is_last: bool) -> tuple[Axis, ...]:
    """Returns the permutation of each axis of a leaf in a chain's layer."""
    inputs, outputs = f"units{index - 1}" if index else None, None if is_last else f"units{index}"
    others = [None] * (len(shape) - 2)
    if layout == "in_out":
        axes = (*others, inputs, outputs)
        return axes[len(axes) - len(shape) :]
    # The bias of a convolution is [outputs, 1, 1] in Equinox.
    is_bias = all(length == 1 for length in shape[1:])
    return (outputs, None if is_bias else inputs, *others)[: len(shape)]


def _places_on(path: str, axis: Axis, size: int) -> dict[str, np.ndarray]:
    """Returns the places of each permutation's units on one axis."""
    if axis is None:
        return {}
    if isinstance(axis, str):
        return {axis: np.arange(size)}
    if sum(stop - start for _, start, stop in axis) != size:
        raise ValueError(
            f"spec has the segments {axis} for {path}; expected segments that fill an axis of {size} units"
        )
    units: dict[str, dict[int, int]] = {}
    place = 0
    for name, start, stop in axis:
        units.setdefault(name, {}).update({unit: place + unit - start for unit in range(start, stop)})
        place += stop - start
    for name, found in units.items():
        if sorted(found) != list(range(len(found))):
            raise ValueError(f"spec has the segments {axis} for {path}; expected each unit of {name!r} exactly once")
    return {name: np.array([found[unit] for unit in range(len(found))]) for name, found in units.items()}
