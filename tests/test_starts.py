"""Learning from several starts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import glue_jax
from tests.test_learning import compilations

pytestmark = pytest.mark.usefixtures("quick_compilation")

EXPERTS = {"w": jnp.array([-1.0, 0.0, 1.0])}
DATA = 0.1 * jax.random.normal(jax.random.key(0), (64,)) + 0.3


def two_minima(params, batch):
    """A minimum at 0.3, where the data is, and a worse one at -0.8."""
    w = params["w"]
    return jnp.mean(jnp.square(batch - w)) * jnp.square(w + 0.8) + 0.1 * jnp.square(w - 0.3)


WORDS = {
    "loss_fn": two_minima,
    "optimizer": optax.adam(0.05),
    "validation_data": DATA[:11],
    "batch_size": 16,
    "max_steps": 40,
    "validate_every": 10,
    "patience": None,
}
STARTS = jnp.stack([glue_jax.weights_to_logits(w) for w in ([0.9, 0.05, 0.05], [0.05, 0.05, 0.9], [0.1, 0.8, 0.1])])


@pytest.fixture(params=[True, False], ids=["cpu", "accelerator"])
def both_ways(request, monkeypatch):
    monkeypatch.setattr("glue_jax.learning.on_cpu", lambda tree: request.param)
    jax.clear_caches()


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("step_fn", [glue_jax.spsa_step, glue_jax.full_gradient_step])
def test_it_is_learning_from_each_and_keeping_the_best(step_fn):
    key = jax.random.key(1)
    together = glue_jax.learn_from_starts(key, EXPERTS, DATA, starts=STARTS, step_fn=step_fn, **WORDS)
    alone = [
        glue_jax.learn(
            key,
            EXPERTS,
            DATA,
            state=glue_jax.init(3, WORDS["optimizer"], beta=start),
            step_fn=step_fn,
            **WORDS,
        )
        for start in STARTS
    ]
    best = min(alone, key=lambda result: result.history.validation_values.min())
    np.testing.assert_allclose(together.alpha, best.alpha, rtol=1e-4)
    np.testing.assert_allclose(together.last_alpha, best.last_alpha, rtol=1e-4)
    values = np.array([result.history.validation_values for result in alone])
    np.testing.assert_allclose(together.history.validation_values, values.min(axis=0), rtol=1e-4)
    assert together.history.metrics.loss.shape == (40, 3)
    # The first start's valley is the other one.
    assert values[0].min() > 1.5 * values.min()
    # What it returns can be gone on from.
    glue_jax.learn(key, EXPERTS, DATA, state=together.state, step_fn=step_fn, **WORDS)


def test_a_second_call_compiles_nothing(caplog):
    words = {**WORDS, "step_fn": glue_jax.spsa_step}
    glue_jax.learn_from_starts(jax.random.key(2), EXPERTS, DATA, starts=STARTS, **words)
    with compilations(caplog) as names:
        glue_jax.learn_from_starts(jax.random.key(3), EXPERTS, DATA, starts=STARTS, **words)
    assert names == []


def test_a_start_whose_loss_is_no_number_is_named_by_its_step():
    starts = STARTS.at[1].set(jnp.nan)
    with pytest.raises(glue_jax.NonFiniteLossError, match=r"is nan at step 0"):
        glue_jax.learn_from_starts(jax.random.key(4), EXPERTS, DATA, starts=starts, **WORDS)


def test_starts_without_a_leading_axis_are_refused():
    with pytest.raises(ValueError, match=r"starts have shape \(3,\); expected \[S, K\]"):
        glue_jax.learn_from_starts(jax.random.key(5), EXPERTS, DATA, starts=STARTS[0], **WORDS)


def test_starts_of_different_numbers_are_refused():
    starts = {"a": STARTS, "b": STARTS[:2]}
    with pytest.raises(ValueError, match="starts"):
        glue_jax.learn_from_starts(jax.random.key(6), EXPERTS, DATA, starts=starts, **WORDS)


def test_the_lowest_value_is_of_means_over_all_batches():
    # Of batches of 16, 16 and 1 examples each start is the better one on some.
    data = jnp.concatenate([jnp.full((16,), 1.0), jnp.full((17,), -1.0)])
    words = {**WORDS, "validation_data": data, "loss_fn": lambda params, batch: jnp.mean(jnp.abs(batch - params["w"]))}
    result = glue_jax.learn_from_starts(jax.random.key(7), EXPERTS, DATA, starts=STARTS[:2], **words)
    at_start = [float(jnp.mean(jnp.abs(data - (weights @ EXPERTS["w"])))) for weights in jax.nn.softmax(STARTS[:2])]
    np.testing.assert_allclose(result.history.validation_values[0], min(at_start), rtol=1e-5)
