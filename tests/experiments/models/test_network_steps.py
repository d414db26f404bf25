"""Each network's steps lower for accelerators."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import glue_jax
from experiments import models
from experiments.protocol.data import Examples
from experiments.protocol.training import Problem, make_trainer

OPTIMIZER = optax.adam(1e-2, b1=0.9, b2=0.99)
SIZES = {"resnet20": 32, "mobilenetv2": 32, "vit": 16}
# Two of the ViT's eight blocks: they are all alike.
OPTIONS = {"vit": {"depth": 2}}
# ResNet-20: a stem and two in each of 9 blocks. MobileNetV2: a stem, three in each of 17 blocks but the first, which
# does not expand, and a last one. The ViT: its patches.
NUM_CONVOLUTIONS = {"resnet20": 19, "mobilenetv2": 1 + 3 * 17 - 1 + 1, "vit": 1}
K, B = 3, 8


@pytest.fixture(scope="module", params=list(SIZES))
def problem(request):
    size = SIZES[request.param]
    options = OPTIONS.get(request.param, {})
    network = models.build(request.param, image_shape=(size, size, 3), num_classes=10, **options)
    return request.param, size, Problem(network, np.full(3, 0.5, np.float32), np.full(3, 0.25, np.float32))


def _abstract(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def _stacked(problem, count):
    return jax.eval_shape(jax.vmap(problem.network.init), jax.random.split(jax.random.key(0), count))


def _images(size, count):
    images = jax.ShapeDtypeStruct((count, size, size, 3), jnp.uint8)
    return Examples(images, jax.ShapeDtypeStruct((count,), jnp.int32))


def _module(function, *arguments):
    """The StableHLO for both accelerators: each has its own branch of every choice by platform."""
    return jax.export.export(function, platforms=["cuda", "tpu"])(*arguments).mlir_module()


@pytest.mark.parametrize("step_fn", [glue_jax.spsa_step, glue_jax.full_gradient_step])
def test_steps_of_the_coefficients_lower_for_accelerators(problem, step_fn):
    name, size, problem = problem
    step = jax.jit(functools.partial(step_fn, loss_fn=problem.loss, optimizer=OPTIMIZER))
    arguments = jax.random.key(0), _abstract(glue_jax.init(K, OPTIMIZER)), _stacked(problem, K), _images(size, B)
    module = _module(step, *arguments)
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
