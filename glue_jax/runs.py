"""`Run`: what one run of `learn` has learned so far."""

import dataclasses
import math
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from glue_jax.failures import NonFiniteLossError, explain
from glue_jax.types import GlueMetrics, GlueState, History, LearnResult, LinkFn, Progress, PyTree, StepFn

# Metrics wait on the device until a validation, or until this many steps wait.
MOST_UNREAD = 1000
# This many gradients of exactly 0 are no coincidence.
_ENOUGH_ZEROS = 8


@dataclasses.dataclass
class Run:
    """The progress of a run of `learn`. All of its values are finite.

    Attributes:
        link_fn: the `link_fn` of `learn`.
        step_fn: the `step_fn` of `learn`.
        inputs: the arrays from which losses are computed, by name. An error names those that are not finite.
        state: the state after the last step whose metrics were read.
        metrics: the metrics of the steps so far, one entry for each reading, `[S, ...]` each.
        validation_steps: the number of steps taken before each validation.
        validation_values: the value of each validation.
        best_beta: the beta of the lowest validation value.
        taken: how many steps of this call were read.
        unread: the state, the metrics and the number of steps of each call since the last reading.
    """

    link_fn: LinkFn
    step_fn: StepFn
    inputs: dict[str, PyTree]
    state: GlueState
    metrics: Sequence[GlueMetrics] = ()
    validation_steps: Sequence[int] = ()
    validation_values: Sequence[float] = ()
    best_beta: PyTree = None
    taken: int = 0
    unread: list[tuple[GlueState, GlueMetrics, int]] = dataclasses.field(default_factory=list)
    _step: int = dataclasses.field(init=False)
    _seen_gradients: bool = False
    # The index of the best validation, if one long run would not have made it.
    _between: int | None = None

    def __post_init__(self) -> None:
        """Reads the state's step once."""
        self._step = int(self.state.step)

    def go_on_from(self, result: LearnResult, validate_every: int) -> None:
        """Takes over the history of a result.

        The last validation of the earlier call may lie between two validations of one long run. It is kept for as long
        as it is the best.
        """
        history = result.history
        self.metrics = [history.metrics] if len(history.metrics.loss) else []
        steps, values = history.validation_steps.tolist(), history.validation_values.tolist()
        first_step = self._step - self.steps_of_run
        if steps and (steps[-1] - first_step) % validate_every and _since_best(values):
            del steps[-1], values[-1]
        self.validation_steps, self.validation_values, self.best_beta = steps, values, result.beta
        if values and (steps[values.index(min(values))] - first_step) % validate_every:
            self._between = values.index(min(values))

    @property
    def steps_of_run(self) -> int:
        """The number of steps in the history, including those before this call."""
        return sum(len(metrics.loss) for metrics in self.metrics)

    @property
    def step(self) -> int:
        """The number of the next step, whether or not all steps were read."""
        return self._step + sum(count for *_, count in self.unread)

    @property
    def latest(self) -> GlueState:
        """The state after the last step, whether or not it was read."""
        return self.unread[-1][0] if self.unread else self.state

    def add(self, state: GlueState, metrics: GlueMetrics, count: int) -> None:
        """Keeps the result of a call of `count` steps. Its metrics are `[S, ...]` with S at least `count`."""
        self.unread.append((state, metrics, count))
        if self.step - self._step >= MOST_UNREAD:
            self.read()

    def read(self) -> None:
        """Reads the metrics of the last steps. Refuses metrics, and coefficients after them, that are not finite."""
        if not self.unread:
            return
        (state, *_), first, count = self.unread[-1], self._step, self.step - self._step
        parts = jax.device_get([metrics for _, metrics, _ in self.unread])
        counts = [count for *_, count in self.unread]
        metrics = _joined(
            [jax.tree.map(lambda leaf, c=c: leaf[:c], part) for part, c in zip(parts, counts, strict=True)]
        )
        bad = ~np.isfinite([metrics.loss, metrics.gradient_norm])
        if bad.any():
            at = int(bad.any(axis=0).argmax())
            self._refuse(
                *(("loss", metrics.loss) if bad[0, at] else ("gradient_norm", metrics.gradient_norm)), first, at
            )
        for leaf in map(np.ravel, jax.tree.leaves(jax.device_get(state.beta))):
            if not (finite := np.isfinite(leaf)).all():
                self._refuse("new beta", leaf[[finite.argmin()]], first + count - 1, 0)
        self.check_metrics(metrics)
        kept = [*self.metrics, metrics]
        taken, step = self.taken + count, first + count
        # One statement, so that Ctrl-C cannot leave half of it done.
        self.state, self.metrics, self.taken, self._step, self.unread = state, kept, taken, step, []

    def check_metrics(self, metrics: Any) -> None:
        """Refuses metrics, or their shapes, that cannot be joined to those so far."""
        if self.metrics and _kind(metrics) != _kind(self.metrics[-1]):
            raise ValueError(
                "state is a LearnResult whose metrics have other shapes than those of step_fn: pass "
                "state=result.state, which begins a new history"
            )

    def validated(self, value: float) -> None:
        """Keeps the validation value of the current state."""
        if not math.isfinite(value):
            self._refuse("validation value", [value], self._step, 0)
        steps, values, best = [*self.validation_steps, self._step], [*self.validation_values, value], self.best_beta
        if not _since_best(values):
            best = self.state.beta
            if self._between is not None:
                del steps[self._between], values[self._between]
                self._between = None
        self.validation_steps, self.validation_values, self.best_beta = steps, values, best

    def validation_is_due(self, validate_every: int) -> bool:
        """Returns whether a run validates the current state and has not validated it yet."""
        steps = self.validation_steps
        return not steps or (steps[-1] != self._step and self.steps_of_run % validate_every == 0)

    def out_of_patience(self, patience: int | None) -> bool:
        """Returns whether `patience` validations came after the best one."""
        return patience is not None and _since_best(self.validation_values) >= patience

    def result(self) -> LearnResult:
        """Returns the result so far."""
        beta = self.best_beta if self.validation_values else self.state.beta
        empty: Any = np.zeros((0,), np.float32)
        # Copies, because the user may donate the result's state to a step of their own.
        alpha, beta, last_alpha = jax.tree.map(jnp.array, (self.link_fn(beta), beta, self.link_fn(self.state.beta)))
        return LearnResult(
            alpha=alpha,
            beta=beta,
            last_alpha=last_alpha,
            state=self.state,
            history=History(
                metrics=_joined(self.metrics) if self.metrics else GlueMetrics(empty, empty, empty, None),
                validation_steps=np.array(self.validation_steps, np.int64),
                validation_values=np.array(self.validation_values, np.float64),
            ),
        )

    def progress(self, max_steps: int) -> Progress:
        """Returns the `Progress` for the callback."""
        values = self.validation_values
        return Progress(
            step=self.taken,
            max_steps=max_steps,
            # A copy, so that a callback cannot change the history.
            metrics=jax.tree.map(lambda leaf: leaf[-1].copy(), self.metrics[-1]),
            validation_value=values[-1] if values else None,
            best_value=min(values) if values else None,
            result=self.result(),
        )

    def warn_if_flat(self, max_steps: int) -> None:
        """Warns if the first gradients are all exactly 0."""
        if self._seen_gradients or self.taken < min(_ENOUGH_ZEROS, max_steps):
            return
        self._seen_gradients = True
        if not any(metrics.gradient_norm.any() for metrics in self.metrics):
            warnings.warn(
                f"the gradient was exactly 0 in each of the first {self.steps_of_run} steps, so nothing is learned: "
                "loss_fn may ignore its params, the experts may be equal, there may be only one (K = 1), or the "
                "loss may count (errors, say), which needs a larger radius",
                stacklevel=3,
            )

    def _refuse(self, what: str, values: Any, first: int, at: int) -> None:
        """Raises the error that ends a run. Steps that were not read are lost."""
        self.unread = []
        step, first_step = first + at, self._step - self.steps_of_run
        inputs = {**self.inputs, "beta": self.state.beta}
        advice = explain(what, step, first_step=first_step, step_fn=self.step_fn, inputs=inputs)
        raise NonFiniteLossError(what, step, float(values[at]), advice)


def _since_best(values: Sequence[float]) -> int:
    """Returns how many validations came after the best one. Of equal values, the first is the best."""
    return len(values) - 1 - values.index(min(values)) if values else 0


def _kind(metrics: GlueMetrics) -> tuple[Any, ...]:
    """Returns the structure and the shapes that metrics must share to be joined."""
    leaves, treedef = jax.tree.flatten(metrics)
    return treedef, [leaf.shape[1:] for leaf in leaves]


def _joined(parts: Sequence[GlueMetrics]) -> GlueMetrics:
    """Returns metrics joined along their first axis."""
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
