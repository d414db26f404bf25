"""What `experiments.studies.ablation` measures: each recipe's model, before fine-tuning and after."""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import glue_jax
from experiments.models.network import Variables
from experiments.models.permutations import SPECS
from experiments.protocol.config import CoefficientFields, FineTuningFields, part
from experiments.protocol.context import Context
from experiments.protocol.data import Examples
from experiments.protocol.expert_training import measured_experts, train_experts
from experiments.protocol.fine_tuning import fine_tune
from experiments.protocol.passes import passes_of
from experiments.protocol.run import kept
from experiments.protocol.training import cross_entropy
from experiments.runtime.sources import functions_in
from experiments.runtime.stages import Stages
from experiments.studies.ablation.learners import Learner, learn_beta, make_learner
from experiments.studies.ablation.prerequisites import Alignment, Measured
from experiments.studies.ablation.recipes import Recipe
from experiments.studies.frame import slug
from experiments.studies.refreshing import REFRESH_BATCH, REFRESH_IMAGES, has_statistics, refresh_batches, refreshed


def measure(context: Context, recipes: list[Recipe], num_epochs: int, stages: Stages) -> dict[str, Any]:
    """Measures what is not measured yet.

    Args:
        context: the context of the run whose experts these are. Missing experts are trained.
        recipes: the recipes to follow.
        num_epochs: the number of epochs of fine-tuning.
        stages: the stages that keep the measurements.

    Returns:
        A dict that JSON holds: `config`, `data`, `experts` (the rows of `measured_experts`), `ensemble` (test loss
            and accuracy of the experts' mean probabilities), and `rows`. There is a row for each recipe and seed. It
            has `recipe`, `part`, `seed`, `test_loss` and `test_accuracy` (of the prior and after each epoch),
            `validation_loss` and `validation_accuracy` (of the prior, on the images that judged it), `training_loss` of
            each epoch, `forward_passes` (of one model on one image), `prior_seconds` (with compilation, without the
            experts' alignment) and `machine`. If the coefficients are learned, it also has `alpha`, `temperature`,
            `steps` and `learned_on`, a machine.
    """
    experts, _ = train_experts(context)
    table = measured_experts(context, experts)["experts"]
    stacked = glue_jax.stack_experts(experts)
    aligned = functools.cache(functools.partial(_aligned, context, stacked))
    measured = Measured(context.problem, aligned, table, context.validation, context.evaluate)
    learning_fields = {**context.bank_fields, **part(context.config, CoefficientFields)}
    fields = {**learning_fields, **part(context.config, FineTuningFields)}
    bar = context.progress.stage("Recipes", len(recipes) * len(context.config.seeds) * (1 + num_epochs))

    def test(model: Variables) -> dict[str, float]:
        bar.advance()
        return context.evaluate(model, context.test)

    def measure_row(recipe: Recipe, learner: Callable[[], Learner], seed: int) -> dict[str, Any]:
        name = f"ablation/{slug(recipe.name)}-seed{seed}"
        code = context.code(measure, *functions_in(recipe))
        how = {"recipe": recipe.fingerprint, "seed": seed, "code": code}

        def compute() -> dict[str, Any]:
            target, learned = context.target(seed), None
            # The alignment is computed once, so it is not part of any recipe's seconds.
            measured.experts(recipe.aligned)
            if recipe.step_fn is not None:
                # The coefficients are kept before fine-tuning starts, because both may take long.
                stage = f"{name}-coefficients", {**learning_fields, **how}
                learned = stages.run(*stage, lambda: _learn(context, learner(), target, seed))
                learner()
            begin = time.perf_counter()
            variables, details = _model(context, recipe, measured, learner, learned, target)
            jax.block_until_ready(variables)
            seconds = time.perf_counter() - begin + (learned["seconds"] if learned else 0.0)
            judged = context.evaluate(variables, context.validation)
            rows = context.targets[seed]
            tuned = fine_tune(context.tuning, variables, seed, context.train, rows, num_epochs=num_epochs, test=test)
            judged = {f"validation_{name}": value for name, value in judged.items()}
            return {**details, **judged, **tuned, "prior_seconds": seconds}

        stage = name, {**fields, **how, "epochs": num_epochs}
        row = stages.read(*stage) or _kept(context, recipe, measured, seed, num_epochs)
        if row is not None:
            bar.skip(1 + num_epochs)
        return row or stages.run(*stage, compute)

    rows = []
    for recipe in recipes:
        learner = functools.cache(functools.partial(make_learner, context, recipe, measured))
        for seed in context.config.seeds:
            row = measure_row(recipe, learner, seed)
            rows.append({"recipe": recipe.name, "part": recipe.part, "seed": seed, **row})
            context.progress.say(
                f"{recipe.name}, seed {seed}: {100 * row['test_accuracy'][0]:.1f} % before fine-tuning"
            )
    of_ensemble = {**context.bank_fields, "test": len(context.test.labels), "code": context.code(_ensemble)}
    ensemble = stages.run("ablation/ensemble", of_ensemble, lambda: _ensemble(context, experts))
    return {
        "config": dataclasses.asdict(context.config),
        "data": context.dataset.name,
        "experts": table,
        "ensemble": ensemble,
        "rows": rows,
    }


def _kept(context: Context, recipe: Recipe, measured: Measured, seed: int, num_epochs: int) -> dict[str, Any] | None:
    """Returns a row of `measure` for one of the paper's Configs, if the experiment has it.

    This can save hours of work.
    """
    config, judging, number = context.config, context.validation, recipe.paper_config
    if number is None or num_epochs > config.fine_tuning_epochs:
        return None
    weights, tuned = kept(context, number, seed)
    if weights is None or tuned is None:
        return None
    variables = glue_jax.blend(measured.experts("no"), jnp.asarray(weights["alpha"], jnp.float32))
    judged = context.evaluate(variables, judging)
    details = {"alpha": weights["alpha"]}
    if "validation_steps" in weights:
        details |= {"temperature": None, "steps": weights["validation_steps"][-1]}
    return {
        **details,
        **{f"validation_{name}": value for name, value in judged.items()},
        **{name: tuned[name][: 1 + num_epochs] for name in ("test_loss", "test_accuracy")},
        "training_loss": tuned["training_loss"][:num_epochs],
        "forward_passes": passes_of(config, len(judging.labels), number, weights)[0],
        "prior_seconds": weights.get("seconds", 0.0),
        "machine": tuned["machine"],
        "learned_on": weights.get("machine"),
    }


def _model(
    context: Context,
    recipe: Recipe,
    measured: Measured,
    learner: Callable[[], Learner],
    learned: dict[str, Any] | None,
    target: Examples,
) -> tuple[Variables, dict[str, Any]]:
    """Returns a recipe's model, and what is known of it: `forward_passes`, and what `_learn` returned."""
    measured.passes, passes, details = 0, 0, {}
    if recipe.merge is not None:
        variables = recipe.merge(measured, refresh_batches(target.images))
    elif learned is None:
        alpha = recipe.start(measured)
        variables = glue_jax.blend(measured.experts(recipe.aligned), alpha)
        details["alpha"] = np.asarray(alpha).tolist()
    else:
        details = {name: learned[name] for name in ("alpha", "temperature", "steps")}
        details["learned_on"] = learned["machine"]
        alpha = jnp.asarray(learned["alpha"], jnp.float32)
        if recipe.temperature:
            alpha = glue_jax.links.Tempered(alpha, jnp.float32(learned["temperature"]))
        variables = learner().merge_fn(learner().experts, alpha)
        # The start is computed once, but every seed needs it.
        measured.passes, passes = learner().start_passes, learned["forward_passes"]
    if recipe.statistics != "blended" and has_statistics(context.problem):
        variables = refreshed(context.problem, variables, target.images)
        passes += min(len(target.images), REFRESH_IMAGES)
    return variables, {**details, "forward_passes": measured.passes + passes}


def _learn(context: Context, learner: Learner, target: Examples, seed: int) -> dict[str, Any]:
    """Learns coefficients. Returns `alpha`, `temperature`, `steps` and `forward_passes`."""
    learned = learn_beta(context, learner, target, seed)
    alpha, temperature = learned.alpha, None
    if learner.recipe.temperature:
        alpha, temperature = alpha.coefficients, float(alpha.temperature)
    return {
        "alpha": np.asarray(alpha).tolist(),
        "temperature": temperature,
        "steps": learned.steps,
        "forward_passes": learned.passes,
    }


def _aligned(context: Context, experts: Variables, how: Alignment) -> Variables:
    """The experts with their units permuted."""
    if how == "no":
        return experts
    spec = SPECS[context.config.network](**context.config.network_options)
    reference = 0 if how == "to the first" else None
    return jax.tree.map(jnp.asarray, glue_jax.merging.align_experts(experts, spec, reference=reference).experts)


def _ensemble(context: Context, experts: list[Variables]) -> dict[str, Any]:
    """Returns the test loss and accuracy of the experts' mean probabilities. The ensemble is K networks, not one."""
    logits = jax.jit(context.problem.logits)
    images, labels = context.test
    rows = []
    for at in range(0, len(labels), REFRESH_BATCH):
        batch = images[at : at + REFRESH_BATCH]
        log_probabilities = jnp.stack([jax.nn.log_softmax(logits(expert, batch)) for expert in experts])
        rows.append(jax.nn.logsumexp(log_probabilities, axis=0) - jnp.log(len(experts)))
    mean = jnp.concatenate(rows)
    return {
        "test_loss": float(cross_entropy(mean, labels)),
        "test_accuracy": float(1 - glue_jax.objectives.error_rate(mean, labels)),
    }
