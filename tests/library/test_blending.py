"""Blending experts."""

import functools
from typing import Any

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import glue_jax
from tests.library.helpers import STEPS

reproducible = hypothesis.settings(deadline=None, derandomize=True, max_examples=15)

finite = st.floats(-100, 100, width=32, allow_subnormal=False)
stacked_leaves = hnp.arrays(np.float32, hnp.array_shapes(min_dims=1, max_dims=3, max_side=4), elements=finite)


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
        (jnp.ones((3, 2)), {"a": 0}, "groups does not fit; expected a prefix"),
        (jnp.ones((1, 2)), glue_jax.merging.group_by_path({"a": 0.0}, "a"), "groups does not fit; pass groups.rows"),
        (jnp.ones((3, 2)), {"a": 0, "b": [0, 1]}, "groups does not fit; expected a prefix"),
    ],
)
def test_alpha_and_groups_that_do_not_fit_are_refused(alpha, groups, message):
    with pytest.raises(ValueError, match=message):
        glue_jax.blend({"a": jnp.ones(2), "b": jnp.ones((2, 3))}, alpha, groups)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4)])
def test_short_experts_are_blended_as_their_float32_copy(dtype, shape):
    rng = np.random.default_rng(0)
    experts = {"w": jnp.asarray(rng.normal(size=(4, *shape)), dtype)}
    wide = {"w": experts["w"].astype(jnp.float32)}
    alpha = jnp.asarray(rng.normal(size=4), jnp.float32)

    def loss(bank, alpha):
        return jnp.sum(jnp.sin(glue_jax.blend(bank, alpha, min_dtype=jnp.float32)["w"]))

    blended = glue_jax.blend(experts, alpha, min_dtype=jnp.float32)["w"]
    assert blended.dtype == jnp.float32
    np.testing.assert_allclose(blended, glue_jax.blend(wide, alpha)["w"], rtol=1e-5, atol=1e-6)
    assert glue_jax.blend(experts, alpha)["w"].dtype == dtype
    # Differentiated either way, and vmapped.
    expected = jax.grad(loss, argnums=1)(wide, alpha)
    np.testing.assert_allclose(jax.grad(loss, argnums=1)(experts, alpha), expected, rtol=1e-4, atol=1e-5)
    slope = jax.jvp(functools.partial(loss, experts), (alpha,), (jnp.ones(4),))[1]
    np.testing.assert_allclose(slope, jnp.sum(expected), rtol=1e-4, atol=1e-5)
    both = jax.vmap(functools.partial(loss, experts))(jnp.stack([alpha, 2 * alpha]))
    np.testing.assert_allclose(both, [loss(wide, alpha), loss(wide, 2 * alpha)], rtol=1e-4, atol=1e-5)


def test_min_dtype_narrows_nothing():
    experts = {"a": jnp.ones((2, 3), jnp.float32), "b": jnp.ones((2, 3), jnp.bfloat16)}
    blended = glue_jax.blend(experts, jnp.ones(2), min_dtype=jnp.float16)
    assert jax.tree.map(lambda leaf: leaf.dtype, blended) == {"a": jnp.float32, "b": jnp.bfloat16}


def test_complex_coefficients_are_refused():
    with pytest.raises(TypeError, match="alpha has dtype complex64; expected real coefficients"):
        glue_jax.blend({"w": jnp.ones(2)}, jnp.array([1j, 0]))


def parameters(k, dtype):
    """Experts of a network of two layers, each leaf with more than two axes, 1.2 million parameters each."""
    rng = np.random.default_rng(0)
    shapes = {"first": (8, 75, 1000), "second": (1000, 600)}
    return {name: jnp.asarray(0.01 * rng.normal(size=(k, *shape)), dtype) for name, shape in shapes.items()}


def network_loss(params, batch):
    hidden = jax.nn.relu(batch @ params["first"].reshape(600, 1000))
    return jnp.mean(jnp.square(hidden @ params["second"]))


def temporary_bytes(options, function, *arguments):
    memory: Any = jax.jit(function, compiler_options=options).lower(*arguments).compile().memory_analysis()
    return memory.temp_size_in_bytes


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(
    ("step_fn", "models"),
    [(glue_jax.spsa_step, 1), (glue_jax.forward_gradient_step, 2.25), (glue_jax.full_gradient_step, 1.5)],
)
def test_a_step_makes_no_float32_copy_of_short_experts(optimized, step_fn, models, dtype):
    k, batch = 12, jnp.ones((4, 600))
    experts, optimizer = parameters(k, dtype), optax.adam(0.1)
    step = functools.partial(step_fn, loss_fn=network_loss, optimizer=optimizer)
    used = temporary_bytes(optimized, step, jax.random.key(0), glue_jax.init(k, optimizer), experts, batch)
    bank = sum(leaf.nbytes for leaf in jax.tree.leaves(experts))
    model = 2 * bank // k
    # Of float32 models: SPSA holds the blend alone; a tangent, or a part of the gradient, comes beside it.
    assert used < 1.02 * models * model + 1e5
    assert used < bank / 2


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_blend_of_short_experts_needs_no_memory_beside_its_result(optimized, dtype):
    experts = parameters(12, dtype)
    blend = functools.partial(glue_jax.blend, min_dtype=jnp.float32)
    assert temporary_bytes(optimized, blend, experts, jnp.ones(12)) < 1e6


def test_the_full_gradient_does_not_transpose_the_experts(optimized):
    experts = parameters(12, jnp.float32)

    def gradient(alpha, experts, cotangent):
        return jax.vjp(lambda alpha: glue_jax.blend(experts, alpha), alpha)[1](cotangent)

    one = jax.tree.map(lambda leaf: leaf[0], experts)
    bank = sum(leaf.nbytes for leaf in jax.tree.leaves(experts))
    assert temporary_bytes(optimized, gradient, jnp.ones(12), experts, one) < bank / 6


def close_experts(dtype):
    """Experts 1 % apart."""
    rng = np.random.default_rng(1)
    shapes = {"first": (20, 30), "second": (30, 5)}
    return {
        name: jnp.asarray(rng.normal(size=shape) + 0.01 * rng.normal(size=(6, *shape)), dtype)
        for name, shape in shapes.items()
    }


def close_loss(params, batch):
    hidden = jnp.tanh(jnp.matmul(batch, params["first"]) / 5)
    return jnp.mean(jnp.square(jnp.matmul(hidden, params["second"]) - batch[:, :5]))


@pytest.mark.parametrize("step_fn", STEPS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_the_default_step_is_right_for_experts_of_each_dtype_that_are_1_percent_apart(step_fn, dtype):
    experts, optimizer = close_experts(dtype), optax.sgd(1.0)
    batch = jnp.asarray(np.random.default_rng(2).normal(size=(50, 20)), jnp.float32)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), experts)
    words = {} if step_fn is glue_jax.full_gradient_step else {"num_directions": 5}
    start = glue_jax.init(6, optimizer)
    expected = jax.grad(lambda beta: close_loss(glue_jax.blend(wide, jax.nn.softmax(beta)), batch))(start.beta)
    after, _ = step_fn(jax.random.key(0), start, experts, batch, loss_fn=close_loss, optimizer=optimizer, **words)
    found = start.beta - after.beta
    assert np.linalg.norm(found - expected) < 0.05 * np.linalg.norm(expected)


def test_a_merge_that_rounds_while_it_is_learned_is_refused_and_one_with_min_dtype_is_not():
    experts, optimizer = close_experts(jnp.bfloat16), optax.sgd(1.0)
    batch = jnp.ones((4, 20))
    step = functools.partial(
        glue_jax.spsa_step, jax.random.key(0), glue_jax.init(6, optimizer), experts, batch, loss_fn=close_loss
    )
    with pytest.raises(ValueError, match=r"merge_fn returned bfloat16 at \['first'\].*min_dtype=jnp.float32"):
        step(optimizer=optimizer, merge_fn=lambda experts, alpha: glue_jax.blend(experts, alpha))
    groups = {"first": 0, "second": 0}
    one_row = glue_jax.init(6, optimizer, beta=jnp.zeros((1, 6)))
    glue_jax.spsa_step(
        jax.random.key(0),
        one_row,
        experts,
        batch,
        loss_fn=close_loss,
        optimizer=optimizer,
        merge_fn=functools.partial(glue_jax.blend, groups=groups),
    )


def test_leaves_that_a_merge_passes_through_may_be_short():
    experts = {"base": jnp.ones((20, 30), jnp.bfloat16), "change": jnp.ones((3, 20, 30), jnp.bfloat16)}

    def merge(experts, alpha):
        change = glue_jax.blend({"w": experts["change"]}, alpha, min_dtype=jnp.float32)["w"]
        return {"w": experts["base"] + change, "base": experts["base"]}

    optimizer = optax.sgd(1.0)
    glue_jax.spsa_step(
        jax.random.key(0),
        glue_jax.init(3, optimizer),
        experts,
        None,
        loss_fn=lambda params, _: jnp.sum(params["w"]),
        optimizer=optimizer,
        merge_fn=merge,
    )
