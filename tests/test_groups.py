"""Coefficients by groups of paths."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import glue_jax

MODEL = {
    "params": {"blocks": [{"w": 0.0, "b": 0.0}, {"w": 0.0}], "head": {"w": 0.0}, "stem": 0.0},
    "batch_stats": {"blocks": [{"mean": 0.0}, {"mean": 0.0}]},
}


def test_a_block_has_its_parameters_and_its_statistics():
    groups = glue_jax.group_by_path(MODEL, r"blocks/\d+")
    assert groups.names == ("blocks/0", "blocks/1", "rest")
    assert groups.rows == {
        "params": {"blocks": [{"w": 0, "b": 0}, {"w": 1}], "head": {"w": 2}, "stem": 2},
        "batch_stats": {"blocks": [{"mean": 0}, {"mean": 1}]},
    }


def test_a_group_is_the_first_capture_group_where_there_is_one():
    assert glue_jax.group_by_path(MODEL, "(blocks)/|(head)").names == ("blocks", "rest")
    assert glue_jax.group_by_path(MODEL, "^params/([a-z]+)").names == ("rest", "blocks", "head", "stem")


def test_a_function_may_name_the_groups():
    groups = glue_jax.group_by_path(MODEL, lambda path: path.rpartition("/")[2])
    assert groups.names == ("mean", "b", "w", "stem")


def test_a_pattern_in_no_path_is_refused_with_the_paths():
    with pytest.raises(ValueError, match="the pattern 'tail' is in no path; the paths are"):
        glue_jax.group_by_path(MODEL, "tail")


@pytest.mark.parametrize("step_fn", [glue_jax.spsa_step, glue_jax.full_gradient_step, glue_jax.forward_gradient_step])
def test_each_group_learns_coefficients_of_its_own(step_fn):
    # The first leaf is right in expert 0, the second in expert 1: no single alpha has both.
    experts = glue_jax.stack_experts(
        [{"a": jnp.array(1.0), "b": jnp.array(0.0)}, {"a": jnp.array(0.0), "b": jnp.array(1.0)}]
    )
    groups = glue_jax.group_by_path(experts, "a|b")
    optimizer = optax.adam(0.2)
    words = {
        "loss_fn": lambda params, batch: jnp.square(params["a"] - 1) + jnp.square(params["b"] - 1) + 0 * jnp.sum(batch),
        "optimizer": optimizer,
        "merge_fn": functools.partial(glue_jax.blend, groups=groups.rows),
    }
    if step_fn is not glue_jax.full_gradient_step:
        words |= {"directions": "simplex_orthogonal", "num_directions": 2}
    step = jax.jit(functools.partial(step_fn, **words))
    state = glue_jax.init(2, optimizer, beta=jnp.zeros((len(groups.names), 2)))
    for _ in range(60):
        state, _ = step(jax.random.key(0), state, experts, jnp.zeros(1))
    np.testing.assert_allclose(glue_jax.alpha(state), np.eye(2), atol=0.05)
