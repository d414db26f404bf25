"""RegMean: closed-form merges of linear layers from the Gram matrices of their inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import glue_jax
from glue_jax.merging import regmean_merge
from glue_jax.merging.regmean import conv_gram, layer_gram


def experts_and_inputs(*, num_experts=3, rows=40, in_features=5, out_features=4, dtype=jnp.float32):
    kernels = jax.random.normal(jax.random.key(0), (num_experts, in_features, out_features)).astype(dtype)
    # Each expert's features have correlations and sizes of their own.
    mixing = jax.random.normal(jax.random.key(1), (num_experts, in_features, in_features))
    inputs = jax.random.normal(jax.random.key(2), (num_experts, rows, in_features)) @ mixing
    return {"layer": {"kernel": kernels, "bias": kernels[:, 0]}}, inputs


def least_squares(inputs, kernels):
    """W that minimises the sum over experts of ||X_i W - X_i W_i||^2, in float64."""
    inputs, kernels = (np.asarray(values, np.float64) for values in (inputs, kernels))
    outputs = np.concatenate([x @ w for x, w in zip(inputs, kernels, strict=True)])
    return np.linalg.lstsq(np.concatenate(inputs), outputs)[0]


def test_without_reduction_it_is_the_least_squares_solution_and_biases_are_averaged():
    experts, inputs = experts_and_inputs()
    grams = {"layer/kernel": jax.vmap(layer_gram)(inputs)}
    merged = regmean_merge(experts, grams, scale=1)
    kernels = experts["layer"]["kernel"]
    np.testing.assert_allclose(merged["layer"]["kernel"], least_squares(inputs, kernels), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(merged["layer"]["bias"], jnp.mean(kernels[:, 0], axis=0), rtol=1e-6)


def test_the_off_diagonal_entries_are_reduced():
    experts, inputs = experts_and_inputs()
    grams = np.asarray(jax.vmap(layer_gram)(inputs), np.float64)
    kernels = np.asarray(experts["layer"]["kernel"], np.float64)
    for words, scale in (({}, 0.9), ({"scale": 0.5}, 0.5), ({"scale": 0}, 0)):
        reduced = np.where(np.eye(5, dtype=bool), grams, scale * grams)
        expected = np.linalg.solve(reduced.sum(axis=0), (reduced @ kernels).sum(axis=0))
        merged = regmean_merge(experts, {"layer/kernel": grams}, **words)
        np.testing.assert_allclose(merged["layer"]["kernel"], expected, rtol=1e-4, atol=1e-5)


def test_gram_matrices_of_minibatches_add_up_whatever_axes_are_before_the_features():
    x = jax.random.normal(jax.random.key(0), (2, 6, 3))
    np.testing.assert_allclose(layer_gram(x), layer_gram(x[0]) + layer_gram(x[1]), rtol=1e-5)
    np.testing.assert_allclose(layer_gram(x), np.reshape(x, (-1, 3)).T @ np.reshape(x, (-1, 3)), rtol=1e-5)


@pytest.mark.parametrize(
    ("strides", "padding"), [(1, "SAME"), (2, "SAME"), ((2, 1), "VALID"), (2, 1), (1, ((0, 2), (1, 0)))]
)
def test_a_convolution_is_the_linear_layer_of_its_patches(strides, padding):
    shape = (3, 2, 4, 5)
    images = jax.random.normal(jax.random.key(0), (2, 6, 7, 4))
    kernel = jax.random.normal(jax.random.key(1), shape)
    steps = (strides, strides) if isinstance(strides, int) else strides
    pads = ((padding, padding),) * 2 if isinstance(padding, int) else padding
    if isinstance(pads, str):
        pads = jax.lax.padtype_to_pads(images.shape[1:3], shape[:2], steps, pads)
    padded = np.pad(images, ((0, 0), *pads, (0, 0)))
    outputs = jax.lax.conv_general_dilated(images, kernel, steps, pads, dimension_numbers=("NHWC", "HWIO", "NHWC"))
    patches = np.stack(
        [
            [
                padded[:, row * steps[0] : row * steps[0] + 3, column * steps[1] : column * steps[1] + 2].reshape(2, -1)
                for column in range(outputs.shape[2])
            ]
            for row in range(outputs.shape[1])
        ]
    )
    by_patches = np.einsum("rcbi,io->brco", patches, np.reshape(kernel, (24, 5)))
    np.testing.assert_allclose(outputs, by_patches, rtol=1e-3, atol=1e-4)
    gram = conv_gram(images, shape, strides=strides, padding=padding)
    np.testing.assert_allclose(gram, layer_gram(patches), rtol=1e-4, atol=1e-4)


def test_a_convolution_of_one_axis_has_its_patches_too():
    sequences = jax.random.normal(jax.random.key(0), (2, 5, 3))
    patches = np.stack([np.reshape(sequences[:, at : at + 2], (2, -1)) for at in range(4)])
    gram = conv_gram(sequences, (2, 3, 7), padding="VALID")
    np.testing.assert_allclose(gram, layer_gram(patches), rtol=1e-5, atol=1e-5)


def test_convolutions_are_merged_as_the_same_layers_of_patches():
    kernels = jax.random.normal(jax.random.key(0), (2, 3, 3, 2, 4))
    images = jax.random.normal(jax.random.key(1), (2, 5, 6, 6, 2))
    grams = jax.vmap(lambda x: conv_gram(x, (3, 3, 2, 4), padding="VALID"))(images)
    windows = np.lib.stride_tricks.sliding_window_view(np.asarray(images), (3, 3), axis=(2, 3))
    patches = np.moveaxis(windows, 4, -1).reshape(2, -1, 18)
    merged = regmean_merge({"kernel": kernels}, {"kernel": grams}, scale=1)["kernel"]
    expected = least_squares(patches, np.reshape(kernels, (2, 18, 4))).reshape(3, 3, 2, 4)
    np.testing.assert_allclose(merged, expected, rtol=1e-3, atol=1e-4)


def test_a_kernel_may_have_several_axes_of_inputs_or_of_outputs():
    # Attention's: [width, heads, features] and [heads, features, width].
    _, inputs = experts_and_inputs(in_features=6)
    grams = jax.vmap(layer_gram)(inputs)
    kernels = jax.random.normal(jax.random.key(5), (3, 6, 4))
    flat = regmean_merge({"w": kernels}, {"w": grams})["w"]
    wide = regmean_merge({"w": kernels.reshape(3, 6, 2, 2)}, {"w": grams})["w"]
    deep = regmean_merge({"w": kernels.reshape(3, 3, 2, 4)}, {"w": grams})["w"]
    np.testing.assert_array_equal(wide, flat.reshape(6, 2, 2))
    np.testing.assert_array_equal(deep, flat.reshape(3, 2, 4))


@pytest.mark.parametrize("scale", [1.0, 0.9])
def test_equal_experts_give_that_expert_back(scale):
    kernel = jax.random.normal(jax.random.key(0), (5, 4))
    _, inputs = experts_and_inputs()
    experts = glue_jax.stack_experts([{"kernel": kernel, "bias": jnp.arange(4.0)}] * 3)
    merged = regmean_merge(experts, {"kernel": jax.vmap(layer_gram)(inputs)}, scale=scale)
    np.testing.assert_allclose(merged["kernel"], kernel, rtol=1e-5)
    np.testing.assert_array_equal(merged["bias"], jnp.arange(4.0))


def test_permuting_the_experts_changes_nothing():
    experts, inputs = experts_and_inputs()
    grams = jax.vmap(layer_gram)(inputs)
    order = jnp.array([2, 0, 1])
    merged = regmean_merge(experts, {"layer/kernel": grams})
    other = regmean_merge(jax.tree.map(lambda leaf: leaf[order], experts), {"layer/kernel": grams[order]})
    np.testing.assert_allclose(other["layer"]["kernel"], merged["layer"]["kernel"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 0.9])
def test_along_directions_that_no_input_has_it_is_the_average(scale):
    experts, inputs = experts_and_inputs(rows=40)
    # The last feature is 0 in all inputs.
    inputs = inputs.at[..., -1].set(0)
    kernels = experts["layer"]["kernel"]
    merged = regmean_merge(experts, {"layer/kernel": jax.vmap(layer_gram)(inputs)}, scale=scale)
    merged, mean = merged["layer"]["kernel"], np.mean(kernels, axis=0)
    np.testing.assert_allclose(merged[-1], mean[-1], rtol=1e-6)
    assert np.abs(merged[:-1] - mean[:-1]).max() > 0.1
    if scale == 1:
        np.testing.assert_allclose(merged[:-1], least_squares(inputs[..., :-1], kernels[:, :-1]), rtol=1e-3, atol=1e-4)


def test_fewer_inputs_than_features_leave_the_average_where_nothing_is_known():
    experts, inputs = experts_and_inputs(num_experts=2, rows=1, in_features=6)
    kernels = np.asarray(experts["layer"]["kernel"])
    merged = regmean_merge(experts, {"layer/kernel": jax.vmap(layer_gram)(inputs)}, scale=1)["layer"]["kernel"]
    for x, kernel in zip(np.asarray(inputs), kernels, strict=True):
        np.testing.assert_allclose(x @ merged, x @ kernel, atol=1e-2)
    mean = kernels.mean(axis=0)
    # Two inputs of six dimensions.
    assert np.linalg.matrix_rank(np.asarray(merged) - mean, tol=1e-2) == 2


def test_gram_matrices_of_zeros_give_the_average():
    experts, _ = experts_and_inputs()
    merged = regmean_merge(experts, {"layer/kernel": jnp.zeros((3, 5, 5))})
    mean = jnp.mean(experts["layer"]["kernel"], axis=0)
    np.testing.assert_array_equal(merged["layer"]["kernel"], mean)


def test_half_precision_is_merged_in_float32():
    experts, inputs = experts_and_inputs(dtype=jnp.bfloat16)
    # Sums above 256 lose their last integers in bfloat16.
    ones = jnp.ones((1000, 2), jnp.bfloat16)
    np.testing.assert_array_equal(layer_gram(ones), jnp.full((2, 2), 1000.0))
    grams = {"layer/kernel": jax.vmap(layer_gram)(inputs)}
    merged = regmean_merge(experts, grams)["layer"]["kernel"]
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), experts)
    assert merged.dtype == jnp.bfloat16
    expected = regmean_merge(wide, grams)["layer"]["kernel"]
    np.testing.assert_array_equal(merged, expected.astype(jnp.bfloat16))


def test_it_can_be_jitted_and_keeps_what_is_not_floating_point():
    experts, inputs = experts_and_inputs()
    experts = {**experts, "steps": jnp.array([7, 7, 7])}
    grams = {"layer/kernel": jax.vmap(layer_gram)(inputs)}
    merged = jax.jit(regmean_merge, static_argnames="scale")(experts, grams)
    assert int(merged["steps"]) == 7
    expected = regmean_merge(experts, grams)["layer"]["kernel"]
    np.testing.assert_allclose(merged["layer"]["kernel"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("grams", "words", "message"),
    [
        ({"layer/kernl": jnp.zeros((3, 5, 5))}, {}, r"grams has the path 'layer/kernl'; .*\['layer/bias', 'layer/kern"),
        ({"steps": jnp.zeros((3, 1, 1))}, {}, "grams has the path steps, but the experts hold int32"),
        (
            {"layer/kernel": jnp.zeros((3, 4, 4))},
            {},
            r"grams has shape \(3, 4, 4\) at layer/kernel; expected \[K, in, in\] with K = 3, where in is one of "
            r"\[5, 20\].*whose shape is \(3, 5, 4\)",
        ),
        ({"layer/kernel": jnp.zeros((2, 5, 5))}, {}, r"grams has shape \(2, 5, 5\) at layer/kernel"),
        ({"layer/kernel": jnp.zeros((5, 5))}, {}, r"grams has shape \(5, 5\) at layer/kernel"),
        (
            {"layer/kernel": jnp.zeros((3, 5, 5)).at[1].set(jnp.nan)},
            {},
            "expert 1 of grams holds nan at layer/kernel; expected finite numbers",
        ),
        ({}, {"scale": 1.5}, "scale is 1.5; expected a number from 0 to 1"),
    ],
)
def test_gram_matrices_that_do_not_fit_are_refused_by_path(grams, words, message):
    experts, _ = experts_and_inputs()
    with pytest.raises(ValueError, match=message):
        regmean_merge({**experts, "steps": jnp.zeros((3, 1), jnp.int32)}, grams, **words)


def test_what_is_no_mapping_and_inputs_of_other_shapes_are_refused():
    with pytest.raises(TypeError, match="grams is a list; expected a mapping from kernels' paths"):
        regmean_merge({"w": jnp.zeros((2, 3))}, [])  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"inputs have shape \(\); expected \[..., in_features\]"):
        layer_gram(1.0)
    for shape in ((2, 6, 6, 8), (2, 6, 4)):
        with pytest.raises(ValueError, match=r"expected \[B, \*spatial, 4\] with 2 spatial axes for a kernel of shape"):
            conv_gram(jnp.zeros(shape), (3, 3, 4, 8))
