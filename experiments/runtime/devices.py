"""Several devices: every minibatch is sharded over them, all else is on each."""

from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding


def make_mesh() -> Mesh | None:
    """Returns the mesh of all devices, its one axis `batch`; None where there is just one."""
    if jax.device_count() == 1:
        return None
    return jax.make_mesh((jax.device_count(),), ("batch",), axis_types=(AxisType.Auto,))


def everywhere(mesh: Mesh | None) -> Sharding:
    """Returns the sharding of what each device holds whole."""
    return NamedSharding(mesh, PartitionSpec()) if mesh else SingleDeviceSharding(jax.devices()[0])


def put(tree: Any, mesh: Mesh | None) -> Any:
    """Returns a pytree of arrays, of any shapes, on the device, or whole on each.

    They are committed there, as arrays read from a checkpoint are: a program that is compiled for arrays that are not
    is compiled anew for those that are.
    """
    return jax.device_put(tree, everywhere(mesh))


def shard_batch(array: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Returns an array, under jit, whose leading axis is sharded over the devices, where they divide it."""
    if mesh is None or len(array) % mesh.size:
        return array
    return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, PartitionSpec("batch")))
