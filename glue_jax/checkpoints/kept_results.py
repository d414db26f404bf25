"""Results of `learn` on disk, so that a stopped run goes on. They are arrays and names; reading them runs no code."""

import importlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from glue_jax.types import LearnResult

# The packages whose named tuples a state consists of.
_PACKAGES = ("glue_jax", "optax")


def place(out: Path) -> Path:
    """Returns where the results so far are kept of a run that will write to `out`."""
    return out.with_name(f"{out.name}.state.npz")


def save(path: Path, results: Mapping[str, LearnResult], about: Mapping[str, Any]) -> None:
    """Writes results by the names of their stages, whole or not at all.

    Args:
        path: the file, with the ending `.npz`.
        results: what to keep.
        about: what the results depend on, as JSON. `load` returns it.
    """
    arrays: dict[str, np.ndarray] = {}
    header = {"about": about, "results": {name: _encode(result, arrays) for name, result in results.items()}}
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            np.savez(file, allow_pickle=False, **{_HEADER: np.array(json.dumps(header))}, **arrays)
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(f"the results so far cannot be kept in {path}: {error}") from error


def load(path: Path) -> tuple[dict[str, LearnResult], dict[str, Any]]:
    """Reads what `save` wrote: the results, and what they depend on.

    Raises:
        ValueError: if the file is damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            header = json.loads(str(arrays[_HEADER]))
            return {name: _decode(of, arrays) for name, of in header["results"].items()}, header["about"]
    except Exception as error:
        # NumPy and zipfile have many errors for a damaged file.
        raise ValueError(f"{path} cannot be read ({type(error).__name__}: {error}); delete it to begin anew") from error


_HEADER = "header"


def _encode(node: Any, arrays: dict[str, np.ndarray]) -> Any:
    """Returns a tree as JSON, and puts its arrays into `arrays`."""
    if node is None:
        return None
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        kind = type(node)
        return {"type": [kind.__module__, kind.__qualname__], "fields": [_encode(each, arrays) for each in node]}
    if isinstance(node, tuple | list):
        return {"type": type(node).__name__, "fields": [_encode(each, arrays) for each in node]}
    if isinstance(node, dict):
        return {"type": "dict", "keys": list(node), "fields": [_encode(each, arrays) for each in node.values()]}
    name = f"array{len(arrays)}"
    arrays[name] = np.asarray(node)
    return name


def _decode(node: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    """Returns the tree that `_encode` got."""
    if node is None:
        return None
    if isinstance(node, str):
        return arrays[node]
    fields = [_decode(each, arrays) for each in node["fields"]]
    if node["type"] == "dict":
        return dict(zip(node["keys"], fields, strict=True))
    if isinstance(node["type"], str):
        return tuple(fields) if node["type"] == "tuple" else fields
    module, name = node["type"]
    if module.partition(".")[0] not in _PACKAGES:
        raise ValueError(f"{module} is none of {_PACKAGES}")
    kind = getattr(importlib.import_module(module), name)
    if not (issubclass(kind, tuple) and hasattr(kind, "_fields")):
        raise ValueError(f"{name} is no named tuple")
    return kind(*fields)
