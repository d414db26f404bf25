"""The paper's section 5: experts, coefficients (Configs 1 to 4), the prior, the fine-tuned model; and our Config 5.

Each stage's result is kept on disk (`experiments.runtime.stages`). Configs 3, 4 and 5 see the same minibatches, and so
do the fine-tunings of a seed.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import glue_jax
from experiments.models.network import Variables
from experiments.protocol.config import CoefficientFields, FineTuningFields, part
from experiments.protocol.context import Context, counts, take
from experiments.protocol.data import Examples
from experiments.protocol.expert_training import measure_experts, measurement, train_experts
from experiments.protocol.passes import prior_cost
from experiments.protocol.training import output_loss, train
from experiments.reporting.analysis import CONFIGS
from experiments.runtime.progress import Stage

# Of the coefficients by step, so many at most are kept, evenly spaced.
_MOST_ALPHAS = 201
# Of Config 5: a few of its steps go as far as many others. It is `glue_jax.learn`'s own default.
_GAUSS_NEWTON_VALIDATES_EVERY = 5
_ONLY_OF_SPSA = ("radius", "num_directions", "directions")
# The fields of `CoefficientFields` that a Config does not use: its coefficients do not depend on them.
_NOT_USED = {3: _ONLY_OF_SPSA, 5: (*_ONLY_OF_SPSA, "alpha_learning_rate", "alpha_b1", "alpha_b2", "validate_every")}
# What a seed's key is folded with, so that no two uses share one.
_COEFFICIENTS, _FINE_TUNING = range(2, 4)


def run(context: Context) -> dict[str, Any]:
    """Does what is not done yet, and returns the results.

    Args:
        context: of `experiments.protocol.context.prepare`.

    Returns:
        A dict that JSON holds: `config`, `data` (names and the counts drawn), `experts` (a row each, with how many of
        the first seed's target images it was trained on), `runs` (a row for each seed and Config, with what
        `experiments.protocol.passes.prior_cost` returns), `seconds` (of each stage), `machine` (all that the stages
        were made on).

    Raises:
        FloatingPointError: a loss that is infinite or not a number, with its stage and step.
    """
    config, progress = context.config, context.progress
    drawn = counts(context)
    experts, training = train_experts(context)
    measured = measure_experts(context, experts)
    stacked = glue_jax.stack_experts(experts)
    machines = {record["machine"] for record in (*training, measured)}
    seconds = {"Experts": sum(record["seconds"] for record in training), "Experts' accuracies": measured["seconds"]}
    coefficients = progress.stage("Coefficients", len(context.step_fns) * len(config.seeds) * config.alpha_steps)
    learned = {}
    for seed in config.seeds:
        target = take(context.train, context.targets[seed])
        for number in CONFIGS:
            learned[seed, number] = _coefficients(context, number, seed, target, stacked, measured, coefficients)
    tuning = progress.stage("Fine-tuning", len(learned) * config.fine_tuning_epochs)
    runs = []
    for (seed, number), weights in learned.items():
        tuned = _fine_tune(context, number, seed, stacked, weights["alpha"], tuning)
        took = prior_cost(context, number, weights, measured)
        for what, record in (("Coefficients", weights), ("Fine-tuning", tuned)):
            name = f"{what}, Config {number}"
            seconds[name] = seconds.get(name, 0.0) + record.pop("seconds", 0.0)
            machines |= {record.pop("machine")} if "machine" in record else set()
        runs.append({"seed": seed, "config": number, **weights, **took, **tuned})
        progress.say(
            f"seed {seed}, Config {number}: test accuracy {100 * tuned['test_accuracy'][0]:.1f} % before "
            f"fine-tuning, {100 * tuned['test_accuracy'][-1]:.1f} % after"
        )
    return {
        "config": dataclasses.asdict(config),
        "data": drawn,
        "experts": [
            {"training_loss": record["training_loss"], "target_images_seen": seen, **row}
            for record, seen, row in zip(training, _target_images_seen(context), measured["experts"], strict=True)
        ],
        "runs": runs,
        "seconds": seconds,
        "machine": "; ".join(sorted(machines)),
    }


def remaining(context: Context) -> dict[str, list[int]]:
    """Returns the Configs, one for each seed, whose `coefficients` are to be learned, and whose `fine-tuning` is."""
    left: dict[str, list[int]] = {"coefficients": [], "fine-tuning": []}
    for seed in context.config.seeds:
        for number in CONFIGS:
            weights, tuned = kept(context, number, seed)
            if weights is None and number in context.step_fns:
                left["coefficients"].append(number)
            if tuned is None:
                left["fine-tuning"].append(number)
    return left


def kept(context: Context, number: int, seed: int) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Returns what an earlier run has kept of a Config and a seed: its coefficients, its fine-tuning, None for none."""
    if number in context.step_fns:
        weights = context.stages.read(*_coefficients_stage(context, number, seed))
    else:
        measured = context.stages.read(*measurement(context))
        weights = measured and {"alpha": _heuristic(context, number, measured)}
    tuned = weights and context.stages.read(*_fine_tuning_stage(context, number, seed, weights["alpha"]))
    return weights, tuned


def validate_every(context: Context, number: int) -> int:
    """Returns the steps between two validations of Config 3, 4 or 5."""
    return _GAUSS_NEWTON_VALIDATES_EVERY if number == 5 else context.config.validate_every


def coefficients_key(seed: int) -> jax.Array:
    """Returns what decides a seed's minibatches and directions while the coefficients are learned."""
    return jax.random.fold_in(jax.random.key(seed), _COEFFICIENTS)


def learn_coefficients(
    context: Context,
    number: int,
    key: jax.Array,
    experts: Variables,
    target: Examples,
    *,
    max_steps: int,
    callback: Callable[[glue_jax.types.Progress], None] | None = None,
) -> glue_jax.LearnResult:
    """Learns the coefficients of Config 3, 4 or 5.

    Args:
        context: of `experiments.protocol.context.prepare`; its validation images, if any, judge the plateau.
        number: 3, 4 or 5.
        key: decides the minibatches, the same for these Configs, and the directions.
        experts: stacked, each leaf `[K, ...]`.
        target: the images to learn on.
        max_steps: the most steps.
        callback: of `glue_jax.learn`.

    Returns:
        As `glue_jax.learn` does.

    Raises:
        glue_jax.NonFiniteLossError: a loss or a gradient that is infinite or not a number, with its step.
    """
    config = context.config
    with jax.default_matmul_precision(config.matmul_precision):
        return glue_jax.learn(
            key,
            experts,
            target,
            loss_fn=output_loss(context.problem),
            optimizer=None if number == 5 else context.alpha_optimizer,
            step_fn=context.step_fns[number],
            validation_data=context.validation,
            batch_size=config.alpha_batch_size,
            max_steps=max_steps,
            validate_every=validate_every(context, number),
            patience=None if context.validation is None else config.patience,
            callback=callback,
        )


def fine_tune(context: Context, prior: Variables, seed: int, *, num_epochs: int, stage: Stage) -> dict[str, Any]:
    """Fine-tunes all parameters of a model on a seed's target images.

    Args:
        context: of `experiments.protocol.context.prepare`.
        prior: the model to begin with.
        seed: of target images, minibatches and augmentation.
        num_epochs: of all target images.
        stage: counts the epochs.

    Returns:
        `test_loss` and `test_accuracy`, of the prior (epoch 0) and after each epoch, and `training_loss` of each epoch.

    Raises:
        FloatingPointError: a loss that is infinite or not a number, with its epoch and step.
    """
    measures = [context.evaluate(prior, context.test)]
    losses = []

    def after_epoch(variables: Variables, loss: np.ndarray) -> None:
        losses.append(float(loss[0]))
        measures.append(context.evaluate(jax.tree.map(lambda leaf: leaf[0], variables), context.test))
        stage.advance()

    train(
        context.tuning,
        jax.random.fold_in(jax.random.key(seed), _FINE_TUNING)[None],
        jax.tree.map(lambda leaf: leaf[None], prior),
        context.train,
        jnp.asarray(context.targets[seed])[None],
        num_epochs=num_epochs,
        after_epoch=after_epoch,
    )
    return {
        "test_loss": [row["loss"] for row in measures],
        "test_accuracy": [row["accuracy"] for row in measures],
        "training_loss": losses,
    }


def _heuristic(context: Context, number: int, measured: dict[str, Any]) -> list[float]:
    """The coefficients of Configs 1 and 2."""
    if number == 1:
        weights = glue_jax.coefficients.data_size_weights([len(rows) for rows in context.splits.experts])
    else:
        weights = glue_jax.coefficients.proxy_accuracy_weights(
            [row["validation_accuracy"] for row in measured["experts"]]
        )
    return np.asarray(weights).tolist()


def _target_images_seen(context: Context) -> list[int]:
    """How many of the first seed's target images each expert was trained on: both are drawn from the same rest."""
    target = context.targets[context.config.seeds[0]]
    return [len(np.intersect1d(rows, target)) for rows in context.splits.experts]


def _coefficients_stage(context: Context, number: int, seed: int) -> tuple[str, dict[str, Any]]:
    """The name of a stage that learns coefficients, and all that it depends on."""
    fields = part(context.config, CoefficientFields)
    depends_on = {
        **context.expert_fields,
        **{name: value for name, value in fields.items() if name not in _NOT_USED.get(number, ())},
        "experts": context.config.num_experts,
        "seed": seed,
        "code": context.code(_coefficients),
    }
    return f"coefficients/seed{seed}-config{number}", depends_on


def _coefficients(
    context: Context,
    number: int,
    seed: int,
    target: Examples,
    experts: Variables,
    measured: dict[str, Any],
    stage: Stage,
) -> dict[str, Any]:
    """The coefficients of one Config, and how they were learned."""
    config = context.config
    if number not in context.step_fns:
        return {"alpha": _heuristic(context, number, measured)}
    steps_done = 0

    def callback(progress: glue_jax.types.Progress) -> None:
        nonlocal steps_done
        stage.advance(progress.step - steps_done)
        steps_done = progress.step

    def compute() -> dict[str, Any]:
        key = coefficients_key(seed)
        result = learn_coefficients(
            context, number, key, experts, target, max_steps=config.alpha_steps, callback=callback
        )
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

    learned = context.stages.run(*_coefficients_stage(context, number, seed), compute)
    stage.skip(config.alpha_steps - steps_done)
    return learned


def _fine_tuning_stage(context: Context, number: int, seed: int, alpha: list[float]) -> tuple[str, dict[str, Any]]:
    """The name of a stage that fine-tunes, and all that it depends on: the coefficients, not the way to them."""
    config = context.config
    depends_on = {
        **context.expert_fields,
        **part(config, FineTuningFields),
        "experts": config.num_experts,
        "target_examples": config.target_examples,
        "seed": seed,
        "alpha": alpha,
        "code": context.code(_fine_tune, has_steps=False),
    }
    return f"fine-tuning/seed{seed}-config{number}", depends_on


def _fine_tune(
    context: Context, number: int, seed: int, experts: Variables, alpha: list[float], stage: Stage
) -> dict[str, Any]:
    """Test loss and accuracy of the prior (epoch 0), and after each epoch of fine-tuning all of its parameters."""
    config = context.config

    def compute() -> dict[str, Any]:
        prior = glue_jax.blend(experts, jnp.asarray(alpha, jnp.float32))
        return fine_tune(context, prior, seed, num_epochs=context.config.fine_tuning_epochs, stage=stage)

    stage_of_this = _fine_tuning_stage(context, number, seed, alpha)
    if context.stages.read(*stage_of_this) is not None:
        stage.skip(config.fine_tuning_epochs)
    return context.stages.run(*stage_of_this, compute)
