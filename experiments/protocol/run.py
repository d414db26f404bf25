"""A run of the paper's section 5: experts, coefficients, priors, fine-tuned models. Each stage's result is kept."""

import dataclasses
from typing import Any

import numpy as np

import glue_jax
from experiments.protocol.coefficients import (
    coefficients_of,
    coefficients_stage,
    heuristic_coefficients,
    make_steps,
)
from experiments.protocol.config import CONFIGS
from experiments.protocol.context import Context, counts
from experiments.protocol.expert_training import measured_experts, measurement, train_experts
from experiments.protocol.fine_tuning import fine_tuned, fine_tuning_stage
from experiments.protocol.passes import prior_cost


def run(context: Context) -> dict[str, Any]:
    """Does what is not done yet, and returns the results.

    Returns:
        A dict that JSON holds. `data` has names and the numbers of images that were drawn. `experts` has a row for each
        expert, with the number of the first seed's target images that it was trained on. `runs` has a row for each seed
        and Config, with what `experiments.protocol.passes.prior_cost` returns. `seconds` has those of each stage.
        `machine` names the machines of all stages. `config` is the config.

    Raises:
        FloatingPointError: if a loss is infinite or NaN; the error has the stage and the step.
    """
    config, progress, target = context.config, context.progress, context.targets[context.config.seeds[0]]
    drawn = counts(context)
    experts, training = train_experts(context)
    measured = measured_experts(context, experts)
    stacked = glue_jax.stack_experts(experts)
    machines = {record["machine"] for record in (*training, measured)}
    seconds = {"Experts": sum(record["seconds"] for record in training), "Experts' accuracies": measured["seconds"]}
    coefficients = progress.stage("Coefficients", len(make_steps(config)) * len(config.seeds) * config.alpha_steps)
    learned = {}
    for seed in config.seeds:
        for number in CONFIGS:
            learned[seed, number] = coefficients_of(context, number, seed, stacked, measured, coefficients)
    tuning = progress.stage("Fine-tuning", len(learned) * (1 + config.fine_tuning_epochs))
    runs = []
    for (seed, number), weights in learned.items():
        tuned = fine_tuned(context, number, seed, stacked, weights["alpha"], tuning)
        took = prior_cost(config, drawn, number, weights, measured)
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
            # Experts' and target images are drawn from the same rest.
            {"training_loss": record["training_loss"], "target_images_seen": len(np.intersect1d(rows, target)), **row}
            for record, rows, row in zip(training, context.splits.experts, measured["experts"], strict=True)
        ],
        "runs": runs,
        "seconds": seconds,
        "machine": "; ".join(sorted(machines)),
    }


def remaining(context: Context) -> dict[str, list[int]]:
    """Returns the Configs whose `coefficients` and `fine-tuning` are missing, once for each seed."""
    left: dict[str, list[int]] = {"coefficients": [], "fine-tuning": []}
    for seed in context.config.seeds:
        for number in CONFIGS:
            weights, tuned = kept(context, number, seed)
            if weights is None and number in make_steps(context.config):
                left["coefficients"].append(number)
            if tuned is None:
                left["fine-tuning"].append(number)
    return left


def kept(context: Context, number: int, seed: int) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Returns the coefficients and the fine-tuning that an earlier run has kept of a Config and a seed, or None."""
    if number in make_steps(context.config):
        weights = context.stages.read(*coefficients_stage(context, number, seed))
    else:
        measured = context.stages.read(*measurement(context))
        weights = measured and {"alpha": heuristic_coefficients(context.splits, number, measured)}
    tuned = weights and context.stages.read(*fine_tuning_stage(context, number, seed, weights["alpha"]))
    return weights, tuned
