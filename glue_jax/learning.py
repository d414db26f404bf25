"""Learning the coefficients to the validation plateau."""

import contextlib
import functools
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from glue_jax import arguments
from glue_jax.batches import on_cpu
from glue_jax.blending import blend
from glue_jax.checks import check_optimizer, check_state
from glue_jax.experts import num_experts
from glue_jax.failures import NonFiniteLossError
from glue_jax.runs import MOST_UNREAD, Run
from glue_jax.steps import init, spsa_step
from glue_jax.streams import ArrayBatches, is_stream, stream_batches
from glue_jax.types import (
    Batch,
    GlueMetrics,
    GlueState,
    LearnResult,
    LinkFn,
    LossFn,
    MergeFn,
    Params,
    Progress,
    PyTree,
    StepFn,
)
from glue_jax.validation import make_judge

__all__ = ["NonFiniteLossError", "learn"]

# What a call's key is folded with, so that minibatches and directions share none.
_MINIBATCHES, _STEPS = range(2)
_STATIC = ("step_fn", "loss_fn", "optimizer", "link_fn", "merge_fn")


def learn(
    key: jax.Array,
    experts: Params,
    data: Batch | Iterable[Batch],
    *,
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation | None = None,
    state: GlueState | LearnResult | None = None,
    step_fn: StepFn = spsa_step,
    link_fn: LinkFn = jax.nn.softmax,
    merge_fn: MergeFn = blend,
    validation_data: Batch | Iterable[Batch] | None = None,
    validation_fn: LossFn | None = None,
    batch_size: int = arguments.BATCH_SIZE,
    validation_batch_size: int | None = None,
    max_steps: int = 1000,
    validate_every: int | None = None,
    patience: int | None = arguments.PATIENCE,
    steps_per_call: int | None = None,
    callback: Callable[[Progress], bool | None] | None = None,
) -> LearnResult:
    """Learns the coefficients by minibatches until validation stops improving (section 3.3 of the paper).

    The functions and the optimizer are static: build them once, and a second call compiles nothing. (A variable that a
    function reads from outside is read when it compiles: where the variable changes, give a new function.)

    An exception that ends a run, Ctrl-C's too, has a `LearnResult` of what was learned before it as its attribute
    `result` (in a notebook `sys.last_value.result`).

    Args:
        key: a `jax.random.key`. It decides the minibatches of arrays, whatever the `step_fn`, and the directions.
        experts: stacked experts, each leaf `[K, ...]`. With a `state` and a `merge_fn` that knows them, other leaves
            may be among them, such as the base that adapters share.
        data: a pytree of arrays `[N, ...]`, whose minibatches are those of
            `minibatch_indices(jax.random.fold_in(key, 0), ...)` (an epoch leaves out the examples that fill no whole
            minibatch); or an iterator of batches, read once, which may end before `max_steps` and then ends the run;
            or a loader, each epoch a new iteration of it, which may be endless. A batch of a new shape compiles anew.
            A list is a pytree: for a list of batches pass `iter(batches)`.
        loss_fn: `loss_fn(params, batch) -> scalar`, the mean over a batch of `data`. The params are at least float32,
            whatever the experts' dtype.
        optimizer: of beta. None is for `gauss_newton_step`, which has none.
        state: where to go on from. The default is `init(K, optimizer, link_fn=link_fn)`: the link's own start. From a
            `LearnResult`, learning goes on with its best coefficients, its patience and its history: stopped runs
            return what one long run returns. (If `max_steps` stopped a run between two validations, the run was
            validated there once more, and these coefficients are kept if they are the best.) An iterator goes on
            where it is, a loader begins an epoch.
        step_fn: the step, hence the estimator: `spsa_step`, `gauss_newton_step`, `full_gradient_step`,
            `forward_gradient_step`, or a `functools.partial` of one, for instance with its `radius`.
        link_fn: `link_fn(beta) -> alpha`.
        merge_fn: `merge_fn(experts, alpha) -> params`.
        validation_data: what judges the unperturbed blend: arrays `[M, ...]`, or a loader that ends, each of whose
            batches counts by its size.
        validation_fn: `validation_fn(params, batch) -> scalar`, the mean over a batch, lower is better; the default
            is `loss_fn`.
        batch_size: examples in a minibatch of arrays.
        validation_batch_size: the same for validation; the default is `batch_size`. A last smaller batch counts by its
            size.
        max_steps: the most steps of this call.
        validate_every: steps between two validations, and between two callbacks. None is 50, and 5 for
            `gauss_newton_step`.
        patience: validations without a new best after which to stop; None never stops before `max_steps`.
        steps_per_call: the most steps in one call of a compiled program. The default is 1 where the data lies on a
            CPU (in a loop, XLA:CPU runs the backward pass of a convolution many times slower) or is read batch after
            batch, elsewhere all between two validations, at most 1000.
        callback: called with a `Progress` after each chunk of `validate_every` steps. If it returns True, the run ends.
            (The `update` of a tqdm bar returns True at times: do not return it.)

    Returns:
        The best coefficients by validation, the last ones, and the history.

    Raises:
        ValueError: an argument out of its range, data of different lengths, validation data of another kind than
            data, before any work; a validation or a loss that is no scalar.
        TypeError: an argument of another type.
        NonFiniteLossError: a loss, a gradient, a validation value or beta that is infinite or not a number.

    Warns:
        UserWarning: the first gradients are all exactly 0, or `state` is a result that had run out of patience.

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
    functions: dict[str, Any] = {"step_fn": step_fn, "loss_fn": loss_fn, "link_fn": link_fn, "merge_fn": merge_fn}
    functions |= {} if optimizer is None else {"optimizer": optimizer}
    arguments.check_functions(functions, callback=callback, validation_fn=validation_fn)
    validate_every = arguments.validate_every_of(step_fn) if validate_every is None else validate_every
    arguments.check_key_and_trees(key, experts, data, validation_data, state)
    arguments.check_numbers(max_steps, validate_every, batch_size, validation_batch_size, patience, steps_per_call)
    data = arguments.checked_data(data, batch_size, steps_per_call)
    validation_data = arguments.checked_validation(
        validation_data, data, validation_fn, patience, validation_batch_size
    )
    experts = jax.tree.map(jnp.asarray, experts)
    run = _begin(state, experts, data, validation_data, functions, validate_every)
    steps = _steps(key, experts, data, functions, run.step, batch_size, steps_per_call, min(validate_every, max_steps))
    if run.out_of_patience(patience):
        warnings.warn(
            "state is a result that had run out of patience, so no step is taken: pass a larger patience, or None, or "
            "state=result.state, which begins anew from its last coefficients",
            stacklevel=2,
        )
    judge = make_judge(
        experts, validation_data, validation_fn or loss_fn, functions, validation_batch_size or batch_size
    )
    try:
        if judge and run.validation_is_due(validate_every):
            run.validated(judge(run.state.beta))
        while (left := max_steps - run.taken) and not run.out_of_patience(patience):
            wanted, before = min(left, validate_every - run.steps_of_run % validate_every), run.taken
            for call in steps(run, wanted):
                run.add(*call)
            run.read()
            if run.taken == before:
                break
            run.warn_if_flat(max_steps)
            if judge:
                run.validated(judge(run.state.beta))
            if (callback and _says_stop(callback(run.progress(max_steps)))) or run.taken < before + wanted:
                break
        if not run.taken and not run.out_of_patience(patience):
            raise ValueError(f"data, a {type(data).__name__}, gave no batch: an iterator can be read once")
    except BaseException as error:
        _keep_result(error, run, experts)
        raise
    return run.result()


def _begin(
    state: GlueState | LearnResult | None,
    experts: Params,
    data: Any,
    validation_data: Any,
    functions: dict[str, Any],
    validate_every: int,
) -> Run:
    """The run before this call's first step."""
    optimizer = functions.get("optimizer")
    before = state if isinstance(state, LearnResult) else None
    if before is not None and len(before.history.validation_steps) and validation_data is None:
        raise ValueError(
            "state is a LearnResult with validations, but there is no validation_data: pass the same again, or "
            "state=result.state"
        )
    if state is None:
        try:
            state = init(num_experts(experts), optimizer, link_fn=functions["link_fn"])
        except ValueError as error:
            raise ValueError(
                f"{error}. With leaves or a link that are meant so, pass state=glue_jax.init(K, optimizer, ...)"
            ) from error
    current = state.state if isinstance(state, LearnResult) else state
    check_state(current)
    if optimizer is not None:
        check_optimizer(optimizer, current)
    inputs = {"experts": experts, "data": data, "validation_data": validation_data}
    inputs = {name: tree for name, tree in inputs.items() if tree is not None and not is_stream(tree)}
    run = Run(functions["link_fn"], functions["step_fn"], inputs, _beside(current, (experts, inputs.get("data"))))
    if before is not None:
        run.go_on_from(before, validate_every)
    return run


def _beside(state: GlueState, trees: PyTree) -> GlueState:
    """The state where a step with these arrays returns it, if they have a place, so that no step compiles anew."""
    shardings = [leaf.sharding for leaf in jax.tree.leaves(trees) if leaf.committed]
    if not shardings:
        return state
    mesh = getattr(shardings[0], "mesh", None)
    return jax.device_put(state, NamedSharding(mesh, PartitionSpec()) if mesh else shardings[0])


def _steps(
    key: jax.Array,
    experts: Params,
    data: Any,
    functions: dict[str, Any],
    first_step: int,
    batch_size: int,
    steps_per_call: int | None,
    chunk: int,
) -> Callable[[Run, int], Iterator[tuple[GlueState, GlueMetrics, int]]]:
    """A function that takes so many steps from where a run is, and yields what each call of a program returned."""
    key, minibatches = jax.random.fold_in(key, _STEPS), jax.random.fold_in(key, _MINIBATCHES)

    def one_by_one(batches: Iterator[Batch], run: Run, count: int) -> Iterator[tuple[GlueState, GlueMetrics, int]]:
        for batch in itertools.islice(batches, count):
            yield *_run_step(key, run.latest, experts, batch, **functions), 1

    if is_stream(data):
        return functools.partial(one_by_one, stream_batches(data))
    source = ArrayBatches(minibatches, data, batch_size)
    per_call = min(steps_per_call or (1 if on_cpu(data) else MOST_UNREAD), chunk)

    def many_at_once(run: Run, count: int) -> Iterator[tuple[GlueState, GlueMetrics, int]]:
        for left in range(count, 0, -per_call):
            rows = source.rows(run.step, min(left, per_call))
            # Of one shape for all numbers of steps, so that they are one program.
            padded = np.pad(rows, ((0, per_call - len(rows)), (0, 0)))
            called = _run_steps(key, run.latest, experts, data, padded, np.int32(len(rows)), **functions)
            yield *called, len(rows)

    return functools.partial(one_by_one, source.batches(first_step)) if per_call == 1 else many_at_once


@functools.partial(jax.jit, static_argnames=_STATIC)
def _run_step(
    key: jax.Array, state: GlueState, experts: Params, batch: Batch, *, step_fn: StepFn, **functions: Any
) -> tuple[GlueState, GlueMetrics]:
    """A step; metrics `[1, ...]`."""
    stepped = step_fn(key, state, experts, batch, **functions)
    if not isinstance(stepped, tuple) or len(stepped) != 2 or not hasattr(stepped[1], "gradient_norm"):
        raise TypeError(
            f"step_fn returned {jax.tree.map(jnp.shape, stepped)}; expected a GlueState and its GlueMetrics"
        )
    return stepped[0], jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], stepped[1])


@functools.partial(jax.jit, static_argnames=_STATIC)
def _run_steps(
    key: jax.Array,
    state: GlueState,
    experts: Params,
    data: Batch,
    rows: jax.Array,
    count: jax.Array,
    **functions: Any,
) -> tuple[GlueState, GlueMetrics]:
    """A step on each of the first `count` of the minibatches `rows` `[S, B]`; metrics `[S, ...]`, after these zeros."""

    def step(state: GlueState, indices: jax.Array) -> tuple[GlueState, GlueMetrics]:
        return _run_step(key, state, experts, jax.tree.map(lambda leaf: leaf[indices], data), **functions)

    def body(index: jax.Array, carry: tuple[GlueState, GlueMetrics]) -> tuple[GlueState, GlueMetrics]:
        state, metrics = step(carry[0], rows[index])
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=index, axis=0)
        return state, jax.tree.map(put, carry[1], metrics)

    _, shapes = jax.eval_shape(step, state, rows[0])
    empty = jax.tree.map(lambda leaf: jnp.zeros((len(rows), *leaf.shape[1:]), leaf.dtype), shapes)
    return jax.lax.fori_loop(0, count, body, (state, empty))


def _keep_result(error: BaseException, run: Run, experts: Params) -> None:
    """Gives what ends a run the result before it."""
    # The error itself is raised, whatever keeps the last steps from being read.
    with contextlib.suppress(Exception):
        run.read()
    with contextlib.suppress(Exception):
        error.result = run.result()  # pyright: ignore[reportAttributeAccessIssue]
        error.add_note("The attribute `result` is what was learned before: learn(..., state=result) goes on from it.")
    if type(experts) in (list, tuple) and not run.taken and isinstance(error, Exception):
        error.add_note(
            f"experts is a {type(experts).__name__}: if it holds one model an entry, use stack_experts(experts)."
        )


def _says_stop(answer: Any) -> bool:
    """Whether a callback's answer is True; what else it returns is not for `learn`."""
    return isinstance(answer, bool | np.bool_ | jax.Array) and bool(answer)
