"""A Flax NNX module as pure functions of its variables."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

Variables: TypeAlias = dict[str, Any]
"""`{"params": ..., "batch_stats": ...}`, nested dicts of arrays. An expert is such a dict, and so is a blend."""


class Network(NamedTuple):
    """A network as pure functions.

    Attributes:
        init: `init(key) -> variables`.
        apply: `apply(variables, images) -> logits [B, classes]`. BatchNorm normalises by its running statistics.
        apply_training: `apply_training(variables, images) -> (logits, batch_stats)`. BatchNorm normalises by the
            minibatch. The returned statistics are the updated running statistics.
        apply_minibatch: `apply_minibatch(params, images) -> (logits, batch_stats)`. BatchNorm normalises by the
            minibatch. The returned statistics are those of the minibatch alone.
    """

    init: Callable[[jax.Array], Variables]
    apply: Callable[[Variables, jax.Array], jax.Array]
    apply_training: Callable[[Variables, jax.Array], tuple[jax.Array, Any]]
    apply_minibatch: Callable[[Any, jax.Array], tuple[jax.Array, Any]]


def as_functions(build: Callable[[nnx.Rngs], Any]) -> Network:
    """Returns the pure functions of the module that `build(rngs)` makes.

    Args:
        build: a function that makes a module. The module has only `nnx.Param` and `nnx.BatchStat` variables. It is
            called with images `[B, H, W, C]`.
    """
    abstract = nnx.eval_shape(lambda: build(nnx.Rngs(0)))

    def graph(*, use_running_average: bool) -> nnx.GraphDef[Any]:
        view = nnx.view(abstract, use_running_average=use_running_average, raise_if_not_found=False)
        return nnx.graphdef(view)

    evaluation, training = graph(use_running_average=True), graph(use_running_average=False)
    for _, module in nnx.iter_modules(abstract):
        if isinstance(module, nnx.BatchNorm):
            module.momentum = 0.0
    minibatch = graph(use_running_average=False)
    placeholders = nnx.to_pure_dict(nnx.state(abstract, nnx.BatchStat))

    def init(key: jax.Array) -> Variables:
        _, params, batch_stats = nnx.split(build(nnx.Rngs(params=key)), nnx.Param, nnx.BatchStat)
        return {"params": nnx.to_pure_dict(params), "batch_stats": nnx.to_pure_dict(batch_stats)}

    def apply(variables: Variables, images: jax.Array) -> jax.Array:
        if len(jax.tree.leaves(variables["batch_stats"])) < len(jax.tree.leaves(placeholders)):
            raise ValueError(
                "the variables have no BatchNorm statistics, as outside the experts' convex hull, where they are not "
                "blended: normalise by the minibatch (apply_minibatch), or estimate them "
                "(glue_jax.merging.refresh_statistics)"
            )
        return nnx.merge(evaluation, variables["params"], variables["batch_stats"])(images)

    def apply_training(variables: Variables, images: jax.Array) -> tuple[jax.Array, Any]:
        module = nnx.merge(training, variables["params"], variables["batch_stats"])
        logits = module(images)
        return logits, nnx.to_pure_dict(nnx.state(module, nnx.BatchStat))

    def apply_minibatch(params: Any, images: jax.Array) -> tuple[jax.Array, Any]:
        unknown = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), placeholders)
        module = nnx.merge(minibatch, params, unknown)
        logits = module(images)
        return logits, nnx.to_pure_dict(nnx.state(module, nnx.BatchStat))

    return Network(init, apply, apply_training, apply_minibatch)
