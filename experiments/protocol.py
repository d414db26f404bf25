"""The paper's section 5: experts, coefficients (Configs 1 to 4), the prior, the fine-tuned model.

Each stage's result is kept on disk (`experiments.stages`). Configs 3 and 4 see the same minibatches, and so do the four
fine-tunings of a seed.
"""

import dataclasses
import functools
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import glue_jax
from experiments import checkpoints
from experiments.config import CoefficientFields, FineTuningFields, part
from experiments.context import Context, counts, take
from experiments.data import Examples
from experiments.models.network import Variables
from experiments.progress import Stage
from experiments.stages import naming
from experiments.training import train

CONFIGS: Mapping[int, str] = {1: "Data size", 2: "Proxy accuracy", 3: "Full gradient", 4: "GLUE (SPSA)"}
"""The paper's four ways to coefficients, by its numbers."""

# Of the coefficients by step, so many at most are kept, evenly spaced.
_MOST_ALPHAS = 201
# What a seed's key is folded with, so that no two uses share one.
_INITIALIZATION, _EXPERT_TRAINING, _COEFFICIENTS, _FINE_TUNING = range(4)


def run(context: Context) -> dict[str, Any]:
    """Does what is not done yet, and returns the results.

    Args:
        context: of `experiments.context.prepare`.

    Returns:
        A dict that JSON holds: `config`, `data` (names and the counts drawn), `experts` (a row each), `runs` (a row for
        each seed and Config), `seconds` (of each stage), `machine` (all that the stages were made on).

    Raises:
        FloatingPointError: a loss that is infinite or not a number, with its stage and step.
    """
    config, progress = context.config, context.progress
    drawn = counts(context)
    experts, training = _experts(context)
    measured = _measure_experts(context, experts)
    stacked = glue_jax.stack_experts(experts)
    machines = {record["machine"] for record in (*training, measured)}
    seconds = {"Experts": sum(record["seconds"] for record in training), "Experts' accuracies": measured["seconds"]}
    runs = []
    coefficients = progress.stage("Coefficients", 2 * len(config.seeds) * config.alpha_steps)
    tuning = progress.stage("Fine-tuning", len(CONFIGS) * len(config.seeds) * config.fine_tuning_epochs)
    for seed in config.seeds:
        target = take(context.train, context.targets[seed])
        for number in CONFIGS:
            learned = _coefficients(context, number, seed, target, stacked, measured, coefficients)
            tuned = _fine_tune(context, number, seed, stacked, learned["alpha"], tuning)
            for what, record in (("Coefficients", learned), ("Fine-tuning", tuned)):
                name = f"{what}, Config {number}"
                seconds[name] = seconds.get(name, 0.0) + record.pop("seconds", 0.0)
                machines |= {record.pop("machine")} if "machine" in record else set()
            runs.append({"seed": seed, "config": number, **learned, **tuned})
            progress.say(
                f"seed {seed}, Config {number}: test accuracy {100 * tuned['test_accuracy'][0]:.1f} % before "
                f"fine-tuning, {100 * tuned['test_accuracy'][-1]:.1f} % after"
            )
    return {
        "config": dataclasses.asdict(config),
        "data": drawn,
        "experts": [
            {"training_loss": record["training_loss"], **row}
            for record, row in zip(training, measured["experts"], strict=True)
        ],
        "runs": runs,
        "seconds": seconds,
        "machine": "; ".join(sorted(machines)),
    }


def _experts(context: Context) -> tuple[list[Variables], list[dict[str, Any]]]:
    """The trained experts and how their training went."""
    config, stages = context.config, context.stages
    fields = [{**context.expert_fields, "expert": index} for index in range(config.num_experts)]
    names = [f"experts/{index}" for index in range(config.num_experts)]
    places = [stages.path(name, depends_on) for name, depends_on in zip(names, fields, strict=True)]
    missing = [
        index for index, place in enumerate(places) if not (place.is_dir() and stages.read(names[index], fields[index]))
    ]
    stage = context.progress.stage("Experts", config.num_experts * config.expert_epochs)
    # A group is trained anew if any of it is missing, so that the missing ones come out as they would have.
    together = context.trained_together
    groups = [list(range(first, first + together)) for first in range(0, config.num_experts, together)]
    groups = [group for group in groups if set(group) & set(missing)]
    stage.skip((config.num_experts - sum(map(len, groups))) * config.expert_epochs)
    if len(missing) < config.num_experts:
        context.progress.say(f"kept from an earlier run: {config.num_experts - len(missing)} experts")
    for group in groups:
        start = time.perf_counter()
        with naming(f"experts {group}"):
            trained, losses = _train_experts(context, group, stage)
        for position, index in enumerate(group):
            if index not in missing:
                continue
            checkpoints.save(places[index], _model(trained, position))
            result = {
                "training_loss": [float(loss[position]) for loss in losses],
                "seconds": (time.perf_counter() - start) / len(group),
            }
            stages.write(names[index], fields[index], result)
    like = jax.eval_shape(context.problem.network.init, jax.random.key(0))
    records = [stages.read(name, depends_on) or {} for name, depends_on in zip(names, fields, strict=True)]
    return [checkpoints.load(place, like) for place in places], records


def _train_experts(context: Context, group: list[int], stage: Stage) -> tuple[Variables, list[np.ndarray]]:
    """Trains some experts at once; their variables, stacked, and their mean losses in each epoch."""
    config = context.config
    key = jax.random.key(config.expert_seed)
    numbers = jnp.asarray(group, jnp.uint32)
    initializations = jnp.zeros_like(numbers) if config.initialization == "common" else numbers
    losses = []

    def after_epoch(_: Variables, loss: np.ndarray) -> None:
        losses.append(loss)
        stage.advance(len(group))

    trained = train(
        context.training,
        _keys(jax.random.fold_in(key, _EXPERT_TRAINING), numbers),
        jax.vmap(context.problem.network.init)(_keys(jax.random.fold_in(key, _INITIALIZATION), initializations)),
        context.train,
        jnp.asarray(np.stack([context.splits.experts[index] for index in group])),
        num_epochs=config.expert_epochs,
        after_epoch=after_epoch,
    )
    for index, loss in zip(group, losses[-1], strict=True):
        context.progress.say(f"expert {index}: training loss {loss:.3f} in the last epoch")
    return trained, losses


def _measure_experts(context: Context, experts: list[Variables]) -> dict[str, Any]:
    """Each expert's loss and accuracy on validation, test and (the first seed's) target images: Table 1."""
    config = context.config
    first_seed = config.seeds[0]

    def compute() -> dict[str, Any]:
        images = {
            "validation": context.validation,
            "target": take(context.train, context.targets[first_seed]),
            "test": context.test,
        }
        rows = []
        for expert in experts:
            measures = {name: context.evaluate(expert, examples) for name, examples in images.items()}
            rows.append({f"{name}_{what}": value for name, row in measures.items() for what, value in row.items()})
        return {"experts": rows}

    depends_on = {
        **context.expert_fields,
        "experts": config.num_experts,
        "seed": first_seed,
        "target_examples": config.target_examples,
        "test_examples": config.test_examples,
    }
    return context.stages.run("experts/accuracies", depends_on, compute)


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
    if number == 1:
        weights = glue_jax.data_size_weights([len(rows) for rows in context.splits.experts])
        return {"alpha": np.asarray(weights).tolist()}
    if number == 2:
        weights = glue_jax.proxy_accuracy_weights([row["validation_accuracy"] for row in measured["experts"]])
        return {"alpha": np.asarray(weights).tolist()}
    steps_done = 0

    def callback(progress: glue_jax.Progress) -> None:
        nonlocal steps_done
        stage.advance(progress.step - steps_done)
        steps_done = progress.step

    def compute() -> dict[str, Any]:
        with jax.default_matmul_precision(config.matmul_precision):
            result = glue_jax.learn(
                jax.random.fold_in(jax.random.key(seed), _COEFFICIENTS),
                experts,
                target,
                loss_fn=context.problem.loss,
                optimizer=context.alpha_optimizer,
                step_fn=context.step_fns[number],
                validation_data=context.validation,
                batch_size=config.alpha_batch_size,
                max_steps=config.alpha_steps,
                validate_every=config.validate_every,
                patience=config.patience,
                callback=callback,
            )
        history = result.history
        alphas = np.concatenate([history.metrics.alpha, np.asarray(result.last_alpha)[None]])
        kept = np.unique(np.linspace(0, len(alphas) - 1, _MOST_ALPHAS).round().astype(int))
        return {
            "alpha": np.asarray(result.alpha).tolist(),
            "validation_steps": history.validation_steps.tolist(),
            "validation_loss": history.validation_values.tolist(),
            "alpha_steps": kept.tolist(),
            "alphas": alphas[kept].tolist(),
        }

    fields = part(config, CoefficientFields)
    if number == 3:
        for only_of_spsa in ("radius", "num_directions", "directions"):
            del fields[only_of_spsa]
    depends_on = {**context.expert_fields, **fields, "experts": config.num_experts, "seed": seed}
    learned = context.stages.run(f"coefficients/seed{seed}-config{number}", depends_on, compute)
    stage.skip(config.alpha_steps - steps_done)
    return learned


def _fine_tune(
    context: Context, number: int, seed: int, experts: Variables, alpha: list[float], stage: Stage
) -> dict[str, Any]:
    """Test loss and accuracy of the prior (epoch 0), and after each epoch of fine-tuning all of its parameters."""
    config = context.config

    def compute() -> dict[str, Any]:
        prior = glue_jax.blend(experts, jnp.asarray(alpha, jnp.float32))
        measures = [context.evaluate(prior, context.test)]
        losses = []

        def after_epoch(variables: Variables, loss: np.ndarray) -> None:
            losses.append(float(loss[0]))
            measures.append(context.evaluate(_model(variables, 0), context.test))
            stage.advance()

        train(
            context.tuning,
            jax.random.fold_in(jax.random.key(seed), _FINE_TUNING)[None],
            jax.tree.map(lambda leaf: leaf[None], prior),
            context.train,
            jnp.asarray(context.targets[seed])[None],
            num_epochs=config.fine_tuning_epochs,
            after_epoch=after_epoch,
        )
        return {
            "test_loss": [row["loss"] for row in measures],
            "test_accuracy": [row["accuracy"] for row in measures],
            "training_loss": losses,
        }

    # It depends on the coefficients, not on the way to them.
    depends_on = {
        **context.expert_fields,
        **part(config, FineTuningFields),
        "experts": config.num_experts,
        "target_examples": config.target_examples,
        "seed": seed,
        "alpha": alpha,
    }
    name = f"fine-tuning/seed{seed}-config{number}"
    if context.stages.read(name, depends_on) is not None:
        stage.skip(config.fine_tuning_epochs)
    return context.stages.run(name, depends_on, compute)


def _model(variables: Variables, index: int) -> Variables:
    """One of the models that were trained at once."""
    return jax.tree.map(lambda leaf: leaf[index], variables)


def _keys(key: jax.Array, numbers: jax.Array) -> jax.Array:
    """A key for each number."""
    return jax.vmap(functools.partial(jax.random.fold_in, key))(numbers)
