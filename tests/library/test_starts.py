"""Learning from several starts."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import glue_jax
from tests.helpers import compilations
from tests.library.helpers import Loader

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
STARTS = jnp.stack(
    [glue_jax.coefficients.weights_to_logits(w) for w in ([0.9, 0.05, 0.05], [0.05, 0.05, 0.9], [0.1, 0.8, 0.1])]
)


def alone(key, start, **words):
    state = glue_jax.init(3, WORDS["optimizer"], beta=start)
    return glue_jax.learn(key, EXPERTS, DATA, state=state, **(WORDS | words))


def together(key, starts, **words):
    return glue_jax.learn_from_starts(key, EXPERTS, DATA, starts=starts, **(WORDS | words))


@pytest.mark.parametrize("step_fn", [glue_jax.spsa_step, glue_jax.full_gradient_step])
def test_it_is_learning_from_each_and_keeping_the_best(step_fn):
    key = jax.random.key(1)
    found = together(key, STARTS, step_fn=step_fn, patience=3)
    each = [alone(key, start, step_fn=step_fn, patience=3) for start in STARTS]
    values = [result.history.validation_values.min() for result in each]
    best = int(np.argmin(values))
    assert found.start == best
    chex.assert_trees_all_equal(found._replace(start=None), each[best])
    # The first start's valley is the other one.
    assert values[0] > 1.5 * min(values)
    # What it returns can be gone on from.
    assert int(glue_jax.learn(key, EXPERTS, DATA, state=found, step_fn=step_fn, **WORDS).state.step) == 80


def test_a_second_call_compiles_nothing(caplog):
    words = {**WORDS, "step_fn": glue_jax.spsa_step}
    glue_jax.learn_from_starts(jax.random.key(2), EXPERTS, DATA, starts=STARTS, **words)
    with compilations(caplog) as names:
        glue_jax.learn_from_starts(jax.random.key(3), EXPERTS, DATA, starts=STARTS, **words)
    assert names == []


def test_a_start_that_diverges_ends_with_a_warning_and_the_others_go_on():
    starts = STARTS.at[1].set(jnp.nan)
    with pytest.warns(UserWarning, match=r"start 1 of 3 ended early: .* at step 0.*beta\[0\]") as told:
        found = together(jax.random.key(4), starts)
    assert told[0].filename == __file__
    chex.assert_trees_all_equal(found, together(jax.random.key(4), starts[::2])._replace(start=found.start))
    assert found.start in (0, 2)


def overflowing(params, batch):
    """Falls without end, to what is no number beyond 0.5."""
    return jnp.where(params["w"] > 0.5, jnp.nan, -params["w"]) + 0 * jnp.mean(batch)


def test_what_a_start_found_before_it_diverged_counts():
    words = {"loss_fn": overflowing, "validate_every": 1, "step_fn": glue_jax.full_gradient_step}
    middle = jnp.zeros(3)
    still = glue_jax.coefficients.weights_to_logits([0.98, 0.01, 0.01])
    with pytest.warns(UserWarning, match="start 0 of 2 ended early"):
        found = together(jax.random.key(4), jnp.stack([middle, still]), **words)
    assert found.start == 0
    assert 0.3 < float(found.alpha @ EXPERTS["w"]) <= 0.5


@pytest.mark.filterwarnings("ignore:start")
def test_if_all_diverge_it_is_an_error_with_the_best_of_them():
    words = {"loss_fn": overflowing, "validate_every": 1, "step_fn": glue_jax.full_gradient_step}
    starts = jnp.stack([jnp.zeros(3), jnp.full(3, jnp.nan)])
    with pytest.raises(glue_jax.NonFiniteLossError, match="at step 0") as caught:
        together(jax.random.key(4), starts, **words)
    assert caught.value.result.start == 0
    assert len(caught.value.result.history.validation_values) > 1


def test_an_exception_has_the_best_result_of_all_starts_before_it():
    told = []

    def callback(progress):
        told.append(progress)
        if len(told) == 10:
            raise KeyboardInterrupt

    # In the second chunk of the third start.
    with pytest.raises(KeyboardInterrupt) as caught:
        together(jax.random.key(1), STARTS, callback=callback)
    expected = together(jax.random.key(1), STARTS[:2])
    chex.assert_trees_all_equal(caught.value.result, expected)  # pyright: ignore[reportAttributeAccessIssue]


def test_an_exception_before_a_start_has_begun_has_the_best_result_too(monkeypatch):
    learn, calls = glue_jax.learn, []

    def third_fails(*args, **words):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return learn(*args, **words)

    expected = together(jax.random.key(1), STARTS[:2])
    monkeypatch.setattr("glue_jax.starts.learn", third_fails)
    with pytest.raises(KeyboardInterrupt) as caught:
        together(jax.random.key(1), STARTS)
    chex.assert_trees_all_equal(caught.value.result, expected)  # pyright: ignore[reportAttributeAccessIssue]


def test_a_loader_is_data_and_an_iterator_is_refused():
    loader = Loader([np.asarray(DATA[:16]), np.asarray(DATA[16:32])])
    words = {name: value for name, value in WORDS.items() if name != "batch_size"}
    found = glue_jax.learn_from_starts(jax.random.key(0), EXPERTS, loader, starts=STARTS[:2], **words)
    assert int(found.state.step) == 40
    with pytest.raises(
        TypeError, match=r"data is an iterator \(list_iterator\), which only the first start could read"
    ):
        glue_jax.learn_from_starts(jax.random.key(0), EXPERTS, iter(loader.batches), starts=STARTS[:2], **words)


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        ({"optimizer": None}, TypeError, "optimizer is None"),
        ({"state": glue_jax.init(3, WORDS["optimizer"])}, TypeError, "state was given; expected no state"),
        ({"validation_data": None}, ValueError, "validation_data is None"),
        ({"starts": [jnp.zeros(3), jnp.zeros(3)]}, TypeError, "starts is a list; expected one array"),
        ({"starts": "abc"}, TypeError, "starts is a Python str; expected an array"),
        ({"starts": jnp.zeros((2, 3), jnp.int32)}, TypeError, "expected a floating-point dtype"),
        ({"starts": jnp.zeros((0, 3))}, ValueError, "starts has shapes"),
        ({"starts": STARTS[0]}, ValueError, r"starts have shape \(3,\); expected \[S, K\]"),
        ({"starts": {"a": STARTS, "b": STARTS[:2]}}, ValueError, "starts"),
    ],
)
def test_bad_arguments_are_refused(words, error, message):
    with pytest.raises(error, match=message):
        together(jax.random.key(5), **({"starts": STARTS} | words))
