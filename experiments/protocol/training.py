"""Supervised training of a network, an epoch at a time under one jit, and its evaluation."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

import glue_jax
from experiments.models import Network
from experiments.models.network import Variables
from experiments.protocol.data import Examples
from experiments.runtime.devices import put, shard_batch
from glue_jax.batches import on_cpu

Augmentation = Literal["crop_flip", "crop", "none"]
_EVALUATION_BATCH = 256
# A model's key is folded with these numbers, so that minibatches and augmentation share no key.
_MINIBATCHES, _AUGMENTATION = range(2)


class TrainingState(NamedTuple):
    """The state of training. Every leaf has a leading axis of the M models that are trained at once.

    Attributes:
        variables: the variables of the networks, each leaf `[M, ...]`.
        opt_state: the optimizer's state for `variables["params"]`.
    """

    variables: Variables
    opt_state: optax.OptState


class EpochFn(Protocol):
    """One epoch of training of M models at once."""

    def __call__(
        self, keys: jax.Array, epoch: int, state: TrainingState, examples: Examples, rows: jax.Array, /
    ) -> tuple[TrainingState, np.ndarray]:
        """Trains model i on `examples[rows[i]]`. Returns the next state, and the losses of the S steps, `[M, S]`.

        The state that goes in is donated.
        """
        ...


class Trainer(NamedTuple):
    """How models are trained.

    Attributes:
        init: `init(variables) -> state`, where each leaf of the variables is `[M, ...]`.
        steps: `steps(keys, first_step, state, examples, rows) -> (state, losses)`, jitted. It takes a step on each of
            the minibatches `rows` `[M, S, B]`. The losses are `[M, S]`. The state that goes in is donated.
        epoch: one epoch.
    """

    init: Callable[[Variables], TrainingState]
    steps: jax.stages.Wrapped
    epoch: EpochFn


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """A network with the preparation of its images.

    Attributes:
        network: the network, as pure functions.
        mean: the mean of each channel over the training split, float32 `[C]`.
        std: the standard deviation of each channel over the training split, float32 `[C]`.
        mesh: the devices over which minibatches are sharded. None is one device.
    """

    network: Network
    mean: np.ndarray
    std: np.ndarray
    mesh: jax.sharding.Mesh | None = None

    def normalize(self, images: jax.Array) -> jax.Array:
        """Returns uint8 images as float32 with mean 0 and standard deviation 1 over the training split.

        Every forward pass begins here, so the minibatch is sharded here.
        """
        images = shard_batch(images, self.mesh)
        mean, std = (jnp.expand_dims(values, (0, 1, 2)) for values in (self.mean, self.std))
        return (images.astype(jnp.float32) / 255 - mean) / std

    def minibatch_logits(self, variables: Variables, images: jax.Array) -> jax.Array:
        """Returns logits `[B, classes]` with BatchNorm by the minibatch.

        It does not use the statistics in the variables.
        """
        return self.network.apply_minibatch(variables["params"], self.normalize(images))[0]

    def minibatch_statistics(self, variables: Variables, images: jax.Array) -> Any:
        """BatchNorm's statistics of one minibatch, for `glue_jax.merging.refresh_statistics`."""
        return self.network.apply_minibatch(variables["params"], self.normalize(images))[1]

    def logits(self, variables: Variables, images: jax.Array) -> jax.Array:
        """Logits `[B, classes]` in evaluation mode."""
        return self.network.apply(variables, self.normalize(images))

    def loss(self, variables: Variables, batch: Examples) -> jax.Array:
        """The mean cross-entropy in evaluation mode, which the coefficients minimise (Eq. 2)."""
        return cross_entropy(self.logits(variables, batch.images), batch.labels)

    def measures(self, variables: Variables, batch: Examples) -> dict[str, jax.Array]:
        """The mean cross-entropy and the accuracy (a fraction) in evaluation mode."""
        logits = self.logits(variables, batch.images)
        accuracy = jnp.mean(jnp.argmax(logits, axis=-1) == batch.labels)
        return {"loss": cross_entropy(logits, batch.labels), "accuracy": accuracy}


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the mean cross-entropy in nats, `[]`, of logits `[B, C]` and labels `[B]`."""
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def output_loss(
    problem: Problem,
    *,
    by_minibatch: bool = False,
    objective: Callable[[jax.Array, jax.Array], jax.Array] = cross_entropy,
) -> glue_jax.OutputLoss:
    """Returns a loss in two parts, the logits and their objective. By default it is `problem.loss`.

    Equal arguments have one such loss, so a function that takes it as a static argument compiles once.

    Args:
        problem: the network, with the preparation of its images.
        by_minibatch: whether BatchNorm takes the statistics of the minibatch.
        objective: a function from logits `[B, C]` and labels `[B]` to the loss.
    """
    return _output_loss(problem, by_minibatch, objective)


@functools.cache
def _output_loss(
    problem: Problem, by_minibatch: bool, objective: Callable[[jax.Array, jax.Array], jax.Array]
) -> glue_jax.OutputLoss:
    """Returns an `output_loss`. The cache tells arguments by position."""

    def outputs_fn(variables: Variables, batch: Examples) -> jax.Array:
        logits = problem.minibatch_logits if by_minibatch else problem.logits
        return logits(variables, batch.images)

    def loss(logits: jax.Array, batch: Examples) -> jax.Array:
        return objective(logits, batch.labels)

    return glue_jax.OutputLoss(outputs_fn, loss)


def make_trainer(
    problem: Problem, optimizer: optax.GradientTransformation, *, batch_size: int, augmentation: Augmentation
) -> Trainer:
    """Returns a trainer. It is compiled once for each number of models and of examples.

    An epoch is one `lax.scan` under one jit. On a CPU each step is a jitted call of its own, because XLA:CPU runs the
    backward pass of a convolution many times slower inside a loop.

    Args:
        problem: the network to train, with the preparation of its images.
        optimizer: the optimizer of the parameters.
        batch_size: the number of examples in a minibatch. An epoch leaves out the examples that fill no whole
            minibatch.
        augmentation: the augmentation of each minibatch.
    """

    def loss_fn(params: Any, batch_stats: Any, batch: Examples) -> tuple[jax.Array, Any]:
        variables = {"params": params, "batch_stats": batch_stats}
        logits, batch_stats = problem.network.apply_training(variables, problem.normalize(batch.images))
        return cross_entropy(logits, batch.labels), batch_stats

    def step(key: jax.Array, state: TrainingState, batch: Examples) -> tuple[TrainingState, jax.Array]:
        if augmentation != "none":
            batch = batch._replace(images=crop_and_flip(key, batch.images, flip=augmentation == "crop_flip"))
        params, batch_stats = state.variables["params"], state.variables["batch_stats"]
        (loss, batch_stats), gradient = jax.value_and_grad(loss_fn, has_aux=True)(params, batch_stats, batch)
        updates, opt_state = optimizer.update(gradient, state.opt_state, params)
        variables = {"params": optax.apply_updates(params, updates), "batch_stats": batch_stats}
        return TrainingState(variables=variables, opt_state=opt_state), loss

    def steps(
        key: jax.Array, first_step: jax.Array, state: TrainingState, examples: Examples, batches: jax.Array
    ) -> tuple[TrainingState, jax.Array]:
        def body(state: TrainingState, at: tuple[jax.Array, jax.Array]) -> tuple[TrainingState, jax.Array]:
            number, rows = at
            batch = jax.tree.map(lambda array: array[rows], examples)
            return step(jax.random.fold_in(jax.random.fold_in(key, _AUGMENTATION), number), state, batch)

        if len(batches) == 1:
            state, loss = body(state, (first_step, batches[0]))
            return state, loss[None]
        return jax.lax.scan(body, state, (first_step + jnp.arange(len(batches)), batches))

    def draw(key: jax.Array, epoch: jax.Array, rows: jax.Array) -> jax.Array:
        per_epoch = len(rows) // batch_size
        key = jax.random.fold_in(key, _MINIBATCHES)
        return rows[glue_jax.batches.minibatch_indices(key, epoch * per_epoch, per_epoch, len(rows), batch_size)]

    steps_of_all = jax.jit(jax.vmap(steps, in_axes=(0, None, 0, None, 0)), donate_argnums=2)
    draw_of_all = jax.jit(jax.vmap(draw, in_axes=(0, None, 0)))

    def epoch_fn(
        keys: jax.Array, epoch: int, state: TrainingState, examples: Examples, rows: jax.Array
    ) -> tuple[TrainingState, np.ndarray]:
        if rows.shape[1] < batch_size:
            raise ValueError(f"{rows.shape[1]} examples do not fill a minibatch of {batch_size}")
        batches = draw_of_all(keys, np.int32(epoch), rows)
        per_epoch = batches.shape[1]
        first_step = np.int32(epoch * per_epoch)
        if not on_cpu(examples):
            state, losses = steps_of_all(keys, first_step, state, examples, batches)
            return state, np.asarray(losses)
        batches, losses = np.asarray(batches), []
        for offset in range(per_epoch):
            state, loss = steps_of_all(keys, first_step + offset, state, examples, batches[:, offset : offset + 1])
            losses.append(loss)
        return state, np.concatenate(jax.device_get(losses), axis=1)

    def init(variables: Variables) -> TrainingState:
        # A copy, because an epoch donates its state. It is put where an epoch leaves its state. Otherwise the second
        # epoch would be compiled anew.
        variables = jax.tree.map(jnp.copy, variables)
        state = TrainingState(variables=variables, opt_state=jax.vmap(optimizer.init)(variables["params"]))
        return put(state, problem.mesh)

    return Trainer(init=init, steps=steps_of_all, epoch=epoch_fn)


def train(
    trainer: Trainer,
    keys: jax.Array,
    variables: Variables,
    examples: Examples,
    rows: jax.Array,
    *,
    num_epochs: int,
) -> Iterator[tuple[TrainingState, np.ndarray]]:
    """Trains M models at once, an epoch for each item that is taken.

    Args:
        trainer: what `make_trainer` returned.
        keys: a `jax.random.key` for each model, `[M]`.
        variables: the start, each leaf `[M, ...]`.
        examples: the examples, on the device.
        rows: the examples that each model is trained on, int `[M, n]`.
        num_epochs: the number of epochs over these examples.

    Yields:
        The state after each epoch, which the next epoch donates, and the epoch's mean losses, `[M]`.

    Raises:
        ValueError: if there are fewer examples than a minibatch holds.
        FloatingPointError: if a training loss is infinite or NaN; the error has the model, the epoch and the step.
    """
    state = trainer.init(variables)
    for epoch in range(num_epochs):
        state, losses = trainer.epoch(keys, epoch, state, examples, rows)
        if (bad := np.argwhere(~np.isfinite(losses))).size:
            model, step = bad[np.argmin(bad[:, 1])]
            which = f" of model {model} of {len(losses)}" if len(losses) > 1 else ""
            raise FloatingPointError(
                f"the training loss{which} is {losses[model, step]} at step {step + 1} of {losses.shape[1]} in epoch "
                f"{epoch + 1}: expected a finite number"
            )
        yield state, losses.mean(axis=1)


def make_evaluate(problem: Problem) -> Callable[[Variables, Examples], dict[str, float]]:
    """Returns `evaluate(variables, examples) -> {"loss", "accuracy"}`, the means over all examples.

    It raises a FloatingPointError if one of them is infinite or not a number.
    """

    @jax.jit
    def measures(variables: Variables, examples: Examples) -> dict[str, jax.Array]:
        return glue_jax.batches.batched_mean(problem.measures, variables, examples, _EVALUATION_BATCH)

    def evaluate(variables: Variables, examples: Examples) -> dict[str, float]:
        values = {name: float(value) for name, value in measures(variables, examples).items()}
        if not np.isfinite(list(values.values())).all():
            raise FloatingPointError(f"a model has {values} on {len(examples.labels)} images: expected finite numbers")
        return values

    return evaluate


def crop_and_flip(key: jax.Array, images: jax.Array, *, flip: bool = True) -> jax.Array:
    """Returns images `[B, H, W, C]` shifted at random by up to an eighth of their size, mirrored with probability 1/2.

    The pixels that a shift uncovers are black. He et al. (2016, section 4.2) augment images of 32 x 32 pixels in this
    way.

    Args:
        key: a `jax.random.key`.
        images: of any dtype.
        flip: whether to mirror as well.
    """
    crop_key, flip_key = jax.random.split(key)
    batch, *shape = images.shape
    height, width = (size // 8 for size in shape[:2])
    padded = jnp.pad(images, ((0, 0), (height, height), (width, width), (0, 0)))
    corners = jax.random.randint(crop_key, (batch, 2), 0, 2 * jnp.array([[height, width]]) + 1)

    def crop(image: jax.Array, corner: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), shape)

    cropped = jax.vmap(crop)(padded, corners)
    if not flip:
        return cropped
    flipped = jax.random.bernoulli(flip_key, shape=(batch, 1, 1, 1))
    return jnp.where(flipped, cropped[:, :, ::-1], cropped)
