"""Stacking, counting and blending experts."""

import math
import re
from typing import Any, NamedTuple

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import glue_jax

pytestmark = pytest.mark.usefixtures("quick_compilation")

reproducible = hypothesis.settings(deadline=None, derandomize=True, max_examples=15)

finite = st.floats(-100, 100, width=32, allow_subnormal=False)
stacked_leaves = hnp.arrays(np.float32, hnp.array_shapes(min_dims=1, max_dims=3, max_side=4), elements=finite)


class Layer(NamedTuple):
    kernel: Any
    count: Any
    count_scale: Any = 1.0


def unstack(experts, index):
    return jax.tree.map(lambda leaf: leaf[index], experts)


def test_stacking_gives_each_leaf_a_leading_axis_of_experts_in_their_order():
    experts = [{"w": jnp.full((2, 3), float(i)), "b": [jnp.asarray(10.0 * i)]} for i in range(4)]
    stacked = glue_jax.stack_experts(experts)
    assert stacked["w"].shape == (4, 2, 3)
    np.testing.assert_array_equal(stacked["b"][0], [0, 10, 20, 30])
    assert glue_jax.num_experts(stacked) == 4
    for index, expert in enumerate(experts):
        assert jax.tree.all(jax.tree.map(np.array_equal, unstack(stacked, index), expert))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16, jnp.int32, jnp.bool_])
def test_stacking_keeps_dtypes(dtype):
    stacked = glue_jax.stack_experts([{"w": jnp.ones(2, dtype)}, {"w": jnp.ones(2, dtype)}])
    assert stacked["w"].dtype == dtype


def test_python_numbers_and_numpy_arrays_can_be_stacked():
    stacked = glue_jax.stack_experts(
        [{"a": 1.0, "b": np.array([2.0, 3.0], np.float32)}, {"a": 3.0, "b": np.array([4.0, 5.0], np.float32)}]
    )
    np.testing.assert_array_equal(stacked["a"], [1, 3])
    np.testing.assert_array_equal(stacked["b"], [[2, 3], [4, 5]])


def test_the_blend_is_the_weighted_sum_of_the_experts():
    experts = glue_jax.stack_experts(
        [{"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([10.0, 20.0])}, {"w": jnp.array([-4.0, 8.0])}]
    )
    np.testing.assert_array_equal(glue_jax.blend(experts, jnp.array([0.5, 0.25, 0.25]))["w"], [2.0, 8.0])
    np.testing.assert_array_equal(glue_jax.blend(experts, jnp.array([2.0, -1.0, 0.5]))["w"], [-10.0, -12.0])


@reproducible
@hypothesis.given(leaf=stacked_leaves, data=st.data())
def test_a_one_hot_alpha_returns_that_expert_exactly(leaf, data):
    index = data.draw(st.integers(0, leaf.shape[0] - 1))
    blended = glue_jax.blend({"w": jnp.asarray(leaf)}, jax.nn.one_hot(index, leaf.shape[0]))
    np.testing.assert_array_equal(blended["w"], leaf[index])


@reproducible
@hypothesis.given(leaf=stacked_leaves, data=st.data())
def test_permuting_experts_and_alpha_together_leaves_the_blend(leaf, data):
    k = leaf.shape[0]
    alpha = data.draw(hnp.arrays(np.float32, (k,), elements=st.floats(-1, 1, width=32)))
    order = np.array(data.draw(st.permutations(range(k))))
    blended = glue_jax.blend({"w": jnp.asarray(leaf)}, alpha)["w"]
    permuted = glue_jax.blend({"w": jnp.asarray(leaf[order])}, alpha[order])["w"]
    np.testing.assert_allclose(permuted, blended, rtol=0, atol=1e-6 * k * 100)


@reproducible
@hypothesis.given(expert=stacked_leaves, logits=hnp.arrays(np.float32, (5,), elements=st.floats(-5, 5, width=32)))
def test_equal_experts_make_alpha_on_the_simplex_irrelevant(expert, logits):
    experts = glue_jax.stack_experts([{"w": expert}] * 5)
    blended = glue_jax.blend(experts, jax.nn.softmax(logits))["w"]
    np.testing.assert_allclose(blended, expert, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_experts_are_accumulated_in_float32(dtype):
    # Beyond 2/eps neighbours are 2 apart, so that `big + 1` is `big` again, but `big + 1 + 1` is not.
    big = 2 / float(jnp.finfo(dtype).eps)
    assert dtype(big) + dtype(1) == dtype(big)
    experts = {"w": jnp.array([[big], [1.0], [1.0]], dtype)}
    blended = glue_jax.blend(experts, jnp.ones(3))["w"]
    assert blended.dtype == dtype
    assert float(blended[0]) == big + 2


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_alpha_is_not_rounded_to_half_precision_experts(dtype):
    eps = float(jnp.finfo(dtype).eps)
    alpha, expert = 1 + 0.45 * eps, 3 / eps
    assert dtype(alpha) == 1
    # The product is expert + 1.35, where neighbours are 2 apart.
    assert float(glue_jax.blend({"w": jnp.array([[expert]], dtype)}, jnp.array([alpha]))["w"][0]) == expert + 2


def test_each_leaf_keeps_its_own_dtype():
    experts = {"a": jnp.ones((2, 3), jnp.bfloat16), "b": jnp.ones((2,), jnp.float32), "c": jnp.ones((2, 1), jnp.int32)}
    blended = glue_jax.blend(experts, jnp.array([0.5, 0.5]))
    assert jax.tree.map(lambda leaf: leaf.dtype, blended) == {"a": jnp.bfloat16, "b": jnp.float32, "c": jnp.int32}


def test_integer_leaves_are_the_first_experts_whatever_alpha():
    experts = glue_jax.stack_experts(
        [{"n": jnp.array([3, 4]), "mask": jnp.array(True)}, {"n": jnp.array([3, 4]), "mask": jnp.array(True)}]
    )
    blended = glue_jax.blend(experts, jnp.array([0.0, 0.3]))
    np.testing.assert_array_equal(blended["n"], [3, 4])
    assert blended["n"].dtype == jnp.int32
    assert blended["mask"].dtype == jnp.bool_
    assert bool(blended["mask"])


ROWS = jnp.array([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])


@pytest.mark.parametrize(
    "groups",
    [
        {"body": {"w": 0, "b": 0}, "head": {"w": 2, "b": 1}},
        {"body": 0, "head": {"w": 2, "b": 1}},
        {"body": np.int64(0), "head": {"w": jnp.array(2), "b": 1}},
    ],
    ids=["a full tree", "a prefix tree", "integer arrays"],
)
def test_groups_blend_each_leaf_by_its_row_of_alpha(groups):
    part = {"w": jnp.array([[2.0, 2.0], [6.0, 6.0]]), "b": jnp.array([10.0, 30.0])}
    blended = glue_jax.blend({"body": part, "head": part}, ROWS, groups)
    np.testing.assert_array_equal(blended["body"]["w"], [2, 2])
    np.testing.assert_array_equal(blended["body"]["b"], 10)
    np.testing.assert_array_equal(blended["head"]["w"], [4, 4])
    np.testing.assert_array_equal(blended["head"]["b"], 30)


def test_one_row_for_the_whole_tree_is_the_blend_by_that_row():
    experts = {"a": jnp.array([1.0, 3.0]), "b": jnp.array([[2.0], [4.0]])}
    by_group, by_row = glue_jax.blend(experts, ROWS, 2), glue_jax.blend(experts, ROWS[2])
    assert jax.tree.all(jax.tree.map(np.array_equal, by_group, by_row))


@pytest.mark.parametrize(
    ("alpha", "groups", "message"),
    [
        (jnp.ones(3), None, r"alpha has shape \(3,\); expected \[K\] with K = 2"),
        (jnp.ones(()), None, r"alpha has shape \(\); expected \[K\]"),
        (jnp.ones((3, 2)), None, r"alpha has shape \(3, 2\).*pass groups"),
        (jnp.ones(2), {"a": 0, "b": 0}, r"alpha has shape \(2,\); expected \[G, K\] with K = 2"),
        (jnp.ones((2, 3)), {"a": 0, "b": 0}, r"alpha has shape \(2, 3\); expected \[G, K\]"),
        (jnp.ones((3, 2)), {"a": 0, "b": 3}, r"row 3 at \['b'\]; expected one of the 3 rows"),
        (jnp.ones((3, 2)), {"a": -1, "b": 0}, r"row -1 at \['a'\]"),
        (jnp.ones((3, 2)), {"a": 0, "b": 0.5}, r"0.5 at \['b'\]; expected a row number"),
        (jnp.ones((3, 2)), {"a": 0}, "groups is no prefix"),
        (jnp.ones((3, 2)), {"a": 0, "b": [0, 1]}, "groups is no prefix"),
    ],
)
def test_alpha_and_groups_that_do_not_fit_are_refused(alpha, groups, message):
    with pytest.raises(ValueError, match=message):
        glue_jax.blend({"a": jnp.ones(2), "b": jnp.ones((2, 3))}, alpha, groups)


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        ({}, "hold no arrays"),
        ({"a": jnp.ones(2), "b": jnp.ones(())}, r"\['b'\] has shape \(\) and \['a'\] has shape \(2,\)"),
        ({"a": jnp.ones(2), "b": {"c": jnp.ones((3, 2))}}, r"\['b'\]\['c'\] has shape \(3, 2\)"),
    ],
)
def test_experts_that_are_not_stacked_are_refused_by_path(experts, message):
    with pytest.raises(ValueError, match=message):
        glue_jax.num_experts(experts)
    with pytest.raises(ValueError, match=message):
        glue_jax.blend(experts, jnp.ones(2))


BASE = {"a": np.zeros((2, 3), np.float32), "b": {"c": np.zeros(4, np.float32), "n": np.int32(7)}}


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ({"a": BASE["a"], "b": {"n": np.int32(7)}}, ["has no ['b']['c']"]),
        ({**BASE, "d": np.zeros(1)}, ["has ['d'], which expert 0 lacks"]),
        ({**BASE, "a": np.zeros((2, 5), np.float32)}, ["at ['a']: (2, 5) against (2, 3)"]),
        ({**BASE, "a": np.zeros((2, 3), np.float16)}, ["at ['a']: float16 against float32"]),
        (
            {**BASE, "b": {"c": BASE["b"]["c"], "n": np.int32(9)}},
            ["at ['b']['n']: different int32 values (9 against 7)", "take_first"],
        ),
        (
            {"a": np.zeros((3, 3), np.float32), "b": {"c": np.zeros(4, np.float64), "n": np.int32(8)}, "e": 1.0},
            ["at ['a']: (3, 3) against (2, 3)", "at ['b']['c']: float64", "at ['b']['n']: different", "has ['e']"],
        ),
    ],
    ids=["missing", "extra", "shape", "dtype", "integer value", "several at once"],
)
def test_every_difference_between_experts_is_reported_by_its_path(other, expected):
    with pytest.raises(ValueError) as caught:
        glue_jax.stack_experts([BASE, BASE, other])
    lines = str(caught.value).splitlines()
    assert all(line.startswith("expert 2 differs from expert 0 ") for line in lines)
    for text in expected:
        assert text in str(caught.value)


def test_each_expert_that_differs_is_reported():
    experts = [{"w": np.zeros(n)} for n in (3, 4, 3, 5)]
    with pytest.raises(ValueError, match=r"expert 1 .*\(4,\) against \(3,\)\nexpert 3 .*\(5,\) against \(3,\)"):
        glue_jax.stack_experts(experts)


def test_containers_of_different_types_are_refused():
    with pytest.raises(ValueError, match=r"expert 1 differs from expert 0 in the types of its containers"):
        glue_jax.stack_experts([[np.zeros(2), np.zeros(3)], (np.zeros(2), np.zeros(3))])


@pytest.mark.parametrize(("experts", "message"), [([], "got no experts"), ([{}, {}], "hold no arrays")])
def test_nothing_to_stack_is_refused(experts, message):
    with pytest.raises(ValueError, match=message):
        glue_jax.stack_experts(experts)


def test_a_key_leaf_is_refused_by_path_with_the_way_out():
    experts = [{"w": jnp.zeros(2), "dropout": {"rng": jax.random.key(i)}} for i in range(2)]
    with pytest.raises(TypeError, match=r"expert 0 holds a PRNG key at \['dropout'\]\['rng'\].*split off"):
        glue_jax.stack_experts(experts)


@pytest.mark.parametrize("leaf", ["relu", math.sqrt, object()])
def test_a_leaf_that_is_no_array_is_refused_by_path(leaf):
    with pytest.raises(TypeError, match=re.escape(f"expert 1 holds a {type(leaf).__name__} at ['f']")):
        glue_jax.stack_experts([{"f": 1.0}, {"f": leaf}])


@pytest.mark.parametrize("entry", ["num_batches_tracked", "['bn1']['num_batches_tracked']", "bn1"])
def test_take_first_keeps_the_first_experts_value(entry):
    # As in a PyTorch state dict, a counter that training left different in each expert.
    def expert(count):
        return {"bn1": {"num_batches_tracked": jnp.array(count)}, "w": jnp.array([float(count)])}

    stacked = glue_jax.stack_experts([expert(5), expert(7), expert(9)], take_first=[entry])
    blended = glue_jax.blend(stacked, jnp.array([0.0, 0.5, 0.5]))
    assert int(blended["bn1"]["num_batches_tracked"]) == 5
    np.testing.assert_allclose(blended["w"], [8.0])


def test_a_key_in_take_first_names_every_leaf_of_that_name_and_below():
    def expert(count):
        return {"a": {"count": jnp.array(count)}, "b": {"count": {"x": jnp.array(count), "y": jnp.array(-count)}}}

    blended = glue_jax.blend(
        glue_jax.stack_experts([expert(1), expert(2)], take_first=["count"]), jnp.array([0.5, 0.5])
    )
    assert jax.tree.map(int, blended) == {"a": {"count": 1}, "b": {"count": {"x": 1, "y": -1}}}


@pytest.mark.parametrize("entry", ["count", ".count"])
def test_take_first_names_a_field_by_its_whole_name(entry):
    # `count` must not name `count_scale`, a floating-point leaf.
    experts = [Layer(jnp.zeros(2), jnp.array(count)) for count in (3, 4)]
    blended = glue_jax.blend(glue_jax.stack_experts(experts, take_first=[entry]), jnp.array([0.5, 0.5]))
    assert int(blended.count) == 3


def test_take_first_leaves_the_other_integer_leaves_checked():
    experts = [{"n": jnp.array(i), "m": jnp.array(i)} for i in range(2)]
    with pytest.raises(ValueError, match=r"expert 1 differs from expert 0 at \['m'\]: different int32 values"):
        glue_jax.stack_experts(experts, take_first=["n"])


@pytest.mark.parametrize(
    ("take_first", "error", "message"),
    [
        (["nothing"], ValueError, r"take_first names 'nothing', but no leaf is there.*\['n'\]"),
        (["w"], ValueError, r"take_first names 'w', but floating-point leaves.*\['w'\]"),
        ("n", TypeError, "take_first is the string 'n'"),
    ],
)
def test_a_take_first_that_names_nothing_or_a_weight_is_refused(take_first, error, message):
    with pytest.raises(error, match=message):
        glue_jax.stack_experts([{"n": jnp.array(1), "w": jnp.array(1.0)}], take_first=take_first)
