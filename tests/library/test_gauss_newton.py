"""Gauss-Newton: the step against linear algebra, what it may never do, and that no minibatch ends a run."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export

import glue_jax
from glue_jax import gauss_newton
from glue_jax.links import directions_of
from glue_jax.quadratic_model import GaussNewtonState
from tests.library.helpers import CLASSIFICATION, FEATURES, K, classification, cross_entropy, forward_only, network

EXAMPLES = 40
EXPERTS, BATCH = classification()
START = glue_jax.init(K)


def linear(params, batch):
    return batch["x"] @ params["w"]


def squared(outputs, batch):
    return jnp.mean((outputs - batch["y"]) ** 2)


REGRESSION = glue_jax.OutputLoss(linear, squared)


def regression(seed=0, noise=0.1):
    """K linear models, and examples of a blend of them."""
    rng = np.random.default_rng(seed)
    experts = rng.normal(size=(K, FEATURES))
    x = rng.normal(size=(EXAMPLES, FEATURES))
    y = x @ (np.array([0.7, -0.4, 0.5, 0.2]) @ experts) + noise * rng.normal(size=EXAMPLES)
    batch = {"x": jnp.asarray(x, jnp.float32), "y": jnp.asarray(y, jnp.float32)}
    return {"w": jnp.asarray(experts, jnp.float32)}, batch


def undamped(state):
    return state._replace(opt_state=state.opt_state._replace(damping=jnp.float32(0)))


def steps(count, state, experts, batch, *, loss_fn=CLASSIFICATION, **words):
    step = jax.jit(functools.partial(glue_jax.gauss_newton_step, loss_fn=loss_fn, **words))
    for _ in range(count - 1):
        state, _ = step(None, state, experts, batch)
    return step(None, state, experts, batch)


def test_one_undamped_step_of_a_linear_model_lands_on_the_least_squares_solution():
    experts, batch = regression()
    outputs = np.asarray(batch["x"], np.float64) @ np.asarray(experts["w"], np.float64).T
    solution = np.linalg.lstsq(outputs, np.asarray(batch["y"], np.float64), rcond=None)[0]
    state = undamped(glue_jax.init(K, link_fn=glue_jax.unconstrained))
    # The first step proposes it, the second accepts it.
    state, _ = steps(2, state, experts, batch, loss_fn=REGRESSION, link_fn=glue_jax.unconstrained)
    np.testing.assert_allclose(state.beta, solution, rtol=2e-4)


def test_the_first_step_proposes_and_moves_nothing():
    experts, batch = regression()
    state, metrics = steps(1, START, experts, batch, loss_fn=REGRESSION)
    np.testing.assert_array_equal(state.beta, START.beta)
    assert float(jnp.linalg.norm(state.opt_state.proposal)) > 0
    assert int(state.step) == 1
    np.testing.assert_allclose(metrics.loss, REGRESSION(glue_jax.blend(experts, metrics.alpha), batch), rtol=1e-5)
    np.testing.assert_allclose(metrics.alpha, np.full(K, 1 / K), rtol=1e-6)
    assert metrics.probe_losses is None


def exact_model(link_fn, state):
    """Gradient and Gauss-Newton curvature in the coordinates of the basis, by JAX's derivatives of the network."""
    directions = gauss_newton.basis(state.beta, directions_of(link_fn))

    def outputs(z):
        return CLASSIFICATION.outputs_fn(glue_jax.blend(EXPERTS, link_fn(state.beta + z @ directions)), BATCH)

    z = jnp.zeros(len(directions))
    jacobian = jax.jacobian(outputs)(z).reshape(-1, len(z))
    flat = outputs(z)
    hessian = jax.hessian(lambda out: CLASSIFICATION.loss(out, BATCH))(flat).reshape(flat.size, flat.size)
    gradient = jax.grad(lambda z: CLASSIFICATION.loss(outputs(z), BATCH))(z)
    return gradient, jacobian.T @ hessian @ jacobian


@pytest.mark.parametrize("tangents", ["differences", "forward_mode"])
@pytest.mark.parametrize("link_fn", [jax.nn.softmax, glue_jax.unconstrained], ids=["softmax", "unconstrained"])
def test_the_model_is_the_gradient_and_the_gauss_newton_curvature(link_fn, tangents):
    state = glue_jax.init(K, link_fn=link_fn)
    gradient, curvature = exact_model(link_fn, state)
    state, metrics = steps(1, state, EXPERTS, BATCH, link_fn=link_fn, tangents=tangents)
    tolerance = 0.05 if tangents == "differences" else 1e-4
    scale = float(jnp.linalg.norm(gradient))
    np.testing.assert_allclose(state.opt_state.gradient, gradient, atol=tolerance * scale)
    np.testing.assert_allclose(state.opt_state.curvature, curvature, atol=tolerance * float(jnp.abs(curvature).max()))
    np.testing.assert_allclose(metrics.gradient_norm, jnp.linalg.norm(state.opt_state.gradient), rtol=1e-6)


def test_differences_and_tangents_agree_in_proportion_to_the_radius():
    exact, _ = steps(1, START, EXPERTS, BATCH, tangents="forward_mode")
    errors = []
    for radius in (0.4, 0.1):
        found, _ = steps(1, START, EXPERTS, BATCH, tangents="differences", radius=radius)
        errors.append(float(jnp.linalg.norm(found.opt_state.gradient - exact.opt_state.gradient)))
    assert 0.15 < errors[1] / errors[0] < 0.35


@jax.custom_jvp
def no_reverse(value):
    return value


@no_reverse.defjvp
def _no_reverse_jvp(primals, tangents):
    # A while loop has a derivative forwards and none backwards.
    (value,), (tangent,) = primals, tangents
    return value, jax.lax.while_loop(lambda c: c[0] < 1, lambda c: (c[0] + 1, 1.0 * c[1]), (0, tangent))[1]


@pytest.mark.parametrize(("guard", "tangents"), [(forward_only, "differences"), (no_reverse, "forward_mode")])
def test_the_network_is_never_differentiated_backwards(guard, tangents):
    loss_fn = glue_jax.OutputLoss(lambda params, batch: guard(network(params, batch)), cross_entropy)
    with pytest.raises((NotImplementedError, ValueError)):
        jax.grad(lambda params: loss_fn(params, BATCH))(jax.tree.map(lambda leaf: leaf[0], EXPERTS))
    state, metrics = steps(3, START, EXPERTS, BATCH, loss_fn=loss_fn, tangents=tangents)
    plain, expected = steps(3, START, EXPERTS, BATCH, tangents=tangents)
    np.testing.assert_allclose(state.beta, plain.beta, rtol=1e-5)
    np.testing.assert_allclose(metrics.loss, expected.loss, rtol=1e-5)


@pytest.mark.parametrize("tangents", ["differences", "forward_mode"])
def test_a_step_along_some_directions_sees_the_part_of_the_model_that_lies_along_them(tangents):
    state, key = START, jax.random.key(0)
    gradient, curvature = exact_model(jax.nn.softmax, state)
    rows = gauss_newton.subspace(key, state, state.opt_state, 2)
    assert rows is not None
    np.testing.assert_allclose(rows @ rows.T, np.eye(2), atol=1e-6)
    step = functools.partial(glue_jax.gauss_newton_step, loss_fn=CLASSIFICATION, tangents=tangents, num_directions=2)
    model = step(key, state, EXPERTS, BATCH)[0].opt_state
    along, factor = rows.T @ rows, (K - 1) / 2
    scale = float(jnp.abs(curvature).max())
    np.testing.assert_allclose(model.gradient, factor * along @ gradient, atol=0.02 * float(jnp.linalg.norm(gradient)))
    np.testing.assert_allclose(model.curvature, factor * along @ curvature @ along, atol=0.02 * scale)
    other = step(jax.random.key(1), state, EXPERTS, BATCH)[0].opt_state
    assert not np.allclose(other.gradient, model.gradient)


def test_steps_along_some_directions_come_to_the_least_loss():
    step = jax.jit(functools.partial(glue_jax.gauss_newton_step, loss_fn=CLASSIFICATION, num_directions=2))
    state = START
    for _ in range(100):
        state, _ = step(jax.random.key(3), state, EXPERTS, BATCH)
    loss = CLASSIFICATION(glue_jax.blend(EXPERTS, glue_jax.alpha(state)), BATCH)
    assert float(loss) < 1.01 * best_loss(EXPERTS, BATCH)


def test_no_step_moves_a_coefficient_by_more_than_one():
    experts, batch = regression()
    batch = {**batch, "y": 100 * batch["y"]}
    state = undamped(glue_jax.init(K, link_fn=glue_jax.unconstrained))
    words = {"loss_fn": REGRESSION, "link_fn": glue_jax.unconstrained}
    state, _ = steps(1, state, experts, batch, **words)
    np.testing.assert_allclose(jnp.max(jnp.abs(state.opt_state.proposal)), 1, rtol=1e-5)


def test_permuted_experts_give_permuted_coefficients():
    order = np.array([2, 0, 3, 1])
    permuted = jax.tree.map(lambda leaf: leaf[order], EXPERTS)
    # Differences have an error in proportion to the radius, which depends on the basis.
    state, _ = steps(12, START, EXPERTS, BATCH, tangents="forward_mode")
    other, _ = steps(12, START, permuted, BATCH, tangents="forward_mode")
    np.testing.assert_allclose(glue_jax.alpha(other), glue_jax.alpha(state)[order], atol=2e-3)


def test_a_proposal_that_raises_the_next_loss_is_turned_down_and_damped():
    state, _ = steps(1, START, EXPERTS, BATCH)
    wrong = state._replace(opt_state=state.opt_state._replace(proposal=-5 * state.opt_state.proposal))
    after, _ = steps(1, wrong, EXPERTS, BATCH)
    np.testing.assert_array_equal(after.beta, wrong.beta)
    assert float(after.opt_state.damping) > float(wrong.opt_state.damping)
    good, _ = steps(1, state, EXPERTS, BATCH)
    assert float(good.opt_state.damping) < float(state.opt_state.damping)
    assert float(jnp.linalg.norm(good.beta)) > 0


def losses_of_minibatches(loss_fn, experts, data, *, count=40, size=48, **words):
    """The losses on all data while minibatches teach."""
    state = glue_jax.init(K, link_fn=words.get("link_fn"))
    step = jax.jit(functools.partial(glue_jax.gauss_newton_step, loss_fn=loss_fn, **words))
    whole = jax.jit(lambda alpha: CLASSIFICATION(glue_jax.blend(experts, alpha, min_dtype=jnp.float32), data))
    rng, found = np.random.default_rng(0), []
    for _ in range(count):
        rows = rng.permutation(len(data["y"]))[:size]
        state, _ = step(None, state, experts, jax.tree.map(lambda leaf, r=rows: leaf[r], data))
        found.append(float(whole(glue_jax.alpha(state, words.get("link_fn", jax.nn.softmax)))))
    return state, np.array(found)


def best_loss(experts, data):
    """The least loss under a softmax, by the full gradient of all data."""
    optimizer = optax.adam(0.1)
    state = glue_jax.init(K, optimizer)
    step = jax.jit(functools.partial(glue_jax.full_gradient_step, loss_fn=CLASSIFICATION, optimizer=optimizer))
    for _ in range(300):
        state, _ = step(jax.random.key(0), state, experts, data)
    return float(step(jax.random.key(0), state, experts, data)[1].loss)


def test_minibatches_lead_to_the_least_loss_of_all_data():
    _, losses = losses_of_minibatches(CLASSIFICATION, EXPERTS, BATCH)
    assert losses[-1] < 1.01 * best_loss(EXPERTS, BATCH)


@pytest.mark.parametrize("tangents", [None, "differences", "forward_mode"])
def test_bfloat16_experts_come_to_the_same_loss(tangents):
    experts, data = classification(dtype=jnp.bfloat16)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), experts)
    _, losses = losses_of_minibatches(CLASSIFICATION, experts, data, tangents=tangents)
    assert losses[-1] < 1.01 * best_loss(wide, data)


def tf32(leaf):
    return jax.lax.reduce_precision(leaf, exponent_bits=8, mantissa_bits=10)


def rounded_network(params, batch):
    """The network with products of TF32."""
    hidden = jnp.tanh(tf32(batch["x"]) @ tf32(params["first"]))
    return tf32(hidden) @ tf32(params["second"])


def bfloat16_network(params, batch):
    """The network with layers of bfloat16."""
    short = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    return network(short, {**batch, "x": batch["x"].astype(jnp.bfloat16)})


@pytest.mark.parametrize("outputs_fn", [rounded_network, bfloat16_network])
def test_a_network_that_rounds_its_products_comes_to_the_same_loss(outputs_fn):
    _, losses = losses_of_minibatches(glue_jax.OutputLoss(outputs_fn, cross_entropy), EXPERTS, BATCH)
    assert losses[-1] < 1.01 * best_loss(EXPERTS, BATCH)


def test_a_network_of_short_products_is_differentiated_forwards_by_default():
    loss_fn = glue_jax.OutputLoss(bfloat16_network, cross_entropy)
    by_default, _ = steps(1, START, EXPERTS, BATCH, loss_fn=loss_fn)
    tangents, _ = steps(1, START, EXPERTS, BATCH, loss_fn=loss_fn, tangents="forward_mode")
    differences, _ = steps(1, START, EXPERTS, BATCH, loss_fn=loss_fn, tangents="differences")
    np.testing.assert_array_equal(by_default.opt_state.gradient, tangents.opt_state.gradient)
    assert not np.array_equal(by_default.opt_state.gradient, differences.opt_state.gradient)


def test_two_equal_experts_do_not_end_a_run():
    twice = jax.tree.map(lambda leaf: leaf[np.array([0, 0, 1, 2])], EXPERTS)
    state, losses = losses_of_minibatches(CLASSIFICATION, twice, BATCH, link_fn=glue_jax.unconstrained)
    assert np.isfinite(losses).all()
    assert np.isfinite(state.beta).all()
    assert losses[-1] < losses[0]


def test_an_outlier_minibatch_does_not_spoil_a_run():
    state, losses = losses_of_minibatches(CLASSIFICATION, EXPERTS, BATCH)
    outlier = {"x": 1e4 * BATCH["x"][:48], "y": (BATCH["y"][:48] + 1) % 3}
    for batch in (outlier, *[jax.tree.map(lambda leaf, i=i: leaf[48 * i : 48 * i + 48], BATCH) for i in range(5)]):
        state, metrics = steps(1, state, EXPERTS, batch)
        assert np.isfinite(metrics.loss)
    after = float(CLASSIFICATION(glue_jax.blend(EXPERTS, glue_jax.alpha(state)), BATCH))
    assert after < 1.1 * losses[-1]


def test_a_run_recovers_from_an_early_outlier():
    experts, batch = regression()
    link_fn = glue_jax.unconstrained
    words = {"loss_fn": REGRESSION, "link_fn": link_fn}
    outlier = {"x": 100 * batch["x"], "y": -100 * batch["y"]}
    state, _ = steps(3, glue_jax.init(K, link_fn=link_fn), experts, batch, **words)
    state, _ = steps(1, state, experts, outlier, **words)
    _, metrics = steps(40, state, experts, batch, **words)
    assert float(metrics.loss) < 0.02


def test_tangents_do_not_depend_on_the_radius():
    one, _ = steps(2, START, EXPERTS, BATCH, tangents="forward_mode")
    other, _ = steps(2, START, EXPERTS, BATCH, radius=1e-9, tangents="forward_mode")
    np.testing.assert_array_equal(one.beta, other.beta)


def test_outputs_that_are_not_finite_at_a_proposal_turn_it_down_and_teach_nothing():
    experts, batch = classification()

    def fragile(params, batch):
        out = network(params, batch)
        # Not a number away from where learning starts.
        return jnp.where(jnp.abs(params["weight"][0] - 1 / K) > 0.05, jnp.nan, out)

    experts = {**experts, "weight": jnp.eye(K)}
    loss_fn = glue_jax.OutputLoss(fragile, cross_entropy)
    words = {"loss_fn": loss_fn, "radius": 1e-2}
    before, _ = steps(1, START, experts, batch, **words)
    before = before._replace(opt_state=before.opt_state._replace(proposal=jnp.full(K - 1, 1.0)))
    after, metrics = steps(1, before, experts, batch, **words)
    np.testing.assert_array_equal(after.beta, before.beta)
    np.testing.assert_array_equal(after.opt_state.curvature, before.opt_state.curvature)
    np.testing.assert_allclose(after.opt_state.gradient, before.opt_state.gradient, rtol=1e-4, atol=1e-6)
    assert np.isfinite(metrics.loss)
    assert np.isfinite(metrics.gradient_norm)
    last, _ = steps(12, after, experts, batch, **words)
    assert np.isfinite(last.beta).all()
    assert float(jnp.linalg.norm(last.beta)) > 0


def test_groups_a_temperature_and_outputs_of_several_arrays():
    groups = glue_jax.merging.group_by_path(EXPERTS, lambda path: path)

    def several(params, batch):
        logits = network(params, batch)
        return {"logits": logits, "size": jnp.sum(logits**2, axis=-1)}

    loss_fn = glue_jax.OutputLoss(
        several, lambda outputs, batch: cross_entropy(outputs["logits"], batch) + 1e-3 * jnp.mean(outputs["size"])
    )
    link_fn = glue_jax.links.tempered_link(jax.nn.softmax)
    merge_fn = glue_jax.links.tempered_merge(functools.partial(glue_jax.blend, groups=groups.rows), head="second")
    beta = glue_jax.links.Tempered(jnp.zeros((len(groups.names), K)), jnp.zeros(()))
    state = glue_jax.init(K, beta=beta, link_fn=link_fn)
    assert state.opt_state.curvature.shape == (2 * (K - 1) + 1,) * 2
    words = {"loss_fn": loss_fn, "link_fn": link_fn, "merge_fn": merge_fn}
    state, metrics = steps(20, state, EXPERTS, BATCH, **words)
    first = loss_fn(merge_fn(EXPERTS, link_fn(beta)), BATCH)
    assert float(metrics.loss) < 0.9 * float(first)


def test_learn_needs_no_optimizer_and_comes_to_the_least_loss():
    words: dict[str, Any] = {"loss_fn": CLASSIFICATION, "step_fn": glue_jax.gauss_newton_step, "batch_size": 48}
    learn = functools.partial(glue_jax.learn, jax.random.key(0), EXPERTS, BATCH, validation_data=BATCH, **words)
    result = learn(max_steps=60)
    assert min(result.history.validation_values) < 1.01 * best_loss(EXPERTS, BATCH)
    assert result.history.validation_steps[1] == 5
    assert isinstance(result.state.opt_state, GaussNewtonState)
    more = learn(state=result, max_steps=5, patience=None)
    assert len(more.history.metrics.loss) == len(result.history.metrics.loss) + 5


def test_what_does_not_fit_is_refused():
    adam = optax.adam(0.1)
    step: Any = functools.partial(glue_jax.gauss_newton_step, None)
    with pytest.raises(TypeError, match=r"expected a glue_jax.OutputLoss\(outputs_fn, loss\)"):
        step(START, EXPERTS, BATCH, loss_fn=lambda params, batch: 0.0)
    with pytest.raises(TypeError, match="without an optimizer"):
        step(glue_jax.init(K, adam), EXPERTS, BATCH, loss_fn=CLASSIFICATION)
    with pytest.raises(ValueError, match="state has 3 directions, but beta has 4"):
        step(START, EXPERTS, BATCH, loss_fn=CLASSIFICATION, link_fn=glue_jax.unconstrained)
    with pytest.raises(ValueError, match="tangents is 'backwards'"):
        step(START, EXPERTS, BATCH, loss_fn=CLASSIFICATION, tangents="backwards")
    with pytest.raises(ValueError, match="radius is 0"):
        step(START, EXPERTS, BATCH, loss_fn=CLASSIFICATION, radius=0.0)
    with pytest.raises(ValueError, match=r"the loss of the outputs is \(240,\)"):
        step(START, EXPERTS, BATCH, loss_fn=glue_jax.OutputLoss(network, lambda out, _: out[:, 0]))
    with pytest.raises(ValueError, match=r"expected floating-point outputs \[B, ...\]"):
        step(START, EXPERTS, BATCH, loss_fn=glue_jax.OutputLoss(CLASSIFICATION, lambda out, _: out))
    with pytest.raises(ValueError, match="num_directions is 4; expected at most d = 3"):
        glue_jax.gauss_newton_step(jax.random.key(0), START, EXPERTS, BATCH, loss_fn=CLASSIFICATION, num_directions=4)
    with pytest.raises(TypeError, match=r"key is None; expected a jax\.random\.key"):
        step(START, EXPERTS, BATCH, loss_fn=CLASSIFICATION, num_directions=2)
    learn: Any = functools.partial(glue_jax.learn, jax.random.key(0), EXPERTS, BATCH, loss_fn=CLASSIFICATION)
    with pytest.raises(ValueError, match="optimizer was given, but step_fn, gauss_newton_step, takes none"):
        learn(step_fn=glue_jax.gauss_newton_step, optimizer=adam)
    with pytest.raises(TypeError, match=r"optimizer is None; .* which step_fn, spsa_step, takes"):
        learn()
    make: Any = glue_jax.OutputLoss
    with pytest.raises(TypeError, match="outputs_fn is 3; expected a function"):
        make(3, cross_entropy)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("tangents", ["differences", "forward_mode"])
def test_an_accelerator_runs_all_blends_in_one_batched_forward(platform, tangents):
    step = functools.partial(glue_jax.gauss_newton_step, None, loss_fn=CLASSIFICATION, tangents=tangents)
    text = export.export(jax.jit(step), platforms=[platform])(START, EXPERTS, BATCH).mlir_module()
    hidden = f"tensor<240x{K + 1}x16xf32>" if tangents == "differences" else f"tensor<{K - 1}x240x16xf32>"
    assert hidden in text


def test_a_vmapped_group_of_probes_gives_what_one_at_a_time_gives():
    for tangents in ("differences", "forward_mode"):
        one, _ = steps(3, START, EXPERTS, BATCH, probe_batch_size=1, tangents=tangents)
        all_at_once, _ = steps(3, START, EXPERTS, BATCH, probe_batch_size=100, tangents=tangents)
        np.testing.assert_allclose(one.beta, all_at_once.beta, rtol=1e-4, atol=1e-5)


def test_much_damping_moves_a_coefficient_by_its_gradient_over_the_root_of_its_curvature():
    batch = {"x": jnp.eye(3) * jnp.sqrt(3.0), "y": jnp.array([3.0, -2.0, 1.0])}
    experts = {"w": jnp.diag(jnp.array([1.0, 0.1, 0.01]))}
    state = glue_jax.init(3, link_fn=glue_jax.unconstrained)
    state = state._replace(opt_state=state.opt_state._replace(damping=jnp.float32(1e4)))
    words = {"loss_fn": REGRESSION, "link_fn": glue_jax.unconstrained, "tangents": "forward_mode"}
    model = steps(1, state, experts, batch, **words)[0].opt_state
    curvature = np.diag(model.curvature)
    np.testing.assert_allclose(model.curvature, np.diag(curvature), atol=1e-7)
    np.testing.assert_allclose(curvature[:2] / curvature[1:], 100, rtol=1e-3)
    # Of an expert ten times as small the gradient is ten times as small, and so is the damping: beta moves as far.
    expected = -model.gradient / np.sqrt(curvature * curvature.mean()) / 1e4
    np.testing.assert_allclose(model.proposal, expected, rtol=0.2)
