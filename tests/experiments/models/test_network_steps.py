"""The steps with the networks that they are for: what they are lowered to, and what ResNet-20's cost."""

import functools
import itertools
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
from experiments.protocol.training import Problem, make_trainer
from glue_jax.learning import _run_steps
from tests.experiments.helpers import small_mobilenetv2

OPTIMIZER = optax.adam(1e-2, b1=0.9, b2=0.99)
SIZES = {"resnet20": 32, "mobilenetv2": 32, "vit": 16}
# Two of the ViT's eight blocks: they are all alike. MobileNetV2 has one block of each kind.
OPTIONS = {"vit": {"depth": 2}}
# ResNet-20: a stem and two in each of 9 blocks. MobileNetV2: a stem, three in each block but the first, which does not
# expand, and a last one. The ViT: its patches.
NUM_CONVOLUTIONS = {"resnet20": 19, "mobilenetv2": 1 + 3 * 4 - 1 + 1, "vit": 1}
K, B = 3, 8


@pytest.fixture(scope="module", params=list(SIZES))
def problem(request):
    size = SIZES[request.param]
    options = OPTIONS.get(request.param, {})
    with small_mobilenetv2():
        network = models.build(request.param, image_shape=(size, size, 3), num_classes=10, **options)
        yield request.param, size, Problem(network, np.full(3, 0.5, np.float32), np.full(3, 0.25, np.float32))


of_resnet = pytest.mark.parametrize("problem", ["resnet20"], indirect=True)


def _abstract(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def _stacked(problem, count):
    return jax.eval_shape(jax.vmap(problem.network.init), jax.random.split(jax.random.key(0), count))


def _images(size, count):
    images = jax.ShapeDtypeStruct((count, size, size, 3), jnp.uint8)
    return Examples(images, jax.ShapeDtypeStruct((count,), jnp.int32))


def _step(step_fn, problem, **options):
    return jax.jit(functools.partial(step_fn, loss_fn=problem.loss, optimizer=OPTIMIZER), **options)


def _module(function, *arguments):
    """The StableHLO for both accelerators: each has its own branch of every choice by platform."""
    return jax.export.export(function, platforms=["cuda", "tpu"])(*arguments).mlir_module()


@pytest.mark.parametrize(
    ("problem", "step_fn"),
    [
        *itertools.product(SIZES, (glue_jax.spsa_step, glue_jax.full_gradient_step)),
        ("resnet20", glue_jax.forward_gradient_step),
    ],
    indirect=["problem"],
)
def test_steps_of_the_coefficients_lower_for_accelerators(problem, step_fn):
    name, size, problem = problem
    arguments = jax.random.key(0), _abstract(glue_jax.init(K, OPTIMIZER)), _stacked(problem, K), _images(size, B)
    module = _module(_step(step_fn, problem), *arguments)
    # All probes in one forward, whatever the network.
    assert "stablehlo.while" not in module
    if step_fn is glue_jax.spsa_step:
        assert module.count("stablehlo.convolution") == 2 * NUM_CONVOLUTIONS[name]
    if step_fn is glue_jax.spsa_step and name == "resnet20":
        # Both probes at once: kernels of two models side by side, as groups. The stem's images are the same for both.
        assert module.count("feature_group_count = 2") == 2 * (NUM_CONVOLUTIONS[name] - 1)


def test_an_epoch_of_all_experts_at_once_lowers_as_one_scan(problem):
    _, size, problem = problem
    trainer = make_trainer(problem, optax.adam(1e-3), batch_size=B, augmentation="crop_flip")
    state = jax.eval_shape(trainer.init, _stacked(problem, K))
    rows = jax.ShapeDtypeStruct((K, 5, B), jnp.int32)
    keys = _abstract(jax.random.split(jax.random.key(0), K))
    step = jax.ShapeDtypeStruct((), jnp.int32)
    module = _module(trainer.steps, keys, step, state, _images(size, 50), rows)
    assert module.count("stablehlo.while") == 1


@of_resnet
def test_on_an_accelerator_the_steps_between_two_validations_are_one_scan(problem):
    name, size, problem = problem
    run = functools.partial(
        _run_steps,
        step_fn=glue_jax.spsa_step,
        loss_fn=problem.loss,
        optimizer=OPTIMIZER,
        link_fn=jax.nn.softmax,
        merge_fn=glue_jax.blend,
    )
    state, rows = _abstract(glue_jax.init(K, OPTIMIZER)), jax.ShapeDtypeStruct((5, B), jnp.int32)
    arguments = jax.random.key(0), state, _stacked(problem, K), _images(size, 50), rows, jnp.int32(5)
    module = _module(jax.jit(run), *arguments)
    # The one loop is the scan over minibatches; the probes within it stay one batched forward.
    assert module.count("stablehlo.while") == 1
    assert module.count("stablehlo.convolution") == 2 * NUM_CONVOLUTIONS[name]


@of_resnet
def test_on_a_cpu_a_step_of_glue_takes_at_most_half_the_time_of_a_full_gradient_step(problem, optimized):
    _, size, problem = problem
    rng = np.random.default_rng(0)
    # Variances of BatchNorm are above 0.
    experts = jax.tree.map(lambda leaf: rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32), _stacked(problem, 10))
    images = rng.integers(0, 256, (64, size, size, 3), dtype=np.uint8)
    batch = Examples(jnp.asarray(images), jnp.arange(64) % 10)
    arguments = jax.random.key(2), glue_jax.init(10, OPTIMIZER), experts, batch
    step_fns = (glue_jax.spsa_step, glue_jax.full_gradient_step)
    steps = [_step(step_fn, problem, compiler_options=optimized) for step_fn in step_fns]
    seconds = [[], []]
    for step in steps:
        jax.block_until_ready(step(*arguments))
    for _ in range(3):
        for step, times in zip(steps, seconds, strict=True):
            # Seconds of this process on all cores: other processes do not add to them.
            start = time.process_time()
            jax.block_until_ready(step(*arguments))
            times.append(time.process_time() - start)
    spsa, full = map(statistics.median, seconds)
    # On a quiet machine it is 0.4.
    assert spsa <= 0.5 * full, f"{spsa:.3f} s against {full:.3f} s"
