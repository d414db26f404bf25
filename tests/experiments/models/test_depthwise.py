import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.models import depthwise
from experiments.models.depthwise import _grouped, _in_chunks, _shifted, depthwise_conv


def _inputs(height, width, channels=5):
    x = jax.random.normal(jax.random.key(0), (2, height, width, channels))
    return x, jax.random.normal(jax.random.key(1), (3, 3, 1, channels))


def _convolve(x, kernel, *, strides):
    return depthwise_conv(x, kernel, strides)


def _gradient(function, strides):
    """Of a loss, for the images and the kernel."""

    def loss(x, kernel):
        return jnp.sum(jnp.sin(function(x, kernel, strides=strides)))

    return jax.jit(jax.grad(loss, argnums=(0, 1)))


@pytest.mark.parametrize("function", [_shifted, _in_chunks])
@pytest.mark.parametrize("strides", [1, 2])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (7, 5), (1, 2)])
def test_each_form_is_the_grouped_convolution(height, width, strides, function):
    x, kernel = _inputs(height, width)
    ours, grouped = (jax.jit(f, static_argnames="strides")(x, kernel, strides=strides) for f in (function, _grouped))
    assert ours.shape == (2, -(-height // strides), -(-width // strides), 5)
    np.testing.assert_allclose(ours, grouped, rtol=1e-5, atol=1e-5)


@pytest.fixture(params=[1, 2**16], ids=["an image at a time", "all at once"])
def chunk(request, monkeypatch):
    monkeypatch.setattr(depthwise, "_CHUNK", request.param)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("strides", [1, 2])
@pytest.mark.parametrize(("height", "width"), [(6, 6), (7, 5)])
def test_gradients_are_those_of_the_grouped_convolution(height, width, strides):
    x, kernel = _inputs(height, width)
    expected = _gradient(_grouped, strides)(x, kernel)
    for ours, theirs in zip(_gradient(_convolve, strides)(x, kernel), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("chunk", "loops"), [(1, 6), (2 * 4 * 4 * 5, 3), (5 * 4 * 4 * 5, 2), (2**16, 1)])
def test_a_chunk_is_the_most_images_that_fit_and_divide_the_batch(chunk, loops, monkeypatch):
    monkeypatch.setattr(depthwise, "_CHUNK", chunk)
    x = jnp.ones((6, 4, 4, 5))
    jaxpr = jax.make_jaxpr(functools.partial(_in_chunks, strides=1))(x, jnp.ones((3, 3, 1, 5)))
    assert [equation.params["length"] for equation in jaxpr.eqns if equation.primitive.name == "scan"] == [loops]


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("strides", [1, 2])
def test_the_derivative_in_a_direction_is_that_of_the_grouped_convolution(strides):
    inputs = _inputs(7, 6)
    directions = jax.tree.map(jnp.cos, inputs)
    ours, theirs = (
        jax.jit(functools.partial(jax.jvp, functools.partial(function, strides=strides)))(inputs, directions)
        for function in (_convolve, _grouped)
    )
    for value, expected in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("axes", [(0, 0), (None, 0), (0, None)], ids=["both", "kernels", "images"])
def test_gradients_of_several_models_at_once_are_those_of_each(axes, monkeypatch):
    monkeypatch.setattr(depthwise, "_CHUNK", 1)
    x, kernel = _inputs(5, 4)
    many = jnp.stack([x, 2 * x, x - 1]), jnp.stack([kernel, -kernel, kernel + 1])
    arguments = [values if axis == 0 else values[0] for values, axis in zip(many, axes, strict=True)]
    gradient = _gradient(_convolve, 2)
    together = jax.jit(jax.vmap(gradient, in_axes=axes))(*arguments)
    for i in range(3):
        each = gradient(*(values[i] if axis == 0 else values for values, axis in zip(arguments, axes, strict=True)))
        for ours, theirs in zip(together, each, strict=True):
            np.testing.assert_allclose(ours[i], theirs, rtol=1e-4, atol=1e-4)


def test_second_derivatives_are_those_of_the_grouped_convolution():
    inputs = _inputs(4, 3)
    ours, theirs = (
        jax.jit(functools.partial(jax.jvp, _gradient(function, 2)))(inputs, jax.tree.map(jnp.cos, inputs))
        for function in (_convolve, _grouped)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), ours, theirs)


@pytest.mark.parametrize(("platform", "convolutions"), [("cpu", 0), ("cuda", 1), ("tpu", 1)])
def test_the_platform_that_a_program_is_lowered_for_decides(platform, convolutions):
    x, kernel = _inputs(8, 8)
    exported = jax.export.export(jax.jit(depthwise_conv, static_argnums=2), platforms=[platform])(x, kernel, 1)
    module = exported.mlir_module()
    assert module.count("stablehlo.convolution") == convolutions
    assert len(re.findall("feature_group_count = 5", module)) == convolutions
