"""Learning from several starts at once; the best by validation is kept."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from glue_jax.batches import batched_mean, num_examples
from glue_jax.blending import blend
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
        ValueError: as for `learn`; starts without a leading axis, or of different numbers.
        NonFiniteLossError: as for `learn`, of any start.
    """
    starts = jax.tree.map(jnp.asarray, starts)
    if isinstance(starts, jax.Array) and starts.ndim < 2:
        raise ValueError(f"starts have shape {starts.shape}; expected [S, K] or [S, ...], one beta for each start")
    if num_examples("starts", starts) < 1:
        raise ValueError("starts hold none: expected at least one")
    num_examples("validation_data", validation_data)
    batch_size = options.get("batch_size", 64)
    judge = _EachValue(validation_fn or loss_fn, batch_size)
    each: dict[str, Any] = {"link_fn": _EachLink(link_fn), "merge_fn": _EachMerge(merge_fn)}
    result = learn(
        key,
        experts,
        data,
        state=GlueState(step=jnp.zeros((), jnp.int32), beta=starts, opt_state=jax.vmap(optimizer.init)(starts)),
        loss_fn=loss_fn,
        optimizer=optimizer,
        step_fn=_EachStep(step_fn, link_fn, merge_fn),
        # One example, the whole of it: the lowest of means over all batches is no mean over batches.
        validation_data=jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], validation_data),
        validation_fn=_LowestValue(judge),
        **each,
        **options,
    )
    best = int(jnp.argmin(_values(experts, result.alpha, validation_data, judge=judge, merge_fn=each["merge_fn"])))
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

        states, metrics = _each(of_one, (state.beta, state.opt_state))
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
    """The value of each start's model on all data, `[S]`."""

    function: LossFn
    batch_size: int

    def __call__(self, models: Params, data: Batch, /) -> jax.Array:
        return _each(lambda params: batched_mean(self.function, params, data, self.batch_size), models)


class _LowestValue(NamedTuple):
    """The lowest value of the starts' models, on a batch of one example that holds all data."""

    values: _EachValue

    def __call__(self, models: Params, batch: Batch, /) -> jax.Array:
        return jnp.min(self.values(models, jax.tree.map(lambda leaf: leaf[0], batch)))


@functools.partial(jax.jit, static_argnames=("judge", "merge_fn"))
def _values(experts: Params, alpha: PyTree, data: Batch, *, judge: _EachValue, merge_fn: MergeFn) -> jax.Array:
    """The value of each start, `[S]`."""
    return judge(merge_fn(experts, alpha), data)


def _each(fun: Callable[[PyTree], Any], starts: PyTree) -> Any:
    """`fun` of each start, under `vmap`; on a CPU one after another, not in a loop, which runs convolutions slowly."""

    def one_after_another(starts: PyTree) -> Any:
        count = jax.tree.leaves(starts)[0].shape[0]
        results = [fun(jax.tree.map(lambda leaf, at=index: leaf[at], starts)) for index in range(count)]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *results)

    return jax.lax.platform_dependent(starts, cpu=one_after_another, default=jax.vmap(fun))
