"""Checks of arguments: each error names the argument and its value."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import glue_jax
from glue_jax.checks import as_number, as_numbers, check_positive, compiled


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
