import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import models
from experiments.protocol import training
from experiments.protocol.data import Examples

EXAMPLES = Examples(
    jax.random.randint(jax.random.key(0), (48, 8, 8, 1), 0, 256).astype(jnp.uint8),
    jax.random.randint(jax.random.key(1), (48,), 0, 4),
)


@pytest.fixture(scope="module")
def problem():
    network = models.build("convnet", image_shape=(8, 8, 1), num_classes=4)
    return training.Problem(network, np.full(1, 0.5, np.float32), np.full(1, 0.25, np.float32))


def _trainer(problem, rate=1e-2, augmentation: training.Augmentation = "none"):
    return training.make_trainer(problem, optax.adam(rate), batch_size=8, augmentation=augmentation)


def _variables(problem, count):
    return jax.vmap(problem.network.init)(jax.random.split(jax.random.key(2), count))


def _train(trainer, keys, variables, rows, epochs=2):
    found = list(training.train(trainer, keys, variables, EXAMPLES, rows, num_epochs=epochs))
    return found[-1][0].variables, np.array([loss for _, loss in found])


def test_training_lowers_the_loss(problem):
    keys, rows = jax.random.key(3)[None], jnp.arange(48)[None]
    _, losses = _train(_trainer(problem), keys, _variables(problem, 1), rows, epochs=8)
    assert losses.shape == (8, 1)
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("augmentation", ["none", "crop_flip"])
def test_models_trained_at_once_are_those_trained_one_by_one(problem, augmentation):
    trainer, keys = _trainer(problem, 1e-3, augmentation), jax.random.split(jax.random.key(4), 2)
    variables, rows = _variables(problem, 2), jnp.stack([jnp.arange(24), jnp.arange(24, 48)])
    together, losses = _train(trainer, keys, variables, rows)
    for index in range(2):
        one = jax.tree.map(lambda leaf, index=index: leaf[index : index + 1], variables)
        alone, loss = _train(trainer, keys[index : index + 1], one, rows[index : index + 1])
        np.testing.assert_allclose(losses[:, index], loss[:, 0], rtol=1e-4)
        of_all = jax.tree.map(lambda leaf, index=index: leaf[index : index + 1], together)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-4), of_all, alone)


def test_an_epoch_as_one_scan_is_the_epoch_step_by_step(problem, monkeypatch):
    keys, variables, rows = jax.random.key(5)[None], _variables(problem, 1), jnp.arange(48)[None]
    by_step, losses = _train(_trainer(problem, 1e-3, "crop_flip"), keys, variables, rows)
    monkeypatch.setattr(training, "on_cpu", lambda tree: False)
    by_scan, scan_losses = _train(_trainer(problem, 1e-3, "crop_flip"), keys, variables, rows)
    np.testing.assert_allclose(losses, scan_losses, rtol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-4), by_step, by_scan)


def test_evaluation_weighs_a_last_smaller_batch_by_its_size(problem, monkeypatch):
    monkeypatch.setattr(training, "_EVALUATION_BATCH", 20)
    variables = problem.network.init(jax.random.key(6))
    logits = problem.network.apply(variables, problem.normalize(EXAMPLES.images))
    measures = training.make_evaluate(problem)(variables, EXAMPLES)
    assert measures["loss"] == pytest.approx(float(training.cross_entropy(logits, EXAMPLES.labels)), rel=1e-4)
    assert measures["accuracy"] == pytest.approx(float(jnp.mean(jnp.argmax(logits, -1) == EXAMPLES.labels)))


def test_a_training_loss_that_is_not_finite_stops_with_its_model_step_and_epoch(problem):
    # The second of two models has no number to begin with; its first loss is none.
    variables = jax.tree.map(lambda leaf: leaf.at[1].set(jnp.nan), _variables(problem, 2))
    keys, rows = jax.random.split(jax.random.key(7)), jnp.tile(jnp.arange(48), (2, 1))
    with pytest.raises(FloatingPointError, match="loss of model 1 of 2 is nan at step 1 of 6 in epoch 1"):
        _train(_trainer(problem), keys, variables, rows)
    # Steps of infinite length: the first loss is of the start, the second of what follows.
    with pytest.raises(FloatingPointError, match="training loss is nan at step 2 of 6 in epoch 1"):
        _train(_trainer(problem, np.inf), jax.random.key(7)[None], _variables(problem, 1), jnp.arange(48)[None])


def test_too_few_examples_for_a_minibatch_are_refused(problem):
    with pytest.raises(ValueError, match="7 examples do not fill a minibatch of 8"):
        _train(_trainer(problem), jax.random.key(8)[None], _variables(problem, 1), jnp.arange(7)[None])


@pytest.mark.parametrize("flip", [True, False])
def test_crop_and_flip_shifts_each_image_over_black_by_an_eighth_and_mirrors_some(flip):
    images = jnp.arange(1, 1 + 16 * 8, dtype=jnp.uint8).reshape(1, 16, 8, 1).repeat(200, axis=0)
    augmented = np.asarray(training.crop_and_flip(jax.random.key(9), images, flip=flip))
    padded = np.pad(np.asarray(images[0]), ((2, 2), (1, 1), (0, 0)))
    crops = [padded[i : i + 16, j : j + 8] for i in range(5) for j in range(3)]
    views = {crop.tobytes(): "as it is" for crop in crops} | {
        np.ascontiguousarray(crop[:, ::-1]).tobytes(): "mirrored" for crop in crops
    }
    seen = [views[image.tobytes()] for image in augmented]
    # Binomial(200, 1/2): within five standard deviations of 100.
    low, high = (65, 135) if flip else (0, 0)
    assert low <= seen.count("mirrored") <= high
    assert len({image.tobytes() for image in augmented}) > (20 if flip else 12)


def test_the_loss_in_two_parts_is_the_loss_and_there_is_one_of_a_problem(problem):
    variables = jax.tree.map(lambda leaf: leaf[0], _variables(problem, 1))
    parts = training.output_loss(problem)
    assert float(parts(variables, EXAMPLES)) == pytest.approx(float(problem.loss(variables, EXAMPLES)), rel=1e-6)
    np.testing.assert_array_equal(parts.outputs_fn(variables, EXAMPLES), problem.logits(variables, EXAMPLES.images))
    # By identity it is a static argument that compiles once, and another problem's is another.
    assert training.output_loss(problem) is parts
    assert hash(parts) == hash(training.output_loss(problem))
    assert training.output_loss(dataclasses.replace(problem)) != parts
