"""Checks of arguments: each error names the argument and its value."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import glue_jax
from glue_jax.checks import (
    as_number,
    as_numbers,
    check_callable,
    check_counts,
    check_optimizer,
    check_positive,
    check_state,
    compiled,
)


def test_counts_that_are_below_one_or_no_integers_are_refused_by_name():
    check_counts(batch_size=1, max_steps=np.int64(3))
    check_counts(at_least=0, first_step=0)
    with pytest.raises(ValueError, match="patience is -1; expected at least 1"):
        check_counts(batch_size=1, patience=-1)
    for count in (2.5, None, "3", float("nan"), jnp.ones(2, jnp.int32)):
        with pytest.raises(TypeError, match=r"max_steps is .*; expected an integer of at least 1"):
            check_counts(max_steps=count)


@pytest.mark.parametrize(
    "values",
    [
        [1, 2.0],
        (jnp.float32(1), np.float64(2)),
        [jnp.bfloat16(1), jnp.bfloat16(2)],
        jnp.array([1, 2], jnp.bfloat16),
        np.array([1, 2]),
    ],
)
def test_numbers_of_any_kind_are_float64(values):
    numbers = as_numbers("losses", values)
    assert numbers.dtype == np.float64
    np.testing.assert_array_equal(numbers, [1, 2])


@pytest.mark.parametrize(
    "values", [["90%"], ["1.0"], [1.0, None], None, {"a": 1.0}, jnp.array([1j]), [1j, 2.0], [[1.0], [2.0, 3.0]], max]
)
def test_what_is_no_real_number_is_refused_by_name(values):
    with pytest.raises(TypeError, match=r"losses is .*; expected real numbers"):
        as_numbers("losses", values)


def test_traced_numbers_are_refused_with_what_to_do():
    with pytest.raises(TypeError, match=r"sizes is .*; expected real numbers, outside jit"):
        jax.jit(glue_jax.coefficients.data_size_weights)(jnp.ones(3))


def test_a_number_is_one_number():
    assert as_number("low", np.float32(0.5)) == 0.5
    with pytest.raises(ValueError, match=r"low has shape \(2,\); expected one real number"):
        as_number("low", jnp.zeros(2))


@pytest.mark.parametrize("value", [0, -1.0, np.nan, np.inf, jnp.float32(0)])
def test_numbers_that_are_not_above_0_are_refused(value):
    with pytest.raises(ValueError, match=r"radius is .*; expected a finite number above 0"):
        check_positive("radius", value)


def test_a_traced_number_is_refused_by_its_shape_alone():
    jax.jit(lambda radius: check_positive("radius", radius))(0.0)
    with pytest.raises(ValueError, match=r"radius has shape \(2,\), dtype float32; expected one real number"):
        jax.jit(lambda radius: check_positive("radius", radius))(jnp.ones(2))


def test_patterns_that_are_none_are_refused():
    assert compiled("pattern", "^a").search("ab")
    with pytest.raises(ValueError, match=r"pattern is '\(', which is no regular expression: missing \)"):
        compiled("pattern", "(")
    with pytest.raises(TypeError, match=r"pattern is \['w'\]; expected a regular expression"):
        compiled("pattern", ["w"])


def test_what_cannot_be_called_is_refused():
    with pytest.raises(TypeError, match="link_fn is None; expected a function"):
        check_callable(loss_fn=max, link_fn=None)


def test_states_and_optimizers_that_are_none_or_do_not_fit_are_refused():
    state = glue_jax.init(3, optax.adam(0.1))
    check_state(state)
    check_optimizer(optax.adam(0.2), state)
    for wrong in (None, state.beta, tuple(state), state._asdict()):
        with pytest.raises(TypeError, match=r"state is a .*; expected a GlueState"):
            check_state(wrong)
    for step in (0.5, None):
        with pytest.raises(TypeError, match=f"state.step is {step}; expected one integer"):
            check_state(state._replace(step=step))
    for wrong in (None, optax.adam, optax.adam(0.1).update):
        with pytest.raises(TypeError, match=r"optimizer is .*; expected an optax.GradientTransformation"):
            check_optimizer(wrong)
    with pytest.raises(ValueError, match=r"state.opt_state is not of this optimizer and beta"):
        check_optimizer(optax.sgd(0.1), state)
