"""The inputs of each linear layer of a network, as Gram matrices for `glue_jax.merging.regmean_merge`."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
from flax import nnx

from experiments.models.network import Variables
from glue_jax.merging.regmean import conv_gram, layer_gram
from glue_jax.paths import by_path

_LAYERS: tuple[type[Any], ...] = (nnx.Conv, nnx.Linear, nnx.LinearGeneral)


def input_grams(
    apply: Callable[[Variables, jax.Array], Any], variables: Variables, images: jax.Array
) -> dict[str, jax.Array]:
    """Returns the Gram matrix of the inputs of each linear layer and convolution of a network, in one forward pass.

    Grouped convolutions, for example depthwise ones, have no Gram matrix. The network computes as usual. During this
    pass, the inputs of each layer are read when the layer is called. The name of a layer is the path of its kernel in
    `variables`.

    Args:
        apply: `apply(variables, images)`, a forward pass of an NNX module made of `variables`.
        variables: the variables of the network.
        images: `[B, ...]`.

    Returns:
        The Gram matrices `[in, in]`, by the path of the kernel.
    """
    paths = {id(leaf): path for path, leaf in by_path(variables).items()}
    grams: dict[str, jax.Array] = {}

    def record(layer: Any, inputs: jax.Array) -> None:
        gram = _gram(layer, inputs)
        if gram is not None:
            path = paths[id(layer.kernel.get_raw_value())]
            # A layer may be called twice.
            grams[path] = grams[path] + gram if path in grams else gram

    with _calling_first(record):
        apply(variables, images)
    return grams


def _gram(layer: Any, inputs: jax.Array) -> jax.Array | None:
    """Returns the Gram matrix of one layer's inputs. Returns None if the layer is not one linear map."""
    if isinstance(layer, nnx.LinearGeneral):
        # Our networks contract the last axes.
        return layer_gram(inputs.reshape(*inputs.shape[: -len(layer.axis)], -1))
    if isinstance(layer, nnx.Linear):
        return layer_gram(inputs)
    if layer.feature_group_count > 1:
        return None
    return conv_gram(inputs, layer.kernel_shape, strides=layer.strides, padding=layer.padding)


@contextlib.contextmanager
def _calling_first(record: Callable[[Any, jax.Array], None]) -> Iterator[None]:
    """Lets each linear layer call `record(layer, inputs)` before it computes."""
    calls = {kind: kind.__call__ for kind in _LAYERS}

    def recording(call: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        def recorded(layer: Any, inputs: jax.Array, *arguments: Any, **words: Any) -> jax.Array:
            record(layer, inputs)
            return call(layer, inputs, *arguments, **words)

        return recorded

    try:
        for kind, call in calls.items():
            kind.__call__ = recording(call)
        yield
    finally:
        for kind, call in calls.items():
            kind.__call__ = call
