"""What a JSON file of ours must look like."""

from types import UnionType
from typing import Any


def check_shape(found: Any, shape: Any, where: str) -> None:
    """Refuses what has not the types and the keys of a shape.

    Args:
        found: what a file holds.
        shape: a type, or a dict of shapes, or a list of one shape, which each of at least one entry has.
        where: what to call it.

    Raises:
        ValueError: with the place, and what is there.
    """
    kind = shape if isinstance(shape, type | UnionType) else type(shape)
    if not isinstance(found, kind):
        name = kind.__name__ if isinstance(kind, type) else kind
        raise ValueError(f"{where} is {found!r:.80}; expected {name}")
    if isinstance(shape, dict):
        for key, inner in shape.items():
            if key not in found:
                raise ValueError(f"{where} has no {key!r}")
            check_shape(found[key], inner, f"{where}[{key!r}]")
    if isinstance(shape, list):
        if not found:
            raise ValueError(f"{where} is empty; expected at least one entry")
        for index, entry in enumerate(found):
            check_shape(entry, shape[0], f"{where}[{index}]")
