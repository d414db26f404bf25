"""Objectives without a gradient, and without labels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glue_jax.objectives import entropy, error_rate


def test_an_error_rate_is_one_less_the_accuracy():
    logits = jnp.array([[2.0, 1.0], [0.0, 1.0], [3.0, 0.0], [1.0, 0.0]])
    assert error_rate(logits, jnp.array([0, 1, 1, 0])) == 0.25


def test_entropy_is_that_of_the_predictions():
    np.testing.assert_allclose(entropy(jnp.zeros((3, 4))), np.log(4), rtol=1e-6)
    np.testing.assert_allclose(entropy(jnp.array([[1e4, 0.0], [0.0, 1e4]])), 0, atol=1e-6)
    p = np.array([0.2, 0.3, 0.5])
    np.testing.assert_allclose(entropy(jnp.log(p)[None]), -(p * np.log(p)).sum(), rtol=1e-5)


LOGITS = jnp.array([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0], [0.0, 3.0, 1.0]])
LABELS = jnp.array([0, 2, 0])


@pytest.mark.parametrize(
    ("logits", "labels", "error", "message"),
    [
        (LOGITS, LABELS[:, None], ValueError, r"labels have shape \(3, 1\) and logits have shape \(3, 3\); expected"),
        (LOGITS, jax.nn.one_hot(LABELS, 3), ValueError, r"labels have shape \(3, 3\)"),
        (LOGITS, LABELS[:2], ValueError, r"labels have shape \(2,\)"),
        (LOGITS, LABELS[0], ValueError, r"labels have shape \(\)"),
        (LOGITS[0], LABELS, ValueError, r"logits have shape \(3,\)"),
        (LOGITS[:, :1], LABELS, ValueError, r"logits have shape \(3, 1\).* C at least 2"),
        (LOGITS[:0], LABELS[:0], ValueError, r"labels have shape \(0,\)"),
        (LOGITS, LABELS.astype(jnp.float32), TypeError, "labels have dtype float32; expected integers"),
        (LOGITS, None, TypeError, "labels is None; expected integers"),
    ],
)
def test_labels_that_are_not_one_integer_an_example_are_refused(logits, labels, error, message):
    with pytest.raises(error, match=message):
        error_rate(logits, labels)


def test_pixels_have_labels_too():
    assert error_rate(jnp.stack([LOGITS, LOGITS]), jnp.stack([LABELS, LABELS])) == pytest.approx(1 / 3)


def test_logits_that_are_nan_make_the_error_rate_nan():
    assert jnp.isnan(error_rate(LOGITS.at[1, 2].set(jnp.nan), LABELS))
    assert jnp.isnan(error_rate(jnp.full((4, 2), jnp.nan, jnp.bfloat16), jnp.zeros(4, int)))


@pytest.mark.parametrize("label", [-1, 3])
def test_labels_of_no_class_make_the_error_rate_nan(label):
    assert jnp.isnan(error_rate(LOGITS, LABELS.at[1].set(label)))


def test_masked_classes_add_nothing_to_the_entropy_nor_to_its_gradient():
    masked = jnp.array([[0.0, -jnp.inf], [1.0, -jnp.inf]])
    assert entropy(masked) == 0
    logits = jnp.array([[0.3, -0.5, -jnp.inf]])
    np.testing.assert_allclose(entropy(logits), entropy(logits[:, :2]), rtol=1e-6)
    gradient = jax.grad(entropy)(logits)
    np.testing.assert_allclose(gradient[:, :2], jax.grad(entropy)(logits[:, :2]), rtol=1e-5)
    assert gradient[0, 2] == 0
    # NaN stays to be seen.
    assert jnp.isnan(entropy(jnp.array([[0.0, jnp.nan]])))


def test_the_entropy_of_half_precision_is_averaged_in_float32():
    logits = jnp.tile(jnp.array([[0.0, 1.0]], jnp.bfloat16), (1000, 1))
    found = entropy(logits)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, entropy(jnp.array([[0.0, 1.0]])), rtol=1e-5)


@pytest.mark.parametrize("shape", [(), (0, 3), (3, 0)])
def test_logits_of_no_example_or_class_are_refused(shape):
    with pytest.raises(ValueError, match="logits have shape"):
        entropy(jnp.zeros(shape))


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int8, jnp.int32])
def test_labels_of_a_short_dtype_name_all_classes(dtype):
    logits = jnp.zeros((2, 256)).at[:, 3].set(1.0)
    assert float(error_rate(logits, jnp.array([3, 4], dtype))) == 0.5
