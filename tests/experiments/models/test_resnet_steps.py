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
    rng = np.random.default_rng(0)
    # Variances of BatchNorm are above 0.
    experts = jax.tree.map(
        lambda leaf: rng.uniform(0.5, 1.5, (10, *leaf.shape)).astype(np.float32),
        jax.eval_shape(problem.network.init, jax.random.key(0)),
    )
    images = rng.integers(0, 256, (64, 32, 32, 3), dtype=np.uint8)
    batch = Examples(jnp.asarray(images), jnp.arange(64) % 10)
    return jax.random.key(2), glue_jax.init(10, OPTIMIZER), experts, batch


def _step(step_fn, problem, **words):
    return jax.jit(functools.partial(step_fn, loss_fn=problem.loss, optimizer=OPTIMIZER, **words))


def test_a_cpu_runs_one_probe_after_another(problem, arguments):
    module = jax.export.export(_step(glue_jax.spsa_step, problem), platforms=["cpu"])(*arguments).mlir_module()
    assert "stablehlo.while" in module
    assert module.count("stablehlo.convolution") == NUM_CONVOLUTIONS
    assert not re.search(r"(feature|batch)_group_count = 2", module)


def test_the_forward_gradient_lowers_for_accelerators(problem, arguments):
    step = _step(glue_jax.forward_gradient_step, problem)
    exported = jax.export.export(step, platforms=["cuda", "tpu"])(*arguments)
    assert "stablehlo.while" not in exported.mlir_module()


def test_on_a_cpu_a_step_of_glue_takes_at_most_half_the_time_of_a_full_gradient_step(problem, arguments, optimized):
    step_fns = (glue_jax.spsa_step, glue_jax.full_gradient_step)
    steps = [jax.jit(_step(step_fn, problem), compiler_options=optimized) for step_fn in step_fns]
    seconds = [[], []]
    for step in steps:
        jax.block_until_ready(step(*arguments))
    for _ in range(5):
        for step, times in zip(steps, seconds, strict=True):
            # Seconds of this process on all cores: other processes do not add to them.
            start = time.process_time()
            jax.block_until_ready(step(*arguments))
            times.append(time.process_time() - start)
    spsa, full = map(statistics.median, seconds)
    assert spsa <= 0.5 * full, f"{spsa:.3f} s against {full:.3f} s"


def test_on_an_accelerator_the_steps_between_two_validations_are_one_scan(problem, arguments):
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
    export = jax.export.export(jax.jit(run), platforms=["cuda", "tpu"])
    module = export(key, state, experts, batch, rows, jnp.int32(5)).mlir_module()
    # The one loop is the scan over minibatches; the probes within it stay one batched forward.
    assert module.count("stablehlo.while") == 1
    assert module.count("stablehlo.convolution") == 2 * NUM_CONVOLUTIONS
