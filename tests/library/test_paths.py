"""Parts of a pytree by their paths."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import glue_jax
from glue_jax.paths import by_name, by_path, check_finite

MODEL = {"params": {"body": [{"w": 1.0}, {"w": 2.0}], "head": {"w": 3.0, "b": 4.0}}, "batch_stats": {"body": 5.0}}


def test_a_path_is_its_keys_joined_by_slashes():
    assert jax.tree.leaves(glue_jax.paths.leaf_paths(MODEL)) == [
        "batch_stats/body",
        "params/body/0/w",
        "params/body/1/w",
        "params/head/b",
        "params/head/w",
    ]


@pytest.mark.parametrize("pattern", ["head", "^batch_stats/", "/w$", ""])
def test_combining_what_was_partitioned_gives_the_tree_again(pattern):
    part, rest = glue_jax.partition(MODEL, pattern)
    assert len(jax.tree.leaves(rest)) + len(jax.tree.leaves(part)) == 5
    assert glue_jax.combine(rest, part) == glue_jax.combine(part, rest) == MODEL


def test_the_part_that_the_pattern_is_in_comes_first():
    part, rest = glue_jax.partition(MODEL, "^params/head")
    assert jax.tree.leaves(part) == [4, 3]
    assert jax.tree.leaves(rest) == [5, 1, 2]


def test_a_pattern_in_no_path_is_refused_with_the_paths():
    with pytest.raises(ValueError, match=r"the pattern 'tail' matches no path; the paths are \['batch_stats/body', "):
        glue_jax.partition(MODEL, "tail")


def test_a_tree_that_holds_none_keeps_it():
    # As an Equinox layer without a bias.
    tree = {"body": 1.0, "bias": None, "head": 2.0}
    assert glue_jax.combine(*glue_jax.partition(tree, "head")) == tree


def test_parts_that_overlap_are_refused():
    with pytest.raises(ValueError, match="each of the two trees has a leaf at a"):
        glue_jax.combine({"a": 1.0, "b": None}, {"a": 2.0, "b": 1.0})


def test_the_value_below_an_nnx_variable_is_no_part_of_a_name():
    state = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    assert list(by_path(state)) == ["bias/value", "kernel/value"]
    assert list(by_name(state)) == ["bias", "kernel"]
    # Where it has siblings it is a name of its own.
    attention = {"query": 1.0, "key": {"value": 2.0}, "value": 3.0}
    assert by_name({"attention": attention}) == {"attention/key": 2.0, "attention/query": 1.0, "attention/value": 3.0}


def test_two_leaves_of_one_path_are_refused():
    with pytest.raises(ValueError, match="two leaves have the path 'a/b'; expected one"):
        by_path({"a/b": 1.0, "a": {"b": 2.0}})


def test_a_number_that_is_not_finite_is_named_by_expert_and_path():
    check_finite("params", {"a": jnp.ones(2, jnp.bfloat16), "n": jnp.array(3), "b": np.float64(1e300)})
    with pytest.raises(ValueError, match="expert 2 of experts holds inf at a/b; expected finite numbers"):
        check_finite("experts", {"a": {"b": jnp.array([[1.0], [2.0], [jnp.inf]])}}, stacked=True)
