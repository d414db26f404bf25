"""Reads orbax checkpoints. It takes only the leaves that are asked for."""

import contextlib
import functools
import gc
import logging
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from glue_jax.checkpoints.headers import Header, library, within
from glue_jax.paths import by_path, leaf_paths, slashed

# Files that orbax writes beside the arrays. Older versions write only the second.
_MARKS = ("_CHECKPOINT_METADATA", "_METADATA")


def is_checkpoint(path: Path) -> bool:
    """Returns whether a folder is an orbax checkpoint."""
    return any((path / mark).is_file() for mark in _MARKS)


def read_header(files: Sequence[Path], subtree: str | None) -> Header:
    """Returns what one orbax checkpoint holds."""
    (path,) = files
    item, subtree = _item(path, subtree)
    with quiet(), plain(path) as readable:
        whole = _orbax().metadata(str(readable), checkpointable_name=item).metadata
    part = within(whole, subtree)
    for at, leaf in jax.tree_util.tree_leaves_with_path(part):
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            raise ValueError(f"{slashed(at)} is a {type(leaf).__name__}, no array; name the model's part by subtree")
    if hasattr(part, "shape"):
        raise ValueError(f"subtree is {subtree!r}, which is one array; expected a tree of arrays")
    tensors = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in by_path(part).items()}
    reader = functools.partial(_read, path, item, whole, subtree)
    return Header(tensors, dict.fromkeys(tensors, path), leaf_paths(part), {}, reader)


def save(path: Path, tree: Any) -> None:
    """Writes a pytree of arrays to a new folder."""
    with quiet(), plain(path) as writable:
        _orbax().save(str(writable), tree)


def _item(path: Path, subtree: str | None) -> tuple[str, str | None]:
    """Returns the name of a tree, and the rest of `subtree` inside this tree. A checkpoint may hold several trees."""
    items = sorted(folder.name for folder in path.iterdir() if (folder / _MARKS[1]).is_file())
    if len(items) < 2:
        return (items[0] if items else "AUTO"), subtree
    item, _, rest = (subtree or "").partition("/")
    if item not in items:
        raise ValueError(f"it holds the trees {items}, and subtree is {subtree!r}; expected the name of one of them")
    return item, rest or None


def _read(path: Path, item: str, whole: Any, subtree: str | None, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Reads some leaves. The request to orbax has `...` in place of each leaf that is not wanted."""
    prefix, wanted = f"{subtree}/" if subtree else "", set(names)

    def asked(at: tuple[Any, ...], leaf: Any) -> Any:
        name = slashed(at)
        is_wanted = name.startswith(prefix) and name.removeprefix(prefix) in wanted
        return np.empty(leaf.shape, leaf.dtype) if is_wanted else ...

    with quiet(), plain(path) as readable:
        abstract = jax.tree_util.tree_map_with_path(asked, whole)
        loaded = _orbax().load(str(readable), abstract, checkpointable_name=item)
    leaves = by_path(within(loaded, subtree))
    return {name: np.asarray(leaf) for name, leaf in leaves.items() if name in wanted}


def _orbax() -> Any:
    return library("orbax.checkpoint").v1


@contextlib.contextmanager
def plain(path: Path) -> Iterator[Path]:
    """Yields a path to the same place without `[`, `]` and backslashes, since orbax reads a path as a pattern."""
    path = path.absolute()
    if not set(str(path)) & set("[]\\"):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder) / "link"
        link.symlink_to(path.parent, target_is_directory=True)
        yield link / path.name


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences the threads of orbax and tensorstore, which print a traceback for each array after a failure.

    Some of it is printed later, when a task is collected or a write ends. So after a failure they stay silent.
    """
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels, hook = [logger.level for logger in loggers], sys.unraisablehook

    def without_closed_loops(unraisable: "sys.UnraisableHookArgs") -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    sys.unraisablehook = without_closed_loops
    try:
        yield
    except BaseException:
        gc.collect()
        raise
    sys.unraisablehook = hook
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
