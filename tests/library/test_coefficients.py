"""Coefficients that need no learning."""

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import glue_jax
from glue_jax.coefficients import check_floating, data_size_weights, proxy_accuracy_weights, uniform, weights_to_logits

reproducible = hypothesis.settings(deadline=None, derandomize=True, max_examples=20)


@pytest.mark.parametrize("k", [1, 2, 10])
def test_uniform_is_one_over_k(k):
    alpha = uniform(k)
    assert alpha.dtype == jnp.float32
    np.testing.assert_array_equal(alpha, np.full(k, np.float32(1 / k)))


def test_uniform_refuses_no_experts():
    with pytest.raises(ValueError, match="num_experts is 0"):
        uniform(0)


@pytest.mark.parametrize("weights", [data_size_weights, proxy_accuracy_weights])
@pytest.mark.parametrize(
    ("values", "expected"),
    [([1, 3], [0.25, 0.75]), ([2000, 2000], [0.5, 0.5]), ([0, 5, 5, 10], [0, 0.25, 0.25, 0.5]), ([7.5], [1])],
)
def test_weights_are_proportional_to_sizes_and_accuracies(weights, values, expected):
    alpha = weights(values)
    assert alpha.dtype == jnp.float32
    np.testing.assert_allclose(alpha, expected, rtol=1e-7)


def test_weights_whose_sum_is_too_large_for_a_float_are_weights():
    np.testing.assert_array_equal(data_size_weights([1e308, 1e308, 0]), [0.5, 0.5, 0])


def test_accuracies_in_percent_and_as_fractions_weigh_the_same():
    np.testing.assert_allclose(proxy_accuracy_weights([42.0, 21.0]), proxy_accuracy_weights([0.42, 0.21]), rtol=1e-6)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], r"shape \(0,\)"),
        ([[1, 2]], r"shape \(1, 2\)"),
        (3, r"shape \(\)"),
        ([1, -1], r"\[1.0, -1.0\]"),
        ([0, 0], r"\[0.0, 0.0\]"),
        ([1, np.inf], "inf"),
        ([1, np.nan], "nan"),
    ],
)
@pytest.mark.parametrize(("weights", "name"), [(data_size_weights, "sizes"), (proxy_accuracy_weights, "accuracies")])
def test_weights_of_impossible_numbers_are_refused(weights, name, values, message):
    with pytest.raises(ValueError, match=f"{name} .*{message}"):
        weights(values)


def test_logits_of_known_weights():
    # softmax of (0, log 3) is (1/4, 3/4); the mean is taken off.
    logits = weights_to_logits([0.25, 0.75])
    np.testing.assert_allclose(logits, [-np.log(3) / 2, np.log(3) / 2], rtol=1e-6)
    assert logits.dtype == jnp.float32


@reproducible
@hypothesis.given(
    logits=hnp.arrays(np.float32, st.sampled_from([(3,), (1,), (2, 4)]), elements=st.floats(-4, 4, width=32))
)
def test_the_softmax_of_the_logits_is_the_weights_and_their_mean_is_zero(logits):
    weights = jax.nn.softmax(logits)
    found = weights_to_logits(weights)
    np.testing.assert_allclose(jax.nn.softmax(found), weights, atol=1e-6)
    np.testing.assert_allclose(jnp.mean(found, axis=-1), np.zeros(logits.shape[:-1]), atol=1e-6)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0, 0.0], "0.99"),
        ([1.5, -0.5], "expected finite numbers above 0"),
        ([0.5, np.nan], "expected finite numbers above 0"),
        ([0.5, 0.4], "weights sum to 0.9"),
        ([[0.5, 0.5], [0.5, 0.6]], r"weights sum to \[1.0, 1.1\]"),
        (0.5, r"shape \(\)"),
        ([], r"shape \(0,\)"),
    ],
)
def test_weights_outside_the_simplex_have_no_logits(weights, message):
    with pytest.raises(ValueError, match=message):
        weights_to_logits(weights)


def test_the_unconstrained_link_changes_nothing():
    beta = {"a": jnp.array([2.0, -3.0]), "b": jnp.array(1.0)}
    assert glue_jax.unconstrained(beta) is beta


@pytest.mark.parametrize(
    ("beta", "message"),
    [
        (jnp.array([1, 2]), "beta has dtype int32"),
        ({"a": jnp.ones(2), "t": jnp.array(True)}, r"beta\['t'\] has dtype bool"),
        ([jnp.ones(2, jnp.complex64)], r"beta\[0\] has dtype complex64"),
    ],
)
def test_coefficients_that_are_not_floating_point_are_refused_by_path(beta, message):
    with pytest.raises(TypeError, match=message):
        check_floating(beta)


@pytest.mark.parametrize("beta", [jnp.ones(2, jnp.bfloat16), {"a": 1.0, "b": np.ones(3, np.float32)}, {}])
def test_floating_point_coefficients_of_any_kind_pass(beta):
    assert check_floating(beta) is None


@pytest.mark.parametrize("function", [data_size_weights, weights_to_logits, glue_jax.merging.best_expert])
def test_complex_weights_keep_no_real_part_in_silence(function):
    with pytest.raises(TypeError, match="expected real numbers"):
        function(jnp.array([0.5 + 1j, 0.5]))
