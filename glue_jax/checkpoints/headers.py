"""What the readers of all formats return, and the error if a library is missing."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np


class Header(NamedTuple):
    """What a checkpoint holds. The attributes are those of `glue_jax.checkpoints.Checkpoint`."""

    tensors: Mapping[str, jax.ShapeDtypeStruct]
    files: Mapping[str, Path]
    structure: Any
    metadata: Mapping[str, str]
    reader: Callable[[Sequence[str]], dict[str, np.ndarray]]


def library(name: str, advice: str = "pip install 'glue_jax[io]'") -> Any:
    """Imports a library that only one format needs.

    Raises:
        ImportError: if it is not installed; the error says how to install it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{name} cannot be imported ({error}): {advice}") from error


def within(tree: Any, subtree: str | None) -> Any:
    """Returns the part of nested dicts that the keys of `subtree`, joined by slashes, lead to.

    Raises:
        ValueError: if a key is missing; the error names the keys that are there.
    """
    for key in subtree.split("/") if subtree else ():
        if isinstance(tree, list | tuple):
            tree = {str(index): part for index, part in enumerate(tree)}
        if not isinstance(tree, Mapping) or key not in tree:
            keys = sorted(map(str, tree))[:10] if isinstance(tree, Mapping) else []
            raise ValueError(f"subtree is {subtree!r}, but there is no {key!r}; the keys there are {keys}")
        tree = tree[key]
    return tree
