"""`load_experts`: experts from files as one stacked pytree, read one portion of tensors after another."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from glue_jax.checkpoints.formats import Checkpoint, PathLike, open_checkpoints
from glue_jax.checks import compiled
from glue_jax.experts import place_leaf
from glue_jax.paths import check_finite
from glue_jax.types import Params, PyTree

Rename: TypeAlias = Callable[[str], str]
"""A function from a tensor's name in the file to a path such as `"params/Dense_0/kernel"`."""

COUNTERS = r"num_batches_tracked$"
"""The counters of PyTorch's BatchNorm. They differ between experts, and nothing depends on them in evaluation mode."""

_MOST_DIFFERENCES = 5


def load_experts(
    paths: PathLike | Sequence[PathLike | Checkpoint],
    *,
    steps: Sequence[int] | None = None,
    last: int | None = None,
    subtree: str | None = None,
    take_first: str | Sequence[str] = (),
    rename: Rename | None = None,
    sharding: jax.sharding.Sharding | None = None,
) -> Params:
    """Reads K experts from files into one stacked pytree, for `glue_jax.learn` and `glue_jax.blend`.

    The headers are compared before any weight is read. Then the call reads the weights portion by portion. A portion
    has the same tensors of all experts: at most 32 MB of each expert, or one tensor if that is larger. So the call
    needs memory for the stacked experts and for one portion. There is one exception: files that were written by PyTorch
    before 1.6. PyTorch can only read such a file whole, even for its header. If one expert is such a file, all weights
    are one portion.

    Args:
        paths: the paths of K checkpoints, or open checkpoints. `open_checkpoint` lists the formats. A single path to
            one checkpoint gives one expert, K = 1. The folder of one training run of orbax gives an expert for each
            saved step.
        steps: the numbers of the saved steps that are read. With None, all are read.
        last: how many of the last saved steps are read.
        subtree: the part of each checkpoint that is the model, such as `"params"`.
        take_first: regular expressions for integer tensors that may differ. The first expert's are kept. The counters
            `num_batches_tracked` of PyTorch's BatchNorm need not be named.
        rename: `rename(name)` returns the path of a tensor in the result, such as `"params/Dense_0/kernel"`. It can
            also remove a prefix: `lambda name: name.removeprefix("module.")`. It renames only, and transposes nothing.
            None keeps the names.
        sharding: the place of each stacked tensor, as for `stack_experts`. With None it is JAX's default.

    Returns:
        The stacked experts, each leaf `[K, ...]`, in the dtypes of the files. For safetensors and PyTorch the tree is a
        flat dict of names. For orbax it is the tree of the checkpoint. With `rename` it is a dict of the new names. A
        new name with slashes stands for nested dicts.

    Raises:
        FileNotFoundError: if a path or a step does not exist.
        ValueError: if the experts differ in names, shapes or dtypes; the error names the first differences.
        ValueError: if a weight is infinite or NaN, or if the experts differ in an integer tensor that `take_first` does
            not name.
        ImportError: if a library for the format is not installed.

    Warns:
        UserWarning: if a tensor is float64. JAX stores it as float32 unless `jax_enable_x64` is set.
    """
    checkpoints = open_checkpoints(paths, steps=steps, last=last, subtree=subtree)
    kept = check_alike(checkpoints, take_first)
    to_tree = _to_tree(checkpoints[0], rename)
    leaves = {}
    for portion in portions_of(checkpoints):
        stacked = read_stacked(checkpoints, portion, kept)
        leaves |= {name: place_leaf(name, stacked.pop(name), sharding) for name in portion}
    return to_tree(leaves)


def portions_of(checkpoints: Sequence[Checkpoint], names: Iterable[str] | None = None) -> list[list[str]]:
    """Returns names of tensors, all by default, in portions that are small enough to be read at once.

    A file that must be read whole has one portion. Then that is the portion of all checkpoints.
    """
    names = list(checkpoints[0].tensors) if names is None else list(names)
    return min((list(each.portions(names)) for each in checkpoints), key=len)


def read_stacked(
    checkpoints: Sequence[Checkpoint], names: Sequence[str], kept: frozenset[str]
) -> dict[str, np.ndarray]:
    """Reads some tensors of all checkpoints, each `[K, ...]`. The arguments are those of `read_alike`.

    Raises:
        ValueError: as `read_alike`, or if a weight is infinite or NaN.
    """
    tensors = [(name, checkpoints[0].tensors[name]) for name in names]
    stacked = {name: _empty((len(checkpoints), *tensor.shape), tensor.dtype) for name, tensor in tensors}
    for index, arrays in enumerate(read_alike(checkpoints, names, kept)):
        check_finite(str(checkpoints[index].path), arrays)
        for name, array in arrays.items():
            stacked[name][index] = array
    return stacked


def read_alike(
    checkpoints: Sequence[Checkpoint], names: Sequence[str], kept: frozenset[str]
) -> Iterator[dict[str, np.ndarray]]:
    """Reads some tensors of one checkpoint after another, and checks them.

    Args:
        checkpoints: checkpoints that `check_alike` accepted.
        names: the names of the tensors.
        kept: what `check_alike` returned. Every checkpoint yields the first's.

    Raises:
        ValueError: if other integer tensors differ, or if a checkpoint cannot be read.
    """
    first = None
    for checkpoint in checkpoints:
        arrays = checkpoint.read(names)
        first = arrays if first is None else first
        for name, array in arrays.items():
            if name in kept:
                arrays[name] = first[name]
            elif not jnp.issubdtype(array.dtype, jnp.inexact) and not np.array_equal(array, first[name]):
                raise ValueError(
                    f"{checkpoint.path} has other values at {name} than {checkpoints[0].path}. Its dtype is "
                    f"{array.dtype}, and only floating-point tensors are averaged. To keep the first expert's, name it "
                    "in take_first"
                )
        first = {name: array for name, array in first.items() if not jnp.issubdtype(array.dtype, jnp.inexact)}
        yield arrays


def check_alike(checkpoints: Sequence[Checkpoint], take_first: str | Sequence[str] = ()) -> frozenset[str]:
    """Refuses checkpoints that cannot be blended, by their headers alone.

    Args:
        checkpoints: the checkpoints of K experts.
        take_first: the integer tensors that may differ.

    Returns:
        The names of the integer tensors that may differ. The blend takes those of the first expert.

    Raises:
        ValueError: if the checkpoints differ in names, shapes or dtypes, or if `take_first` matches no integer tensor.
    """
    first = checkpoints[0]
    for checkpoint in checkpoints:
        if adapter := next((name for name in checkpoint.tensors if ".lora_" in name), None):
            raise ValueError(
                f"{checkpoint.path} holds {adapter}, a factor of a LoRA adapter. Averages of factors are no blend of "
                "adapters; expected the folder of each adapter, for load_adapters"
            )
    for name, tensor in first.tensors.items():
        if jnp.issubdtype(tensor.dtype, jnp.floating) and tensor.dtype.itemsize < 2:
            raise ValueError(f"{first.path} holds {name} in {tensor.dtype}; expected at least 16 bits to blend")
    differences = [
        f"{other.path} against {first.path}: {text}"
        for other in checkpoints[1:]
        for text in differences_of(first.tensors, other.tensors)
    ]
    if differences:
        more = len(differences) - _MOST_DIFFERENCES
        listed = "; ".join(differences[:_MOST_DIFFERENCES]) + (f"; and {more} more" if more > 0 else "")
        raise ValueError(f"the experts do not fit together. {listed}")
    kept = {name for name in integers(first) if compiled("a pattern", COUNTERS).search(name)}
    for entry in (take_first,) if isinstance(take_first, str) else take_first:
        expression = compiled("an entry of take_first", entry)
        found = {name for name in first.tensors if expression.search(name)}
        if not found or found - set(integers(first)):
            raise ValueError(
                f"take_first has {entry!r}, which matches {sorted(found)[:5] or 'no tensor'}; expected integer "
                f"tensors, which here are {integers(first)[:5]}"
            )
        kept |= found
    return frozenset(kept)


def differences_of(
    first: Mapping[str, jax.ShapeDtypeStruct], other: Mapping[str, jax.ShapeDtypeStruct]
) -> Iterator[str]:
    """Yields the differences between the tensors of two checkpoints, one sentence each."""
    yield from (f"{name} is missing" for name in first if name not in other)
    yield from (f"{name} is unknown to the first" for name in other if name not in first)
    for name, tensor in other.items():
        if name in first and tensor.shape != first[name].shape:
            yield f"{name} has shape {tensor.shape} against {first[name].shape}"
        elif name in first and tensor.dtype != first[name].dtype:
            yield f"{name} has dtype {np.dtype(tensor.dtype)} against {np.dtype(first[name].dtype)}"


def integers(checkpoint: Checkpoint) -> list[str]:
    """Returns the names of the tensors that are not floating point. They are not averaged."""
    return [name for name, tensor in checkpoint.tensors.items() if not jnp.issubdtype(tensor.dtype, jnp.inexact)]


def nested(leaves: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Returns leaves by their paths, with keys joined by slashes, as nested dicts."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves:
        *above, last = path.split("/")
        node = tree
        for key in above:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                raise ValueError(f"rename gives {path!r}, but a part of this path is a tensor of its own")
        if last in node:
            raise ValueError(f"rename gives {path!r} twice, or gives a path within it; expected each path once")
        node[last] = leaf
    return tree


def _empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Returns an array at an address that is a multiple of 64, which JAX takes on a CPU without a copy."""
    count = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(count + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + count].view(dtype).reshape(shape)


def _to_tree(checkpoint: Checkpoint, rename: Rename | None) -> Callable[[dict[str, Any]], PyTree]:
    """Returns the function from the leaves by name to the tree of an expert. It checks `rename` first."""
    if rename is None:
        return lambda leaves: jax.tree.map(leaves.__getitem__, checkpoint.structure)
    paths = [(name, rename(name)) for name in checkpoint.tensors]
    for name, path in paths:
        if not isinstance(path, str) or not path:
            raise ValueError(f"rename({name!r}) returned {path!r}; expected a path, such as 'params/Dense_0/kernel'")
    nested((path, name) for name, path in paths)
    return lambda leaves: nested((path, leaves[name]) for name, path in paths)
