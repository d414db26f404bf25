"""Pytrees of arrays on disk, by orbax; all that knows orbax's interface."""

from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp


def save(path: Path, tree: Any) -> None:
    """Writes a pytree of arrays to a folder, whole or not at all.

    Args:
        path: the folder, whose parents are made. What is there is replaced.
        tree: any pytree of arrays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    ocp.save(str(path.absolute()), tree, overwrite=True)


def load(path: Path, like: Any, sharding: jax.sharding.Sharding | None = None) -> Any:
    """Reads a pytree that `save` wrote.

    Args:
        path: what was given to `save`.
        like: a pytree of the same structure, of arrays or `jax.ShapeDtypeStruct`.
        sharding: where its arrays go; None is the first device.

    Returns:
        The pytree, of arrays.
    """
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), like)
    return ocp.load(str(path.absolute()), abstract)
