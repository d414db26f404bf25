"""The step cut in two gives the step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import glue_jax
from tests.test_learning import compilations

EXPERTS = glue_jax.stack_experts([{"w": jax.random.normal(jax.random.key(i), (4,))} for i in range(3)])
TARGET = jax.random.normal(jax.random.key(9), (4,))
OPTIMIZER = optax.adam(0.05)
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
def test_ask_and_tell_take_the_step_bit_for_bit(words):
    key = jax.random.key(1)
    step = jax.jit(functools.partial(glue_jax.spsa_step, loss_fn=loss, optimizer=OPTIMIZER, **words))
    ask = jax.jit(functools.partial(glue_jax.ask, **words))
    tell = jax.jit(functools.partial(glue_jax.tell, optimizer=OPTIMIZER, **words))
    judge = jax.jit(lambda alpha: loss(glue_jax.blend(EXPERTS, alpha), TARGET))
    whole = halves = glue_jax.init(3, OPTIMIZER, beta=glue_jax.uniform(3))
    for _ in range(3):
        whole, metrics = step(key, whole, EXPERTS, TARGET)
        # A host's loop, one loss after another.
        losses = [float(judge(alpha)) for alpha in ask(key, halves)]
        halves, told = tell(key, halves, losses)
        jax.tree.map(np.testing.assert_array_equal, (told, halves), (metrics, whole))


def test_coefficients_may_be_any_tree():
    def link(beta):
        return {"alpha": jax.nn.softmax(beta["a"]), "scale": jnp.exp(beta["b"])}

    state = glue_jax.init(3, OPTIMIZER, beta=PAIR)
    alphas = glue_jax.ask(jax.random.key(2), state, link_fn=link, num_directions=2)
    assert alphas["alpha"].shape == (4, 3)
    assert alphas["scale"].shape == (4,)
    state, metrics = glue_jax.tell(
        jax.random.key(2), state, range(4), optimizer=OPTIMIZER, link_fn=link, num_directions=2
    )
    assert metrics.loss == 1.5
    assert int(state.step) == 1


def test_a_metric_that_jax_does_not_compute_is_learned_from():
    state = glue_jax.init(3, OPTIMIZER)
    words = {"num_directions": 2, "directions": "simplex_orthogonal", "radius": 0.2}
    for _ in range(150):
        alphas = np.asarray(glue_jax.ask(jax.random.key(3), state, **words))
        # The number of entries that are not right to a tenth, and something to go by.
        losses = [
            np.sum(np.abs(alpha - [0.2, 0.5, 0.3]) > 0.1) + np.abs(alpha - [0.2, 0.5, 0.3]).sum() for alpha in alphas
        ]
        state, _ = glue_jax.tell(jax.random.key(3), state, losses, optimizer=OPTIMIZER, **words)
    np.testing.assert_allclose(glue_jax.alpha(state), [0.2, 0.5, 0.3], atol=0.1)


def test_losses_of_another_number_are_refused():
    state = glue_jax.init(3, OPTIMIZER)
    with pytest.raises(ValueError, match=r"losses have shape \(3,\); expected \[2m\] = \(4,\)"):
        glue_jax.tell(jax.random.key(4), state, [1.0, 2.0, 3.0], optimizer=OPTIMIZER, num_directions=2)


@pytest.mark.parametrize("radius", [0.0, -1.0, np.inf])
def test_a_radius_out_of_its_range_is_refused_by_both(radius):
    state = glue_jax.init(3, OPTIMIZER)
    with pytest.raises(ValueError, match="radius is"):
        glue_jax.ask(jax.random.key(5), state, radius=radius)
    with pytest.raises(ValueError, match="radius is"):
        glue_jax.tell(jax.random.key(5), state, [1.0, 2.0], optimizer=OPTIMIZER, radius=radius)


def test_a_loss_that_is_no_number_is_refused():
    state = glue_jax.init(3, OPTIMIZER)
    with pytest.raises(ValueError, match=r"losses are \[1.0, nan\]; expected finite numbers"):
        glue_jax.tell(jax.random.key(6), state, [1.0, np.nan], optimizer=OPTIMIZER)


def test_a_hosts_loop_compiles_nothing_after_its_first_step(caplog):
    state = glue_jax.init(3, OPTIMIZER)

    def take_a_step(state):
        alphas = glue_jax.ask(jax.random.key(7), state)
        return glue_jax.tell(jax.random.key(7), state, [float(alpha[0]) for alpha in alphas], optimizer=OPTIMIZER)[0]

    state = take_a_step(take_a_step(state))
    with compilations(caplog) as names:
        take_a_step(state)
    assert names == []
