"""The steps with the network that they are for: what they are lowered to, and what they cost."""

import functools
import re
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import glue_jax
from experiments import models
from experiments.protocol.data import Examples
from experiments.protocol.training import Problem
from glue_jax.learning import _run_steps

OPTIMIZER = optax.adam(1e-2, b1=0.9, b2=0.99)
# ResNet-20: one convolution, and two in each of nine blocks.
NUM_CONVOLUTIONS = 19


@pytest.fixture(scope="module")
def problem():
    network = models.build("resnet20", image_shape=(32, 32, 3), num_classes=10)
    return Problem(network, np.full(3, 0.5, np.float32), np.full(3, 0.25, np.float32))


@pytest.fixture(scope="module")
def arguments(problem):
    experts = jax.jit(jax.vmap(problem.network.init))(jax.random.split(jax.random.key(0), 10))
    images = jax.random.randint(jax.random.key(1), (64, 32, 32, 3), 0, 256).astype(jnp.uint8)
    batch = Examples(images, jnp.arange(64) % 10)
    return jax.random.key(2), glue_jax.init(10, OPTIMIZER), experts, batch


def _step(step_fn, problem, **words):
    return jax.jit(functools.partial(step_fn, loss_fn=problem.loss, optimizer=OPTIMIZER, **words))


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_an_accelerator_runs_both_probes_in_one_batched_forward(problem, arguments, platform):
    module = jax.export.export(_step(glue_jax.spsa_step, problem), platforms=[platform])(*arguments).mlir_module()
    assert "stablehlo.while" not in module
    assert module.count("stablehlo.convolution") == NUM_CONVOLUTIONS
    # Both probes at once: kernels of two models side by side, as groups.
    assert re.search(r"(feature|batch)_group_count = 2", module)


def test_a_cpu_runs_one_probe_after_another(problem, arguments):
    module = jax.export.export(_step(glue_jax.spsa_step, problem), platforms=["cpu"])(*arguments).mlir_module()
    assert "stablehlo.while" in module
    assert module.count("stablehlo.convolution") == NUM_CONVOLUTIONS
    assert not re.search(r"(feature|batch)_group_count = 2", module)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("step_fn", [glue_jax.full_gradient_step, glue_jax.forward_gradient_step])
def test_the_other_steps_lower_for_accelerators(problem, arguments, step_fn, platform):
    exported = jax.export.export(_step(step_fn, problem), platforms=[platform])(*arguments)
    assert "stablehlo.while" not in exported.mlir_module()


def test_on_a_cpu_a_step_of_glue_takes_at_most_half_of_a_full_gradient_step(problem, arguments):
    steps = [_step(step_fn, problem) for step_fn in (glue_jax.spsa_step, glue_jax.full_gradient_step)]
    seconds = [[], []]
    for step in steps:
        jax.block_until_ready(step(*arguments))
    for _ in range(7):
        for step, times in zip(steps, seconds, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(step(*arguments))
            times.append(time.perf_counter() - start)
    spsa, full = map(statistics.median, seconds)
    assert spsa <= 0.5 * full, f"{spsa:.3f} s against {full:.3f} s"


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_on_an_accelerator_the_steps_between_two_validations_are_one_scan(problem, arguments, platform):
    key, state, experts, batch = arguments
    run = functools.partial(
        _run_steps,
        step_fn=glue_jax.spsa_step,
        loss_fn=problem.loss,
        optimizer=OPTIMIZER,
        link_fn=jax.nn.softmax,
        merge_fn=glue_jax.blend,
    )
    rows = jnp.zeros((5, 16), jnp.int32)
    exported = jax.export.export(jax.jit(run), platforms=[platform])(key, state, experts, batch, rows, jnp.int32(5))
    module = exported.mlir_module()
    # The one loop is the scan over minibatches; the probes within it stay one batched forward.
    assert module.count("stablehlo.while") == 1
    assert module.count("stablehlo.convolution") == NUM_CONVOLUTIONS
