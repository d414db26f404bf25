"""What may be permuted in a network, as data.

A `PermutationSpec` says for each leaf, by its path (`glue_jax.paths`), what runs along each of its axes. Of a network
with two dense layers:

    spec = {"dense1/kernel": (None, "hidden"), "dense1/bias": ("hidden",), "dense2/kernel": ("hidden", None)}

`chain_spec` writes it for a plain chain of layers.

An axis whose units belong to several permutations, as behind a concatenation or a shortcut that pads with zeros, is a
tuple of segments `(name, start, stop)` of them, in their order on the axis.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from glue_jax.checks import compiled
from glue_jax.paths import by_path
from glue_jax.types import Params

Segment: TypeAlias = tuple[str, int, int]
Axis: TypeAlias = str | tuple[Segment, ...] | None
PermutationSpec: TypeAlias = Mapping[str, tuple[Axis, ...]]
"""For each leaf's path, what is permuted along each of its axes; None, or a path left out, is nothing."""

KernelLayout: TypeAlias = Literal["in_out", "out_in"]
"""Where kernels have inputs and outputs: on their last two axes, as in Flax and Haiku, or, outputs first, on their
first two, as in PyTorch and Equinox."""


def chain_spec(params: Params, layers: Sequence[str], *, kernel_layout: KernelLayout | None = None) -> PermutationSpec:
    """Returns what may be permuted in an MLP, or in a CNN without shortcuts: the units of each layer but the last.

    Args:
        params: one model.
        layers: for each layer, from input to output, a regular expression for the paths of its leaves: its kernel,
            and what runs along its outputs, such as its bias, and the scales and the statistics of a norm behind it.
        kernel_layout: `in_out` for kernels `[..., inputs, outputs]`, as of Flax and Haiku, `out_in` for
            `[outputs, inputs, ...]`, as of PyTorch and Equinox. None finds it by the shapes. Where these allow both, as
            where all kernels are square, it must be given: in the wrong one, units change places and their weights
            do not, and the network computes something else.

    Returns:
        The spec of all leaves of these layers, with the units of the layer at index i as `"units{i}"`.

    Raises:
        ValueError: fewer than two layers, a pattern that is in no path, a path that two have, shapes that do not fit
            the layout, or that fit both where none is given.
        TypeError: one string in place of a sequence of patterns.

    Example:
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
            raise ValueError(f"the pattern {layer!r} is in no path; the paths are {list(shapes)}")
        for path in paths:
            if path in layer_of:
                raise ValueError(f"the pattern {layer!r} finds {path!r}, which is of an earlier layer, too")
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
            "the layers are no chain of one model (experts that are stacked are several): "
            + "; ".join(f"with kernel_layout {layout!r}, {reason}" for layout, reason in reasons.items())
        )
    if len(specs) > 1 and len({tuple(spec.items()) for spec in specs.values()}) > 1:
        raise ValueError(
            "the shapes fit both layouts of kernels: pass kernel_layout='in_out' (as Flax and Haiku have them) or "
            f"'out_in' (as PyTorch and Equinox); the shapes are {[f'{path} {shapes[path]}' for path in layer_of]}"
        )
    return next(iter(specs.values()))


class Layout:
    """Where the units of each permutation are on the axes of each leaf, checked against a model."""

    def __init__(self, spec: PermutationSpec, params: Params):
        """Refuses a spec that does not fit."""
        if not isinstance(spec, Mapping):
            raise TypeError(f"spec is a {type(spec).__name__}; expected a mapping from paths to axes (see chain_spec)")
        shapes = {path: np.shape(leaf) for path, leaf in by_path(params).items()}
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
        if not isinstance(permutations, Mapping):
            raise TypeError(
                f"permutations is a {type(permutations).__name__}; expected a mapping from names to permutations "
                "(those of one model)"
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


def _chain_axes(shape: tuple[int, ...], layout: KernelLayout, index: int, *, is_last: bool) -> tuple[Axis, ...]:
    """What runs along the axes of a leaf of a chain's layer."""
    inputs, outputs = f"units{index - 1}" if index else None, None if is_last else f"units{index}"
    others = [None] * (len(shape) - 2)
    if layout == "in_out":
        axes = (*others, inputs, outputs)
        return axes[len(axes) - len(shape) :]
    # The bias of a convolution is [outputs, 1, 1] in Equinox.
    is_bias = all(length == 1 for length in shape[1:])
    return (outputs, None if is_bias else inputs, *others)[: len(shape)]


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
