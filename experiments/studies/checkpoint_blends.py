"""The ways that `experiments.studies.last_checkpoints` compares. Each makes one model of a run's last checkpoints."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

import glue_jax
from experiments.models.network import Variables
from experiments.protocol.context import Context
from experiments.studies.refreshing import REFRESH_IMAGES, refreshed
from experiments.studies.sharing import Coefficients, learn_by_gauss_newton
from experiments.studies.training_run import Images

_VALIDATION_BATCH = 250


class Run(NamedTuple):
    """A training run that is done, and what every way may use.

    Attributes:
        context: what `experiments.protocol.context.prepare` returned.
        seed: the seed of the run.
        images: the images of the seed.
        models: the last K models, stacked, each leaf `[K, ...]`.
        averages: the moving averages of the parameters, by decay.
        problem: what is to be learned: free coefficients with BatchNorm by the minibatch.
    """

    context: Context
    seed: int
    images: Images
    models: Variables
    averages: Mapping[float, Any]
    problem: Coefficients

    def model(self, index: int) -> Variables:
        """Returns one of the last K models."""
        return jax.tree.map(lambda leaf: leaf[index], self.models)

    def refreshed(self, variables: Variables) -> Variables:
        """Returns a model with BatchNorm's statistics estimated on training images."""
        rows = self.images.training[:REFRESH_IMAGES]
        return refreshed(self.context.problem, variables, self.context.images(rows).images)


class Choice(NamedTuple):
    """What a way returns.

    Attributes:
        variables: the model.
        chosen: what was chosen, for the report.
        alpha: the coefficients of the K models, `[K]`. None if the model is no blend of them.
    """

    variables: Variables
    chosen: str
    alpha: Any = None


def _last(run: Run) -> Choice:
    """The last checkpoint as it is."""
    return Choice(run.model(-1), "-")


def _last_refreshed(run: Run) -> Choice:
    """The last checkpoint with new statistics."""
    return Choice(run.refreshed(run.model(-1)), "-")


def _best(run: Run) -> Choice:
    """The checkpoint with the lowest validation loss, as it is."""
    count = run.context.config.num_experts
    return _lowest(run, {f"{count - at} from the end": Choice(run.model(at), "") for at in reversed(range(count))})


def _uniform(run: Run) -> Choice:
    """The uniform average of the last k."""
    candidates, count = {}, run.context.config.num_experts
    for k in range(2, count + 1):
        alpha = np.repeat([0.0, 1 / k], [count - k, k]).astype(np.float32)
        candidates[f"k = {k}"] = Choice(run.refreshed(glue_jax.blend(run.models, alpha)), "", alpha)
    return _lowest(run, candidates)


def _moving_average(run: Run) -> Choice:
    """The moving average of the parameters at the end of training."""
    candidates = {}
    for decay, params in run.averages.items():
        candidates[f"decay {decay}"] = Choice(run.refreshed({**run.model(-1), "params": params}), "")
    return _lowest(run, candidates)


def _lowest(run: Run, candidates: Mapping[str, Choice]) -> Choice:
    """The candidate with the lowest validation loss."""
    validation = run.context.validation
    losses = {name: run.context.evaluate(each.variables, validation)["loss"] for name, each in candidates.items()}
    chosen = min(losses, key=losses.__getitem__)
    return candidates[chosen]._replace(chosen=chosen)


def _learned(
    link: Literal["softmax", "free"], learn_on: Literal["held out images", "training images"], run: Run
) -> Choice:
    """Coefficients by Gauss-Newton with BatchNorm by the minibatch, and then new statistics."""
    context, problem = run.context, run.problem
    if link == "softmax":
        problem = problem._replace(link_fn=jax.nn.softmax, beta=0 * problem.beta)
    rows = run.images.training if learn_on == "training images" else run.images.held_out
    result = learn_by_gauss_newton(
        context,
        problem,
        run.seed,
        context.images(rows),
        context.validation,
        batch_size=context.config.alpha_batch_size,
        validation_batch_size=_VALIDATION_BATCH,
    )
    variables = run.refreshed(problem.merge_fn(problem.experts, result.alpha))
    history, alpha = result.history, np.asarray(result.alpha, np.float64)
    step = history.validation_steps[np.argmin(history.validation_values)]
    return Choice(variables, f"step {step}", alpha)


WAYS: Mapping[str, Callable[[Run], Choice]] = {
    "last checkpoint": _last,
    "last checkpoint, refreshed": _last_refreshed,
    "best checkpoint": _best,
    "uniform average of the last k": _uniform,
    "moving average": _moving_average,
    "learned, softmax": functools.partial(_learned, "softmax", "held out images"),
    "learned, free": functools.partial(_learned, "free", "held out images"),
    "learned, softmax, on training images": functools.partial(_learned, "softmax", "training images"),
    "learned, free, on training images": functools.partial(_learned, "free", "training images"),
}
"""By name: from a run to a model."""
