"""The fine-tuning of a blend on a seed's target images. All fine-tunings of a seed see the same minibatches."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import glue_jax
from experiments.models.network import Variables
from experiments.protocol.config import FineTuningFields, part
from experiments.protocol.context import Context
from experiments.protocol.training import train
from experiments.runtime.progress import Stage

# A seed's key is folded with this number, so that no two uses share a key. Learning has another number.
_FINE_TUNING = 3


def fine_tune(context: Context, prior: Variables, seed: int, *, num_epochs: int, stage: Stage) -> dict[str, Any]:
    """Fine-tunes all parameters of a model on a seed's target images.

    Args:
        context: what `experiments.protocol.context.prepare` returned.
        prior: the model to begin with.
        seed: the seed of target images, minibatches and augmentation.
        num_epochs: the number of epochs over all target images.
        stage: the progress bar, which counts the epochs.

    Returns:
        `test_loss` and `test_accuracy` of the prior (epoch 0) and after each epoch, and `training_loss` of each epoch.

    Raises:
        FloatingPointError: if a loss is infinite or NaN; the error has the epoch and the step.
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


def fine_tuning_stage(context: Context, number: int, seed: int, alpha: list[float]) -> tuple[str, dict[str, Any]]:
    """Returns the name of a stage that fine-tunes, and all that it depends on, such as the coefficients themselves."""
    config = context.config
    depends_on = {
        **context.expert_fields,
        **part(config, FineTuningFields),
        "experts": config.num_experts,
        "target_examples": config.target_examples,
        "seed": seed,
        "alpha": alpha,
        "code": context.code(fine_tuned),
    }
    return f"fine-tuning/seed{seed}-config{number}", depends_on


def fine_tuned(
    context: Context, number: int, seed: int, experts: Variables, alpha: list[float], stage: Stage
) -> dict[str, Any]:
    """Returns what `fine_tune` returns for the prior of one Config and seed."""
    config = context.config

    def compute() -> dict[str, Any]:
        prior = glue_jax.blend(experts, jnp.asarray(alpha, jnp.float32))
        return fine_tune(context, prior, seed, num_epochs=context.config.fine_tuning_epochs, stage=stage)

    stage_of_this = fine_tuning_stage(context, number, seed, alpha)
    if context.stages.read(*stage_of_this) is not None:
        stage.skip(config.fine_tuning_epochs)
    return context.stages.run(*stage_of_this, compute)
