"""Minibatches of data that lies on the device, a pytree of arrays `[N, ...]`."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from glue_jax.types import Batch, Params, PyTree


def minibatch_indices(
    key: jax.Array, first_step: int | jax.Array, num_steps: int, num_examples: int, batch_size: int
) -> jax.Array:
    """Returns the examples of consecutive minibatches from shuffled epochs.

    Step s sees minibatch `s % (N // B)` of epoch `s // (N // B)`; an epoch is a permutation that the key and the
    epoch's number decide, so that a window of steps may begin anywhere.

    Args:
        key: a `jax.random.key`.
        first_step: the first step's number; may be traced.
        num_steps: the number of steps, S.
        num_examples: N.
        batch_size: B, at most N.

    Returns:
        Indices into the examples, int32 `[S, B]`.

    Raises:
        ValueError: a count below 1, or a batch size above the number of examples.
    """
    check_counts(num_steps=num_steps, num_examples=num_examples, batch_size=batch_size)
    if batch_size > num_examples:
        raise ValueError(f"batch_size is {batch_size}, but there are {num_examples} examples")
    steps_per_epoch = num_examples // batch_size
    num_epochs = (num_steps + 2 * steps_per_epoch - 2) // steps_per_epoch
    epochs = first_step // steps_per_epoch + jnp.arange(num_epochs)

    def one_epoch(epoch: jax.Array) -> jax.Array:
        order = jax.random.permutation(jax.random.fold_in(key, epoch), num_examples)
        return order[: steps_per_epoch * batch_size].reshape(steps_per_epoch, batch_size)

    batches = jax.vmap(one_epoch)(epochs).reshape(-1, batch_size)
    return jax.lax.dynamic_slice_in_dim(batches, first_step % steps_per_epoch, num_steps)


def batched_mean(fn: Callable[[Params, Batch], PyTree], params: Params, data: Batch, batch_size: int) -> PyTree:
    """Returns the mean of `fn(params, batch)` over all examples, batch after batch.

    Args:
        fn: returns a scalar, or a pytree of scalars, each a mean over its batch.
        params: a model.
        data: a pytree of arrays `[N, ...]`.
        batch_size: B. A last batch of fewer than B examples counts by its size.

    Returns:
        What `fn` returns, averaged, in at least float32.

    Raises:
        ValueError: data of different lengths, or a batch size below 1.
    """
    check_counts(batch_size=batch_size)
    n = num_examples("data", data)
    whole = n // batch_size
    covered = whole * batch_size

    def average(means: PyTree) -> PyTree:
        return jax.tree.map(lambda mean: jnp.mean(mean, axis=0, dtype=_accumulator(mean)), means)

    parts = []
    if whole:
        batches = jax.tree.map(lambda a: a[:covered].reshape(whole, batch_size, *a.shape[1:]), data)
        parts.append((covered, average(jax.lax.map(functools.partial(fn, params), batches))))
    if covered < n:
        parts.append((n - covered, fn(params, jax.tree.map(lambda a: a[covered:], data))))
    return jax.tree.map(
        lambda *means: sum(count * mean for (count, _), mean in zip(parts, means, strict=True)) / n,
        *(means for _, means in parts),
    )


def num_examples(name: str, data: Any) -> int:
    """N, the leading axis that the data's leaves share."""
    leaves = jax.tree_util.tree_leaves_with_path(data)
    if not leaves:
        raise ValueError(f"{name} holds no arrays: expected a pytree of arrays [N, ...]")
    shapes = {f"{name}{jax.tree_util.keystr(path)}": np.shape(leaf) for path, leaf in leaves}
    if len({shape[:1] for shape in shapes.values()}) > 1 or not all(shape and shape[0] for shape in shapes.values()):
        raise ValueError(f"{name} has shapes {shapes}; expected one common leading axis N of at least 1")
    return next(iter(shapes.values()))[0]


def on_cpu(tree: PyTree) -> bool:
    """Whether all arrays lie on CPUs."""
    return all(device.platform == "cpu" for leaf in jax.tree.leaves(tree) for device in leaf.devices())


def check_counts(**counts: int | None) -> None:
    """Refuses counts below 1."""
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{name} is {count}; expected at least 1")


def _accumulator(array: jax.Array) -> Any:
    """The dtype that means of `array` are taken in."""
    return jnp.promote_types(array.dtype, jnp.float32)
