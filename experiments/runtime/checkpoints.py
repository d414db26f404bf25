"""Pytrees of arrays on disk, by orbax."""

import errno
import glob
import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from experiments.runtime.stages import DamagedStageError
from glue_jax.checkpoints.orbax_format import plain, quiet


def save(path: Path, tree: Any) -> str:
    """Writes a pytree of arrays to a folder, whole or not at all.

    Args:
        path: the folder. Its parents are made. What is there is replaced.
        tree: any pytree of arrays.

    Returns:
        The checksum of the arrays, for `load`.

    Raises:
        OSError: if the disk has no room.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with quiet(), plain(path) as place:
            ocp.save(str(place), tree, overwrite=True)
    except (ValueError, OSError) as error:
        # It comes from tensorstore, or from orbax itself.
        if os.strerror(errno.ENOSPC) not in str(error):
            raise
        # The next attempt needs the room of what was written.
        for left in path.parent.glob(f"{glob.escape(path.name)}.orbax-checkpoint-tmp*"):
            shutil.rmtree(left, ignore_errors=True)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
    return checksum(tree)


def load(path: Path, like: Any, sharding: jax.sharding.Sharding | None = None, *, expected: str | None = None) -> Any:
    """Reads a pytree that `save` wrote.

    Args:
        path: the `path` of `save`.
        like: a pytree of the same structure. Its leaves are arrays or `jax.ShapeDtypeStruct`s.
        sharding: the place of the arrays. None is the first device.
        expected: what `save` returned. None checks nothing.

    Returns:
        The pytree, of arrays.

    Raises:
        DamagedStageError: if the folder cannot be read, or if its arrays are not those that were written.
    """
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), like)
    try:
        with quiet(), plain(path) as place:
            tree = ocp.load(str(place), abstract)
    except jax.errors.JaxRuntimeError:
        # This is an error of the device, for example too little memory.
        raise
    except Exception as error:
        # orbax and tensorstore have many errors for missing or wrong files.
        first_line = next(iter(str(error).splitlines()), "")
        raise DamagedStageError(path, f"{type(error).__name__}: {first_line[:200]}") from error
    if expected is not None and checksum(tree) != expected:
        raise DamagedStageError(path, "its arrays are not what was written: their checksums differ")
    return tree


def checksum(tree: Any) -> str:
    """Returns a digest of the paths, shapes, dtypes and numbers of a pytree."""
    found = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(leaf)
        found.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()
