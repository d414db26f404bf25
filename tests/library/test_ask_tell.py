"""The step cut in two gives the step."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import glue_jax
from tests.helpers import compilations

EXPERTS = glue_jax.stack_experts([{"w": jax.random.normal(jax.random.key(i), (4,))} for i in range(3)])
TARGET = jax.random.normal(jax.random.key(9), (4,))
OPTIMIZER = optax.adam(0.05)
START = glue_jax.init(3, OPTIMIZER)
PAIR = {"a": jnp.array([0.1, -0.2, 0.3]), "b": jnp.array(0.5)}


def loss(params, batch):
    return jnp.mean(jnp.square(params["w"] - batch))


@pytest.mark.parametrize(
    "words",
    [
        {},
        {"num_directions": 4, "directions": "simplex_orthogonal", "radius": 0.1},
        {"num_directions": 2, "directions": "gaussian", "link_fn": glue_jax.unconstrained},
        {"radius": optax.exponential_decay(0.1, 1, 0.5)},
    ],
    ids=["default", "orthogonal", "unconstrained", "schedule"],
)
def test_ask_and_tell_take_the_step(words):
    key = jax.random.key(1)
    link_fn = words.get("link_fn", jax.nn.softmax)
    step = jax.jit(functools.partial(glue_jax.spsa_step, loss_fn=loss, optimizer=OPTIMIZER, **words))
    judge = jax.jit(lambda alpha: loss(glue_jax.blend(EXPERTS, alpha), TARGET))
    whole = halves = glue_jax.init(3, OPTIMIZER, link_fn=link_fn)
    for _ in range(3):
        whole, metrics = step(key, whole, EXPERTS, TARGET)
        # A host's loop, one loss after another.
        probes = glue_jax.ask(key, halves, **words)
        halves, told = glue_jax.tell(probes, [float(judge(alpha)) for alpha in probes.alpha], optimizer=OPTIMIZER)
        # The host subtracts in float64, and its programs round elsewhere than those of the step.
        chex.assert_trees_all_close((told, halves), (metrics, whole), rtol=1e-3, atol=1e-4)


def test_losses_of_the_host_are_not_rounded_before_they_are_subtracted():
    # At 1e6 the neighbours of float32 are 0.06 apart.
    probes = glue_jax.ask(jax.random.key(1), START)
    _, metrics = glue_jax.tell(probes, [1e6 + 0.01, 1e6], optimizer=OPTIMIZER)
    np.testing.assert_allclose(metrics.gradient_norm, 2 * 0.01 / (2 * 0.1), rtol=1e-5)


def test_what_was_asked_decides_the_step_not_what_is_told():
    for radius in (0.1, 0.4):
        probes = glue_jax.ask(jax.random.key(1), START, radius=radius, num_directions=2, directions="sphere")
        _, metrics = glue_jax.tell(probes, [1.0, 2.0, 3.0, 4.0], optimizer=OPTIMIZER)
        slopes = np.array([-1.0, -1.0]) / (2 * radius)
        expected = 3 * slopes @ np.asarray(probes.directions) / 2
        np.testing.assert_allclose(metrics.gradient_norm, np.linalg.norm(expected), rtol=1e-5)


def test_a_probe_that_fails_leaves_its_pair_out():
    probes = glue_jax.ask(jax.random.key(1), START, num_directions=2)
    _, metrics = glue_jax.tell(probes, [3.0, 1.0, None, 4.0], optimizer=OPTIMIZER)
    expected = 2 * (3.0 - 1.0) / 0.2 * np.asarray(probes.directions)[0]
    np.testing.assert_allclose(metrics.gradient_norm, np.linalg.norm(expected), rtol=1e-5)
    assert metrics.loss == 2.0
    assert metrics.probe_losses is not None
    assert np.isnan(metrics.probe_losses[1]).all()


def test_where_all_probes_fail_the_next_ask_draws_other_directions():
    probes = glue_jax.ask(jax.random.key(1), START)
    after, metrics = glue_jax.tell(probes, [None, 1.0], optimizer=OPTIMIZER)
    chex.assert_trees_all_equal((after.beta, after.opt_state), (START.beta, START.opt_state))
    assert np.isnan(metrics.loss)
    assert not np.allclose(glue_jax.ask(jax.random.key(1), after).directions, probes.directions)


def test_coefficients_may_be_any_tree():
    def link(beta):
        return {"alpha": jax.nn.softmax(beta["a"]), "scale": jnp.exp(beta["b"])}

    state = glue_jax.init(3, OPTIMIZER, beta=PAIR, link_fn=link)
    probes = glue_jax.ask(jax.random.key(2), state, link_fn=link, num_directions=2)
    assert probes.alpha["alpha"].shape == (4, 3)
    assert probes.alpha["scale"].shape == (4,)
    state, metrics = glue_jax.tell(probes, range(4), optimizer=OPTIMIZER)
    assert metrics.loss == 1.5
    assert int(state.step) == 1


def test_a_metric_that_jax_does_not_compute_is_learned_from():
    state = START
    words = {"num_directions": 2, "directions": "simplex_orthogonal", "radius": 0.2}
    for _ in range(150):
        probes = glue_jax.ask(jax.random.key(3), state, **words)
        # The number of entries that are not right to a tenth, and something to go by.
        losses = [
            np.sum(np.abs(alpha - [0.2, 0.5, 0.3]) > 0.1) + np.abs(alpha - [0.2, 0.5, 0.3]).sum()
            for alpha in np.asarray(probes.alpha)
        ]
        state, _ = glue_jax.tell(probes, losses, optimizer=OPTIMIZER)
    np.testing.assert_allclose(glue_jax.alpha(state), [0.2, 0.5, 0.3], atol=0.1)


def test_losses_of_another_number_are_refused():
    probes = glue_jax.ask(jax.random.key(4), START, num_directions=2)
    with pytest.raises(ValueError, match=r"losses have shape \(3,\); expected \[2m\] = \(4,\)"):
        glue_jax.tell(probes, [1.0, 2.0, 3.0], optimizer=OPTIMIZER)


@pytest.mark.parametrize("radius", [0.0, -1.0, np.inf, jnp.float32(0), lambda step: 0.0])
def test_a_radius_out_of_its_range_is_refused(radius):
    with pytest.raises(ValueError, match="radius is"):
        glue_jax.ask(jax.random.key(5), START, radius=radius)


@pytest.mark.parametrize(
    ("losses", "error"),
    [([1.0, np.nan], ValueError), ([np.inf, 1.0], ValueError), ([1.0, 2j], TypeError), (["1", "2"], TypeError)],
)
def test_losses_that_are_no_finite_numbers_are_refused(losses, error):
    probes = glue_jax.ask(jax.random.key(6), START)
    with pytest.raises(error, match=r"losses (are|is) \[.*\]; expected (finite )?real numbers"):
        glue_jax.tell(probes, losses, optimizer=OPTIMIZER)


def test_losses_may_be_short_floats():
    probes = glue_jax.ask(jax.random.key(6), START)
    expected = glue_jax.tell(probes, [1.0, 2.0], optimizer=OPTIMIZER)
    for losses in ([jnp.bfloat16(1.0), jnp.bfloat16(2.0)], jnp.array([1.0, 2.0], jnp.bfloat16)):
        chex.assert_trees_all_equal(glue_jax.tell(probes, losses, optimizer=OPTIMIZER), expected)


def test_a_hosts_loop_compiles_nothing_after_its_first_step(caplog):
    state = START

    def take_a_step(state):
        probes = glue_jax.ask(jax.random.key(7), state)
        return glue_jax.tell(probes, [float(alpha[0]) for alpha in probes.alpha], optimizer=OPTIMIZER)[0]

    state = take_a_step(take_a_step(state))
    with compilations(caplog) as names:
        take_a_step(state)
    assert names == []


def test_what_is_no_probes_and_another_optimizer_are_refused():
    with pytest.raises(TypeError, match="probes is a GlueState; expected the Probes"):
        glue_jax.tell(START, [1.0, 2.0], optimizer=OPTIMIZER)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"state\.opt_state is not of this optimizer"):
        glue_jax.tell(glue_jax.ask(jax.random.key(8), START), [1.0, 2.0], optimizer=optax.sgd(0.1, momentum=0.9))


# Three linear models, the outputs of a blend computed by NumPy, and the same as an `OutputLoss`.
RNG = np.random.default_rng(0)
LINEAR, INPUTS, TARGETS = (jnp.asarray(RNG.normal(size=shape), jnp.float32) for shape in ((3, 5), (20, 5), 20))


def squared(outputs, batch):
    return jnp.mean((outputs - batch) ** 2)


LOSS_FN = glue_jax.OutputLoss(lambda params, batch: INPUTS @ params["w"], squared)


def outputs(probes):
    inputs, experts = np.asarray(INPUTS, np.float64), np.asarray(LINEAR, np.float64)
    return [inputs @ (np.asarray(alpha, np.float64) @ experts) for alpha in probes.alpha]


def _shifted(shift, outputs, batch):
    return squared(outputs - shift, batch)


@pytest.mark.parametrize(
    ("link_fn", "m"),
    [(jax.nn.softmax, None), (glue_jax.unconstrained, None), (glue_jax.unconstrained, 2)],
    ids=["softmax", "unconstrained", "some directions"],
)
def test_told_outputs_take_the_step_of_gauss_newton(link_fn, m):
    told = stepped = glue_jax.init(3, link_fn=link_fn)
    key = jax.random.key(5)
    for _ in range(6):
        probes = glue_jax.ask_outputs(key, told, link_fn=link_fn, num_directions=m)
        assert len(probes.alpha) == 2 + (m or (3 if link_fn is glue_jax.unconstrained else 2))
        told, metrics = glue_jax.tell_outputs(probes, outputs(probes), TARGETS, loss=squared)
        words = {"loss_fn": LOSS_FN, "link_fn": link_fn, "tangents": "differences", "num_directions": m}
        stepped, expected = glue_jax.gauss_newton_step(key, stepped, {"w": LINEAR}, TARGETS, **words)
        np.testing.assert_allclose(told.beta, stepped.beta, rtol=2e-3, atol=1e-4)
        np.testing.assert_allclose(metrics.loss, expected.loss, rtol=1e-4)
    assert float(jnp.linalg.norm(told.beta)) > 0.1


def test_outputs_of_the_host_are_subtracted_in_float64_and_may_be_short():
    alphas = []
    for shift, dtype in ((0, np.float64), (1e5, np.float64), (0, jnp.bfloat16)):
        state = glue_jax.init(3)
        shifted = functools.partial(_shifted, shift)
        for _ in range(15):
            probes = glue_jax.ask_outputs(None, state, radius=0.3 if dtype == jnp.bfloat16 else None)
            found = [np.asarray(out + shift, dtype) for out in outputs(probes)]
            state, _ = glue_jax.tell_outputs(probes, found, TARGETS, loss=shifted)
        alphas.append(glue_jax.alpha(state))
    np.testing.assert_allclose(alphas[1], alphas[0], atol=0.01)
    np.testing.assert_allclose(alphas[2], alphas[0], atol=0.05)


def test_steps_of_the_host_compile_once(caplog):
    state = glue_jax.init(3)
    for _ in range(2):
        probes = glue_jax.ask_outputs(None, state)
        state, _ = glue_jax.tell_outputs(probes, outputs(probes), TARGETS, loss=squared)
    with compilations(caplog) as names:
        for _ in range(3):
            probes = glue_jax.ask_outputs(None, state)
            state, _ = glue_jax.tell_outputs(probes, outputs(probes), TARGETS, loss=squared)
    assert not names


def test_outputs_that_could_not_be_had_do_not_end_a_run():
    state, losses = glue_jax.init(3), []
    for failed in (3, 1, 2, None, None, None, 3, None):
        probes = glue_jax.ask_outputs(None, state)
        found = [None if index == failed else out for index, out in enumerate(outputs(probes))]
        before, (state, metrics) = state, glue_jax.tell_outputs(probes, found, TARGETS, loss=squared)
        losses.append(float(metrics.loss))
        if failed == 1:
            np.testing.assert_array_equal(state.beta, before.beta)
        if failed is not None:
            np.testing.assert_array_equal(state.opt_state.curvature, before.opt_state.curvature)
    assert losses[-1] < losses[0]


def test_outputs_that_do_not_fit_are_refused():
    probes = glue_jax.ask_outputs(None, glue_jax.init(3))
    tell: Any = functools.partial(glue_jax.tell_outputs, batch=TARGETS, loss=squared)
    with pytest.raises(ValueError, match=r"outputs are float\d+\[3, 20\]; expected .* m \+ 2 = 4"):
        tell(probes, outputs(probes)[:3])
    with pytest.raises(ValueError, match=r"outputs are float\d+\[4\]"):
        tell(probes, np.zeros(4))
    with pytest.raises(ValueError, match=r"outputs have shapes \[\(20,\), \(19,\).* expected the same of each probe"):
        tell(probes, [out[index % 2 :] for index, out in enumerate(outputs(probes))])
    with pytest.raises(ValueError, match="outputs\\[0\\], are None"):
        tell(probes, [None, *outputs(probes)[1:]])
    with pytest.raises(ValueError, match=r"outputs\[0\], are not finite"):
        tell(probes, [np.full(20, np.nan), *outputs(probes)[1:]])
    with pytest.raises(TypeError, match=r"expected what glue_jax\.ask_outputs returned"):
        tell(3, outputs(probes))
    with pytest.raises(TypeError, match="without an optimizer"):
        glue_jax.ask_outputs(None, glue_jax.init(3, optax.adam(0.1)))
