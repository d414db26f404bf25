"""Minibatches of arrays `[N, ...]` on the device, and means over them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from glue_jax.checks import check_callable, check_counts
from glue_jax.loops import loop
from glue_jax.types import Batch, Params, PyTree

__all__ = ["batched_mean", "minibatch_indices"]

# The most shapes that a message prints.
_MOST_SHAPES = 8


def minibatch_indices(
    key: jax.Array, first_step: int | jax.Array, num_steps: int, num_examples: int, batch_size: int
) -> jax.Array:
    """Returns the examples of consecutive minibatches from shuffled epochs.

    An epoch has N // B minibatches. Step s sees minibatch `s % (N // B)` of epoch `s // (N // B)`. The key and the
    number of the epoch decide its order, so a run can continue at any step.

    Args:
        key: a `jax.random.key`.
        first_step: the number of the first step, an integer of at least 0. It may be traced.
        num_steps: S, the number of steps.
        num_examples: N, the number of examples.
        batch_size: B, at most N.

    Returns:
        Indices of examples, int32 `[S, B]`.

    Raises:
        ValueError: if a count is below 1, if the first step is below 0, or if the batch size exceeds the number of
            examples.
        TypeError: if a count or the first step is no integer.
    """
    check_counts(num_steps=num_steps, num_examples=num_examples, batch_size=batch_size)
    if batch_size > num_examples:
        raise ValueError(f"batch_size is {batch_size}, but there are {num_examples} examples")
    steps_per_epoch = num_examples // batch_size
    # A traced first step could be the last of its epoch.
    offset = steps_per_epoch - 1
    if not isinstance(first_step, Tracer):
        check_counts(at_least=0, first_step=first_step)
        offset = int(first_step) % steps_per_epoch
    num_epochs = -(-(offset + num_steps) // steps_per_epoch)
    epochs = first_step // steps_per_epoch + jnp.arange(num_epochs)
    # Under vmap, keys of the kind rbg would draw other numbers.
    orders = jax.lax.map(lambda epoch: epoch_batches(key, epoch, num_examples, batch_size), epochs)
    return jax.lax.dynamic_slice_in_dim(orders.reshape(-1, batch_size), first_step % steps_per_epoch, num_steps)


def epoch_batches(key: jax.Array, epoch: int | jax.Array, num_examples: int, batch_size: int) -> jax.Array:
    """Returns the examples of all minibatches of one epoch, int32 `[N // B, B]`."""
    order = jax.random.permutation(jax.random.fold_in(key, epoch), num_examples)
    return order[: num_examples // batch_size * batch_size].reshape(-1, batch_size)


def batched_mean(fn: Callable[[Params, Batch], PyTree], params: Params, data: Batch, batch_size: int) -> PyTree:
    """Returns the mean of `fn(params, batch)` over all examples, computed batch after batch.

    Args:
        fn: `fn(params, batch)`, which returns a scalar or a pytree of scalars. Each scalar is a mean over the batch.
        params: a model.
        data: a pytree of arrays `[N, ...]`.
        batch_size: B, the number of examples in a batch. The last batch may be smaller; it is weighted by its size.

    Returns:
        The averaged value of `fn`, in at least float32.

    Raises:
        ValueError: if the arrays have different lengths, if the batch size is below 1, or if `fn` returns no scalars.
        TypeError: if the batch size is no integer, or if `data` holds no arrays.
    """
    check_callable(fn=fn)
    return mean_over_batches(lambda batch: _wide_scalars(fn(params, batch)), data, batch_size)


def mean_over_batches(means_of: Callable[[Batch], PyTree], data: Batch, batch_size: int) -> PyTree:
    """Returns the mean of arrays over all examples. `means_of` returns their means over one batch."""
    check_counts(batch_size=batch_size)
    n = num_examples("data", data)
    whole = n // batch_size
    covered = whole * batch_size
    parts = []
    if whole:
        batches = jax.tree.map(lambda a: a[:covered].reshape(whole, batch_size, *a.shape[1:]), data)
        means = jax.tree.map(lambda mean: jnp.mean(mean, axis=0), loop(means_of, batches))
        parts.append((covered, means))
    if covered < n:
        parts.append((n - covered, means_of(jax.tree.map(lambda a: a[covered:], data))))
    return jax.tree.map(
        lambda *means: sum(count * mean for (count, _), mean in zip(parts, means, strict=True)) / n,
        *(means for _, means in parts),
    )


def num_examples(name: str, data: Any) -> int:
    """Returns N, the length of the leading axis that all leaves share."""
    leaves = jax.tree_util.tree_leaves_with_path(data)
    if not leaves:
        raise ValueError(f"{name} holds no arrays: expected a pytree of arrays [N, ...]")
    for path, leaf in leaves:
        if not hasattr(leaf, "shape") and not hasattr(leaf, "__array__"):
            raise TypeError(
                f"{name}{jax.tree_util.keystr(path)} is a Python {type(leaf).__name__}; expected an array [N, ...] "
                "(np.asarray makes one of a list, and dict of a mapping a pytree)"
            )
    shapes = [(f"{name}{jax.tree_util.keystr(path)}", np.shape(leaf)) for path, leaf in leaves]
    if len({shape[:1] for _, shape in shapes}) > 1 or not all(shape and shape[0] for _, shape in shapes):
        # One path of each length comes first, so that the message shows the difference.
        first: dict[Any, Any] = {}
        for path, shape in shapes:
            first.setdefault(shape[:1], (path, shape))
        printed = dict(list(dict.fromkeys([*first.values(), *shapes]))[:_MOST_SHAPES])
        rest = f" and {len(shapes) - len(printed)} more" if len(shapes) > len(printed) else ""
        raise ValueError(f"{name} has shapes {printed}{rest}; expected one common leading axis N of at least 1")
    return shapes[0][1][0]


def on_cpu(tree: PyTree) -> bool:
    """Returns whether all arrays lie on CPUs."""
    return all(device.platform == "cpu" for leaf in jax.tree.leaves(tree) for device in leaf.devices())


def _wide_scalars(means: PyTree) -> PyTree:
    """Returns the scalars of a tree in at least float32, so that no mean is taken in half precision."""
    leaves = jax.tree.leaves(means)
    if not leaves or any(jnp.shape(leaf) != () for leaf in leaves):
        shapes = jax.tree.map(jnp.shape, means)
        raise ValueError(f"fn returned {shapes}; expected a scalar, or a pytree of scalars, each a mean over its batch")
    return jax.tree.map(lambda mean: jnp.asarray(mean, jnp.promote_types(jnp.result_type(mean), jnp.float32)), means)
