"""Stacking and counting experts."""

import gc
import math
import re
import weakref
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import glue_jax
from tests.library.helpers import Tensor


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


@pytest.mark.parametrize("entry", ["count$", ".count"])
def test_take_first_finds_a_field_by_its_whole_name(entry):
    # `count` finds `count_scale` too, a floating-point leaf.
    experts = [Layer(jnp.zeros(2), jnp.array(count)) for count in (3, 4)]
    blended = glue_jax.blend(glue_jax.stack_experts(experts, take_first=[entry]), jnp.array([0.5, 0.5]))
    assert int(blended.count) == 3


def test_take_first_leaves_the_other_integer_leaves_checked():
    experts = [{"n": jnp.array(i), "m": jnp.array(i)} for i in range(2)]
    with pytest.raises(ValueError, match=r"expert 1 differs from expert 0 at \['m'\]: different int32 values"):
        glue_jax.stack_experts(experts, take_first=["n"])


@pytest.mark.parametrize(
    ("take_first", "message"),
    [
        (["nothing"], r"take_first has 'nothing', which matches no path; the paths are \['n', 'w'\]"),
        ("w", r"take_first has 'w', but floating-point leaves.*\['w'\]"),
    ],
)
def test_a_take_first_that_finds_nothing_or_a_weight_is_refused(take_first, message):
    with pytest.raises(ValueError, match=message):
        glue_jax.stack_experts([{"n": jnp.array(1), "w": jnp.array(1.0)}], take_first=take_first)


def test_take_first_finds_dotted_names_by_one_pattern():
    experts = [{"bn1.num_batches_tracked": np.int64(count), "bn1.weight": np.ones(2, np.float32)} for count in (3, 9)]
    stacked = glue_jax.stack_experts(experts, take_first="num_batches_tracked")
    np.testing.assert_array_equal(stacked["bn1.num_batches_tracked"], [3, 3])


def test_experts_may_come_one_after_another_from_an_iterator():
    alive = []

    class Tracked(np.ndarray):
        """An array that can be counted."""

    def experts():
        for index in range(3):
            array = np.full(4, index, np.float32).view(Tracked)
            alive.append(weakref.ref(array))
            yield {"w": array}

    stacked = glue_jax.stack_experts(experts())
    np.testing.assert_array_equal(stacked["w"][:, 0], [0, 1, 2])
    gc.collect()
    assert [found() for found in alive] == [None] * 3


def test_the_stack_goes_where_its_sharding_says():
    device = jax.devices()[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    experts = [{"a": np.ones(2, np.float32), "b": {"c": np.ones(3, np.float32)}}] * 2
    for given in (sharding, {"a": sharding, "b": sharding}):
        stacked = glue_jax.stack_experts(experts, sharding=given)
        assert all(leaf.sharding == sharding and leaf.committed for leaf in jax.tree.leaves(stacked))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_weights_that_are_not_finite_are_refused_by_expert_and_path(bad, dtype):
    experts = [{"w": jnp.ones(3, dtype)}, {"w": jnp.array([1.0, bad, 1.0], dtype)}, {"w": jnp.ones(3, dtype)}]
    with pytest.raises(ValueError, match=rf"expert 1 of experts holds {bad} at w; expected finite numbers"):
        glue_jax.stack_experts(experts)


def test_integers_that_jax_does_not_hold_are_refused_and_others_kept():
    assert int(glue_jax.stack_experts([{"n": np.int64(7)}] * 2)["n"][0]) == 7
    with pytest.raises(ValueError, match=r"\['n'\] has int64 values that JAX's int32 does not hold"):
        glue_jax.stack_experts([{"n": np.int64(2**40 + 7)}] * 2)


def test_float64_is_not_narrowed_in_silence():
    with pytest.warns(UserWarning, match=r"float64 leaves are stored as float32"):
        glue_jax.stack_experts([{"w": np.ones(2)}] * 2)


def test_masks_and_arrays_that_numpy_cannot_read_are_refused_by_path():
    with pytest.raises(TypeError, match=r"expert 0 holds a MaskedArray at \['w'\], whose mask would be lost"):
        glue_jax.stack_experts([{"w": np.ma.masked_array([1.0, 2.0], [True, False])}])
    with pytest.raises(TypeError, match="expected numbers"):
        glue_jax.stack_experts([{"w": np.array(["a"])}])

    class Tensor:
        """As a PyTorch tensor that requires a gradient."""

        dtype = "torch.float32"

        def __array__(self, dtype=None, copy=None):
            raise RuntimeError("Can't call numpy() on Tensor that requires grad.")

    with pytest.raises(TypeError, match=r"expert 0 holds a Tensor at \['w'\], which NumPy cannot read.*detach"):
        glue_jax.stack_experts([{"w": Tensor()}])


def test_a_tensor_of_another_framework_that_numpy_reads_is_stacked():
    stacked = glue_jax.stack_experts([{"w": Tensor(np.array(values, np.float32))} for values in ([1, 2], [3, 4])])
    np.testing.assert_array_equal(stacked["w"], [[1, 2], [3, 4]])


def test_integers_under_jit_are_not_said_to_differ():
    def stack(n):
        return glue_jax.stack_experts([{"n": n}, {"n": n}])

    with pytest.raises(ValueError, match="traced, and cannot be compared under jit"):
        jax.jit(stack)(jnp.array(1))


def test_no_experts_on_the_leading_axis_are_refused():
    with pytest.raises(ValueError, match=r"\['w'\] has shape \(0, 3\); expected at least one expert"):
        glue_jax.num_experts({"w": jnp.zeros((0, 3))})


def test_a_generator_that_overwrites_its_expert_is_refused():
    def overwriting():
        expert = {"w": np.zeros(3, np.float32)}
        for value in range(3):
            expert["w"][:] = value
            yield expert

    with pytest.raises(ValueError, match="expert 1 lies in the memory of expert 0; expected"):
        glue_jax.stack_experts(overwriting())
    copies = glue_jax.stack_experts({"w": expert["w"].copy()} for expert in overwriting())
    assert copies["w"][:, 0].tolist() == [0, 1, 2]


def test_experts_of_a_generator_may_share_a_frozen_leaf():
    frozen = np.ones(3, np.float32)
    stacked = glue_jax.stack_experts({"frozen": frozen, "w": np.full(2, i, np.float32)} for i in range(3))
    assert stacked["frozen"].shape == (3, 3)
    assert stacked["w"][:, 0].tolist() == [0, 1, 2]
