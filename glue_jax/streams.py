"""The sources of `learn`'s minibatches: arrays, an iterator of batches, or a loader that each epoch reads anew."""

import functools
import operator
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from glue_jax.batches import epoch_batches, num_examples
from glue_jax.types import Batch, PyTree


def is_stream(data: Any) -> bool:
    """Returns whether data is read batch after batch: an iterator or a loader, not a pytree of arrays."""
    leaf = jax.tree_util.all_leaves([data])
    is_one = hasattr(data, "__array__") or isinstance(data, str | bytes | Mapping)
    return leaf and hasattr(data, "__iter__") and not is_one


def stream_batches(stream: Any) -> Iterator[Batch]:
    """Yields the batches of an iterator once, or of a loader epoch after epoch. It reads none in advance.

    The batches end with the iterator, or with an epoch that has none.
    """
    while True:
        some = False
        # Not `yield from`, because that would close the user's iterator, and a later call may continue it.
        for batch in stream:
            some = True
            yield as_arrays("a batch of data", batch)
        if not some or hasattr(stream, "__next__"):
            return


class ArrayBatches:
    """Minibatches of arrays `[N, ...]` from shuffled epochs: the same as those of `minibatch_indices`."""

    def __init__(self, key: jax.Array, data: Batch, batch_size: int):
        """Keeps the arrays where they are."""
        self._data, self._batch_size = data, batch_size
        n = num_examples("data", data)
        self._steps_per_epoch = n // batch_size
        # Two, because a chunk of steps may lie in two epochs.
        self._epoch = functools.lru_cache(2)(lambda epoch: np.asarray(_epoch_batches(key, epoch, n, batch_size)))

    def rows(self, first_step: int, num_steps: int) -> np.ndarray:
        """Returns the examples of consecutive minibatches, int32 `[S, B]`."""
        parts = []
        while num_steps:
            epoch, at = divmod(first_step, self._steps_per_epoch)
            parts.append(self._epoch(epoch)[at : at + num_steps])
            first_step, num_steps = first_step + len(parts[-1]), num_steps - len(parts[-1])
        return np.concatenate(parts)

    def batches(self, first_step: int) -> Iterator[Batch]:
        """Yields the minibatches from a step on, without end."""
        while True:
            yield _take(self._data, self.rows(first_step, 1)[0])
            first_step += 1


def as_arrays(name: str, tree: PyTree) -> PyTree:
    """Returns the tree with arrays of numbers as leaves. PyTorch tensors become NumPy arrays.

    It refuses a leaf that holds no numbers, or integers that JAX would change; the error names the path.
    """

    def array(path: tuple[Any, ...], leaf: Any) -> jax.Array | np.ndarray:
        if isinstance(leaf, jax.Array):
            return leaf
        where = f"{name}{jax.tree_util.keystr(path)}"
        if isinstance(leaf, Mapping):
            raise TypeError(f"{where} is a {type(leaf).__name__}, which JAX takes for a leaf; expected dict(...) of it")
        try:
            found = np.asarray(leaf)
        except Exception as error:
            raise TypeError(f"{where} is a {type(leaf).__name__}, which is no array for NumPy: {error}") from error
        if found.dtype.kind in "OSUMm":
            raise TypeError(
                f"{where} is a {type(leaf).__name__} with dtype {found.dtype}; expected an array of numbers"
            )
        stored = jax.dtypes.canonicalize_dtype(found.dtype)
        if found.dtype.kind in "iu" and stored != found.dtype and not np.array_equal(found.astype(stored), found):
            raise ValueError(f"{where} has {found.dtype} values that JAX's {stored} does not hold: leave it out")
        return found

    return jax.tree_util.tree_map_with_path(array, tree)


def check_validation_stream(stream: Any) -> None:
    """Refuses a stream that cannot be read at every validation."""
    name = type(stream).__name__
    if hasattr(stream, "__next__"):
        raise TypeError(
            f"validation_data is an iterator ({name}), which can be read once; expected arrays, or a loader that can "
            "be iterated anew at each validation"
        )
    if operator.length_hint(stream) >= sys.maxsize:
        raise ValueError(f"validation_data is a {name} without end; expected a loader that ends")


def stream_mean(value_fn: Callable[[Batch], jax.Array], stream: Any) -> float:
    """Returns the mean of `value_fn(batch)` over a loader's examples. Each batch is weighted by its size."""
    values, sizes = [], []
    for batch in stream:
        arrays = as_arrays("a batch of validation_data", batch)
        sizes.append(num_examples("a batch of validation_data", arrays))
        values.append(value_fn(arrays))
    if not sizes:
        raise ValueError(f"validation_data, a {type(stream).__name__}, gave no batch")
    return float(np.average(np.asarray(jax.device_get(values), np.float64), weights=sizes))


def check_same_kind(data: Batch, validation_data: Batch) -> None:
    """Refuses validation arrays that differ from the data in more than N; the error names the paths."""
    found, expected = (
        {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (validation_data, data)
    )

    def text(leaf: Any) -> str:
        return f"{leaf.dtype}{['N', *leaf.shape[1:]]}".replace("'", "")

    differences = [f"it has no {path}" for path in expected if path not in found]
    differences += [f"it has {path}, which data lacks" for path in found if path not in expected]
    differences += [
        f"at {path or 'the root'}: {text(found[path])} against {text(leaf)}"
        for path, leaf in expected.items()
        if path in found and text(found[path]) != text(leaf)
    ]
    if differences:
        raise ValueError(
            f"validation_data differs from data: {'; '.join(differences)} (without a validation_fn, loss_fn takes both)"
        )


_epoch_batches = jax.jit(epoch_batches, static_argnums=(2, 3))


@jax.jit
def _take(data: Batch, rows: jax.Array) -> Batch:
    """Returns one minibatch."""
    return jax.tree.map(lambda leaf: leaf[rows], data)
