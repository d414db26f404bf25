"""One training run that writes a checkpoint after each of its last epochs, for `experiments.studies.last_checkpoints`.

The checkpoints are written by orbax, and read back by `glue_jax.checkpoints.load_experts`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.models.network import Variables
from experiments.protocol.context import Context
from experiments.protocol.splits import Indices
from experiments.protocol.training import make_trainer, train
from experiments.runtime import checkpoints
from experiments.runtime.progress import Stage
from experiments.runtime.stages import DamagedStageError
from glue_jax.checkpoints import load_experts
from glue_jax.paths import by_path, slashed

MODEL, AVERAGES = "model", "averages"
"""The parts of a checkpoint that are read: the variables, and the moving averages of the parameters by decay."""
# A seed's key is folded with the first number. The protocol and the other studies have other numbers. The result is
# folded with the second number. The trainer has other numbers.
_TRAINING, _INITIALIZATION = 7, 2


class Images(NamedTuple):
    """The images of a seed, as rows of the training split. No image is in both.

    Attributes:
        training: the images to train the network on, `[n]`.
        held_out: the images to learn the coefficients on, `[m]`.
    """

    training: Indices
    held_out: Indices


class MovingAverages(NamedTuple):
    """The state of `moving_averages`.

    Attributes:
        step: the number of steps that were taken, int32 `[]`.
        averages: the average of the parameters for each decay, by `decay_name`.
    """

    step: jax.Array
    averages: dict[str, Any]


def draw_images(context: Context, seed: int) -> Images:
    """Draws the images of a seed: `expert_examples` to train on, and `target_examples` others.

    Raises:
        ValueError: if there are fewer images.
    """
    config, rest = context.config, context.splits.rest
    if config.expert_examples + config.target_examples > len(rest):
        raise ValueError(
            f"expert_examples is {config.expert_examples} and target_examples is {config.target_examples}, but there "
            f"are {len(rest)} images to draw both from"
        )
    rows = np.random.default_rng([seed, 4]).permutation(rest)
    cuts = np.cumsum([config.expert_examples, config.target_examples])
    training, held_out, _ = np.split(rows, cuts)
    return Images(training, held_out)


def moving_averages(decays: Sequence[float]) -> optax.GradientTransformation:
    """Returns a last link for `optax.chain` that keeps exponential moving averages of the parameters.

    It does not change the updates. After step t an average is `decay * average + (1 - decay) * parameters`, where the
    decay is at most t / (t + 9). So the first parameters are soon forgotten.
    """

    def init(params: Any) -> MovingAverages:
        averages = {decay_name(decay): jax.tree.map(jnp.copy, params) for decay in decays}
        return MovingAverages(jnp.zeros((), jnp.int32), averages)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, MovingAverages]:
        new, step = optax.apply_updates(params, updates), state.step + 1
        averages = {}
        for decay in decays:
            now = jnp.minimum(decay, step / (step + 9))
            name = decay_name(decay)
            averages[name] = optax.incremental_update(new, state.averages[name], 1 - now)
        return updates, MovingAverages(step, averages)

    return optax.GradientTransformation(init, update)


def decay_name(decay: float) -> str:
    """Returns the name of a decay in a checkpoint: that of 0.99 is `decay_0_99`."""
    return f"decay_{decay}".replace(".", "_")


def train_run(
    context: Context, images: Images, seed: int, decays: Sequence[float], folder: Path, bar: Stage
) -> dict[str, Any]:
    """Trains a network at a constant learning rate, and writes a checkpoint after each of its last epochs.

    Args:
        context: what `experiments.protocol.context.prepare` returned. The last `num_experts` of the `expert_epochs` are
            kept.
        images: the images of the seed.
        seed: the seed of the first weights, the minibatches and the augmentation.
        decays: the decays of the moving averages of the parameters.
        folder: the folder of the checkpoints. Each checkpoint is a folder, named by the number of its epoch.
        bar: a bar that advances by one after each epoch.

    Returns:
        `training_loss` by epoch, and `checksums` of the models by epoch.

    Raises:
        FloatingPointError: if a training loss is infinite or NaN; the error has the epoch and the step.
    """
    config = context.config
    adam = optax.adam(config.expert_learning_rate, b1=config.expert_b1, b2=config.expert_b2)
    optimizer = optax.chain(adam, moving_averages(decays))
    trainer = make_trainer(
        context.problem, optimizer, batch_size=config.expert_batch_size, augmentation=config.augmentation
    )
    key = jax.random.fold_in(jax.random.key(seed), _TRAINING)
    initial = jax.jit(context.problem.network.init)(jax.random.fold_in(key, _INITIALIZATION))
    start, rows = jax.tree.map(lambda leaf: leaf[None], initial), jnp.asarray(images.training)[None]
    found: dict[str, Any] = {"training_loss": [], "checksums": {}}
    epochs = train(trainer, key[None], start, context.train, rows, num_epochs=config.expert_epochs)
    for epoch, (state, loss) in enumerate(epochs):
        found["training_loss"].append(float(loss[0]))
        if epoch >= config.expert_epochs - config.num_experts:
            variables, (adam_state, averages) = jax.tree.map(lambda leaf: leaf[0], (state.variables, state.opt_state))
            content = {MODEL: variables, AVERAGES: averages.averages, "optimizer": adam_state}
            checkpoints.save(folder / str(epoch + 1), content)
            found["checksums"][str(epoch + 1)] = checkpoints.checksum(variables)
        bar.advance()
    return found


def load_models(context: Context, folder: Path, trained: dict[str, Any]) -> Variables:
    """Returns the last `num_experts` models of a run of `train_run`, stacked, each leaf `[K, ...]`.

    Raises:
        DamagedStageError: if a checkpoint is not what was written.
    """
    like = jax.eval_shape(context.problem.network.init, jax.random.key(0))
    models = _keys_of(like, load_experts(folder, last=context.config.num_experts, subtree=MODEL))
    for index, (epoch, expected) in enumerate(trained["checksums"].items()):
        if checkpoints.checksum(jax.tree.map(lambda leaf, at=index: leaf[at], models)) != expected:
            raise DamagedStageError(folder / epoch, "its arrays are not what was written: their checksums differ")
    return models


def load_average(context: Context, folder: Path, decay: float) -> Any:
    """Returns the moving average of the parameters at the end of a run."""
    like = jax.eval_shape(context.problem.network.init, jax.random.key(0))["params"]
    average = load_experts(folder, last=1, subtree=f"{AVERAGES}/{decay_name(decay)}")
    return _keys_of(like, jax.tree.map(lambda leaf: leaf[0], average))


def _keys_of(like: Any, tree: Any) -> Any:
    """Returns a tree with the keys of another tree, because orbax makes text of the numbers of NNX's lists."""
    leaves = by_path(tree)
    return jax.tree_util.tree_map_with_path(lambda at, _: leaves[slashed(at)], like)
