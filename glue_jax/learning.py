"""Learning the coefficients to the validation plateau."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from glue_jax.batches import batched_mean, check_counts, minibatch_indices, num_examples, on_cpu
from glue_jax.blending import blend
from glue_jax.experts import num_experts
from glue_jax.steps import init, spsa_step
from glue_jax.types import (
    Batch,
    GlueMetrics,
    GlueState,
    History,
    LearnResult,
    LinkFn,
    LossFn,
    MergeFn,
    Params,
    Progress,
    PyTree,
    StepFn,
)

# What a call's key is folded with, so that minibatches and directions share none.
_MINIBATCHES, _STEPS = range(2)


class NonFiniteLossError(FloatingPointError):
    """A loss, or the norm of its gradient, became infinite or not a number.

    Attributes:
        step: the step whose loss it was.
        value: what it was.
        result: the `LearnResult` up to the last chunk of steps before it.
    """

    def __init__(self, what: str, step: int, value: float, result: LearnResult):
        """Builds the message from its parts."""
        super().__init__(
            f"the {what} is {value} at step {step}: expected a finite number (a smaller learning rate may help)"
        )
        self.step, self.value, self.result = step, value, result


def learn(
    key: jax.Array,
    experts: Params,
    data: Batch,
    *,
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    state: GlueState | None = None,
    step_fn: StepFn = spsa_step,
    link_fn: LinkFn = jax.nn.softmax,
    merge_fn: MergeFn = blend,
    validation_data: Batch | None = None,
    validation_fn: LossFn | None = None,
    batch_size: int = 64,
    max_steps: int = 1000,
    validate_every: int = 50,
    patience: int | None = 10,
    callback: Callable[[Progress], None] | None = None,
) -> LearnResult:
    """Learns the coefficients by minibatches until validation stops improving (section 3.3 of the paper).

    The steps between two validations are one jitted `lax.scan` over minibatches of shuffled epochs (on a CPU a jitted
    step each: within a loop, XLA:CPU runs the backward pass of a convolution many times slower). An epoch leaves
    out the examples that fill no whole minibatch. The functions and the optimizer are static: build them once, and
    a second call compiles nothing.

    Args:
        key: a `jax.random.key`. It decides the minibatches, whatever the `step_fn`, and the directions.
        experts: stacked experts, each leaf `[K, ...]`.
        data: a pytree of arrays `[N, ...]`.
        loss_fn: `loss_fn(params, batch) -> scalar`, the mean over a batch of `data`.
        optimizer: of beta.
        state: where to go on from. The default is `init(K, optimizer)`: beta 0, under a softmax the uniform average.
            For `unconstrained`, start from `init(K, optimizer, beta=uniform(K))`.
        step_fn: the step, hence the estimator: `spsa_step`, `full_gradient_step`, `forward_gradient_step`, or a
            `functools.partial` of one, for instance with its `radius`.
        link_fn: `link_fn(beta) -> alpha`.
        merge_fn: `merge_fn(experts, alpha) -> params`.
        validation_data: a pytree of arrays `[M, ...]` that judges the unperturbed blend.
        validation_fn: `validation_fn(params, batch) -> scalar`, the mean over a batch, lower is better; the default
            is `loss_fn`.
        batch_size: examples in a minibatch, of `data` and of `validation_data`; a last smaller batch of the latter
            counts by its size.
        max_steps: the most steps of this call.
        validate_every: steps between two validations, and between two callbacks.
        patience: validations without a new best after which to stop; None never stops before `max_steps`.
        callback: called with a `Progress` after each chunk of `validate_every` steps.

    Returns:
        The best coefficients by validation, the last ones, and the history.

    Raises:
        ValueError: an argument out of its range, or data of different lengths, before any work.
        NonFiniteLossError: a loss or a gradient that is infinite or not a number.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> import glue_jax
        >>> experts = glue_jax.stack_experts([{"w": jnp.array(0.0)}, {"w": jnp.array(1.0)}])
        >>> data = 0.25 + 0.1 * jax.random.normal(jax.random.key(0), (512,))
        >>> result = glue_jax.learn(
        ...     jax.random.key(1),
        ...     experts,
        ...     data[:448],
        ...     loss_fn=lambda params, batch: jnp.mean((params["w"] - batch) ** 2),
        ...     optimizer=optax.adam(0.1),
        ...     validation_data=data[448:],
        ...     max_steps=100,
        ...     validate_every=10,
        ... )
        >>> bool(jnp.abs(result.alpha[1] - 0.25) < 0.05)
        True
    """
    check_counts(batch_size=batch_size, max_steps=max_steps, validate_every=validate_every, patience=patience)
    if batch_size > num_examples("data", data):
        raise ValueError(f"batch_size is {batch_size}, but data holds {num_examples('data', data)} examples")
    if validation_data is not None:
        num_examples("validation_data", validation_data)
    elif validation_fn is not None:
        raise ValueError("validation_fn was given without validation_data")
    k = num_experts(experts)
    experts, data, validation_data = jax.tree.map(jnp.asarray, (experts, data, validation_data))
    current = init(k, optimizer) if state is None else state
    current = _beside(current, (experts, data))
    first_step = int(current.step)
    blending: dict[str, Any] = {"link_fn": link_fn, "merge_fn": merge_fn}
    run = functools.partial(_run_steps, step_fn=step_fn, loss_fn=loss_fn, optimizer=optimizer, **blending)
    judge = functools.partial(_validate, function=validation_fn or loss_fn, batch_size=batch_size, **blending)
    chunks: list[GlueMetrics] = []
    validations: list[_Validation] = []

    def result() -> LearnResult:
        beta = min(validations, key=lambda validation: validation.value).beta if validations else current.beta
        return LearnResult(
            alpha=link_fn(beta),
            beta=beta,
            last_alpha=link_fn(current.beta),
            state=current,
            history=_history(chunks, validations),
        )

    def validate(step: int) -> None:
        if validation_data is None:
            return
        value = float(judge(current.beta, experts, validation_data))
        if not math.isfinite(value):
            raise NonFiniteLossError("validation value", step, value, result())
        validations.append(_Validation(step, value, current.beta))

    validate(first_step)
    done = 0
    while done < max_steps and (patience is None or _validations_since_best(validations) < patience):
        count = min(validate_every, max_steps - done)
        rows = _chunk_rows(
            jax.random.fold_in(key, _MINIBATCHES), current.step, validate_every, num_examples("data", data), batch_size
        )
        next_state, metrics = _run_chunk(run, jax.random.fold_in(key, _STEPS), current, experts, data, rows, count)
        for name in ("loss", "gradient_norm"):
            values = getattr(metrics, name)
            if (bad := np.argwhere(~np.isfinite(values))).size:
                raise NonFiniteLossError(name, first_step + done + int(bad[0][0]), float(values[*bad[0]]), result())
        current, done = next_state, done + count
        chunks.append(metrics)
        validate(first_step + done)
        if callback is not None:
            callback(
                Progress(
                    step=done,
                    max_steps=max_steps,
                    metrics=jax.tree.map(lambda leaf: leaf[-1], metrics),
                    validation_value=validations[-1].value if validations else None,
                    best_value=min(validation.value for validation in validations) if validations else None,
                )
            )
    return result()


_chunk_rows = jax.jit(minibatch_indices, static_argnums=(2, 3, 4))


def _beside(state: GlueState, trees: PyTree) -> GlueState:
    """The state where a step with these arrays returns it, if they have a place, so that no step compiles anew."""
    shardings = [leaf.sharding for leaf in jax.tree.leaves(trees) if leaf.committed]
    if not shardings:
        return state
    mesh = getattr(shardings[0], "mesh", None)
    return jax.device_put(state, NamedSharding(mesh, PartitionSpec()) if mesh else shardings[0])


@functools.partial(jax.jit, static_argnames=("step_fn", "loss_fn", "optimizer", "link_fn", "merge_fn"))
def _run_steps(
    key: jax.Array,
    state: GlueState,
    experts: Params,
    data: Batch,
    rows: jax.Array,
    count: jax.Array,
    *,
    step_fn: StepFn,
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    link_fn: LinkFn,
    merge_fn: MergeFn,
) -> tuple[GlueState, GlueMetrics]:
    """A step on each of the minibatches `rows` `[S, B]`, the first `count` of which count; metrics `[S]`.

    So a last shorter chunk compiles nothing.
    """

    def step(state: GlueState, at: tuple[jax.Array, jax.Array]) -> tuple[GlueState, GlueMetrics]:
        position, indices = at
        batch = jax.tree.map(lambda leaf: leaf[indices], data)
        next_state, metrics = step_fn(
            key,
            state,
            experts,
            batch,
            loss_fn=loss_fn,
            optimizer=optimizer,
            link_fn=link_fn,
            merge_fn=merge_fn,
        )
        return jax.tree.map(functools.partial(jnp.where, position < count), next_state, state), metrics

    positions = jnp.arange(len(rows))
    if len(rows) == 1:
        state, metrics = step(state, (positions[0], rows[0]))
        return state, jax.tree.map(lambda leaf: leaf[None], metrics)
    return jax.lax.scan(step, state, (positions, rows))


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
    """The validation value of the unperturbed blend."""
    value = batched_mean(function, merge_fn(experts, link_fn(beta)), data, batch_size)
    if jnp.shape(value) != ():
        raise ValueError(f"validation returned shape {jnp.shape(value)}; expected a scalar, the mean over a batch")
    return value


class _Validation(NamedTuple):
    """One judgement of the unperturbed blend."""

    step: int
    value: float
    beta: PyTree


def _validations_since_best(validations: list[_Validation]) -> int:
    """How many validations came after the best one."""
    values = [validation.value for validation in validations]
    return len(values) - 1 - values.index(min(values)) if values else 0


def _run_chunk(
    run: Callable[..., tuple[GlueState, GlueMetrics]],
    key: jax.Array,
    state: GlueState,
    experts: Params,
    data: Batch,
    rows: jax.Array,
    count: int,
) -> tuple[GlueState, GlueMetrics]:
    """A step on each of the first `count` minibatches, in one call or, on a CPU, in one each; metrics in NumPy."""
    parts = []
    if on_cpu(data):
        for indices in np.asarray(rows)[:count]:
            state, metrics = run(key, state, experts, data, indices[None], np.int32(1))
            parts.append(metrics)
    else:
        state, metrics = run(key, state, experts, data, rows, np.int32(count))
        parts.append(jax.tree.map(lambda leaf: leaf[:count], jax.device_get(metrics)))
    return state, _concatenated(jax.device_get(parts))


def _concatenated(parts: list[GlueMetrics]) -> GlueMetrics:
    """Metrics end to end."""
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def _history(chunks: list[GlueMetrics], validations: list[_Validation]) -> History:
    """The chunks end to end."""
    empty: Any = np.zeros((0,), np.float32)
    return History(
        metrics=_concatenated(chunks) if chunks else GlueMetrics(empty, empty, empty, None),
        validation_steps=np.array([validation.step for validation in validations], np.int64),
        validation_values=np.array([validation.value for validation in validations], np.float64),
    )
