"""Learning from several starts at once; the best by validation is kept."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from glue_jax.batches import batched_mean
from glue_jax.estimators import map_probes
from glue_jax.experts import blend
from glue_jax.learning import learn
from glue_jax.steps import spsa_step
from glue_jax.types import (
    Batch,
    GlueMetrics,
    GlueState,
    LearnResult,
    LinkFn,
    LossFn,
    MergeFn,
    Params,
    PyTree,
    StepFn,
)


def learn_from_starts(
    key: jax.Array,
    experts: Params,
    data: Batch,
    *,
    starts: PyTree,
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    validation_data: Batch,
    validation_fn: LossFn | None = None,
    step_fn: StepFn = spsa_step,
    link_fn: LinkFn = jax.nn.softmax,
    merge_fn: MergeFn = blend,
    **options: Any,
) -> LearnResult:
    """Learns from S starts on the same minibatches, and returns the one that comes to the best validation.

    All at once under `vmap` where the program is lowered for an accelerator, one after another within a step on a CPU.
    It goes on while any of them improves on the best of all.

    Args:
        key: as for `learn`; all starts share it, their minibatches and their directions.
        experts: as for `learn`.
        data: as for `learn`.
        starts: beta of each, leaves `[S, ...]`; `jnp.stack([weights_to_logits(w) for w in ...])`, for instance.
        loss_fn: as for `learn`.
        optimizer: as for `learn`.
        validation_data: as for `learn`.
        validation_fn: as for `learn`.
        step_fn: as for `learn`.
        link_fn: as for `learn`.
        merge_fn: as for `learn`.
        **options: `learn`'s others: `batch_size`, `max_steps`, `validate_every`, `patience`, `callback`.

    Returns:
        As `learn` does, of the best start; the history's metrics are of all, `[steps, S, ...]`, and its validation
        values the lowest of them.

    Raises:
        ValueError: as for `learn`.
        NonFiniteLossError: as for `learn`, of any start.
    """
    judge = _EachValue(validation_fn or loss_fn)
    each: dict[str, Any] = {"link_fn": _EachLink(link_fn), "merge_fn": _EachMerge(merge_fn)}
    starts = jax.tree.map(jnp.asarray, starts)
    result = learn(
        key,
        experts,
        data,
        state=GlueState(step=jnp.zeros((), jnp.int32), beta=starts, opt_state=jax.vmap(optimizer.init)(starts)),
        loss_fn=loss_fn,
        optimizer=optimizer,
        step_fn=_EachStep(step_fn, link_fn, merge_fn),
        validation_data=validation_data,
        validation_fn=judge,
        **each,
        **options,
    )
    models = each["merge_fn"](experts, result.alpha)
    values = batched_mean(judge, models, validation_data, options.get("batch_size", 64))
    best = int(jnp.argmin(values))
    return jax.tree.map(lambda leaf: leaf[best], result._replace(state=(), history=()))._replace(
        state=result.state._replace(
            beta=jax.tree.map(lambda leaf: leaf[best], result.state.beta),
            opt_state=jax.tree.map(lambda leaf: leaf[best], result.state.opt_state),
        ),
        history=result.history,
    )


class _EachStep(NamedTuple):
    """A step of each start. As the others, equal where its functions are, so that nothing is compiled twice."""

    step_fn: StepFn
    link_fn: LinkFn
    merge_fn: MergeFn

    def __call__(
        self, key: jax.Array, state: GlueState, experts: Params, batch: Batch, /, **words: Any
    ) -> tuple[GlueState, GlueMetrics]:
        words |= {"link_fn": self.link_fn, "merge_fn": self.merge_fn}

        def of_one(start: tuple[PyTree, optax.OptState]) -> tuple[GlueState, GlueMetrics]:
            beta, opt_state = start
            return self.step_fn(key, GlueState(state.step, beta, opt_state), experts, batch, **words)

        states, metrics = map_probes(of_one, (state.beta, state.opt_state), None)
        return GlueState(state.step + 1, states.beta, states.opt_state), metrics


class _EachLink(NamedTuple):
    """The coefficients of each start."""

    link_fn: LinkFn

    def __call__(self, beta: PyTree, /) -> PyTree:
        return jax.vmap(self.link_fn)(beta)


class _EachMerge(NamedTuple):
    """The model of each start, leaves `[S, ...]`."""

    merge_fn: MergeFn

    def __call__(self, experts: Params, alpha: PyTree, /) -> Params:
        return jax.vmap(self.merge_fn, in_axes=(None, 0))(experts, alpha)


class _EachValue(NamedTuple):
    """The value of each start's model, `[S]`."""

    function: LossFn

    def __call__(self, models: Params, batch: Batch, /) -> jax.Array:
        return map_probes(lambda params: self.function(params, batch), models, None)
