"""How long the rest of a run will take on this backend, measured on a few steps."""

import math
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import glue_jax
from experiments.models.network import Variables
from experiments.protocol.coefficients import learn_coefficients, validate_every
from experiments.protocol.context import Context
from experiments.protocol.data import Examples
from experiments.protocol.expert_training import initialize, missing_experts
from experiments.protocol.run import remaining
from experiments.protocol.training import Trainer
from glue_jax.batches import on_cpu

# The number of steps that are measured on a CPU. There each step is a call. On an accelerator, a call is an epoch, or
# the steps between two validations.
_STEPS = 3


def estimate(context: Context) -> dict[str, float]:
    """Measures a few steps of each kind that is left to do.

    On a CPU, the steps are programs of the run, so the run does not compile them again. An accelerator compiles an
    epoch for each number of images.

    Returns:
        The seconds of each stage that is not done, without compilation. The seconds of the coefficients are an upper
        bound, because learning may reach its plateau before the last step.
    """
    config, seconds = context.config, {}
    missing = missing_experts(context)
    left = remaining(context)
    if not (missing or any(left.values())):
        return {}
    variables = jax.tree.map(lambda leaf: leaf[0], initialize(context.problem, config, [0]))
    num_validation, num_target = len(context.validation.labels), len(context.targets[config.seeds[0]])
    per_image = _second_call(lambda: context.evaluate(variables, context.validation)) / num_validation
    if missing:
        together = context.trained_together
        groups = {index // together for index in missing}
        count, batch_size = config.expert_examples, config.expert_batch_size
        step = _training_step(context.training, [variables] * together, context.train, count, batch_size)
        steps = config.expert_epochs * (count // batch_size)
        images = num_validation + num_target + len(context.test.labels)
        seconds["experts"] = len(groups) * steps * step + config.num_experts * images * per_image
    if left["coefficients"]:
        experts = glue_jax.stack_experts([variables] * config.num_experts)
        target, steps = context.target(config.seeds[0]), config.alpha_steps
        step = {number: _alpha_step(context, number, experts, target) for number in set(left["coefficients"])}
        # At the start, and after each chunk of steps.
        validations = {number: 1 + math.ceil(steps / validate_every(config, number)) for number in step}
        seconds["coefficients, at most"] = sum(
            steps * step[number] + validations[number] * num_validation * per_image for number in left["coefficients"]
        )
    if left["fine-tuning"]:
        batch_size = config.fine_tuning_batch_size
        step = _training_step(context.tuning, [variables], context.train, num_target, batch_size)
        epoch = (num_target // batch_size) * step + len(context.test.labels) * per_image
        seconds["fine-tuning"] = len(left["fine-tuning"]) * config.fine_tuning_epochs * epoch
    return seconds


def describe(seconds: dict[str, float]) -> str:
    """Returns an estimate in words."""
    if not seconds:
        return "nothing is left to do: all stages are kept from an earlier run"
    stages = ", ".join(f"{name} {duration(value)}" for name, value in seconds.items())
    return f"time, from a few steps measured here: {duration(sum(seconds.values()))} ({stages}), without compilation"


def duration(seconds: float) -> str:
    """Returns a time in words, in the unit that suits it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def _second_call(call: Callable[[], Any]) -> float:
    """Returns the seconds of a call that is compiled already."""
    jax.block_until_ready(call())
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def _training_step(
    trainer: Trainer, models: Sequence[Variables], examples: Examples, count: int, batch_size: int
) -> float:
    """Returns the seconds of a training step of several models at once, each on `count` images."""
    if on_cpu(examples):
        count = min(count, _STEPS * batch_size)
    rows = jnp.tile(jnp.arange(count)[None], (len(models), 1))
    state = trainer.init(glue_jax.stack_experts(models))
    keys = jax.random.split(jax.random.key(0), len(models))

    def epoch() -> Any:
        # The state is donated, so the next call goes on from the state of this call.
        nonlocal state
        state, loss = trainer.epoch(keys, 0, state, examples, rows)
        return loss

    return _second_call(epoch) / (count // batch_size)


def _alpha_step(context: Context, number: int, experts: Variables, target: Examples) -> float:
    """Returns the seconds of a step that learns one Config's coefficients, without validation."""
    config, key = context.config, jax.random.key(0)
    steps = min(_STEPS if on_cpu(target) else validate_every(config, number), config.alpha_steps)

    def learn() -> Any:
        with warnings.catch_warnings():
            # All experts are the same network, so the gradient is 0.
            warnings.filterwarnings("ignore", "the gradient was exactly 0")
            return learn_coefficients(context, number, key, experts, target, None, max_steps=steps).alpha

    return _second_call(learn) / steps
