"""What is not finite is named: the quantity, its step, and what may be the reason."""

import copy
import functools
import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import glue_jax
from tests.library.helpers import ADAM, DATA, learn, losing, squared

SPSA = {"step_fn": glue_jax.spsa_step, "loss_fn": squared, "optimizer": ADAM}


def failure(**words):
    with pytest.raises(glue_jax.NonFiniteLossError) as caught:
        learn(**words)
    return caught.value


@pytest.mark.parametrize("validate_every", [1, 2, 50])
@pytest.mark.parametrize("steps_per_call", [1, 50])
def test_the_earliest_of_losses_and_gradients_is_named(validate_every, steps_per_call):
    def root(params, batch):
        # Its value at 0 is finite, its slope is not.
        return jnp.sqrt(jnp.sum(params["w"] - jax.lax.stop_gradient(params["w"]))) + 0 * jnp.mean(batch)

    error = failure(loss_fn=root, validate_every=validate_every, steps_per_call=steps_per_call, max_steps=8)
    assert (error.what, error.step) == ("gradient_norm", 0)
    assert "the loss is finite there" in str(error)
    assert "learning rate" not in str(error)


@pytest.mark.parametrize("radius", [optax.linear_schedule(1e-2, 0.0, 4), lambda step: 0.0 * step + (step < 4) * 1e-2])
def test_a_radius_that_falls_to_0_is_named_at_its_step(radius):
    error = failure(**(SPSA | {"step_fn": functools.partial(glue_jax.spsa_step, radius=radius), "max_steps": 8}))
    assert (error.what, error.step) == ("gradient_norm", 4)
    assert "(the radius is 0 there, and the probes' difference is divided by it)" in str(error)


def test_experts_data_and_coefficients_that_are_not_finite_are_named_by_path():
    experts = {"w": jnp.array([0.0, jnp.nan])}
    assert "(not finite: experts['w'][1])" in str(failure(experts=experts, **SPSA))
    data = {"x": DATA.at[3].set(jnp.inf)}
    error = failure(data=data, **(SPSA | {"loss_fn": lambda params, batch: squared(params, batch["x"])}))
    assert "not finite: data['x'][3]" in str(error)
    state = glue_jax.init(2, ADAM)._replace(beta=jnp.array([0.0, jnp.nan]))
    assert "(not finite: beta[1])" in str(failure(state=state, **SPSA))
    validation = failure(validation_data=DATA.at[2].set(jnp.nan), **SPSA)
    assert (validation.what, validation.step) == ("validation value", 0)
    assert "(not finite: validation_data[2])" in str(validation)


def test_many_paths_are_not_all_named():
    experts = {f"w{index}": jnp.full((2, 3), jnp.nan) for index in range(9)}
    error = failure(experts=experts, loss_fn=lambda params, batch: jnp.sum(params["w0"]) + jnp.mean(batch))
    assert "experts['w0'][0], experts['w1'][0], experts['w2'][0] and 6 more" in str(error)


def test_a_loss_that_is_infinite_of_itself_is_not_the_learning_rates_fault():
    error = failure(loss_fn=lambda params, batch: jnp.log(0 * params["w"]) + 0 * jnp.mean(batch))
    assert (error.what, error.step, error.value) == ("loss", 0, -np.inf)
    assert "experts, data, beta are finite: look in the functions" in str(error)
    assert "learning rate" not in str(error)


def test_a_loss_that_becomes_infinite_may_be_the_learning_rates_fault():
    error = failure(step_fn=losing(7, jnp.inf))
    assert error.step == 7
    assert str(error).endswith("(a smaller learning rate may help)")


@pytest.mark.parametrize("steps_per_call", [1, 5])
def test_last_coefficients_that_are_not_finite_are_an_error(steps_per_call):
    error = failure(optimizer=optax.sgd(jnp.inf), max_steps=1, steps_per_call=steps_per_call)
    assert (error.what, error.step) == ("new beta", 0)
    assert str(error).endswith("(a smaller learning rate may help)")
    np.testing.assert_array_equal(error.result.alpha, [0.5, 0.5])


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda error: pickle.loads(pickle.dumps(error))])
def test_the_error_can_be_copied_and_pickled(again):
    error = failure(experts={"w": jnp.array([0.0, jnp.nan])})
    other = again(error)
    assert type(other) is glue_jax.NonFiniteLossError
    assert (str(other), other.what, other.step) == (str(error), error.what, error.step)
    assert np.isnan(other.value)
    chex.assert_trees_all_equal(other.result, error.result)
