"""`inspect_experts`: do experts in files fit together, and are they related?"""

from collections.abc import Iterator, Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from glue_jax.checkpoints.formats import Checkpoint
from glue_jax.checkpoints.loading import check_alike, portions_of, read_stacked
from glue_jax.merging.groups import by_layer
from glue_jax.merging.similarity import Similarity, similarity_of_leaves
from glue_jax.paths import by_path

KERNELS = "all kernels"
"""The name of the group of all tensors with two or more axes."""


def inspect_experts(checkpoints: Sequence[Checkpoint], take_first: str | Sequence[str] = ()) -> Similarity:
    """Compares experts by their weights, a few tensors at a time.

    Args:
        checkpoints: at least two experts from `open_checkpoints`.
        take_first: as for `load_experts`.

    Returns:
        The similarity of each layer, and at the end that of all kernels together, under the name `all kernels`. A layer
        is a kernel with its bias, or a norm. A kernel is a tensor with two or more axes.

    Raises:
        ValueError: if there is one expert only, or if the experts do not fit together.
    """
    if len(checkpoints) < 2:
        raise ValueError(f"{len(checkpoints)} expert was given; expected at least two to compare")
    kept, k, first = check_alike(checkpoints, take_first), len(checkpoints), checkpoints[0]
    floating = {name: tensor for name, tensor in first.tensors.items() if jnp.issubdtype(tensor.dtype, jnp.floating)}
    if not any(len(tensor.shape) > 1 for tensor in floating.values()):
        raise ValueError(f"{first.path} has no kernel, a floating-point tensor with two or more axes, to compare")
    layers = _layers(floating)
    names = (*dict.fromkeys(layers.values()), KERNELS)

    def leaves() -> Iterator[tuple[int, np.ndarray, None]]:
        for portion in portions_of(checkpoints, floating):
            stacked = read_stacked(checkpoints, portion, kept)
            for name in portion:
                weights = stacked.pop(name)
                yield names.index(layers[name]), weights, None
                if weights.ndim > 2:
                    yield len(names) - 1, weights, None

    return similarity_of_leaves(names, k, leaves(), has_origin=False)


def _layers(tensors: Mapping[str, object]) -> dict[str, str]:
    """Returns the layer of each tensor, by its name."""
    try:
        groups = by_layer(dict(tensors))
    except ValueError:
        # No name contains a layer.
        return {name: name for name in tensors}
    return {name: groups.names[row] for name, row in by_path(groups.rows).items()}
