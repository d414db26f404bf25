"""Values and coefficients from calls of a function on the host, for `build_prior`."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

from glue_jax.ask_tell import ask, tell
from glue_jax.checks import as_number
from glue_jax.priors.stages import SOFTMAX_RADIUS, Stage, out_of_patience
from glue_jax.types import GlueMetrics, GlueState, History, LearnResult, LinkFn, Params, Progress, PyTree


@dataclasses.dataclass(frozen=True, kw_only=True)
class FromCalls:
    """Learning by a function on the host, in steps of `ask` and `tell`. It has the methods of `FromData`.

    Attributes:
        evaluate: the function that gives the value of a model. If it raises, or returns None or a value that is not
            finite, the model cannot be evaluated.
        max_steps: the largest number of steps of a stage.
        patience: a stage ends after this many steps without a new best value.
        failures: the last exception of `evaluate`, if there was one.
    """

    evaluate: Callable[[Params], Any]
    max_steps: int
    patience: int | None
    failures: list[Exception] = dataclasses.field(default_factory=list)

    name_of_value, advice = "evaluate", ""
    validation = (
        "The values are those of evaluate, and the passes are its calls. They chose the model, so they flatter it."
    )

    @property
    def failure(self) -> Exception | None:
        """The last exception of `evaluate`, if there was one."""
        return self.failures[-1] if self.failures else None

    def finished(self, key: jax.Array, params: Params) -> Params:
        """Returns a model unchanged."""
        del key
        return params

    def passes_of_value(self, refreshed: bool) -> int:
        """How often `evaluate` is called for one value."""
        del refreshed
        return 1

    def value(self, params: Params) -> float:
        """Returns the value of a model. NaN if it cannot be evaluated."""
        try:
            value = self.evaluate(params)
        except Exception as error:
            self.failures[:] = [error]
            return math.nan
        number = math.nan if value is None else as_number("the value of evaluate", value)
        return number if math.isfinite(number) else math.nan

    def optimizer(self, stage: Stage) -> optax.GradientTransformation:
        """Returns the optimizer of a stage."""
        return stage.spsa(self.max_steps)[1]

    def learned(
        self,
        key: jax.Array,
        experts: Params,
        stage: Stage,
        start: GlueState | LearnResult,
        on_progress: Callable[[Progress], None],
    ) -> tuple[LearnResult, str | None]:
        """Learns the coefficients of a stage, as `FromData` does. Each step is validated.

        A validation value of inf stands for a blend that could not be evaluated. A step whose probes all failed changes
        nothing, and the next step draws other directions.
        """

        def value(alpha: jax.Array) -> float | None:
            found = self.value(stage.merge_fn(experts, alpha))
            return None if math.isnan(found) else found

        def validated(state: GlueState) -> float:
            found = value(stage.link_fn(state.beta))
            return math.inf if found is None else found

        result = start if isinstance(start, LearnResult) else _first(stage.link_fn, start, validated(start))
        before = len(result.history.metrics.loss)
        try:
            for step in range(before + 1, self.max_steps + 1):
                if out_of_patience(result, self.patience):
                    break
                directions = stage.shape[-1] - 1
                probes = ask(key, result.state, link_fn=stage.link_fn, radius=SOFTMAX_RADIUS, num_directions=directions)
                losses = [value(alpha) for alpha in probes.alpha]
                state, metrics = tell(probes, losses, optimizer=self.optimizer(stage))
                metrics = jax.tree.map(np.asarray, metrics)
                result = _next(stage.link_fn, result, state, metrics, validated(state))
                values = result.history.validation_values.tolist()
                on_progress(Progress(step - before, self.max_steps - before, metrics, values[-1], min(values), result))
        except BaseException as error:
            error.result = result  # pyright: ignore[reportAttributeAccessIssue]
            raise
        return result, None

    def passes(self, stage: Stage, result: LearnResult) -> int:
        """Returns how often `evaluate` was called to learn a result."""
        history = result.history
        return len(history.metrics.loss) * 2 * (stage.shape[-1] - 1) + len(history.validation_values)

    def describe(self, result: LearnResult) -> str:
        """Says how a result was learned."""
        return f"{len(result.history.metrics.loss)} steps of SPSA by calls of evaluate"


def _first(link_fn: LinkFn, state: GlueState, value: float) -> LearnResult:
    """Returns the result before the first step."""
    empty: Any = np.zeros((0,), np.float32)
    history = History(GlueMetrics(empty, empty, empty, None), np.array([int(state.step)]), np.array([value]))
    return _result(link_fn, state.beta, state, history)


def _next(link_fn: LinkFn, result: LearnResult, state: GlueState, metrics: GlueMetrics, value: float) -> LearnResult:
    """Returns a result with one more step and its validation."""
    before, of_step = result.history, jax.tree.map(lambda leaf: leaf[None], metrics)
    if len(before.metrics.loss):
        of_step = jax.tree.map(lambda *leaves: np.concatenate(leaves), before.metrics, of_step)
    beta = state.beta if value < min(before.validation_values) else result.beta
    steps, values = np.append(before.validation_steps, int(state.step)), np.append(before.validation_values, value)
    return _result(link_fn, beta, state, History(of_step, steps, values))


def _result(link_fn: LinkFn, beta: PyTree, state: GlueState, history: History) -> LearnResult:
    """Returns a result whose best coefficients are those of `beta`."""
    return LearnResult(alpha=link_fn(beta), beta=beta, last_alpha=link_fn(state.beta), state=state, history=history)
