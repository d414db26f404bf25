"""Reads state dicts of PyTorch, if PyTorch is installed. No code in the file can run."""

import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from glue_jax.checkpoints.headers import Header, library, within

SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
"""The endings of PyTorch's files. PyTorch Lightning writes the last."""


def read_header(files: Sequence[Path], subtree: str | None) -> Header:
    """Returns what some files of PyTorch hold together."""
    tensors, owner = {}, {}
    for file in files:
        for name, tensor in _load(file, subtree).items():
            if name in owner:
                raise ValueError(f"{name} is in {owner[name].name} and in {file.name}; expected one of them")
            tensors[name] = jax.ShapeDtypeStruct(tuple(tensor.shape), _dtype(name, tensor))
            owner[name] = file
    return Header(tensors, owner, {name: name for name in tensors}, {}, functools.partial(_read, owner, subtree))


def _read(owner: dict[str, Path], subtree: str | None, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Reads some tensors. Each file is opened once."""
    arrays = {}
    for file in dict.fromkeys(owner[name] for name in names):
        state = _load(file, subtree)
        arrays |= {name: to_numpy(state[name]) for name in names if owner[name] == file}
    return arrays


def to_numpy(tensor: Any) -> np.ndarray:
    """Returns a copy of a tensor of PyTorch as a NumPy array of the same dtype, bfloat16 included."""
    tensor = tensor.detach().cpu().contiguous()
    torch = library("torch")
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(jnp.bfloat16).copy()
    return tensor.numpy().copy()


def is_mapped(file: Path) -> bool:
    """Returns whether a file is in PyTorch's zip format, which can be mapped. Older files cannot."""
    with file.open("rb") as opened:
        return opened.read(2) == b"PK"


def _dtype(name: str, tensor: Any) -> Any:
    """Returns the NumPy dtype of a tensor."""
    torch = library("torch")
    if tensor.is_sparse or tensor.is_quantized:
        raise ValueError(f"{name} is a sparse or quantized tensor; expected a dense one")
    if tensor.dtype == torch.bfloat16:
        return jnp.bfloat16
    try:
        return torch.empty(0, dtype=tensor.dtype).numpy().dtype
    except TypeError:
        raise ValueError(f"{name} has dtype {tensor.dtype}; expected one that NumPy knows, or bfloat16") from None


def _load(file: Path, subtree: str | None) -> dict[str, Any]:
    """Returns the state dict of a file, whose tensors are mapped, not read."""
    torch = library("torch", "install PyTorch to read its files, or convert them to safetensors")
    try:
        loaded = torch.load(file, weights_only=True, mmap=is_mapped(file), map_location="cpu")
    except Exception as error:
        if found := re.search(r"GLOBAL (\S+)", str(error)):
            raise ValueError(
                f"{file.name} holds {found[1]}, and may hold code, which is not run; "
                "expected a state dict: torch.save(model.state_dict(), path). If you trust the file, "
                "torch.load(path, weights_only=False) reads it, and its state dict can be saved alone"
            ) from error
        raise
    state = within(loaded, subtree)
    if not isinstance(state, Mapping):
        raise ValueError(f"it holds a {type(state).__name__}; expected a state dict")
    if unnamed := [name for name in state if not isinstance(name, str)]:
        raise ValueError(f"it has the entry {unnamed[0]!r}; expected a state dict, whose keys are names")
    if wrong := sorted(str(name) for name, value in state.items() if not isinstance(value, torch.Tensor)):
        dicts = sorted(str(name) for name, value in state.items() if isinstance(value, Mapping))
        raise ValueError(
            f"its entries {wrong[:5]} are no tensors; expected a state dict"
            + (f". If the model is one of {dicts}, pass this name as subtree (--subtree)" if dicts else "")
        )
    return dict(state)
