"""Steps: what goes in, what comes out, and the update between."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import glue_jax
from glue_jax.estimators import Estimate
from glue_jax.steps import step_by
from tests.library.helpers import STEPS

all_steps = pytest.mark.parametrize("step_fn", STEPS)
SGD = optax.sgd(1.0)


def squared_loss(params, batch):
    inputs, targets = batch
    return jnp.mean((inputs @ params["w"] - targets) ** 2)


def linear_problem(k=4, seed=0):
    """K linear models of 6 inputs, and a batch of 9 examples."""
    rng = np.random.default_rng(seed)
    weights, inputs, targets = rng.normal(size=(k, 6)), rng.normal(size=(9, 6)), rng.normal(size=9)
    experts = {"w": jnp.asarray(weights, jnp.float32)}
    return experts, (jnp.asarray(inputs, jnp.float32), jnp.asarray(targets, jnp.float32))


EXPERTS, BATCH = linear_problem()
START = glue_jax.init(4, SGD)


def by_hand(experts, batch, beta):
    """Loss, alpha, and the gradients for alpha and beta of `squared_loss`, derived by hand, in float64."""
    weights, (inputs, targets) = np.asarray(experts["w"], np.float64), (np.asarray(part, np.float64) for part in batch)
    alpha = np.exp(beta) / np.exp(beta).sum()
    residual = inputs @ (alpha @ weights) - targets
    theta_gradient = 2 / len(targets) * inputs.T @ residual
    alpha_gradient = weights @ theta_gradient
    return np.mean(residual**2), alpha, alpha_gradient, alpha * (alpha_gradient - alpha @ alpha_gradient)


def test_learning_starts_at_the_uniform_average():
    optimizer = optax.adam(1e-2)
    state = glue_jax.init(3, optimizer)
    assert int(state.step) == 0
    assert state.step.dtype == jnp.int32
    np.testing.assert_array_equal(state.beta, np.zeros(3))
    chex.assert_trees_all_equal(state.opt_state, optimizer.init(jnp.zeros(3)))
    np.testing.assert_allclose(glue_jax.alpha(state), np.full(3, 1 / 3), rtol=1e-6)


@pytest.mark.parametrize(
    "beta", [0.5, [0.1, 0.2], {"a": np.ones(2, np.float32), "t": 1.0}], ids=["number", "list", "tree"]
)
def test_a_start_of_any_kind_becomes_strongly_typed_arrays(beta):
    state = glue_jax.init(2, SGD, beta=beta)
    assert jax.tree.structure(state.beta) == jax.tree.structure(beta)
    for leaf, start in zip(jax.tree.leaves(state.beta), jax.tree.leaves(beta), strict=True):
        assert not leaf.weak_type
        np.testing.assert_allclose(leaf, start)


def test_alpha_is_the_link_of_beta():
    weights = jnp.array([0.2, 0.3, 0.5])
    state = glue_jax.init(3, SGD, beta=glue_jax.coefficients.weights_to_logits(weights))
    np.testing.assert_allclose(glue_jax.alpha(state), weights, rtol=1e-6)
    np.testing.assert_array_equal(glue_jax.alpha(state, glue_jax.unconstrained), state.beta)


def test_the_number_of_experts_and_the_start_must_agree():
    with pytest.raises(ValueError, match=r"coefficients of shape \(5,\); expected a last axis of num_experts = 3"):
        glue_jax.init(3, SGD, beta=jnp.zeros(5))
    with pytest.raises(ValueError, match="num_experts = 3"):
        glue_jax.init(3, SGD, beta={"a": jnp.zeros((2, 3)), "b": jnp.zeros(2)})

    def lift(beta):
        return jnp.concatenate([beta, -jnp.sum(beta, keepdims=True)])

    assert glue_jax.init(3, SGD, beta=jnp.zeros(2), link_fn=lift).beta.shape == (2,)
    with pytest.raises(ValueError, match="num_experts = 4"):
        glue_jax.init(4, SGD, beta=jnp.zeros(2), link_fn=lift)


def test_an_optimizer_that_is_none_is_refused():
    init: Any = glue_jax.init
    with pytest.raises(TypeError, match=r"expected an optax\.GradientTransformation"):
        init(3, optax.adam)


@pytest.mark.parametrize("optimizer", [optax.polyak_sgd(), optax.chain(SGD, optax.contrib.reduce_on_plateau())])
def test_optimizers_that_want_the_loss_are_given_it(optimizer):
    state = glue_jax.init(4, optimizer)
    step = jax.jit(functools.partial(glue_jax.full_gradient_step, loss_fn=squared_loss, optimizer=optimizer))
    losses = []
    for _ in range(3):
        state, metrics = step(jax.random.key(0), state, EXPERTS, BATCH)
        losses.append(metrics.loss)
    start = squared_loss(glue_jax.blend(EXPERTS, glue_jax.coefficients.uniform(4)), BATCH)
    assert losses[-1] < start


@pytest.mark.parametrize("k", [2, 3])
def test_the_default_directions_of_a_softmax_are_never_ones_that_it_does_not_see(k):
    experts = {"w": jnp.arange(float(k))}
    step = functools.partial(glue_jax.spsa_step, loss_fn=lambda params, _: params["w"], optimizer=SGD)
    start = glue_jax.init(k, SGD)
    norms = [float(step(jax.random.key(seed), start, experts, None)[1].gradient_norm) for seed in range(12)]
    assert min(norms) > 1e-3
    wasteful = functools.partial(step, directions="rademacher")
    norms = [float(wasteful(jax.random.key(seed), start, experts, None)[1].gradient_norm) for seed in range(12)]
    assert min(norms) < 1e-3


def test_a_step_has_its_diagnostics_in_its_metrics_where_they_are_asked_for():
    # The loss is beta^2 along the one direction in the box of Eq. (7).
    step = functools.partial(
        glue_jax.spsa_step,
        loss_fn=lambda params, _: 3 * params @ params,
        optimizer=SGD,
        link_fn=glue_jax.unconstrained,
        merge_fn=lambda experts, alpha: alpha,
        num_directions=4,
        radius=0.1,
    )
    start = glue_jax.init(4, SGD, beta=jnp.ones(4))
    plain, metrics = step(jax.random.key(0), start, {"w": jnp.ones(4)}, None)
    assert metrics.diagnostics is None
    told, metrics = step(jax.random.key(0), start, {"w": jnp.ones(4)}, None, diagnostics=True)
    chex.assert_trees_all_equal(told, plain)
    # The second derivative of 3 |beta|^2 along any direction, whose slope does not depend on the radius.
    assert metrics.diagnostics is not None
    np.testing.assert_allclose(metrics.diagnostics.curvature, 6, rtol=1e-3)
    assert metrics.diagnostics.disagreement < 1e-3


@pytest.mark.parametrize("digits", [7, 10])
def test_diagnostics_see_the_rounding_of_the_network_whatever_the_dtype_of_the_loss(digits):
    def loss(params, _):
        return jnp.sum(jax.lax.reduce_precision(1 + params["w"], 8, digits))

    step = functools.partial(glue_jax.spsa_step, loss_fn=loss, optimizer=SGD, num_directions=2, diagnostics=True)
    experts = {"w": jax.random.normal(jax.random.key(0), (3, 1000)) / 100}
    fine = functools.partial(step, loss_fn=lambda params, _: jnp.sum(1 + params["w"]))
    coarse, exact = (
        function(jax.random.key(1), glue_jax.init(3, SGD), experts, None, radius=3e-2)[1].diagnostics
        for function in (step, fine)
    )
    assert coarse is not None
    assert exact is not None
    assert coarse.disagreement > 0.5
    assert exact.disagreement < 0.2


def test_a_network_of_bfloat16_products_is_told_and_takes_a_large_radius():
    def loss(params, batch):
        inputs, targets = batch
        outputs = inputs.astype(jnp.bfloat16) @ params["w"].astype(jnp.bfloat16)
        return jnp.mean((outputs.astype(jnp.float32) - targets) ** 2)

    step = functools.partial(glue_jax.spsa_step, loss_fn=loss, optimizer=SGD)
    with pytest.warns(UserWarning, match="multiplies bfloat16 or float16 arrays.*forward_gradient_step is right there"):
        _, told = step(jax.random.key(0), START, EXPERTS, BATCH)
    # A radius that is given is taken without a word.
    _, given = step(jax.random.key(0), START, EXPERTS, BATCH, radius=1.0)
    np.testing.assert_array_equal(told.probe_losses, given.probe_losses)


@pytest.mark.parametrize(
    ("words", "expected"),
    [({}, {"HIGHEST"}), ({"matmul_precision": None}, {"None"}), ({"matmul_precision": "default"}, {"DEFAULT"})],
)
def test_the_products_of_the_loss_have_the_highest_precision_unless_another_is_asked_for(words, expected):
    seen = set()

    def loss(params, batch):
        jaxpr = jax.make_jaxpr(squared_loss)(params, batch)
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                precision = equation.params["precision"]
                seen.add(precision[0].name if precision else "None")
        return squared_loss(params, batch)

    glue_jax.spsa_step(jax.random.key(0), START, EXPERTS, BATCH, loss_fn=loss, optimizer=SGD, **words)
    assert seen == expected


def test_the_products_of_a_merge_and_of_a_link_have_the_highest_precision_too():
    basis, seen = jnp.eye(4)[:, :3], set()

    def note(function, *arguments):
        for equation in jax.make_jaxpr(function)(*arguments).jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                seen.add((equation.params["precision"] or ("None",))[0])
        return function(*arguments)

    glue_jax.spsa_step(
        jax.random.key(0),
        glue_jax.init(4, SGD, beta=jnp.zeros(3), link_fn=lambda beta: basis @ beta),
        {"w": jnp.ones((4, 5))},
        None,
        loss_fn=lambda params, _: jnp.sum(params["w"] ** 2),
        optimizer=SGD,
        link_fn=lambda beta: note(lambda b: basis @ b, beta),
        merge_fn=lambda experts, alpha: {"w": note(lambda a, w: a @ w, alpha, experts["w"])},
        directions="sphere",
    )
    assert jax.lax.Precision.HIGHEST in seen
    # What the step reports of its state is computed as it comes.
    assert seen <= {jax.lax.Precision.HIGHEST, "None"}


def test_an_unnamed_link_of_zeros_is_refused_where_it_would_start():
    with pytest.raises(ValueError, match=r"every coefficient 0 at its start.*glue_jax\.unconstrained"):
        glue_jax.init(3, SGD, link_fn=lambda beta: beta)
    assert glue_jax.init(3, SGD, link_fn=lambda beta: beta + 1).beta.shape == (3,)


def test_the_alpha_of_a_result_is_its_own_whatever_the_link():
    experts = {"w": jnp.arange(3.0)}
    result = glue_jax.learn(
        jax.random.key(0),
        experts,
        jnp.zeros(8),
        loss_fn=lambda params, batch: jnp.mean((params["w"] - batch) ** 2),
        optimizer=SGD,
        link_fn=glue_jax.unconstrained,
        batch_size=8,
        max_steps=3,
    )
    np.testing.assert_array_equal(glue_jax.alpha(result), result.alpha)


def test_coefficients_may_be_a_tuple():
    assert len(glue_jax.init(3, SGD, beta=(jnp.zeros(3), jnp.zeros(3))).beta) == 2


@pytest.mark.parametrize("step_fn", STEPS[1:])
def test_a_loss_that_counts_is_not_differentiated_to_zero_in_silence(step_fn):
    with pytest.raises(ValueError, match="returned dtype int32, whose derivative is 0"):
        step_fn(
            jax.random.key(0), START, EXPERTS, BATCH, loss_fn=lambda params, _: jnp.sum(params["w"] > 0), optimizer=SGD
        )


def test_no_experts_and_integer_coefficients_are_refused():
    with pytest.raises(ValueError, match="num_experts is 0"):
        glue_jax.init(0, SGD)
    with pytest.raises(TypeError, match=r"beta\['a'\] has dtype int32"):
        glue_jax.init(2, SGD, beta={"a": jnp.array([1, 2])})
    with pytest.raises(ValueError, match=r"beta holds nan at a; expected finite numbers"):
        glue_jax.init(2, SGD, beta={"a": jnp.array([0.0, jnp.nan])})
    with pytest.raises(ValueError, match="beta holds nan at the root"):
        glue_jax.init(2, SGD, beta=jnp.array([0.0, jnp.nan]))


@pytest.mark.parametrize(
    "step_fn",
    [
        glue_jax.full_gradient_step,
        functools.partial(glue_jax.forward_gradient_step, num_directions=3, directions="simplex_orthogonal"),
        functools.partial(glue_jax.forward_gradient_step, num_directions=4, directions="orthogonal"),
    ],
    ids=["full", "forward, K - 1 zero-sum directions", "forward, K directions"],
)
def test_a_step_of_plain_descent_subtracts_the_gradient_derived_by_hand(step_fn):
    beta = np.array([0.3, -0.5, 1.0, 0.0])
    loss, alpha, _, gradient = by_hand(EXPERTS, BATCH, beta)
    state, metrics = jax.jit(functools.partial(step_fn, loss_fn=squared_loss, optimizer=SGD))(
        jax.random.key(0), glue_jax.init(4, SGD, beta=jnp.asarray(beta, jnp.float32)), EXPERTS, BATCH
    )
    scale = float(np.linalg.norm(gradient))
    np.testing.assert_allclose(state.beta, beta - gradient, rtol=0, atol=3e-6 * scale)
    np.testing.assert_allclose(metrics.gradient_norm, scale, rtol=3e-6)
    np.testing.assert_allclose(metrics.loss, loss, rtol=3e-6)
    np.testing.assert_allclose(metrics.alpha, alpha, rtol=3e-6)


def test_spsa_along_all_zero_sum_directions_approaches_the_gradient_derived_by_hand():
    beta = np.array([0.3, -0.5, 1.0, 0.0])
    *_, gradient = by_hand(EXPERTS, BATCH, beta)
    state, _ = glue_jax.spsa_step(
        jax.random.key(0),
        glue_jax.init(4, SGD, beta=jnp.asarray(beta, jnp.float32)),
        EXPERTS,
        BATCH,
        loss_fn=squared_loss,
        optimizer=SGD,
        num_directions=3,
        directions="simplex_orthogonal",
    )
    # O(radius²) and differences of float32 losses over twice the radius.
    np.testing.assert_allclose(state.beta, beta - gradient, atol=1e-2 * float(np.linalg.norm(gradient)))


def test_the_update_in_alpha_space_is_equation_7():
    # A loss that is linear in alpha has exact slopes: L = g . alpha, g = [1, -2, 4].
    experts, learning_rate = {"w": jnp.array([1.0, -2.0, 4.0])}, 0.1
    g = np.array([1.0, -2.0, 4.0])
    key, optimizer = jax.random.key(3), optax.sgd(learning_rate)
    start = glue_jax.init(3, optimizer, beta=glue_jax.coefficients.uniform(3))._replace(step=jnp.asarray(7, jnp.int32))
    u = np.asarray(glue_jax.directions.sample_directions(jax.random.fold_in(key, 7), start.beta, 1, "sphere"))[0]
    state, metrics = glue_jax.spsa_step(
        key,
        start,
        experts,
        None,
        loss_fn=lambda params, _: params["w"],
        optimizer=optimizer,
        link_fn=glue_jax.unconstrained,
        directions="sphere",
        scale="paper",
        radius=0.5,
    )
    np.testing.assert_allclose(state.beta, 1 / 3 - learning_rate * (g @ u) * u, rtol=1e-5)
    assert metrics.probe_losses is not None
    np.testing.assert_allclose(metrics.probe_losses, [[1 + 0.5 * g @ u, 1 - 0.5 * g @ u]], rtol=1e-5)
    np.testing.assert_allclose(metrics.gradient_norm, abs(g @ u), rtol=1e-5)
    np.testing.assert_allclose(metrics.alpha, np.full(3, 1 / 3), rtol=1e-6)
    assert int(state.step) == 8


@all_steps
def test_the_state_keeps_its_structure_and_metrics_belong_to_the_state_that_went_in(step_fn):
    optimizer = optax.adam(1e-2, b1=0.9, b2=0.99)
    before = glue_jax.init(4, optimizer, beta=jnp.array([0.3, -0.5, 1.0, 0.0]))
    after, metrics = step_fn(jax.random.key(0), before, EXPERTS, BATCH, loss_fn=squared_loss, optimizer=optimizer)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, before)
    assert int(after.step) == 1
    assert not np.allclose(after.beta, before.beta)
    np.testing.assert_array_equal(metrics.alpha, glue_jax.alpha(before))
    blended = squared_loss(glue_jax.blend(EXPERTS, glue_jax.alpha(before)), BATCH)
    if step_fn is glue_jax.spsa_step:
        assert metrics.probe_losses.shape == (1, 2)
        np.testing.assert_allclose(metrics.loss, np.mean(metrics.probe_losses), rtol=1e-6)
        np.testing.assert_allclose(metrics.loss, blended, rtol=1e-2)
    else:
        assert metrics.probe_losses is None
        np.testing.assert_allclose(metrics.loss, blended, rtol=1e-6)
    assert metrics.loss.shape == metrics.gradient_norm.shape == ()


@all_steps
def test_the_gradient_norm_is_over_the_whole_tree_of_coefficients(step_fn):
    start = glue_jax.init(4, SGD, beta={"logits": jnp.zeros(4), "temperature": jnp.array(0.5)})
    after, metrics = step_fn(
        jax.random.key(0),
        start,
        EXPERTS,
        BATCH,
        loss_fn=squared_loss,
        optimizer=SGD,
        link_fn=lambda beta: jax.nn.softmax(beta["logits"] / beta["temperature"]),
    )
    moved = jax.tree.map(lambda a, b: np.sum((a - b) ** 2), start.beta, after.beta)
    np.testing.assert_allclose(metrics.gradient_norm, np.sqrt(sum(moved.values())), rtol=1e-4)
    assert metrics.alpha.shape == (4,)


@all_steps
def test_groups_learn_a_row_of_coefficients_each(step_fn):
    experts = {"a": jnp.array([0.0, 1.0]), "b": jnp.array([0.0, 1.0])}
    targets = {"a": jnp.array(0.9), "b": jnp.array(0.2)}
    optimizer = optax.adam(0.1)
    step = functools.partial(
        step_fn,
        loss_fn=lambda params, batch: (params["a"] - batch["a"]) ** 2 + (params["b"] - batch["b"]) ** 2,
        optimizer=optimizer,
        merge_fn=functools.partial(glue_jax.blend, groups={"a": 0, "b": 1}),
    )
    start = glue_jax.init(2, optimizer, beta=jnp.zeros((2, 2)))
    state, _ = jax.lax.scan(lambda state, _: step(jax.random.key(0), state, experts, targets), start, None, length=150)
    np.testing.assert_allclose(glue_jax.alpha(state)[:, 1], [0.9, 0.2], atol=0.03)


@all_steps
def test_the_same_key_gives_the_same_result_bit_for_bit(step_fn):
    step = functools.partial(step_fn, loss_fn=squared_loss, optimizer=SGD)
    for transformed in (step, jax.jit(step)):
        results = [transformed(jax.random.key(5), START, EXPERTS, BATCH) for _ in range(2)]
        chex.assert_trees_all_equal(*results)


@pytest.mark.parametrize("step_fn", STEPS[:2])
def test_another_step_or_another_key_draws_other_directions(step_fn):
    def update(seed, step):
        state = START._replace(step=jnp.asarray(step, jnp.int32))
        return step_fn(
            jax.random.key(seed), state, EXPERTS, BATCH, loss_fn=squared_loss, optimizer=SGD, directions="sphere"
        )[0].beta

    first = update(0, 0)
    assert not np.allclose(first, update(0, 1))
    assert not np.allclose(first, update(1, 0))


def test_the_radius_may_be_a_schedule_of_the_step():
    # The loss is alpha_0 = beta_0, so that L+ - L- is 2 radius times +-1/sqrt(K).
    def gap(step):
        state = START._replace(step=jnp.asarray(step, jnp.int32))
        _, metrics = jax.jit(
            functools.partial(
                glue_jax.spsa_step,
                loss_fn=lambda params, _: params,
                optimizer=SGD,
                link_fn=glue_jax.unconstrained,
                directions="rademacher",
                radius=optax.linear_schedule(0.5, 0.1, 4),
            )
        )(jax.random.key(0), state, jnp.array([1.0, 0.0, 0.0, 0.0]), None)
        return abs(metrics.probe_losses[0, 0] - metrics.probe_losses[0, 1])

    np.testing.assert_allclose([gap(step) for step in (0, 2, 4, 9)], [0.5, 0.3, 0.1, 0.1], rtol=1e-5)


@all_steps
def test_permuting_the_experts_permutes_alpha_under_the_exact_gradient(step_fn):
    order = np.array([2, 0, 3, 1])
    words = {"loss_fn": squared_loss, "optimizer": SGD}
    if step_fn is not glue_jax.full_gradient_step:
        words |= {"num_directions": 4, "directions": "orthogonal"}
    step = functools.partial(step_fn, **words)
    state, _ = step(jax.random.key(0), START, EXPERTS, BATCH)
    permuted, _ = step(jax.random.key(0), START, jax.tree.map(lambda w: w[order], EXPERTS), BATCH)
    atol = 2e-3 if step_fn is glue_jax.spsa_step else 1e-5
    np.testing.assert_allclose(glue_jax.alpha(permuted), glue_jax.alpha(state)[order], atol=atol)
    assert np.ptp(glue_jax.alpha(state)) > 0.05


@all_steps
def test_equal_experts_leave_nothing_to_learn(step_fn):
    experts, batch = linear_problem(k=1)
    equal = jax.tree.map(lambda w: jnp.repeat(w, 3, axis=0), experts)
    _, metrics = step_fn(jax.random.key(0), glue_jax.init(3, SGD), equal, batch, loss_fn=squared_loss, optimizer=SGD)
    # float32's rounding of the loss, over twice the radius 1e-2 for SPSA.
    assert float(metrics.gradient_norm) < 1e-3 * float(metrics.loss)


@all_steps
def test_integer_leaves_reach_the_loss_unchanged(step_fn):
    experts = glue_jax.stack_experts([{"n": jnp.array([2, 3]), "w": jnp.full((2,), float(i))} for i in range(3)])
    seen = []

    def loss(params, batch):
        seen.append(params["n"].dtype)
        return jnp.sum(params["n"] * params["w"]) - batch

    _, metrics = step_fn(jax.random.key(0), glue_jax.init(3, SGD), experts, jnp.array(1.0), loss_fn=loss, optimizer=SGD)
    # The blend of 0, 1 and 2 is 1: 2 * 1 + 3 * 1 - 1.
    np.testing.assert_allclose(metrics.loss, 4.0, rtol=1e-3)
    assert set(seen) == {jnp.dtype(jnp.int32)}


@all_steps
def test_steps_compose_under_jit_vmap_and_scan(step_fn):
    optimizer = optax.adam(0.05)
    step = functools.partial(step_fn, loss_fn=squared_loss, optimizer=optimizer)
    betas = jnp.asarray(np.random.default_rng(1).normal(size=(3, 4)), jnp.float32)

    def run(beta):
        return jax.lax.scan(
            lambda state, _: step(jax.random.key(0), state, EXPERTS, BATCH),
            glue_jax.init(4, optimizer, beta=beta),
            None,
            length=4,
        )

    one_step = jax.jit(step)
    many, many_metrics = jax.jit(jax.vmap(run))(betas)
    assert many_metrics.loss.shape == (3, 4)
    for index, beta in enumerate(betas):
        state = glue_jax.init(4, optimizer, beta=beta)
        for number in range(4):
            state, metrics = one_step(jax.random.key(0), state, EXPERTS, BATCH)
            np.testing.assert_allclose(many_metrics.loss[index, number], metrics.loss, rtol=1e-4)
        np.testing.assert_allclose(many.beta[index], state.beta, atol=2e-3)


class DifferentiatedError(Exception):
    """Raised by the derivative of a loss that must not be differentiated."""


@jax.custom_jvp
def undifferentiable(value):
    return value**2


@undifferentiable.defjvp
def _refuse(primals, tangents):
    raise DifferentiatedError


def test_an_spsa_step_never_differentiates_the_loss_and_the_other_steps_do():
    def loss(params, batch):
        return undifferentiable(squared_loss(params, batch))

    def run(step_fn):
        return jax.jit(functools.partial(step_fn, loss_fn=loss, optimizer=SGD))(
            jax.random.key(0), START, EXPERTS, BATCH
        )

    for probe_batch_size in (None, 2):
        spsa_step = functools.partial(glue_jax.spsa_step, probe_batch_size=probe_batch_size)
        assert np.isfinite(run(spsa_step)[1].loss)
    for step_fn in STEPS[1:]:
        with pytest.raises(DifferentiatedError):
            run(step_fn)


@all_steps
@pytest.mark.parametrize(
    ("beta", "loss", "message"),
    [
        (jnp.zeros(3), squared_loss, r"alpha has shape \(3,\); expected \[K\] with K = 4"),
        (jnp.zeros(4), lambda params, batch: params["w"], r"returned \(6,\); expected one real scalar"),
    ],
)
def test_coefficients_and_losses_that_do_not_fit_are_refused(step_fn, beta, loss, message):
    with pytest.raises(ValueError, match=message):
        step_fn(jax.random.key(0), glue_jax.init(len(beta), SGD), EXPERTS, BATCH, loss_fn=loss, optimizer=SGD)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"radius": 0.0}, "radius is 0.0"),
        ({"radius": jnp.float32(0)}, "radius is 0.0"),
        ({"radius": np.array(jnp.nan)}, "radius is nan"),
        ({"radius": lambda step: 0.0}, "radius is 0.0"),
        ({"radius": jnp.ones(3)}, r"radius has shape \(3,\)"),
    ],
)
def test_radii_out_of_their_range_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        glue_jax.spsa_step(jax.random.key(0), START, EXPERTS, BATCH, loss_fn=squared_loss, optimizer=SGD, **words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"num_directions": 1.5}, r"num_directions is 1\.5; expected an integer"),
        ({"probe_batch_size": 1.5}, r"probe_batch_size is 1\.5; expected an integer"),
        ({"radius": 1j}, "radius is 1j; expected real numbers"),
        ({"radius": "0.1"}, r"radius is '0\.1'; expected real numbers"),
        ({"radius": lambda step: None}, "radius is None; expected real numbers"),
        ({"loss_fn": None}, "loss_fn is None; expected a function"),
        ({"link_fn": lambda beta: None}, "link_fn returned None; expected coefficients"),
        ({"optimizer": optax.adam}, r"optimizer is .*; expected an optax\.GradientTransformation"),
        ({"state": jnp.zeros(4)}, r"state is a .*; expected a GlueState"),
        ({"state": tuple(START)}, "state is a tuple; expected a GlueState"),
        ({"state": START._replace(step=0.5)}, r"state\.step is 0\.5; expected one integer"),
        ({"state": START._replace(step=None)}, r"state\.step is None; expected one integer"),
    ],
)
def test_arguments_of_another_type_are_refused(words, message):
    words = {"loss_fn": squared_loss, "optimizer": SGD, "state": START, **words}
    with pytest.raises(TypeError, match=message):
        glue_jax.spsa_step(jax.random.key(0), words.pop("state"), EXPERTS, BATCH, **words)


@pytest.mark.parametrize(
    ("estimator", "error", "message"),
    [
        (None, TypeError, "estimator is None; expected a function"),
        (lambda key, fun, beta: jax.grad(fun)(beta), TypeError, "expected a glue_jax.estimators.Estimate"),
        # It would be broadcast in silence.
        (
            lambda key, fun, beta: Estimate(fun(beta), jnp.ones(()), None),
            ValueError,
            r"a gradient of shape \(\); expected that of beta, \(4,\)",
        ),
    ],
)
def test_an_estimator_that_gives_no_gradient_is_refused(estimator, error, message):
    words = {"loss_fn": squared_loss, "optimizer": SGD, "link_fn": jax.nn.softmax, "merge_fn": glue_jax.blend}
    with pytest.raises(error, match=message):
        step_by(estimator, jax.random.key(0), START, EXPERTS, BATCH, **words)


def test_a_start_of_16_bits_is_refused_because_steps_would_be_rounded_away():
    with pytest.raises(TypeError, match="beta has dtype bfloat16; expected a floating-point dtype of at least 32 bits"):
        glue_jax.init(3, beta=jnp.ones(3, jnp.bfloat16), link_fn=glue_jax.unconstrained)
