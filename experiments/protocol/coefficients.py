"""The coefficients of the paper's Configs 1 to 4 and of our Config 5.

Configs 3, 4 and 5 learn their coefficients, each by its own step. They see the same minibatches.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax

import glue_jax
from experiments.models.network import Variables
from experiments.protocol.config import CoefficientFields, Config, part
from experiments.protocol.context import Context
from experiments.protocol.data import Examples
from experiments.protocol.splits import Splits
from experiments.protocol.training import output_loss
from experiments.runtime.progress import Stage

# The coefficients of at most so many steps are kept, evenly spaced.
_MOST_ALPHAS = 201
# Steps between two validations of Config 5. This is the default of `glue_jax.learn`: few steps of Gauss-Newton go far.
_GAUSS_NEWTON_VALIDATES_EVERY = 5
_ONLY_OF_SPSA = ("radius", "num_directions", "directions")
# The fields of `CoefficientFields` that a Config does not use. Its coefficients do not depend on them.
_NOT_USED = {3: _ONLY_OF_SPSA, 5: (*_ONLY_OF_SPSA, "alpha_learning_rate", "alpha_b1", "alpha_b2", "validate_every")}
# A seed's key is folded with this number, so that no two uses share a key. Fine-tuning has another number.
_COEFFICIENTS = 2
_adam = functools.cache(optax.adam)


@functools.cache
def make_steps(config: Config) -> Mapping[int, Any]:
    """Returns the steps of Configs 3, 4 and 5, by number. Equal configs share them, and so compile them once.

    - Config 3, full gradient: `full_gradient_step`.
    - Config 4, GLUE: `spsa_step` with the paper's directions and radius.
    - Config 5, Gauss-Newton (ours): `gauss_newton_step`.
    """
    gauss_newton = functools.partial(glue_jax.gauss_newton_step, matmul_precision=config.matmul_precision)
    glue = functools.partial(
        glue_jax.spsa_step,
        radius=config.radius,
        num_directions=config.num_directions,
        directions=config.directions,
        matmul_precision=config.matmul_precision,
    )
    return {3: glue_jax.full_gradient_step, 4: glue, 5: gauss_newton}


def alpha_optimizer(config: Config) -> optax.GradientTransformation:
    """Returns the optimizer of beta in Configs 3 and 4. Equal numbers share it, and so compile once."""
    return _adam(config.alpha_learning_rate, b1=config.alpha_b1, b2=config.alpha_b2)


def validate_every(config: Config, number: int) -> int:
    """Returns the steps between two validations of Config 3, 4 or 5."""
    return _GAUSS_NEWTON_VALIDATES_EVERY if number == 5 else config.validate_every


def coefficients_key(seed: int) -> jax.Array:
    """Returns the key of a seed's minibatches and directions while the coefficients are learned."""
    return jax.random.fold_in(jax.random.key(seed), _COEFFICIENTS)


def learn_coefficients(
    context: Context,
    number: int,
    key: jax.Array,
    experts: Variables,
    target: Examples,
    validation: Examples | None,
    *,
    max_steps: int | None = None,
    bar: Stage | None = None,
) -> glue_jax.LearnResult:
    """Learns the coefficients of Config 3, 4 or 5.

    Args:
        context: the run. Its config decides the step, its optimizer, the minibatch, the number of steps, the
            validations and the precision.
        number: 3, 4 or 5.
        key: the key of the directions and the minibatches. These Configs see the same minibatches.
        experts: the stacked experts, each leaf `[K, ...]`.
        target: the images to learn on.
        validation: the images that decide when the plateau is reached. None takes all steps.
        max_steps: the largest number of steps. None is the config's.
        bar: the progress bar, which counts the steps. Steps that are not needed are taken off it.

    Returns:
        What `glue_jax.learn` returns.

    Raises:
        glue_jax.NonFiniteLossError: if a loss or a gradient is infinite or NaN; the error has the step.
    """
    config = context.config
    max_steps, done = config.alpha_steps if max_steps is None else max_steps, 0

    def count(progress: glue_jax.types.Progress) -> None:
        nonlocal done
        if bar:
            bar.advance(progress.step - done)
        done = progress.step

    with jax.default_matmul_precision(config.matmul_precision):
        result = glue_jax.learn(
            key,
            experts,
            target,
            loss_fn=output_loss(context.problem),
            optimizer=None if number == 5 else alpha_optimizer(config),
            step_fn=make_steps(config)[number],
            validation_data=validation,
            batch_size=config.alpha_batch_size,
            max_steps=max_steps,
            validate_every=validate_every(config, number),
            patience=None if validation is None else config.patience,
            callback=count if bar else None,
        )
    if bar:
        bar.skip(max_steps - done)
    return result


def heuristic_coefficients(splits: Splits, number: int, measured: dict[str, Any]) -> list[float]:
    """Returns the coefficients of Config 1 or 2.

    Args:
        splits: the rows of each expert's images, which Config 1 counts.
        number: 1 or 2.
        measured: what `experiments.protocol.expert_training.measured_experts` returned. Config 2 takes the accuracies.
    """
    if number == 1:
        weights = glue_jax.coefficients.data_size_weights([len(rows) for rows in splits.experts])
    else:
        weights = glue_jax.coefficients.proxy_accuracy_weights(
            [row["validation_accuracy"] for row in measured["experts"]]
        )
    return np.asarray(weights).tolist()


def coefficients_stage(context: Context, number: int, seed: int) -> tuple[str, dict[str, Any]]:
    """Returns the name of a stage that learns coefficients, and all that it depends on."""
    fields = part(context.config, CoefficientFields)
    depends_on = {
        **context.bank_fields,
        **{name: value for name, value in fields.items() if name not in _NOT_USED.get(number, ())},
        "seed": seed,
        "code": context.code(coefficients_of),
    }
    return f"coefficients/seed{seed}-config{number}", depends_on


def coefficients_of(
    context: Context,
    number: int,
    seed: int,
    experts: Variables,
    measured: dict[str, Any],
    stage: Stage,
) -> dict[str, Any]:
    """Returns the coefficients of one Config, and how they were learned. The stage counts the steps."""
    config = context.config
    if number not in make_steps(config):
        return {"alpha": heuristic_coefficients(context.splits, number, measured)}

    def compute() -> dict[str, Any]:
        key, target = coefficients_key(seed), context.target(seed)
        result = learn_coefficients(context, number, key, experts, target, context.validation, bar=stage)
        history = result.history
        alphas = np.concatenate([history.metrics.alpha, np.asarray(result.last_alpha)[None]])
        rows = np.unique(np.linspace(0, len(alphas) - 1, _MOST_ALPHAS).round().astype(int))
        return {
            "alpha": np.asarray(result.alpha).tolist(),
            "validation_steps": history.validation_steps.tolist(),
            "validation_loss": history.validation_values.tolist(),
            "alpha_steps": rows.tolist(),
            "alphas": alphas[rows].tolist(),
        }

    return context.stages.run(*coefficients_stage(context, number, seed), compute, stage, config.alpha_steps)
