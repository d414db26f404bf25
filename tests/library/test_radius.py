"""Which radius and learning rate a function asks for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import glue_jax


def wavy(beta):
    """Of curvature that changes on a scale of 1, and values that float32 rounds at 1e-7 of 100."""
    return 100 + jnp.sum(jnp.sin(2 * beta))


def test_the_radius_proposed_lies_between_rounding_and_curvature():
    found = glue_jax.calibrate(jax.random.key(1), wavy, jnp.linspace(-1, 1, 6))
    assert 3e-3 <= found.radius <= 0.3
    assert found.disagreement[0] > 10 * found.disagreement.min()
    assert found.disagreement[-1] > 10 * found.disagreement.min()


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_radius_follows_the_scale_of_the_coefficients(scale):
    radii = tuple(float(radius) for radius in np.logspace(-6, 4, 21))
    found = glue_jax.calibrate(
        jax.random.key(2), lambda beta: wavy(beta / scale), scale * jnp.linspace(-1, 1, 6), radii=radii
    )
    assert 1e-3 <= found.radius / scale <= 0.5


def test_a_metric_that_counts_asks_for_a_radius_at_which_it_changes():
    # 1000 thresholds: the fraction of them below the sum of beta moves by 0.1 % a step of 2e-3.
    thresholds = jax.random.uniform(jax.random.key(3), (1000,), minval=-1.0, maxval=1.0)

    def fraction(beta):
        return jnp.mean(thresholds < jnp.sum(beta))

    found = glue_jax.calibrate(jax.random.key(4), fraction, jnp.zeros(5), num_directions=8)
    assert found.radius >= 0.03


@pytest.mark.parametrize("gain", [0.1, 10.0])
def test_plain_sgd_takes_a_first_step_of_the_length_asked_for(gain):
    beta = jnp.linspace(-1, 1, 6)
    found = glue_jax.calibrate(
        jax.random.key(5),
        lambda beta: gain * wavy(beta),
        beta,
        directions="orthogonal",
        num_directions=6,
        step_directions=6,
        first_step=0.03,
    )
    gradient = gain * 2 * np.cos(2 * np.asarray(beta))
    np.testing.assert_allclose(found.learning_rate * np.sqrt(np.mean(gradient**2)), 0.03, rtol=0.02)


@pytest.mark.parametrize("m", [1, 5])
def test_the_first_step_is_of_that_length_for_the_directions_that_it_takes(m):
    gradient = jnp.linspace(-1, 2, 30)

    def linear(beta):
        return gradient @ beta

    # So many directions know the gradient's length to some percent.
    found = glue_jax.calibrate(
        jax.random.key(7), linear, jnp.zeros(30), num_directions=500, step_directions=m, first_step=0.03
    )

    def first_step(key):
        return glue_jax.estimators.spsa_gradient(
            key, linear, jnp.zeros(30), num_directions=m, radius=found.radius
        ).gradient

    steps = found.learning_rate * jax.vmap(first_step)(jax.random.split(jax.random.key(8), 2000))
    np.testing.assert_allclose(jnp.sqrt(jnp.mean(jnp.square(steps))), 0.03, rtol=0.1)


def test_the_start_may_be_a_number():
    assert glue_jax.calibrate(jax.random.key(9), lambda beta: jnp.sin(beta), 0.3).radius <= 0.3


def test_an_end_of_the_radii_is_told():
    assert glue_jax.calibrate(jax.random.key(9), wavy, jnp.linspace(-1, 1, 6)).interior
    assert not glue_jax.calibrate(jax.random.key(9), wavy, jnp.linspace(-1, 1, 6), radii=(1, 2, 4)).interior


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"radii": (0.1, 1.0)}, "expected at least three finite numbers above 0, ascending"),
        ({"radii": (0.1, 1.0, 0.5)}, "ascending"),
        ({"radii": (0.0, 1.0, 2.0)}, "above 0"),
        ({"first_step": 0.0}, "first_step is 0.0"),
        ({"num_directions": 0}, "num_directions is 0"),
        ({"step_directions": 0}, "step_directions is 0"),
        ({"step_directions": -1}, "step_directions is -1"),
        ({"fun": lambda beta: beta}, "expected one real scalar"),
        ({"fun": lambda beta: jnp.float32(1) + 0 * jnp.sum(beta)}, "fun has the same value"),
    ],
)
def test_bad_arguments_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        glue_jax.calibrate(**({"key": jax.random.key(6), "fun": wavy, "beta": jnp.zeros(3)} | words))
