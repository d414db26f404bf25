"""Learning to the validation plateau: what is kept, when it stops, and what it compiles."""

import dataclasses
import functools
import itertools
from collections import UserDict

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import glue_jax
from glue_jax import streams
from glue_jax.streams import ArrayBatches
from tests.helpers import compilations
from tests.library import helpers
from tests.library.helpers import (
    ADAM,
    CLASSIFICATION,
    DATA,
    EXPERTS,
    OPTIMIZER,
    STEPS,
    classification,
    learn,
    losing,
    squared,
    upward,
)


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


def test_a_call_for_each_step_and_a_call_for_each_chunk_learn_the_same(monkeypatch):
    run = functools.partial(learn, step_fn=glue_jax.spsa_step, loss_fn=squared, optimizer=ADAM, max_steps=13)
    by_steps = run()
    monkeypatch.setattr("glue_jax.learning.on_cpu", lambda tree: False)
    by_chunks = run()
    # Slopes of SPSA are differences of float32 losses over twice the radius 1e-2.
    chex.assert_trees_all_close(by_steps, by_chunks, atol=1e-3)


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
@pytest.mark.parametrize("cuts", [(5, 10), (10,), (7,), (1, 1, 1)])
def test_stopped_runs_that_go_on_return_what_one_long_run_returns(cuts):
    # Cuts at a validation and between two; the best is in the middle, and patience ends the run.
    run = functools.partial(
        learn, loss_fn=upward, step_fn=glue_jax.spsa_step, validation_data=DATA, validation_fn=valley, patience=4
    )
    whole = run(max_steps=60)
    result, done = None, 0
    for cut in cuts:
        result, done = run(max_steps=cut, state=result), done + cut
    result = run(max_steps=60 - done, state=result)
    assert 0 < np.argmin(whole.history.validation_values) < len(whole.history.validation_values) - 1
    assert int(whole.state.step) < 60
    chex.assert_trees_all_equal(result, whole)


def test_what_was_best_before_a_stop_is_still_the_best_after_it():
    run = functools.partial(learn, validation_data=DATA, validation_fn=blend_value)
    rest = run(state=run(max_steps=10), max_steps=10)
    np.testing.assert_array_equal(rest.alpha, [0.5, 0.5])
    # From the state alone, what came before is not known.
    assert run(state=run(max_steps=10).state, max_steps=10).alpha[1] > 0.6


def test_the_best_coefficients_are_kept_where_a_stop_between_two_validations_found_them():
    run = functools.partial(learn, validation_data=DATA, validation_fn=valley, validate_every=4)
    steps = np.argmin([valley({"w": a[1]}, DATA) for a in learn(max_steps=60).history.metrics.alpha])
    assert steps % 4
    first = run(max_steps=steps)
    rest = run(max_steps=60, state=first)
    chex.assert_trees_all_equal(rest.beta, first.state.beta)
    assert steps in rest.history.validation_steps


def test_going_on_where_patience_has_ended_takes_no_step():
    result = learn(validation_data=DATA, validation_fn=blend_value, patience=2)
    with pytest.warns(UserWarning, match="had run out of patience, so no step is taken"):
        again = learn(validation_data=DATA, validation_fn=blend_value, patience=2, state=result)
    chex.assert_trees_all_equal(again, result)


def test_a_result_of_other_metrics_is_refused_and_nothing_is_lost():
    result = learn(max_steps=5)
    with pytest.raises(ValueError, match=r"pass state=result\.state") as caught:
        learn(state=result, step_fn=glue_jax.spsa_step)
    chex.assert_trees_all_equal(caught.value.result, result)  # pyright: ignore[reportAttributeAccessIssue]


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
    result = learn(max_steps=13)
    assert int(result.state.step) == 13
    chex.assert_trees_all_equal(result.alpha, result.last_alpha)
    chex.assert_trees_all_equal(result.beta, result.state.beta)
    assert result.history.metrics.loss.shape == (13,)
    assert result.history.validation_steps.shape == result.history.validation_values.shape == (0,)


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


@pytest.mark.parametrize("link_fn", [glue_jax.unconstrained, lambda beta: {"w": beta}])
def test_a_result_is_not_continued_under_another_link(link_fn):
    first = learn(max_steps=5)
    with pytest.raises(ValueError, match=r"state is a result with the coefficients .*, but link_fn makes"):
        learn(state=first, link_fn=link_fn)


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


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("true", [True, np.True_, jnp.array(True)])
def test_a_callback_that_returns_true_ends_the_run_and_what_it_returned_goes_on(true):
    words = {"validation_data": DATA, "validation_fn": valley, "max_steps": 40, "patience": None}
    stopped = learn(callback=lambda progress: true if progress.step >= 10 else None, **words)
    chex.assert_trees_all_equal(stopped, learn(**(words | {"max_steps": 10})))
    chex.assert_trees_all_equal(learn(state=stopped, **(words | {"max_steps": 30})), learn(**words))


def test_what_else_a_callback_returns_ends_nothing():
    answers = iter([1, "text", np.ones(3), np.False_])
    assert int(learn(callback=lambda progress: next(answers)).state.step) == 20


def test_the_callback_is_told_the_result_so_far():
    told = []
    result = learn(validation_data=DATA, callback=told.append)
    chex.assert_trees_all_equal(told[-1].result, result)
    chex.assert_trees_all_equal(told[1].result, learn(validation_data=DATA, max_steps=10))


@pytest.mark.usefixtures("both_ways")
def test_a_callback_that_writes_into_what_it_is_told_changes_nothing():
    def write(progress):
        progress.metrics.alpha[:] = 7
        progress.result.history.metrics.loss[:] = 7
        progress.result.history.metrics.alpha[:] = 7
        progress.result.history.validation_values[:] = 7

    chex.assert_trees_all_equal(learn(callback=write, validation_data=DATA), learn(validation_data=DATA))


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError("a user's")])
def test_an_exception_of_the_callback_has_the_result_before_it(error):
    def callback(progress):
        if progress.step == 10:
            raise error

    words = {"validation_data": DATA, "validation_fn": valley}
    with pytest.raises(BaseException) as caught:
        learn(callback=callback, **words)
    assert isinstance(caught.value, type(error) if isinstance(error, Exception) else error)
    chex.assert_trees_all_equal(caught.value.result, learn(max_steps=10, **words))  # pyright: ignore
    assert "learn(..., state=result)" in caught.value.__notes__[0]
    rest = learn(state=caught.value.result, max_steps=10, **words)  # pyright: ignore
    chex.assert_trees_all_equal(rest, learn(**words))


@pytest.mark.parametrize("at", [0, 3, 5, 8])
def test_an_exception_between_two_steps_or_in_a_validation_loses_nothing(at, monkeypatch):
    words = {"validation_data": DATA, "validation_fn": valley, "validation_batch_size": 8}
    whole = learn(**words)
    batches = iter(ArrayBatches(jax.random.fold_in(jax.random.key(0), 0), DATA, 8).batches(0))

    def interrupted():
        yield from itertools.islice(batches, at)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        learn(data=interrupted(), batch_size=64, **words)
    result = caught.value.result  # pyright: ignore[reportAttributeAccessIssue]
    assert int(result.state.step) == len(result.history.metrics.loss) == at
    chex.assert_trees_all_equal(learn(state=result, max_steps=20 - at, **words), whole)

    def no_validation(self, value):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("glue_jax.runs.Run.validated", no_validation)
        with pytest.raises(KeyboardInterrupt) as caught:
            learn(state=result, max_steps=20 - at, **words)
    result = caught.value.result  # pyright: ignore[reportAttributeAccessIssue]
    chex.assert_trees_all_equal(learn(state=result, max_steps=20 - int(result.state.step), **words), whole)


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


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize(("max_steps", "validate_every"), [(5, 50), (13, 5), (4, 10**12)])
def test_no_step_is_run_that_is_thrown_away(max_steps, validate_every):
    taken = []

    def step_fn(key, state, experts, batch, **words):
        jax.debug.callback(lambda step: taken.append(int(step)), state.step)
        return glue_jax.full_gradient_step(key, state, experts, batch, **words)

    result = learn(step_fn=step_fn, max_steps=max_steps, validate_every=validate_every)
    jax.effects_barrier()
    assert sorted(taken) == list(range(max_steps))
    assert result.history.metrics.loss.shape == (max_steps,)


def test_metrics_are_read_and_judged_now_and_then_where_validations_are_rare(monkeypatch):
    monkeypatch.setattr("glue_jax.runs.MOST_UNREAD", 4)
    taken = []

    def batches():
        for step in range(100):
            taken.append(step)
            yield DATA[:8]

    with pytest.raises(glue_jax.NonFiniteLossError, match="at step 2"):
        learn(step_fn=losing(2, jnp.nan), data=batches(), batch_size=64, max_steps=100, validate_every=100)
    assert len(taken) == 4


@pytest.mark.parametrize(
    ("platform", "steps_per_call", "calls"),
    [
        ("cpu", None, [1] * 20),
        ("cpu", 3, [3, 2] * 4),
        ("other", None, [5] * 4),
        ("other", 1, [1] * 20),
        ("other", 2, [2, 2, 1] * 4),
        ("other", 50, [5] * 4),
    ],
)
def test_the_steps_in_a_call_may_be_chosen(platform, steps_per_call, calls, monkeypatch):
    monkeypatch.setattr("glue_jax.learning.on_cpu", lambda tree: platform == "cpu")
    # The minibatches of each call are asked for at once.
    rows, asked = ArrayBatches.rows, []
    monkeypatch.setattr(ArrayBatches, "rows", lambda self, first, n: (asked.append(n), rows(self, first, n))[1])
    result = learn(steps_per_call=steps_per_call)
    assert asked == calls
    np.testing.assert_allclose(result.history.metrics.alpha, learn().history.metrics.alpha, rtol=1e-6)


@pytest.mark.parametrize("returned", [None, (1, None), 5])
def test_a_step_that_returns_something_else_is_refused(returned):
    with pytest.raises(TypeError, match=r"step_fn returned .*; expected a GlueState and its GlueMetrics"):
        learn(step_fn=lambda *args, **words: returned)


@pytest.mark.usefixtures("both_ways")
def test_an_epoch_is_permuted_once(monkeypatch):
    epochs = []
    permuted = streams._epoch_batches

    def spy(key, epoch, *counts):
        epochs.append(epoch)
        return permuted(key, epoch, *counts)

    monkeypatch.setattr("glue_jax.streams._epoch_batches", spy)
    # 6 minibatches an epoch.
    learn(max_steps=20)
    assert epochs == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ({"loss_fn": lambda params, batch: jnp.mean(batch)}, "loss_fn may ignore its params"),
        ({"experts": {"w": jnp.ones((1,))}}, r"only one \(K = 1\)"),
        ({"loss_fn": lambda params, batch: jnp.mean(params["w"] > batch), "step_fn": glue_jax.spsa_step}, "radius"),
    ],
)
def test_a_loss_that_does_not_depend_on_the_coefficients_is_told(words, reason):
    with pytest.warns(UserWarning, match=f"exactly 0 in each of the first 10 steps.*{reason}") as told:
        learn(**({"data": jnp.full(50, 3.0), "validate_every": 10} | words))
    assert len(told) == 1
    assert told[0].filename == helpers.__file__


def test_a_gradient_that_is_zero_now_and_then_is_not_told():
    def seldom(key, state, experts, batch, **words):
        after, metrics = glue_jax.full_gradient_step(key, state, experts, batch, **words)
        return after, metrics._replace(gradient_norm=jnp.where(state.step == 7, metrics.gradient_norm, 0))

    assert int(learn(step_fn=seldom, validate_every=1).state.step) == 20


def test_leaves_that_are_not_stacked_go_with_a_state_and_a_merge_that_knows_them():
    experts = {"base": jnp.array(2.0), "adapters": jnp.array([0.0, 1.0])}

    def merge(experts, alpha):
        return {"w": experts["base"] + alpha @ experts["adapters"]}

    words = {"experts": experts, "merge_fn": merge, "validation_data": DATA}
    result = learn(state=glue_jax.init(2, OPTIMIZER), **words)
    assert result.alpha[1] > 0.6
    np.testing.assert_allclose(result.history.validation_values[0], -2.5)
    with pytest.raises(ValueError, match=r"not stacked: \['base'\].*pass state=glue_jax\.init\(K, optimizer, "):
        learn(**words)


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
    assert first.count("jit(_run_step)") + first.count("jit(_run_steps)") == 1
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


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ({"step_fn": functools.partial(glue_jax.spsa_step, **{"num_direction": 2})}, "num_direction"),
        ({"step_fn": functools.partial(glue_jax.spsa_step, num_directions=0)}, "num_directions is 0"),
        ({"loss_fn": lambda params, batch: batch["x"]}, "scalar"),
    ],
)
def test_a_mistake_in_the_step_is_found_before_any_work(words, error):
    def counted(params, batch):
        pytest.fail("a model was evaluated")

    experts, data = classification()
    defaults = {"loss_fn": CLASSIFICATION, "optimizer": optax.adam(0.1), "validation_data": data}
    with pytest.raises((TypeError, ValueError), match=error) as raised:
        glue_jax.learn(jax.random.key(0), experts, data, validation_fn=counted, **{**defaults, **words})
    assert not any("what was learned before" in note for note in getattr(raised.value, "__notes__", ()))


def test_a_result_does_not_share_its_arrays_with_its_state():
    experts, data = classification()
    result = glue_jax.learn(
        jax.random.key(0),
        experts,
        data,
        loss_fn=CLASSIFICATION,
        optimizer=optax.sgd(0.1),
        link_fn=glue_jax.unconstrained,
        max_steps=2,
    )
    jax.jit(lambda state: state._replace(beta=state.beta + 1), donate_argnums=0)(result.state)
    assert all(jnp.isfinite(leaf).all() for leaf in (result.alpha, result.beta, result.last_alpha))


@pytest.mark.parametrize("data", [UserDict(x=np.ones((8, 2)))])
def test_a_mapping_that_is_no_pytree_is_refused(data):
    with pytest.raises(TypeError, match=r"data is a Python UserDict; expected an array.*dict of a mapping"):
        glue_jax.learn(jax.random.key(0), classification()[0], data, loss_fn=CLASSIFICATION, optimizer=optax.sgd(0.1))


def test_integers_that_jax_would_change_are_refused():
    experts, data = classification()
    wide = {**data, "y": np.asarray(data["y"], np.int64) + 2**32}
    with pytest.raises(ValueError, match=r"data\['y'\] has int64 values that JAX's int32 does not hold"):
        glue_jax.learn(jax.random.key(0), experts, wide, loss_fn=CLASSIFICATION, optimizer=optax.sgd(0.1))


def test_a_function_without_a_hash_is_refused_by_name():
    @dataclasses.dataclass
    class Loss:
        def __call__(self, params, batch):
            return jnp.zeros(())

    experts, data = classification()
    with pytest.raises(TypeError, match=r"loss_fn is a Loss that has no hash"):
        glue_jax.learn(jax.random.key(0), experts, data, loss_fn=Loss(), optimizer=optax.sgd(0.1))
