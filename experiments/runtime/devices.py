"""Several devices: each minibatch is sharded over the devices, and each device holds everything else."""

from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding


def make_mesh() -> Mesh | None:
    """Returns the mesh of all devices, with the one axis `batch`. Returns None for a single device."""
    if jax.device_count() == 1:
        return None
    return jax.make_mesh((jax.device_count(),), ("batch",), axis_types=(AxisType.Auto,))


def everywhere(mesh: Mesh | None) -> Sharding:
    """Returns the sharding of arrays that each device holds whole."""
    return NamedSharding(mesh, PartitionSpec()) if mesh else SingleDeviceSharding(jax.devices()[0])


def put(tree: Any, mesh: Mesh | None) -> Any:
    """Returns a pytree of arrays of any shapes on the device, or whole on each device.

    The arrays are committed there, like arrays that are read from a checkpoint. Otherwise a program that was compiled
    for uncommitted arrays would be compiled anew for committed ones.
    """
    return jax.device_put(tree, everywhere(mesh))


def shard_batch(array: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Returns an array, under jit. Its leading axis is sharded over the devices if their number divides its length."""
    if mesh is None or len(array) % mesh.size:
        return array
    return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, PartitionSpec("batch")))
