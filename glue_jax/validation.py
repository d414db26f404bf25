"""`make_judge`: the function that validates a beta by its unperturbed blend."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from glue_jax.batches import batched_mean
from glue_jax.blending import merge_for_learning
from glue_jax.streams import is_stream, stream_mean
from glue_jax.types import Batch, LinkFn, LossFn, MergeFn, Params, PyTree


def make_judge(
    experts: Params, data: Any, function: LossFn, functions: dict[str, Any], batch_size: int
) -> Callable[[PyTree], float] | None:
    """Returns a function that gives the validation value of a beta's unperturbed blend. Returns None without data."""
    blending = {name: functions[name] for name in ("link_fn", "merge_fn")}
    if data is None:
        return None
    if not is_stream(data):
        of_all = functools.partial(_validate, function=function, batch_size=batch_size, **blending)
        return lambda beta: float(of_all(beta, experts, data))

    def of_stream(beta: PyTree) -> float:
        params = _merged(beta, experts, **blending)
        return stream_mean(lambda batch: _value(params, batch, function=function), data)

    return of_stream


@functools.partial(jax.jit, static_argnames=("function", "link_fn", "merge_fn", "batch_size"))
def _validate(
    beta: PyTree,
    experts: Params,
    data: Batch,
    *,
    function: LossFn,
    link_fn: LinkFn,
    merge_fn: MergeFn,
    batch_size: int,
) -> jax.Array:
    """Returns the validation value of the unperturbed blend."""
    params = _merged(beta, experts, link_fn=link_fn, merge_fn=merge_fn)
    return batched_mean(lambda params, batch: _value(params, batch, function=function), params, data, batch_size)


@functools.partial(jax.jit, static_argnames=("link_fn", "merge_fn"))
def _merged(beta: PyTree, experts: Params, *, link_fn: LinkFn, merge_fn: MergeFn) -> Params:
    """Returns the unperturbed blend, in at least float32."""
    return merge_for_learning(merge_fn)(experts, link_fn(beta))


@functools.partial(jax.jit, static_argnames=("function",))
def _value(params: Params, batch: Batch, *, function: LossFn) -> jax.Array:
    """Returns the validation value on a batch. It must be a scalar."""
    value = function(params, batch)
    if not jax.tree_util.all_leaves([value]) or jnp.shape(value) != () or jnp.iscomplexobj(value):
        raise ValueError(
            f"validation returned shape {jax.tree.map(jnp.shape, value)}; expected a scalar, the mean over a batch, "
            "and no other values"
        )
    return jnp.asarray(value)
