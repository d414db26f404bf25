"""`learn`: learning the coefficients until validation stops improving."""

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

from glue_jax import arguments
from glue_jax.batches import on_cpu
from glue_jax.blending import blend
from glue_jax.checks import check_optimizer, check_state
from glue_jax.experts import num_experts
from glue_jax.gauss_newton import check_gauss_newton_state, gauss_newton_step
from glue_jax.runs import MOST_UNREAD, Run
from glue_jax.states import beside, init
from glue_jax.steps import spsa_step
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
    StepFn,
)
from glue_jax.validation import make_judge

# The key is folded with these numbers, so that minibatches and directions share no random numbers.
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
    batch_size: int = 64,
    validation_batch_size: int | None = None,
    max_steps: int = 1000,
    validate_every: int | None = None,
    patience: int | None = 10,
    steps_per_call: int | None = None,
    callback: Callable[[Progress], bool | None] | None = None,
) -> LearnResult:
    """Learns the coefficients from minibatches until validation stops improving (section 3.3 of the paper).

    `data` has one of three forms:

    - Arrays `[N, ...]`, in a pytree. The key shuffles the examples anew for each epoch: the minibatches are those of
      `minibatch_indices(jax.random.fold_in(key, 0), ...)`. Each epoch drops its last minibatch if that is not full.
    - An iterator of batches. It is read once. If it ends before `max_steps`, the run ends.
    - A loader of batches, such as PyTorch's `DataLoader`. Each epoch iterates it anew. A loader may be endless. Then
      the run stays in its first epoch.

    To JAX a list is a pytree, so pass `iter(batches)` for a list of batches. Such an iterator has one epoch. If a batch
    has a new shape, JAX compiles again.

    A run can be continued: pass its `LearnResult` as `state`. The new call keeps the best coefficients, the history,
    and the number of validations without a new best value. It continues an iterator where it is, and begins a new epoch
    of a loader. With the same key, and arrays or an iterator, several calls return what one long call returns. There is
    one exception: `max_steps` may stop the first call between two validations. The first call then validates its last
    coefficients, and one long call does not. If these coefficients are the best so far, the first call returns them,
    and the calls after it keep them until a validation is better.

    JAX compiles again for each new function and each new optimizer. So make the functions and the optimizer once, and
    pass the same objects to every call. Then a second call compiles nothing. If a function reads a variable from
    outside, the compiled program keeps the value that the variable had when it was compiled. If the variable changes,
    pass a new function.

    If an exception ends the run, Ctrl-C included, the exception's attribute `result` holds the `LearnResult` so far. In
    a notebook this is `sys.last_value.result`.

    Args:
        key: a `jax.random.key`. It decides the directions, and the minibatches of arrays. With the same key, the
            minibatches are the same for every `step_fn`.
        experts: stacked experts, each leaf `[K, ...]`. A leaf without the axis K, such as a base that adapters share,
            is allowed if you pass a `state` and a `merge_fn` of your own.
        data: the training data: arrays, an iterator or a loader, as described above.
        loss_fn: `loss_fn(params, batch) -> scalar`, the mean over a batch of `data`. `params` is the blend. Its blended
            arrays are at least float32, also for experts of bfloat16 or float16.
        optimizer: the optimizer of optax that updates beta. Every step except `gauss_newton_step` needs one, so the
            default `spsa_step` does. `gauss_newton_step` takes none. The paper uses `optax.adam(1e-2, b1=0.9,
            b2=0.99)`.
        state: a state to start from, or a result to continue. With None it is `init(K, optimizer, link_fn=link_fn)`.
            For a softmax this is the uniform average.
        step_fn: the step function, which also decides how the gradient is estimated: `spsa_step`, `gauss_newton_step`,
            `full_gradient_step` or `forward_gradient_step`. A `functools.partial` of a step sets its options, such as
            `radius`.
        link_fn: `link_fn(beta) -> alpha`.
        merge_fn: `merge_fn(experts, alpha) -> params`.
        validation_data: the data on which the blend is validated: arrays `[M, ...]`, or a loader that ends. Each batch
            of a loader is weighted by its size. With None there is no validation.
        validation_fn: `validation_fn(params, batch) -> scalar`, the mean over a batch. Lower is better. With None it is
            `loss_fn`.
        batch_size: the number of examples in a minibatch of arrays.
        validation_batch_size: the number of examples in a validation batch of arrays. With None it is `batch_size`. The
            last batch may be smaller; it is weighted by its size.
        max_steps: the largest number of steps in this call.
        validate_every: the number of steps between two validations, and between two callbacks. With None it is 5 for
            `gauss_newton_step` and 50 for other steps.
        patience: the run stops after this many validations without a new best value. With None, all `max_steps` are
            taken.
        steps_per_call: the largest number of steps in one call of a compiled program. With an iterator or a loader it
            is always 1. With None, and arrays on a CPU, it is 1: XLA:CPU runs the backward pass of a convolution many
            times slower inside a compiled loop of steps than outside. With None, and arrays on other devices, it is the
            number of steps between two validations, at most 1000.
        callback: a function that is called with a `Progress` after every `validate_every` steps, and after the last
            step. The run ends if it returns True. Do not return the value of a tqdm bar's `update`, which is True at
            times.

    Returns:
        The best coefficients by validation, the last coefficients, and the history.

    Raises:
        ValueError: before any work, if an argument is out of its range, if arrays have different lengths, or if the
            result in `state` was learned with another link.
        ValueError: if a loss or a validation value is no scalar.
        TypeError: if an argument has the wrong type.
        NonFiniteLossError: if a loss, a gradient, a validation value or beta becomes infinite or NaN.

    Warns:
        UserWarning: if the first gradients are all exactly 0, or if `state` is a result that had run out of patience.

    Examples:
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
    steps = _steps(key, experts, data, functions, run.step, batch_size, steps_per_call, validate_every)
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
        if not is_stream(data) and not run.out_of_patience(patience):
            # The step's own checks come before any work. JAX keeps the trace.
            batch = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((batch_size, *leaf.shape[1:]), leaf.dtype), data)
            stepped = jax.eval_shape(functools.partial(_run_step, **functions), key, run.state, experts, batch)
            run.check_metrics(stepped[1])
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
            raise ValueError(f"data, a {type(data).__name__}, gave no batch: an iterator can be read only once")
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
    """Returns the run before the first step of this call."""
    optimizer = functions.get("optimizer")
    before = state if isinstance(state, LearnResult) else None
    if before is not None and len(before.history.validation_steps) and validation_data is None:
        raise ValueError(
            "state is a LearnResult with validations, but validation_data is None: pass the same validation_data "
            "again, or pass state=result.state"
        )
    if state is None:
        try:
            state = init(num_experts(experts), optimizer, link_fn=functions["link_fn"])
        except ValueError as error:
            raise ValueError(
                f"{error}. If experts and link_fn are right, pass state=glue_jax.init(K, optimizer, ...)"
            ) from error
    if before is not None:
        arguments.check_link(before, functions["link_fn"])
    current = state.state if isinstance(state, LearnResult) else state
    check_state(current)
    if optimizer is not None:
        check_optimizer(optimizer, current)
    elif arguments.bare(functions["step_fn"]) is gauss_newton_step:
        check_gauss_newton_state(current, functions["link_fn"])
    inputs = {"experts": experts, "data": data, "validation_data": validation_data}
    inputs = {name: tree for name, tree in inputs.items() if tree is not None and not is_stream(tree)}
    run = Run(functions["link_fn"], functions["step_fn"], inputs, beside(current, (experts, inputs.get("data"))))
    if before is not None:
        run.go_on_from(before, validate_every)
    return run


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
    """Returns a function that continues a run by a number of steps. It yields the result of each call of a program."""
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
            # Padded, so that one program serves every number of steps.
            padded = np.pad(rows, ((0, per_call - len(rows)), (0, 0)))
            called = _run_steps(key, run.latest, experts, data, padded, np.int32(len(rows)), **functions)
            yield *called, len(rows)

    return functools.partial(one_by_one, source.batches(first_step)) if per_call == 1 else many_at_once


@functools.partial(jax.jit, static_argnames=_STATIC)
def _run_step(
    key: jax.Array, state: GlueState, experts: Params, batch: Batch, *, step_fn: StepFn, **functions: Any
) -> tuple[GlueState, GlueMetrics]:
    """Takes one step. The metrics are `[1, ...]`."""
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
    """Takes one step on each of the first `count` minibatches of `rows`, `[S, B]`.

    The metrics are `[S, ...]`. Those after the first `count` are zeros.
    """

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
    """Gives the exception that ends a run the result so far."""
    # The error itself must be raised, even if the last steps cannot be read.
    with contextlib.suppress(Exception):
        run.read()
    with contextlib.suppress(Exception):
        error.result = run.result()  # pyright: ignore[reportAttributeAccessIssue]
        if run.steps_of_run or run.validation_values:
            error.add_note(
                "The attribute `result` is what was learned before: learn(..., state=result) goes on from it."
            )
    if type(experts) in (list, tuple) and not run.taken and isinstance(error, Exception):
        error.add_note(
            f"experts is a {type(experts).__name__}: if it holds one model an entry, use stack_experts(experts)."
        )


def _says_stop(answer: Any) -> bool:
    """Returns whether a callback's answer is True. Any other kind of answer means nothing."""
    return isinstance(answer, bool | np.bool_ | jax.Array) and np.size(answer) == 1 and bool(answer)
