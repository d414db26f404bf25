"""The inputs of each layer of the experiments' networks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import glue_jax
from experiments import models
from experiments.models.inputs import input_grams
from glue_jax.paths import by_path

TINY_VIT = {"patch_size": 4, "depth": 1, "width": 12, "heads": 3, "mlp_width": 24}


def grams_of(name, **options):
    network = models.build(name, image_shape=(8, 8, 3), num_classes=4, **options)
    variables = network.init(jax.random.key(0))
    images = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
    found = jax.jit(lambda variables, images: input_grams(network.apply, variables, images))(variables, images)
    return network, variables, images, found


def test_each_layer_of_the_small_network_has_its_own_inputs():
    network, variables, images, found = grams_of("convnet")
    assert list(found) == ["params/conv1/kernel", "params/conv2/kernel", "params/head/kernel"]
    windows = np.lib.stride_tricks.sliding_window_view(
        np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0))), (3, 3), axis=(1, 2)
    )
    patches = np.moveaxis(windows, 3, -1).reshape(-1, 27)
    np.testing.assert_allclose(found["params/conv1/kernel"], patches.T @ patches, rtol=1e-4, atol=1e-3)
    # The logits are the head's outputs: with its bias 0 their sum of squares is that of the Gram matrix.
    kernel, logits = variables["params"]["head"]["kernel"], network.apply(variables, images)
    expected = jnp.trace(kernel.T @ found["params/head/kernel"] @ kernel)
    np.testing.assert_allclose(jnp.sum(logits**2), expected, rtol=1e-4)


@pytest.mark.parametrize(("name", "options"), [("resnet20", {}), ("vit", TINY_VIT), ("mobilenetv2", {})])
def test_all_kernels_but_depthwise_ones_have_gram_matrices_that_fit(name, options):
    network = models.build(name, image_shape=(8, 8, 3), num_classes=4, **options)
    variables = jax.eval_shape(network.init, jax.random.key(0))
    images = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)

    def merged(variables, images):
        grams = input_grams(network.apply, variables, images)
        kernels = [path for path in by_path(variables) if path.endswith("/kernel") and "depthwise" not in path]
        assert sorted(grams) == sorted(kernels)
        experts = jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), variables)
        return glue_jax.merging.regmean_merge(experts, {path: jnp.stack([gram] * 2) for path, gram in grams.items()})

    assert jax.eval_shape(merged, variables, images) == variables


def test_the_network_computes_as_before_and_afterwards_nothing_is_recorded():
    before = {kind: kind.__call__ for kind in (nnx.Conv, nnx.Linear, nnx.LinearGeneral)}
    network, variables, images, found = grams_of("convnet")
    outputs = []

    def apply(variables, images):
        outputs.append(network.apply(variables, images))

    again = input_grams(apply, variables, images)
    np.testing.assert_array_equal(outputs[0], network.apply(variables, images))
    # Compiled or not, it is the same.
    for path, gram in found.items():
        np.testing.assert_allclose(again[path], gram, rtol=1e-4, atol=1e-3)
    with pytest.raises(ZeroDivisionError):
        input_grams(lambda variables, images: 1 / 0, variables, images)
    assert {kind: kind.__call__ for kind in before} == before
