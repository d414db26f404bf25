"""`loop`: the values of `jax.lax.map`, and convolutions that XLA:CPU runs fast inside a loop."""

import functools

import jax
import jax.export
import jax.numpy as jnp
import pytest
from numpy.testing import assert_allclose

import glue_jax
from glue_jax.loops import loop
from tests.library.helpers import ADAM

FAST = "[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]"
PYTORCH = ("NCHW", "OIHW", "NCHW")
IMAGES = jax.random.normal(jax.random.key(0), (3, 4, 6, 5))


def convolve(kernel, layout=PYTORCH, images=IMAGES, **words):
    defaults = {"window_strides": (1, 1), "padding": "SAME"}
    return jax.lax.conv_general_dilated(images, kernel, **(defaults | words), dimension_numbers=layout)


def kernels(*shape):
    return jax.random.normal(jax.random.key(1), (2, *shape))


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((2, 4, 3, 3), {}),
        ((2, 4, 3, 3), {"window_strides": (2, 1), "padding": ((1, 0), (2, 1))}),
        ((2, 4, 3, 2), {"padding": "VALID", "rhs_dilation": (1, 2)}),
        ((2, 4, 3, 3), {"padding": ((1, 1), (1, 1)), "lhs_dilation": (2, 1)}),
        ((8, 1, 3, 3), {"feature_group_count": 4}),
        (
            (3, 2, 3, 2),
            {"layout": ("CHWN", "IHWO", "HNWC"), "images": jax.random.normal(jax.random.key(2), (3, 6, 5, 4))},
        ),
        ((2, 4, 3), {"layout": ("NCH", "OIH", "NCH"), "images": IMAGES[..., 0], "window_strides": (1,)}),
    ],
)
@pytest.mark.parametrize("batch_size", [None, 2])
def test_a_loop_has_the_values_of_jax_lax_map(shape, words, batch_size):
    fun = functools.partial(convolve, **words)
    found = loop(fun, kernels(*shape), batch_size)
    assert_allclose(found, jax.lax.map(fun, kernels(*shape)), rtol=1e-5, atol=1e-5)


def test_a_loop_takes_and_returns_pytrees_and_enters_jitted_functions():
    def fun(x):
        return {"sum": jnp.sum(jax.jit(convolve)(x["kernel"])), "none": None, "scale": x["scale"]}

    xs = {"kernel": kernels(2, 4, 3, 3), "scale": jnp.arange(2.0)}
    found = loop(fun, xs)
    assert found["none"] is None
    assert_allclose(found["sum"], jax.lax.map(fun, xs)["sum"], rtol=1e-5)
    assert_allclose(found["scale"], xs["scale"])
    assert FAST in jax.jit(functools.partial(loop, fun)).lower(xs).as_text()


def test_a_loop_has_the_derivatives_of_jax_lax_map():
    def total(kernel, loop):
        return jnp.sum(loop(lambda x: jax.checkpoint(convolve)(kernel * x) ** 2, jnp.arange(1.0, 3.0)))

    kernel = kernels(2, 4, 3, 3)[0]
    expected = jax.grad(total)(kernel, jax.lax.map)
    assert_allclose(jax.jit(jax.grad(total), static_argnums=1)(kernel, loop), expected, rtol=1e-4)
    slope = jax.jvp(functools.partial(total, loop=loop), (kernel,), (kernel,))[1]
    assert_allclose(slope, jnp.vdot(expected, kernel), rtol=1e-4)
    many = jax.vmap(functools.partial(total, loop=loop))(kernels(2, 4, 3, 3))
    assert_allclose(many, jax.vmap(functools.partial(total, loop=jax.lax.map))(kernels(2, 4, 3, 3)), rtol=1e-4)


def test_one_export_has_the_fast_layout_for_a_cpu_alone():
    exported = jax.export.export(jax.jit(functools.partial(loop, convolve)), platforms=("cpu", "cuda"))
    xs = kernels(2, 4, 3, 3)
    module = exported(xs)
    assert FAST in module.mlir_module()
    assert "[b, f, 0, 1]x[o, i, 0, 1]->[b, f, 0, 1]" in module.mlir_module()
    assert_allclose(module.call(xs), jax.lax.map(convolve, xs), rtol=1e-5, atol=1e-5)


def test_a_loop_without_such_a_convolution_is_that_of_jax():
    fun, xs = functools.partial(convolve, layout=("NHWC", "HWIO", "NHWC")), kernels(3, 3, 5, 2)
    plain = jax.make_jaxpr(functools.partial(jax.lax.map, fun))(xs)
    assert str(jax.make_jaxpr(functools.partial(loop, fun))(xs)) == str(plain)


@pytest.mark.parametrize("step_fn", [glue_jax.spsa_step, glue_jax.gauss_newton_step])
@pytest.mark.parametrize("probe_batch_size", [None, 1])
def test_the_steps_of_a_network_in_pytorchs_layout_are_fast_on_a_cpu(step_fn, probe_batch_size):
    experts = {"kernel": kernels(2, 4, 3, 3)}
    loss_fn = glue_jax.OutputLoss(
        lambda params, batch: convolve(params["kernel"], images=batch).mean((2, 3)),
        lambda outputs, batch: jnp.mean(outputs**2),
    )
    optimizer = {} if step_fn is glue_jax.gauss_newton_step else {"optimizer": ADAM}
    step = jax.jit(functools.partial(step_fn, loss_fn=loss_fn, probe_batch_size=probe_batch_size, **optimizer))
    state = glue_jax.init(2, *optimizer.values())
    traced = step.trace(jax.random.key(0), state, experts, IMAGES)
    assert FAST in traced.lower(lowering_platforms=("cpu",)).as_text()
    assert "[b, f, 0, 1]" not in traced.lower(lowering_platforms=("cpu",)).as_text()
    assert FAST not in traced.lower(lowering_platforms=("cuda",)).as_text()
