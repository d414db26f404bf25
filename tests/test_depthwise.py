import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.models.depthwise import _grouped, _shifted, depthwise_conv


def _inputs(height, width, channels=5):
    x = jax.random.normal(jax.random.key(0), (2, height, width, channels))
    return x, jax.random.normal(jax.random.key(1), (3, 3, 1, channels))


@pytest.mark.parametrize("strides", [1, 2])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (7, 5), (1, 2)])
def test_shifted_images_are_the_grouped_convolution(height, width, strides):
    x, kernel = _inputs(height, width)
    shifted, grouped = _shifted(x, kernel, strides=strides), _grouped(x, kernel, strides=strides)
    assert shifted.shape == (2, -(-height // strides), -(-width // strides), 5)
    np.testing.assert_allclose(shifted, grouped, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strides", [1, 2])
def test_their_gradients_agree_and_are_that_of_what_a_cpu_runs(strides):
    x, kernel = _inputs(6, 6)

    def gradient(function):
        return jax.grad(lambda x, kernel: jnp.sum(jnp.sin(function(x, kernel))), argnums=(0, 1))(x, kernel)

    expected = gradient(functools.partial(_grouped, strides=strides))
    for function in (functools.partial(_shifted, strides=strides), lambda x, k: depthwise_conv(x, k, strides)):
        for ours, theirs in zip(gradient(function), expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_each_channel_is_convolved_by_itself():
    x, kernel = _inputs(4, 4, 3)
    only = kernel.at[..., 1:].set(0)
    y = depthwise_conv(x, only, 1)
    assert float(jnp.abs(y[..., 1:]).max()) == 0
    assert float(jnp.abs(y[..., 0]).max()) > 0


@pytest.mark.parametrize(("platform", "convolutions"), [("cpu", 0), ("cuda", 1), ("tpu", 1)])
def test_the_platform_that_a_program_is_lowered_for_decides(platform, convolutions):
    x, kernel = _inputs(8, 8)
    exported = jax.export.export(jax.jit(depthwise_conv, static_argnums=2), platforms=[platform])(x, kernel, 1)
    module = exported.mlir_module()
    assert module.count("stablehlo.convolution") == convolutions
    assert len(re.findall("feature_group_count = 5", module)) == convolutions
