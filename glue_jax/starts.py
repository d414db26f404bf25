"""Learning from several starts; the best by validation is kept."""

import warnings
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from glue_jax import arguments
from glue_jax.batches import num_examples
from glue_jax.blending import blend
from glue_jax.coefficients import check_floating
from glue_jax.failures import NonFiniteLossError
from glue_jax.learning import learn
from glue_jax.steps import opt_state_of, spsa_step
from glue_jax.streams import as_arrays, is_stream
from glue_jax.types import Batch, GlueState, LearnResult, LinkFn, LossFn, MergeFn, Params, PyTree, StepFn


def learn_from_starts(
    key: jax.Array,
    experts: Params,
    data: Batch | Iterable[Batch],
    *,
    starts: PyTree,
    loss_fn: LossFn,
    validation_data: Batch | Iterable[Batch],
    optimizer: optax.GradientTransformation | None = None,
    validation_fn: LossFn | None = None,
    step_fn: StepFn = spsa_step,
    link_fn: LinkFn = jax.nn.softmax,
    merge_fn: MergeFn = blend,
    **options: Any,
) -> LearnResult:
    """Learns from S starts, one after another, and returns the one that comes to the best validation.

    Each is a run of `learn` with its own patience. A start whose loss is not finite ends there with a warning; what it
    found before counts. An exception that ends the whole has the best result before it as its attribute `result`.

    Args:
        key: as for `learn`; all starts share it, their minibatches and their directions.
        experts: as for `learn`.
        data: as for `learn`, but for an iterator, which only one start could read.
        starts: beta of each, leaves `[S, ...]`; `jnp.stack([weights_to_logits(w) for w in ...])`, for instance.
        loss_fn: as for `learn`.
        validation_data: as for `learn`.
        optimizer: as for `learn`.
        validation_fn: as for `learn`.
        step_fn: as for `learn`.
        link_fn: as for `learn`.
        merge_fn: as for `learn`.
        **options: `learn`'s others: `batch_size`, `max_steps`, `validate_every`, `patience`, `callback`, and so on. The
            callback is told of each start in turn, and what it ends is that start.

    Returns:
        As `learn` does, of the best start; `start` is its number.

    Raises:
        ValueError: as for `learn`; starts without a leading axis, or of different numbers.
        TypeError: as for `learn`; an iterator as data; a `state` among the options.
        NonFiniteLossError: the last start's, if every start ended so.

    Warns:
        UserWarning: a start ended so; the others as for `learn`.
    """
    if "state" in options:
        raise TypeError("state was given: expected none, since starts says where to begin")
    if validation_data is None:
        raise ValueError("validation_data is None; expected data by which the best start is chosen")
    if is_stream(data) and hasattr(data, "__next__"):
        raise TypeError(
            f"data is an iterator ({type(data).__name__}), which only the first start could read; expected arrays, or "
            "a loader that each start can iterate anew"
        )
    if isinstance(starts, list):
        raise TypeError("starts is a list; expected one array or pytree with leaves [S, ...] (jnp.stack makes it)")
    count = num_examples("starts", starts)
    starts = jax.tree.map(jnp.asarray, as_arrays("starts", starts))
    if isinstance(starts, jax.Array) and starts.ndim < 2:
        raise ValueError(f"starts have shape {starts.shape}; expected [S, K] or [S, ...], one beta for each start")
    check_floating(starts)
    functions: dict[str, Any] = {"step_fn": step_fn, "loss_fn": loss_fn, "link_fn": link_fn, "merge_fn": merge_fn}
    functions |= {} if optimizer is None else {"optimizer": optimizer}
    arguments.check_functions(functions, validation_fn=validation_fn)
    # Put on the device once, not for each start.
    experts = jax.tree.map(jnp.asarray, experts)
    data = data if is_stream(data) else jax.tree.map(jnp.asarray, as_arrays("data", data))
    results: list[LearnResult] = []
    failures: list[NonFiniteLossError] = []
    for start in range(count):
        beta = jax.tree.map(lambda leaf, at=start: leaf[at], starts)
        try:
            result = learn(
                key,
                experts,
                data,
                state=GlueState(jnp.zeros((), jnp.int32), beta, opt_state_of(beta, optimizer, link_fn)),
                validation_data=validation_data,
                validation_fn=validation_fn,
                **functions,
                **options,
            )
        except NonFiniteLossError as error:
            warnings.warn(f"start {start} of {count} ended early: {error}", stacklevel=2)
            failures.append(error)
            result = error.result
        except BaseException as error:
            if so_far := getattr(error, "result", None):
                error.result = _best([*results, so_far._replace(start=start)])  # pyright: ignore[reportAttributeAccessIssue]
            raise
        results.append(result._replace(start=start))
    best = _best(results)
    if len(failures) == count:
        failures[-1].result = best
        raise failures[-1]
    return best


def _best(results: list[LearnResult]) -> LearnResult:
    """The one with the lowest validation value; one that ended before its first validation has none."""
    return min(results, key=lambda result: min(result.history.validation_values, default=float("inf")))
