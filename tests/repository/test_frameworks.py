"""One step for the models of any framework: Flax NNX, Flax Linen, a plain function."""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import glue_jax

ALPHA = np.array([0.6, 0.3, 0.1])
INPUTS, WIDTH = 4, 8


class Problem(NamedTuple):
    """K experts, and `predict(params, inputs) -> [B]` in evaluation mode."""

    experts: list[Any]
    predict: Any


class NnxNet(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(INPUTS, WIDTH, rngs=rngs)
        self.norm = nnx.BatchNorm(WIDTH, momentum=0.5, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.out = nnx.Linear(WIDTH, 1, rngs=rngs)

    def __call__(self, inputs):
        return self.out(self.dropout(nnx.relu(self.norm(self.hidden(inputs)))))[:, 0]


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, inputs, train: bool):
        hidden = nn.Dense(WIDTH)(inputs)
        hidden = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.5)(hidden))
        return nn.Dense(1)(hidden)[:, 0]


def inputs(seed):
    """Each seed's inputs have a mean and a scale of their own, and so do the statistics of BatchNorm."""
    return (1 + seed) * jax.random.normal(jax.random.key(seed), (16, INPUTS)) + seed


def nnx_problem() -> Problem:
    experts: list[Any] = []
    graph: Any = None
    rest: Any = None
    for seed in range(3):
        model = NnxNet(nnx.Rngs(seed))
        model(inputs(seed))
        model.eval()
        graph, params, statistics, rest = nnx.split(model, nnx.Param, nnx.BatchStat, ...)
        experts.append((params, statistics))
    return Problem(experts, lambda expert, x: nnx.merge(graph, *expert, rest)(x))


def linen_problem() -> Problem:
    experts, net = [], LinenNet()
    for seed in range(3):
        variables = net.init(jax.random.key(seed), inputs(seed), train=True)
        _, statistics = net.apply(variables, inputs(seed), train=True, mutable=["batch_stats"])
        experts.append({"params": variables["params"], **statistics})
    return Problem(experts, lambda expert, x: net.apply(expert, x, train=False))


def plain_problem() -> Problem:
    def expert(seed):
        hidden, out = jax.random.split(jax.random.key(seed))
        return [jax.random.normal(hidden, (INPUTS, WIDTH)), jax.random.normal(out, (WIDTH,))]

    return Problem([expert(seed) for seed in range(3)], lambda expert, x: jnp.tanh(x @ expert[0]) @ expert[1])


problems = pytest.mark.parametrize("problem", [nnx_problem, linen_problem, plain_problem])


def average_by_hand(experts, alpha):
    return jax.tree.map(
        lambda *leaves: sum(a * np.asarray(leaf, np.float64) for a, leaf in zip(alpha, leaves, strict=True)), *experts
    )


@problems
def test_the_blend_is_the_average_of_the_parameters_and_of_the_batch_statistics(problem):
    experts, predict = problem()
    blended = glue_jax.blend(glue_jax.stack_experts(experts), ALPHA.astype(np.float32))
    by_hand = average_by_hand(experts, ALPHA)
    assert jax.tree.structure(blended) == jax.tree.structure(experts[0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), blended, by_hand)
    in_float32 = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), by_hand)
    x = inputs(7)
    np.testing.assert_allclose(predict(blended, x), predict(in_float32, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("problem", [nnx_problem, linen_problem])
def test_the_batch_statistics_of_the_experts_differ(problem):
    experts, _ = problem()
    statistics = [
        jax.tree.leaves(expert[1] if isinstance(expert, tuple) else expert["batch_stats"]) for expert in experts
    ]
    assert all(np.ptp(np.stack(leaves), axis=0).max() > 0.1 for leaves in zip(*statistics, strict=True))


@problems
def test_the_same_jitted_step_lowers_the_loss(problem):
    experts, predict = problem()
    stacked = glue_jax.stack_experts(experts)
    x = inputs(0)
    targets = predict(glue_jax.blend(stacked, ALPHA.astype(np.float32)), x)

    def loss_fn(params, batch):
        return jnp.mean((predict(params, batch[0]) - batch[1]) ** 2)

    optimizer = optax.adam(0.05, b1=0.9, b2=0.99)
    step = jax.jit(functools.partial(glue_jax.spsa_step, loss_fn=loss_fn, optimizer=optimizer, num_directions=2))
    state, losses = glue_jax.init(3, optimizer), []
    for _ in range(60):
        state, metrics = step(jax.random.key(0), state, stacked, (x, targets))
        losses.append(float(metrics.loss))
    assert np.mean(losses[-5:]) < 0.2 * losses[0]
    # The targets are those of the blend at ALPHA, at which the loss is 0.
    start = np.abs(np.full(3, 1 / 3) - ALPHA).max()
    assert np.abs(glue_jax.alpha(state) - ALPHA).max() < 0.5 * start


def test_a_whole_nnx_state_is_refused_for_its_keys_by_path():
    states = []
    for seed in range(2):
        model = NnxNet(nnx.Rngs(seed))
        states.append(nnx.state(model))
    with pytest.raises(TypeError, match=r"expert 0 holds a PRNG key at \['dropout'\]\['rngs'\].*split off the param"):
        glue_jax.stack_experts(states)
