import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import models
from experiments.models.resnet import BasicBlock, ResNet20


@pytest.fixture(scope="module")
def resnet():
    return models.build("resnet20", image_shape=(32, 32, 3), num_classes=10)


def _num_params(network):
    variables = jax.eval_shape(network.init, jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


def test_resnet20_has_the_parameters_of_its_paper(resnet):
    # He et al.: 0.27 M. By hand: 3x3 convolutions 3-16, 6 of 16-16, 16-32, 5 of 32-32, 32-64, 5 of 64-64; BatchNorm's
    # scale and bias behind each; a linear head 64-10.
    convolutions = 9 * (3 * 16 + 6 * 16 * 16 + 16 * 32 + 5 * 32 * 32 + 32 * 64 + 5 * 64 * 64)
    assert _num_params(resnet) == convolutions + 2 * (7 * 16 + 6 * 32 + 6 * 64) + 64 * 10 + 10 == 269_722


def test_the_small_network_has_the_parameters_that_its_docstring_says():
    network = models.build("convnet", image_shape=(8, 8, 1), num_classes=10)
    assert f"{_num_params(network):,} parameters" in (models.ConvNet.__doc__ or "")


def test_resnet20_halves_the_image_and_doubles_the_channels_stage_by_stage():
    module = nnx.eval_shape(lambda: ResNet20(image_shape=(32, 32, 3), num_classes=10, rngs=nnx.Rngs(0)))
    x = jax.ShapeDtypeStruct((2, 32, 32, 16), jnp.float32)
    shapes = []
    for block in module.blocks:
        graph, state = nnx.split(block)
        x = jax.eval_shape(lambda state, x, graph=graph: nnx.merge(graph, state)(x), state, x)
        shapes.append(x.shape)
    assert shapes == [(2, 32, 32, 16)] * 3 + [(2, 16, 16, 32)] * 3 + [(2, 8, 8, 64)] * 3


def test_the_shortcut_strides_and_pads_with_zero_channels():
    block = BasicBlock(2, 4, strides=2, rngs=nnx.Rngs(0))
    block.conv2.kernel[...] = jnp.zeros_like(block.conv2.kernel[...])
    block.norm1.use_running_average = block.norm2.use_running_average = True
    x = jax.random.uniform(jax.random.key(0), (1, 4, 4, 2))
    y = block(x)
    np.testing.assert_allclose(y[..., 1:3], x[:, ::2, ::2], rtol=1e-6)
    np.testing.assert_array_equal(y[..., [0, 3]], 0)


@pytest.mark.parametrize(("name", "shape"), [("resnet20", (2, 32, 32, 3)), ("convnet", (2, 8, 8, 1))])
def test_networks_give_a_logit_a_class(name, shape):
    network = models.build(name, image_shape=shape[1:], num_classes=7)
    logits = jax.eval_shape(lambda key, x: network.apply(network.init(key), x), jax.random.key(0), jnp.zeros(shape))
    assert logits.shape == (2, 7)


def test_evaluation_is_deterministic_in_the_batch_and_training_updates_the_statistics():
    network = models.build("convnet", image_shape=(8, 8, 1), num_classes=10)
    variables = network.init(jax.random.key(0))
    images = jax.random.normal(jax.random.key(1), (4, 8, 8, 1))
    np.testing.assert_allclose(
        network.apply(variables, images)[:2], network.apply(variables, images[:2]), rtol=1e-4, atol=1e-5
    )
    logits, statistics = network.apply_training(variables, images)
    assert logits.shape == (4, 10)
    assert jax.tree.structure(statistics) == jax.tree.structure(variables["batch_stats"])
    # The running mean starts at 0 and moves by a tenth, the momentum being 0.9.
    new_mean = statistics["norm1"]["mean"]
    kernel = variables["params"]["conv1"]["kernel"]
    activations = jax.lax.conv_general_dilated(
        images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(new_mean, 0.1 * activations.mean((0, 1, 2)), rtol=1e-4, atol=1e-6)


def test_an_unknown_network_is_refused_with_those_known():
    with pytest.raises(ValueError, match=r"network is 'vgg'.*resnet20"):
        models.build("vgg", image_shape=(32, 32, 3), num_classes=10)
