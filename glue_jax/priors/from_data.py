"""Values and coefficients from data and a loss, for `build_prior`."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from glue_jax import arguments
from glue_jax.batches import batched_mean, num_examples
from glue_jax.checks import as_number, check_callable, check_counts, compiled
from glue_jax.failures import LOOK_FOR, NonFiniteLossError
from glue_jax.learning import learn
from glue_jax.merging.batch_norm import refresh_statistics
from glue_jax.objectives import OutputLoss
from glue_jax.priors.stages import Stage, out_of_patience
from glue_jax.streams import as_arrays, check_same_kind, is_stream
from glue_jax.types import Batch, GlueState, LearnResult, LossFn, Params, Progress, PyTree

# BatchNorm's statistics are estimated on at most the first number of examples, in batches of the second number.
_REFRESH_EXAMPLES, _REFRESH_BATCH = 2048, 256
_VALIDATE_EVERY = 5
_HELD_OUT_SHARE = 5


@dataclasses.dataclass(frozen=True)
class Statistics:
    """BatchNorm's statistics: the arguments of `refresh_statistics`."""

    statistics_fn: Callable[[Params, Batch], PyTree]
    collection: str
    mean: str
    var: str

    def __post_init__(self) -> None:
        """Refuses a function that cannot be called, and patterns that are no regular expressions."""
        check_callable(statistics_fn=self.statistics_fn)
        for name in ("collection", "mean", "var"):
            compiled(name, getattr(self, name))

    def refreshed(self, params: Params, batches: list[Batch]) -> Params:
        """Returns the model with the statistics of these batches."""
        return refresh_statistics(
            params, batches, jax.jit(self.statistics_fn), collection=self.collection, mean=self.mean, var=self.var
        )


@dataclasses.dataclass(frozen=True)
class _ByMinibatch:
    """A function of a model and a batch, with BatchNorm's statistics of that batch.

    Two instances are equal if their parts are equal, so nothing is compiled twice.
    """

    function: Any
    statistics: Statistics

    def __call__(self, params: Params, batch: Batch, /) -> Any:
        """Returns what the function returns."""
        return self.function(self.statistics.refreshed(params, [batch]), batch)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FromData:
    """Learning from arrays `[N, ...]` by a loss.

    Attributes:
        loss_fn: the loss that learning lowers.
        validation_fn: the function whose lowest value chooses.
        data: the examples to learn from.
        validation_data: the examples that choose.
        validation: a sentence on the validation data, for the report.
        statistics: how BatchNorm's statistics are refreshed. None refreshes nothing.
        batch_size: the number of examples in a minibatch and in a validation batch.
        max_steps: the largest number of steps of a stage.
        patience: a stage ends after this many validations without a new best value.
    """

    loss_fn: LossFn
    validation_fn: LossFn
    data: Batch
    validation_data: Batch
    validation: str
    statistics: Statistics | None
    batch_size: int
    max_steps: int
    patience: int | None

    failure, advice = None, f" ({LOOK_FOR})"

    @property
    def name_of_value(self) -> str:
        """The function that gives the values, in words."""
        return "the loss" if self.validation_fn is self.loss_fn else "the validation function"

    def finished(self, key: jax.Array, params: Params) -> Params:
        """Returns a model with BatchNorm's statistics of the data."""
        if self.statistics is None:
            return params
        n = _length(self.data)
        rows = np.asarray(jax.random.permutation(key, n))[:_REFRESH_EXAMPLES]
        batches = [
            jax.tree.map(lambda leaf, at=at: leaf[rows[at : at + _REFRESH_BATCH]], self.data)
            for at in range(0, len(rows), _REFRESH_BATCH)
        ]
        return self.statistics.refreshed(params, batches)

    def value(self, params: Params) -> float:
        """Returns the validation value of a finished model."""
        value = _mean(params, self.validation_data, function=self.validation_fn, batch_size=self.batch_size)
        return as_number(f"the value of {self.name_of_value}", value)

    def passes_of_value(self, refreshed: bool) -> int:
        """How often a model goes forward on one example to be validated, and before that refreshed if it is."""
        return refreshed * min(_length(self.data), _REFRESH_EXAMPLES) + _length(self.validation_data)

    def optimizer(self, stage: Stage) -> optax.GradientTransformation | None:
        """Returns the optimizer of a stage."""
        return None if isinstance(self.loss_fn, OutputLoss) else stage.spsa(self.max_steps)[1]

    def learned(
        self,
        key: jax.Array,
        experts: Params,
        stage: Stage,
        start: GlueState | LearnResult,
        on_progress: Callable[[Progress], None],
    ) -> tuple[LearnResult, str | None]:
        """Learns the coefficients of a stage from a start on. Returns them, and why learning ended early if it did."""
        taken = len(start.history.metrics.loss) if isinstance(start, LearnResult) else 0
        if isinstance(start, LearnResult) and (taken >= self.max_steps or out_of_patience(start, self.patience)):
            return start, None
        optimizer = self.optimizer(stage)
        step_fn = stage.gauss_newton() if optimizer is None else stage.spsa(self.max_steps)[0]
        try:
            result = learn(
                key,
                experts,
                self.data,
                loss_fn=self._by_minibatch(self.loss_fn),
                optimizer=optimizer,
                state=start,
                step_fn=step_fn,
                link_fn=stage.link_fn,
                merge_fn=stage.merge_fn,
                validation_data=self.validation_data,
                validation_fn=self._by_minibatch(self.validation_fn),
                batch_size=self.batch_size,
                max_steps=self.max_steps - taken,
                validate_every=_VALIDATE_EVERY,
                patience=self.patience,
                callback=on_progress,
            )
        except NonFiniteLossError as error:
            return error.result, str(error)
        return result, None

    def passes(self, stage: Stage, result: LearnResult) -> int:
        """How often a model went forward on one example to learn a result."""
        history = result.history
        probes = history.metrics.probe_losses
        of_step = stage.directions + 2 if probes is None else probes[0].size
        learned = len(history.metrics.loss) * of_step * self.batch_size
        return learned + len(history.validation_values) * _length(self.validation_data)

    def describe(self, result: LearnResult) -> str:
        """Says how a result was learned."""
        way = "Gauss-Newton" if isinstance(self.loss_fn, OutputLoss) else "SPSA"
        return f"{len(result.history.metrics.loss)} steps of {way}"

    def _by_minibatch(self, function: LossFn) -> Any:
        """Returns a loss with BatchNorm by the minibatch, in two parts if it had two."""
        if self.statistics is None:
            return function
        if isinstance(function, OutputLoss):
            return OutputLoss(_ByMinibatch(function.outputs_fn, self.statistics), function.loss)
        return _ByMinibatch(function, self.statistics)


def from_data(
    key: jax.Array,
    *,
    data: Any,
    loss_fn: Any,
    validation_data: Any,
    validation_fn: Any,
    batch_size: int | None,
    statistics: Statistics | None,
    max_steps: int,
    patience: int | None,
) -> FromData:
    """Returns a `FromData`, after a check of the arguments. Without validation data it holds out a part of the data."""
    if data is None or loss_fn is None:
        missing = " and ".join(name for name, given in {"data": data, "loss_fn": loss_fn}.items() if given is None)
        raise ValueError(f"{missing} missing; expected data and loss_fn, or else evaluate")
    check_callable(loss_fn=loss_fn, **({} if validation_fn is None else {"validation_fn": validation_fn}))
    for name, arrays in {"data": data, "validation_data": validation_data}.items():
        if is_stream(arrays):
            raise TypeError(f"{name} is a {type(arrays).__name__}; expected arrays [N, ...] in a pytree")
    n = num_examples("data", data)
    data = jax.tree.map(jnp.asarray, as_arrays("data", data))
    if validation_data is None:
        held_out = n // _HELD_OUT_SHARE
        if not held_out:
            raise ValueError(
                f"data holds {n} examples; expected at least {_HELD_OUT_SHARE} to hold out a fifth, or validation_data"
            )
        rows = np.asarray(jax.random.permutation(key, n))
        data, validation_data = (
            jax.tree.map(lambda leaf, at=at: leaf[at], data) for at in (rows[:-held_out], rows[-held_out:])
        )
        where = f"{held_out} of the {n} examples, which were held out"
    else:
        num_examples("validation_data", validation_data)
        validation_data = jax.tree.map(jnp.asarray, as_arrays("validation_data", validation_data))
        check_same_kind(data, validation_data)
        where = f"the {_length(validation_data)} examples of validation_data"
    batch_size = min(arguments.BATCH_SIZE, _length(data)) if batch_size is None else batch_size
    check_counts(batch_size=batch_size)
    if batch_size > _length(data):
        raise ValueError(f"batch_size is {batch_size}, but there are {_length(data)} examples to learn from")
    words = [
        f"The values are those of {'loss_fn' if validation_fn is None else 'validation_fn'} on {where}.",
        "They chose the model, so they flatter it: judge it on other data.",
    ]
    if statistics is not None:
        refreshed = min(_length(data), _REFRESH_EXAMPLES)
        words.append(f"BatchNorm's statistics of each blend were refreshed on {refreshed} examples of the data.")
    return FromData(
        data=data,
        loss_fn=loss_fn,
        validation_data=validation_data,
        validation_fn=loss_fn if validation_fn is None else validation_fn,
        validation=" ".join(words),
        statistics=statistics,
        batch_size=batch_size,
        max_steps=max_steps,
        patience=patience,
    )


@functools.partial(jax.jit, static_argnames=("function", "batch_size"))
def _mean(params: Params, data: Batch, *, function: LossFn, batch_size: int) -> jax.Array:
    """Returns the mean of a function over all examples."""
    return batched_mean(function, params, data, batch_size)


def _length(data: Batch) -> int:
    """Returns N."""
    return len(jax.tree.leaves(data)[0])
