"""Reads safetensors files. It takes only the bytes that are asked for."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from glue_jax.checkpoints.headers import Header, library

_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
    "C64": np.complex64,
}


def read_header(files: Sequence[Path], subtree: str | None) -> Header:
    """Returns what some safetensors files hold together."""
    if subtree is not None:
        raise ValueError(f"subtree is {subtree!r}, but a safetensors file is flat; expected None")
    tensors, owner, metadata = {}, {}, {}
    for file in files:
        with _open(file) as opened:
            metadata |= opened.metadata() or {}
            for name in opened.keys():  # noqa: SIM118 - a safetensors file is no dict.
                if name in owner:
                    raise ValueError(f"{name} is in {owner[name].name} and in {file.name}; expected one of them")
                view = opened.get_slice(name)
                dtype = _DTYPES.get(view.get_dtype())
                if dtype is None:
                    raise ValueError(f"{name} has dtype {view.get_dtype()}; expected one of {', '.join(_DTYPES)}")
                tensors[name] = jax.ShapeDtypeStruct(tuple(view.get_shape()), dtype)
                owner[name] = file
    return Header(tensors, owner, {name: name for name in tensors}, metadata, functools.partial(_read, owner))


def _read(owner: dict[str, Path], names: Sequence[str]) -> dict[str, np.ndarray]:
    """Reads some tensors. Each file is opened once."""
    arrays = {}
    for file in dict.fromkeys(owner[name] for name in names):
        with _open(file) as opened:
            arrays |= {name: opened.get_tensor(name) for name in names if owner[name] == file}
    return arrays


def _open(file: Path) -> Any:
    """Opens a file. A mapped file would stay in memory, so the bytes are read."""
    return library("safetensors").safe_open(file, framework="np", backend="pread")
