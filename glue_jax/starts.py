"""`learn_from_starts`: learning from several starts, of which the best by validation is kept."""

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
from glue_jax.states import opt_state_of
from glue_jax.steps import spsa_step
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
    """Learns from S starts, one after another, and returns the result with the best validation value.

    Each start is a run of `learn` with its own patience. If a start's loss becomes infinite or NaN, that start ends
    with a warning, and its result so far counts. If any other exception ends the call, the exception's attribute
    `result` holds the best result so far, if there is one.

    Args:
        key: as for `learn`. All starts share it, so all see the same directions, and the same minibatches of arrays.
        experts: as for `learn`.
        data: arrays or a loader, as for `learn`. An iterator is refused, because only one start could read it.
        starts: the beta of each start, leaves `[S, ...]`. For example `jnp.stack([weights_to_logits(w) for w in ...])`.
        loss_fn: as for `learn`.
        validation_data: as for `learn`. It is required, because it chooses the best start.
        optimizer: as for `learn`.
        validation_fn: as for `learn`.
        step_fn: as for `learn`.
        link_fn: as for `learn`.
        merge_fn: as for `learn`.
        **options: the other options of `learn`: `batch_size`, `max_steps`, `validate_every`, `patience`, `callback`,
            and so on. The callback is called in each start. If it returns True, only that start ends.

    Returns:
        The `LearnResult` of the best start. Its `start` is the index of that start.

    Raises:
        ValueError: as for `learn`, or if the leaves of `starts` have no leading axis or leading axes of different
            lengths.
        TypeError: as for `learn`, or if `data` is an iterator, or if `options` contain `state`.
        NonFiniteLossError: if the loss becomes infinite or NaN in every start. It is the error of the last start.

    Warns:
        UserWarning: if a start ends early because its loss is not finite; and as for `learn`.
    """
    if "state" in options:
        raise TypeError("state was given; expected no state, because starts says where to begin")
    if validation_data is None:
        raise ValueError("validation_data is None; expected data to choose the best start by")
    if is_stream(data) and hasattr(data, "__next__"):
        raise TypeError(
            f"data is an iterator ({type(data).__name__}), which only the first start could read; expected arrays, or "
            "a loader that can be iterated anew for each start"
        )
    if isinstance(starts, list):
        raise TypeError("starts is a list; expected one array or pytree with leaves [S, ...] (jnp.stack makes one)")
    count = num_examples("starts", starts)
    starts = jax.tree.map(jnp.asarray, as_arrays("starts", starts))
    if isinstance(starts, jax.Array) and starts.ndim < 2:
        raise ValueError(f"starts have shape {starts.shape}; expected [S, K] or [S, ...], one beta for each start")
    check_floating(starts, least_bits=32)
    functions: dict[str, Any] = {"step_fn": step_fn, "loss_fn": loss_fn, "link_fn": link_fn, "merge_fn": merge_fn}
    functions |= {} if optimizer is None else {"optimizer": optimizer}
    arguments.check_functions(functions, validation_fn=validation_fn)
    # Moved to the device once, not once per start.
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
                results.append(so_far._replace(start=start))
            if results:
                error.result = _best(results)  # pyright: ignore[reportAttributeAccessIssue]
            raise
        results.append(result._replace(start=start))
    best = _best(results)
    if len(failures) == count:
        failures[-1].result = best
        raise failures[-1]
    return best


def _best(results: list[LearnResult]) -> LearnResult:
    """Returns the result with the lowest validation value. A run without a validation counts as infinite."""
    return min(results, key=lambda result: min(result.history.validation_values, default=float("inf")))
