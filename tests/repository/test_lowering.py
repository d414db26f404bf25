"""What the programs hold for each platform, read from their jaxprs and StableHLO modules without such a device."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from jax import export
from jax.interpreters import mlir

import glue_jax

HIGHEST = jax.lax.Precision.HIGHEST
LAYERS = 2
EXPERTS = 3
OPTIMIZER = optax.sgd(1.0)


def convolutional_loss(params, batch):
    """Convolutions and BatchNorm in evaluation mode."""
    for kernel, mean, variance in zip(params["kernel"], params["mean"], params["variance"], strict=True):
        batch = jax.lax.conv_general_dilated(
            batch, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), precision=HIGHEST
        )
        batch = jax.nn.relu((batch - mean[None, None, None]) * jax.lax.rsqrt(variance + 1e-5)[None, None, None])
    return jnp.mean(batch**2)


SHAPES = {"kernel": [(3, 3, 4, 4)] * LAYERS, "mean": [(4,)] * LAYERS, "variance": [(4,)] * LAYERS}


def step_arguments() -> tuple[Any, ...]:
    experts = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct((EXPERTS, *shape), jnp.float32),
        SHAPES,
        is_leaf=lambda node: isinstance(node, tuple),
    )
    state = glue_jax.init(EXPERTS, OPTIMIZER)
    return jax.ShapeDtypeStruct((2,), jnp.uint32), state, experts, jax.ShapeDtypeStruct((5, 8, 8, 4), jnp.float32)


def spsa_step(key_data, state, experts, batch, **words):
    return glue_jax.spsa_step(
        jax.random.wrap_key_data(key_data, impl="threefry2x32"),
        state,
        experts,
        batch,
        loss_fn=convolutional_loss,
        optimizer=OPTIMIZER,
        **words,
    )


@functools.cache
def module(platform, **words) -> str:
    """The StableHLO of a step for one platform."""
    exported = export.export(jax.jit(functools.partial(spsa_step, **words)), platforms=[platform])(*step_arguments())
    return exported.mlir_module()


def operations(text: str) -> Iterator[tuple[Any, bool]]:
    """All operations that the entry function runs, calls followed, and whether each lies within a while loop."""

    def walk(operation: Any, in_loop: bool) -> Iterator[tuple[Any, bool]]:
        operation = operation.operation
        yield operation, in_loop
        if operation.name == "func.call":
            yield from walk(functions[operation.attributes["callee"].value], in_loop)
        for region in operation.regions:
            for block in region.blocks:
                for inner in block.operations:
                    yield from walk(inner, in_loop or operation.name == "stablehlo.while")

    with mlir.make_ir_context():
        parsed = mlir.ir.Module.parse(text)
        entries: list[Any] = list(parsed.body.operations)
        functions = {entry.attributes["sym_name"].value: entry for entry in entries}
        yield from walk(functions["main"], False)


def convolutions_in_loops(text: str) -> list[bool]:
    return [in_loop for operation, in_loop in operations(text) if operation.name == "stablehlo.convolution"]


def equations(jaxpr: Any) -> Iterator[Any]:
    """All equations of a jaxpr and of those within it."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


def products(function, *arguments) -> list[Any]:
    """The parameters of every `dot_general` of a function."""
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    return [equation.params for equation in equations(jaxpr) if equation.primitive.name == "dot_general"]


@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_an_accelerator_runs_all_probes_in_one_batched_forward(platform, m):
    text = module(platform, num_directions=m)
    assert convolutions_in_loops(text) == [False] * LAYERS
    assert "stablehlo.while" not in text
    # XLA's convolution over the probes: the 2m blended kernels side by side.
    assert f"feature_group_count = {2 * m} " in text or f"batch_group_count = {2 * m} " in text


@pytest.mark.parametrize("m", [1, 3])
def test_a_cpu_runs_one_probe_at_a_time(m):
    text = module("cpu", num_directions=m)
    assert convolutions_in_loops(text) == [True] * LAYERS
    assert "feature_group_count = 1 " in text
    assert f"tensor<{2 * m}x5x8x8x4xf32>" not in text


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
@pytest.mark.parametrize("probe_batch_size", [1, 2, 4, 9])
def test_an_explicit_probe_batch_size_holds_on_each_platform(platform, probe_batch_size):
    # 2m = 4 probes.
    text = module(platform, num_directions=2, probe_batch_size=probe_batch_size)
    assert convolutions_in_loops(text) == [probe_batch_size < 4] * LAYERS
    assert f"feature_group_count = {min(probe_batch_size, 4)} " in text


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
@pytest.mark.parametrize("directions", ["orthogonal", "simplex_orthogonal"])
def test_orthogonal_directions_are_lowered_for_each_platform(platform, directions):
    text = module(platform, num_directions=2, directions=directions)
    assert convolutions_in_loops(text) == [platform == "cpu"] * LAYERS
    assert "stablehlo.custom_call" in text


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_no_product_of_the_module_is_rounded_on_an_accelerator(platform):
    lines = [line for line in module(platform, num_directions=3).splitlines() if "stablehlo.dot_general" in line]
    # One blend for each of the 3 * LAYERS leaves, the zero-sum basis, and the combination of the directions.
    assert len(lines) == 3 * LAYERS + 2
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in lines)


@pytest.mark.parametrize("groups", [None, {"a": 0, "b": 1}], ids=["[K]", "[G, K]"])
def test_a_blend_under_vmap_keeps_the_highest_precision_and_float32_sums(groups):
    experts = {"a": jnp.ones((EXPERTS, 4, 2)), "b": jnp.ones((EXPERTS, 5))}
    alphas = jnp.ones((2, EXPERTS) if groups is None else (2, 2, EXPERTS))
    found = products(jax.vmap(lambda alpha: glue_jax.blend(experts, alpha, groups)), alphas)
    # One for each leaf and each of the two kinds of platforms.
    assert [params["precision"] for params in found] == [(HIGHEST, HIGHEST)] * 4
    assert [params["preferred_element_type"] for params in found] == [jnp.float32] * 4


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_short_experts_are_multiplied_and_added_without_a_product_on_an_accelerator(platform, dtype):
    experts = {"a": jax.ShapeDtypeStruct((EXPERTS, 4, 2), dtype)}
    blend = jax.jit(jax.vmap(lambda experts, alpha: glue_jax.blend(experts, alpha), in_axes=(None, 0)))
    text = export.export(blend, platforms=[platform])(experts, jax.ShapeDtypeStruct((2, EXPERTS), jnp.float32))
    assert "dot_general" not in text.mlir_module()
    assert "stablehlo.while" not in text.mlir_module()


@pytest.mark.parametrize("probe_batch_size", [None, 1, 3, 100])
def test_every_product_of_a_step_has_the_highest_precision(probe_batch_size):
    # The loss has no product of its own: blends, the zero-sum basis, and the combination of directions.
    step = functools.partial(
        spsa_step, num_directions=2, directions="simplex_orthogonal", probe_batch_size=probe_batch_size
    )
    found = products(step, *step_arguments())
    assert len(found) >= 2 * 3 * LAYERS + 2
    assert {params["precision"] for params in found} == {(HIGHEST, HIGHEST)}


@pytest.mark.parametrize("estimator", [glue_jax.estimators.spsa_gradient, glue_jax.estimators.forward_gradient])
def test_the_combination_of_directions_has_the_highest_precision_under_vmap(estimator):
    def gradient(beta):
        return estimator(jax.random.key(0), lambda b: jnp.sum(b**2), beta, num_directions=3).gradient

    found = products(jax.vmap(gradient), jnp.ones((4, EXPERTS)))
    assert [params["precision"] for params in found] == [(HIGHEST, HIGHEST)]
