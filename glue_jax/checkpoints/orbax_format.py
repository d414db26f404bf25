"""Reads orbax checkpoints. It takes only the leaves that are asked for."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from glue_jax.checkpoints.headers import Header, library, within
from glue_jax.paths import leaf_paths, slashed

# Files that orbax writes beside the arrays. Older versions write only the second.
_MARKS = ("_CHECKPOINT_METADATA", "_METADATA")


def is_checkpoint(path: Path) -> bool:
    """Returns whether a folder is an orbax checkpoint."""
    return any((path / mark).is_file() for mark in _MARKS)


def read_header(files: Sequence[Path], subtree: str | None) -> Header:
    """Returns what one orbax checkpoint holds."""
    (path,) = files
    whole = _orbax().metadata(str(path.absolute())).metadata
    part = within(whole, subtree)
    for at, leaf in jax.tree_util.tree_leaves_with_path(part):
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            raise ValueError(f"{slashed(at)} is a {type(leaf).__name__}, no array; name the model's part by subtree")
    tensors = {slashed(at): jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for at, leaf in _leaves(part)}
    return Header(
        tensors, dict.fromkeys(tensors, path), leaf_paths(part), {}, functools.partial(_read, path, whole, subtree)
    )


def save(path: Path, tree: Any) -> None:
    """Writes a pytree of arrays to a new folder."""
    _orbax().save(str(path.absolute()), tree)


def _read(path: Path, whole: Any, subtree: str | None, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Reads some leaves. In what orbax is asked for, `...` stands for a leaf that is not wanted."""
    prefix, wanted = f"{subtree}/" if subtree else "", set(names)

    def asked(at: tuple[Any, ...], leaf: Any) -> Any:
        name = slashed(at)
        is_wanted = name.startswith(prefix) and name.removeprefix(prefix) in wanted
        return np.empty(leaf.shape, leaf.dtype) if is_wanted else ...

    loaded = _orbax().load(str(path.absolute()), jax.tree_util.tree_map_with_path(asked, whole))
    return {slashed(at): np.asarray(leaf) for at, leaf in _leaves(within(loaded, subtree)) if slashed(at) in wanted}


def _leaves(tree: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_leaves_with_path(tree)


def _orbax() -> Any:
    return library("orbax.checkpoint").v1
