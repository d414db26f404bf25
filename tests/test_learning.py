"""Learning to the validation plateau: what is kept, when it stops, and what it compiles."""

import contextlib
import functools
import logging
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import glue_jax

pytestmark = pytest.mark.usefixtures("quick_compilation")

STEPS = [glue_jax.spsa_step, glue_jax.forward_gradient_step, glue_jax.full_gradient_step]
# The blend of these two is alpha[1].
EXPERTS = {"w": jnp.array([0.0, 1.0])}
OPTIMIZER = optax.sgd(0.5)
ADAM = optax.adam(0.1)
DATA = jnp.linspace(0.0, 1.0, 50)


def upward(params, batch):
    """Falls as the blend rises, whatever the batch."""
    return -params["w"] + 0 * jnp.mean(batch)


def squared(params, batch):
    return jnp.mean((params["w"] - batch) ** 2)


def blend_value(params, batch):
    return params["w"] + 0 * jnp.mean(batch)


def valley(params, batch):
    """Lowest at the blend 0.75, between the start 0.5 and the end 1 of `upward`."""
    return (params["w"] - 0.75) ** 2 + 0 * jnp.mean(batch)


@pytest.fixture(params=["a call for each step", "a call for each chunk"])
def both_ways(request, monkeypatch):
    """Runs a test as on a CPU, and as on an accelerator, where a chunk of steps is one program."""
    if request.param == "a call for each chunk":
        monkeypatch.setattr("glue_jax.learning.on_cpu", lambda tree: False)


def learn(**words) -> glue_jax.LearnResult:
    defaults: dict[str, Any] = {
        "key": jax.random.key(0),
        "experts": EXPERTS,
        "data": DATA,
        "loss_fn": upward,
        "optimizer": OPTIMIZER,
        "step_fn": glue_jax.full_gradient_step,
        "batch_size": 8,
        "max_steps": 20,
        "validate_every": 5,
    }
    return glue_jax.learn(**(defaults | words))


@pytest.mark.parametrize("step_fn", STEPS)
def test_each_estimator_finds_the_blend_that_fits_the_data(step_fn):
    data = jnp.tile(jnp.array([0.2, 0.4]), 50)
    result = learn(
        data=data,
        step_fn=step_fn,
        loss_fn=squared,
        optimizer=ADAM,
        max_steps=100,
        validate_every=20,
        validation_data=data,
    )
    np.testing.assert_allclose(result.alpha, [0.7, 0.3], atol=0.02)
    np.testing.assert_allclose(jnp.sum(result.alpha), 1, rtol=1e-6)


def test_the_minibatches_do_not_depend_on_the_estimator():
    # With equal experts the loss is the minibatch's mean, whatever alpha.
    def loss(params, batch):
        return params["w"] * jnp.mean(batch)

    def minibatch_means(step_fn, seed):
        return learn(
            key=jax.random.key(seed),
            experts={"w": jnp.ones(2)},
            data=jnp.arange(50.0) ** 2,
            loss_fn=loss,
            step_fn=step_fn,
        ).history.metrics.loss

    means = [minibatch_means(step_fn, 1) for step_fn in STEPS]
    assert len(set(means[0].round())) > 10
    np.testing.assert_allclose(means[1], means[0], rtol=1e-5)
    np.testing.assert_allclose(means[2], means[0], rtol=1e-5)
    assert not np.allclose(minibatch_means(glue_jax.full_gradient_step, 2), means[0])


def test_a_call_for_each_step_and_a_call_for_each_chunk_learn_the_same(monkeypatch):
    run = functools.partial(learn, step_fn=glue_jax.spsa_step, loss_fn=squared, optimizer=ADAM, max_steps=13)
    by_steps = run()
    monkeypatch.setattr("glue_jax.learning.on_cpu", lambda tree: False)
    by_chunks = run()
    # Slopes of SPSA are differences of float32 losses over twice the radius 1e-2.
    chex.assert_trees_all_close(by_steps, by_chunks, atol=1e-3)


def test_each_epoch_sees_its_examples_once():
    result = learn(
        experts={"w": jnp.ones(2)},
        data=jnp.arange(40.0),
        loss_fn=lambda params, batch: params["w"] * jnp.mean(batch),
    )
    # 5 minibatches of 8 an epoch: their means average to that of all.
    np.testing.assert_allclose(result.history.metrics.loss.reshape(4, 5).mean(axis=1), 19.5, rtol=1e-5)


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("step_fn", [glue_jax.spsa_step, glue_jax.full_gradient_step])
@pytest.mark.parametrize("first", [5, 7])
def test_going_on_from_a_state_is_bit_for_bit_one_long_run(step_fn, first):
    # 6 minibatches an epoch: both cuts are within one; the second is within a chunk as well.
    run = functools.partial(
        learn,
        key=jax.random.key(4),
        loss_fn=squared,
        optimizer=ADAM,
        step_fn=step_fn,
        validation_data=DATA,
        patience=None,
    )
    whole = run(max_steps=17)
    part = run(max_steps=first, key=jax.random.key(4))
    rest = run(max_steps=17 - first, key=jax.random.key(4), state=part.state)
    chex.assert_trees_all_equal(rest.state, whole.state)
    chex.assert_trees_all_equal(rest.last_alpha, whole.last_alpha)
    joined = jax.tree.map(lambda *halves: np.concatenate(halves), part.history.metrics, rest.history.metrics)
    chex.assert_trees_all_equal(joined, whole.history.metrics)
    assert rest.history.validation_steps[0] == first
    assert rest.history.validation_values[-1] == whole.history.validation_values[-1]


@pytest.mark.usefixtures("both_ways")
def test_one_key_serves_many_runs():
    key = jax.random.key(9)
    first, second = learn(key=key), learn(key=key)
    chex.assert_trees_all_equal(first, second)


def test_the_best_coefficients_by_validation_are_kept_when_later_ones_are_worse():
    result = learn(validation_data=DATA, validation_fn=valley, max_steps=60, patience=None)
    values = result.history.validation_values
    best = int(np.argmin(values))
    assert 0 < best < len(values) - 1
    assert values[-1] > 10 * values[best]
    # `metrics.alpha` of step s is that of the state after s steps.
    chex.assert_trees_all_equal(
        np.asarray(result.alpha), result.history.metrics.alpha[result.history.validation_steps[best]]
    )
    chex.assert_trees_all_equal(result.alpha, jax.nn.softmax(result.beta))
    np.testing.assert_allclose((result.alpha[1] - 0.75) ** 2, values[best], rtol=1e-4)
    chex.assert_trees_all_equal(result.last_alpha, jax.nn.softmax(result.state.beta))
    assert result.last_alpha[1] > result.alpha[1] + 0.1


def test_the_start_is_kept_when_every_step_makes_it_worse():
    result = learn(validation_data=DATA, validation_fn=blend_value)
    np.testing.assert_array_equal(result.alpha, [0.5, 0.5])
    assert result.last_alpha[1] > 0.6


@pytest.mark.parametrize(("patience", "steps"), [(1, 5), (3, 15), (4, 20), (10, 20), (None, 20)])
def test_patience_counts_validations_since_the_best(patience, steps):
    # The start is the best.
    result = learn(validation_data=DATA, validation_fn=blend_value, patience=patience)
    assert int(result.state.step) == steps
    assert len(result.history.validation_values) == 1 + steps // 5


def test_patience_counts_from_the_last_improvement():
    result = learn(validation_data=DATA, validation_fn=valley, max_steps=500, patience=2)
    values = result.history.validation_values
    assert np.argmin(values) == len(values) - 3 > 0
    assert int(result.state.step) < 500


def test_steady_improvement_goes_on_to_the_last_step():
    result = learn(validation_data=DATA, validation_fn=upward, patience=1, max_steps=40)
    assert int(result.state.step) == 40


def test_without_validation_data_all_steps_are_taken_and_the_last_coefficients_returned():
    result = learn(max_steps=13, patience=1)
    assert int(result.state.step) == 13
    chex.assert_trees_all_equal(result.alpha, result.last_alpha)
    chex.assert_trees_all_equal(result.beta, result.state.beta)
    assert result.history.metrics.loss.shape == (13,)
    assert result.history.validation_steps.shape == result.history.validation_values.shape == (0,)


@pytest.mark.parametrize("batch_size", [4, 16])
def test_validation_counts_each_example_once(batch_size):
    examples = jnp.arange(10.0) ** 2
    result = learn(
        validation_data=examples,
        validation_fn=lambda params, batch: params["w"] * jnp.mean(batch),
        batch_size=batch_size,
        max_steps=1,
    )
    np.testing.assert_allclose(result.history.validation_values[0], 0.5 * 28.5, rtol=1e-6)


def test_the_loss_validates_where_no_other_function_is_given():
    result = learn(loss_fn=squared, validation_data=jnp.zeros(3), max_steps=1)
    np.testing.assert_allclose(result.history.validation_values[0], 0.25, rtol=1e-6)


@pytest.mark.usefixtures("both_ways")
def test_the_history_has_a_row_for_each_step_and_each_validation():
    max_steps = 13
    result = learn(
        step_fn=functools.partial(glue_jax.spsa_step, num_directions=3), validation_data=DATA, max_steps=max_steps
    )
    history = result.history
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(history))
    chex.assert_shape([history.metrics.loss, history.metrics.gradient_norm], (max_steps,))
    chex.assert_shape(history.metrics.alpha, (max_steps, 2))
    chex.assert_shape(history.metrics.probe_losses, (max_steps, 3, 2))
    np.testing.assert_array_equal(history.validation_steps, [0, 5, 10, 13])
    assert history.validation_values.shape == (4,)
    np.testing.assert_array_equal(history.metrics.alpha[0], [0.5, 0.5])


def test_any_link_merge_and_start_may_be_given():
    beta = jnp.array([0.25, 0.25])
    result = learn(
        state=glue_jax.init(2, OPTIMIZER, beta=beta),
        link_fn=glue_jax.unconstrained,
        merge_fn=lambda experts, alpha: {"w": 10 * alpha @ experts["w"]},
        max_steps=2,
        validation_data=DATA,
    )
    # The loss is -10 alpha[1]: each step of rate 0.5 adds 5.
    np.testing.assert_allclose(result.last_alpha, [0.25, 10.25], rtol=1e-6)
    np.testing.assert_allclose(result.history.validation_values, [-2.5, -102.5], rtol=1e-6)


@pytest.mark.usefixtures("both_ways")
def test_the_callback_is_told_after_each_chunk_what_the_history_keeps():
    told = []
    result = learn(validation_data=DATA, validation_fn=valley, max_steps=42, callback=told.append, patience=None)
    values, metrics = result.history.validation_values, result.history.metrics
    assert [progress.step for progress in told] == [5, 10, 15, 20, 25, 30, 35, 40, 42]
    for index, progress in enumerate(told):
        assert progress.max_steps == 42
        assert progress.validation_value == values[index + 1]
        assert progress.best_value == min(values[: index + 2])
        chex.assert_trees_all_equal(
            progress.metrics, jax.tree.map(lambda leaf, at=progress.step: leaf[at - 1], metrics)
        )


def test_the_callback_counts_the_steps_of_this_call_and_does_without_validation():
    state = learn(max_steps=5).state
    told = []
    learn(state=state, max_steps=7, callback=told.append)
    assert [(progress.step, progress.validation_value, progress.best_value) for progress in told] == [
        (5, None, None),
        (7, None, None),
    ]


def losing(at, value):
    """A step whose loss is `value` at one step."""

    def step_fn(key, state, experts, batch, **words):
        after, metrics = glue_jax.full_gradient_step(key, state, experts, batch, **words)
        return after, metrics._replace(loss=jnp.where(state.step == at, value, metrics.loss))

    return step_fn


@pytest.mark.usefixtures("both_ways")
def test_a_loss_that_is_not_finite_stops_with_its_step_its_value_and_the_chunks_before():
    told = []
    with pytest.raises(glue_jax.NonFiniteLossError, match="the loss is nan at step 12") as caught:
        learn(step_fn=losing(12, jnp.nan), validation_data=DATA, callback=told.append)
    error = caught.value
    assert isinstance(error, FloatingPointError)
    assert error.step == 12
    assert np.isnan(error.value)
    assert len(told) == 2
    expected = learn(step_fn=losing(99, jnp.nan), validation_data=DATA, max_steps=10)
    chex.assert_trees_all_equal(error.result, expected)


def test_a_loss_that_is_not_finite_at_once_leaves_the_start():
    with pytest.raises(glue_jax.NonFiniteLossError, match="the loss is -inf at step 0") as caught:
        learn(step_fn=losing(0, -jnp.inf))
    assert int(caught.value.result.state.step) == 0
    np.testing.assert_array_equal(caught.value.result.alpha, [0.5, 0.5])
    assert caught.value.result.history.metrics.loss.shape == (0,)


def test_the_step_of_a_loss_that_is_not_finite_counts_from_the_first_run():
    with pytest.raises(glue_jax.NonFiniteLossError, match="at step 12") as caught:
        learn(step_fn=losing(12, jnp.nan), state=learn(max_steps=10).state)
    assert caught.value.step == 12
    assert int(caught.value.result.state.step) == 10


@pytest.mark.usefixtures("both_ways")
def test_a_loss_beyond_the_last_step_is_not_taken():
    assert int(learn(step_fn=losing(12, jnp.nan), max_steps=12).state.step) == 12


def test_a_validation_value_that_is_not_finite_stops_as_well():
    with pytest.raises(glue_jax.NonFiniteLossError, match="the validation value is inf at step 0") as caught:
        learn(validation_data=jnp.array([1.0, jnp.inf]), validation_fn=lambda params, batch: jnp.mean(batch))
    assert caught.value.step == 0
    assert caught.value.value == float("inf")


def never(*args, **words):
    raise AssertionError("work was done before the arguments were checked")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 51}, "batch_size is 51, but data holds 50 examples"),
        ({"max_steps": 0}, "max_steps is 0"),
        ({"validate_every": 0}, "validate_every is 0"),
        ({"patience": 0}, "patience is 0"),
        ({"data": {"x": jnp.ones(5), "y": jnp.ones(6)}}, r"data has shapes .*\['y'\].*\(6,\)"),
        ({"data": []}, "data holds no arrays"),
        ({"validation_data": (jnp.ones(5), jnp.ones(6))}, r"validation_data has shapes .*\(5,\).*\(6,\)"),
        ({"validation_data": jnp.ones((0, 2))}, "validation_data has shapes"),
        ({"validation_fn": never}, "validation_fn was given without validation_data"),
        ({"experts": {"w": jnp.ones(2), "b": jnp.ones(())}}, r"the experts are not stacked: .*\['b'\]"),
        ({"experts": {}}, "the experts hold no arrays"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(words, message):
    with pytest.raises(ValueError, match=message):
        learn(**({"loss_fn": never, "step_fn": never, "link_fn": never, "merge_fn": never, "callback": never} | words))


@contextlib.contextmanager
def compilations(caplog):
    """The names of the programs that XLA compiles."""
    names: list[str] = []
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="jax"), jax.log_compiles():
        yield names
    prefix = "Finished XLA compilation of "
    names += [line.removeprefix(prefix).split(" in ")[0] for line in caplog.messages if line.startswith(prefix)]


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("step_fn", [glue_jax.spsa_step, glue_jax.full_gradient_step])
@pytest.mark.parametrize("on_a_device", [False, True], ids=["anywhere", "on a device"])
def test_learning_compiles_one_program_for_steps_and_one_for_validations(caplog, step_fn, on_a_device):
    # What is read from a file or put somewhere is committed to its device, and so is all that is computed from it.
    experts, data = jax.device_put((EXPERTS, DATA), jax.devices()[0]) if on_a_device else (EXPERTS, DATA)
    words = {
        "experts": experts,
        "data": data,
        "step_fn": functools.partial(step_fn),
        "loss_fn": functools.partial(squared),
        "validation_data": DATA[:11],
        "patience": None,
    }
    with compilations(caplog) as first:
        learn(max_steps=13, key=jax.random.key(0), **words)
    assert first.count("jit(_run_steps)") == 1
    assert first.count("jit(_validate)") == 1
    with compilations(caplog) as second:
        result = learn(max_steps=13, key=jax.random.key(1), **words)
        learn(max_steps=22, key=jax.random.key(2), state=result.state, **words)
    assert second == []


@pytest.mark.parametrize("num_directions", [1, 2])
@pytest.mark.parametrize("beta", [None, 0.5], ids=["[K]", "a number"])
def test_a_jitted_step_is_traced_once(beta, num_directions):
    traces = []

    def loss(params, batch):
        traces.append(None)
        return squared(params, batch)

    optimizer = optax.adam(1e-2)
    step = jax.jit(
        functools.partial(
            glue_jax.spsa_step,
            loss_fn=loss,
            optimizer=optimizer,
            link_fn=jax.nn.softmax if beta is None else lambda b: jnp.stack([1 - b, b]),
            num_directions=num_directions,
        )
    )
    state, counts = glue_jax.init(2, optimizer, beta=beta), []
    for seed in range(5):
        state, _ = step(jax.random.key(seed), state, EXPERTS, DATA)
        counts.append(len(traces))
    assert counts[0] > 0
    assert set(counts) == {counts[0]}


def test_a_validation_that_is_no_scalar_is_refused():
    with pytest.raises(ValueError, match=r"validation returned shape \(\d+,\); expected a scalar"):
        learn(validation_data=DATA[:11], validation_fn=lambda params, batch: jnp.zeros(4), key=jax.random.key(0))
