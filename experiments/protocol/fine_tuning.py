"""The fine-tuning of a blend on a seed's target images. All fine-tunings of a seed see the same minibatches."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import glue_jax
from experiments.models.network import Variables
from experiments.protocol.config import FineTuningFields, part
from experiments.protocol.context import Context
from experiments.protocol.data import Examples
from experiments.protocol.splits import Indices
from experiments.protocol.training import Trainer, train
from experiments.runtime.progress import Stage

# A seed's key is folded with this number, so that no two uses share a key. Learning has another number.
_FINE_TUNING = 3


def fine_tune(
    trainer: Trainer,
    prior: Variables,
    seed: int,
    examples: Examples,
    rows: Indices,
    *,
    num_epochs: int,
    test: Callable[[Variables], dict[str, float]],
) -> dict[str, Any]:
    """Fine-tunes all parameters of a model on a seed's target images.

    Args:
        trainer: what `experiments.protocol.training.make_trainer` returned.
        prior: the model to begin with.
        seed: the seed of minibatches and augmentation.
        examples: the training split.
        rows: the rows of the target images in the training split, `[n]`.
        num_epochs: the number of epochs over all target images.
        test: `test(model)` returns `loss` and `accuracy` on the test images.

    Returns:
        `test_loss` and `test_accuracy` of the prior (epoch 0) and after each epoch, and `training_loss` of each epoch.

    Raises:
        FloatingPointError: if a loss is infinite or NaN; the error has the epoch and the step.
    """
    key = jax.random.fold_in(jax.random.key(seed), _FINE_TUNING)
    start = jax.tree.map(lambda leaf: leaf[None], prior)
    measures, losses = [test(prior)], []
    for state, loss in train(trainer, key[None], start, examples, jnp.asarray(rows)[None], num_epochs=num_epochs):
        measures.append(test(jax.tree.map(lambda leaf: leaf[0], state.variables)))
        losses.append(float(loss[0]))
    return {
        "test_loss": [row["loss"] for row in measures],
        "test_accuracy": [row["accuracy"] for row in measures],
        "training_loss": losses,
    }


def fine_tuning_stage(context: Context, number: int, seed: int, alpha: list[float]) -> tuple[str, dict[str, Any]]:
    """Returns the name of a stage that fine-tunes, and all that it depends on, such as the coefficients themselves."""
    config = context.config
    depends_on = {
        **context.bank_fields,
        **part(config, FineTuningFields),
        "target_examples": config.target_examples,
        "seed": seed,
        "alpha": alpha,
        "code": context.code(fine_tuned),
    }
    return f"fine-tuning/seed{seed}-config{number}", depends_on


def fine_tuned(
    context: Context, number: int, seed: int, experts: Variables, alpha: list[float], stage: Stage
) -> dict[str, Any]:
    """Returns what `fine_tune` returns for the prior of one Config and seed.

    The stage counts the models that are tested.
    """
    num_epochs = context.config.fine_tuning_epochs

    def test(model: Variables) -> dict[str, float]:
        stage.advance()
        return context.evaluate(model, context.test)

    def compute() -> dict[str, Any]:
        prior, rows = glue_jax.blend(experts, jnp.asarray(alpha, jnp.float32)), context.targets[seed]
        return fine_tune(context.tuning, prior, seed, context.train, rows, num_epochs=num_epochs, test=test)

    return context.stages.run(*fine_tuning_stage(context, number, seed, alpha), compute, stage, 1 + num_epochs)
