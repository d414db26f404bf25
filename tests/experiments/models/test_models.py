import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import models
from experiments.models.mobilenet import STAGES, InvertedResidual, _BatchNorm, _pointwise
from experiments.models.resnet import BasicBlock


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


@pytest.mark.parametrize(("strides", "size"), [("paper", 224), ("small_images", 32)])
def test_mobilenetv2_has_the_parameters_of_its_paper(strides, size):
    # Sandler et al.: 3.4 M, printed from 3,504,872. By hand: a block of expansion t from c to d channels has 1x1
    # convolutions c-tc (none for t = 1) and tc-d, a depthwise 3x3 of tc, BatchNorm's scale and bias behind each.
    count, channels = 9 * 3 * 32 + 2 * 32, 32
    for expansion, features, blocks, _ in STAGES:
        for _ in range(blocks):
            wide = expansion * channels
            count += (channels * wide + 2 * wide if expansion > 1 else 0) + 9 * wide + 2 * wide
            count += wide * features + 2 * features
            channels = features
    count += 320 * 1280 + 2 * 1280
    shape = (size, size, 3)
    network = models.build("mobilenetv2", image_shape=shape, num_classes=1000, strides=strides)
    assert _num_params(network) == count + 1280 * 1000 + 1000 == 3_504_872
    network = models.build("mobilenetv2", image_shape=shape, num_classes=10, strides=strides)
    assert f"{_num_params(network):,} with 10" in (models.MobileNetV2.__doc__ or "")


def test_the_vit_has_the_parameters_that_its_sizes_give():
    # By hand: patches and their positions; a block has two LayerNorms, attention's four matrices and an MLP.
    width, mlp = 192, 768
    block = 2 * 2 * width + 4 * (width * width + width) + 2 * width * mlp + mlp + width
    patches = 8 * 8 * 3 * width + width + 64 * width
    network = models.build("vit", image_shape=(64, 64, 3), num_classes=10)
    assert _num_params(network) == patches + 8 * block + 2 * width + 10 * width + 10 == 3_610_570
    assert f"{_num_params(network):,} parameters" in (models.ViT.__doc__ or "")


def test_the_vits_token_is_a_parameter_and_fixed_positions_are_none():
    sizes = {"image_shape": (64, 64, 3), "num_classes": 10, "depth": 1}
    plain = _num_params(models.build("vit", **sizes))
    assert _num_params(models.build("vit", **sizes, pooling="token")) == plain + 192
    assert _num_params(models.build("vit", **sizes, positions="sincos")) == plain - 64 * 192


def _shapes(module, x):
    """The output shapes of a module's blocks, one after another."""
    shapes = []
    for block in module.blocks:
        graph, state = nnx.split(block)
        x = jax.eval_shape(lambda state, x, graph=graph: nnx.merge(graph, state)(x), state, x)
        shapes.append(x.shape[1:])
    return shapes


@pytest.mark.parametrize(
    ("strides", "size", "stem", "sizes"),
    [
        ("paper", 224, 112, (112, 56, 28, 14, 14, 7, 7)),
        ("small_images", 32, 32, (32, 32, 16, 8, 8, 4, 4)),
    ],
)
def test_mobilenetv2_narrows_and_widens_stage_by_stage(strides, size, stem, sizes):
    shape = (size, size, 3)
    module = nnx.eval_shape(
        lambda: models.MobileNetV2(image_shape=shape, num_classes=10, rngs=nnx.Rngs(0), strides=strides)
    )
    graph, state = nnx.split(module.conv)
    first = jax.eval_shape(lambda s, x: nnx.merge(graph, s)(x), state, jax.ShapeDtypeStruct((2, *shape), jnp.float32))
    assert first.shape == (2, stem, stem, 32)
    stages = zip(sizes, STAGES, strict=True)
    expected = [(pixels, pixels, features) for pixels, (_, features, blocks, _) in stages for _ in range(blocks)]
    assert _shapes(module, first) == expected


def test_an_inverted_residual_adds_its_input_only_where_the_shapes_agree():
    def adds(in_features, out_features, strides):
        block = InvertedResidual(in_features, out_features, expansion=6, strides=strides, rngs=nnx.Rngs(0))
        block.project.kernel[...] = jnp.zeros_like(block.project.kernel[...])
        x = jax.random.uniform(jax.random.key(0), (1, 4, 4, in_features))
        return float(jnp.abs(block(x)).max()) > 0

    assert [adds(2, 2, 1), adds(2, 3, 1), adds(2, 2, 2)] == [True, False, False]


def test_the_vits_blocks_keep_patches_and_width():
    module = nnx.eval_shape(lambda: models.ViT(image_shape=(64, 64, 3), num_classes=10, rngs=nnx.Rngs(0)))
    assert _shapes(module, jax.ShapeDtypeStruct((2, 64, 192), jnp.float32)) == [(64, 192)] * 8


def test_the_vit_sees_where_a_patch_lies():
    images = jax.random.uniform(jax.random.key(0), (1, 16, 16, 3))
    swapped = jnp.roll(images, 8, axis=1)
    for positions in ("learned", "sincos"):
        network = models.build("vit", image_shape=(16, 16, 3), num_classes=4, depth=1, positions=positions)
        variables = network.init(jax.random.key(1))
        difference = jnp.abs(network.apply(variables, images) - network.apply(variables, swapped)).max()
        assert float(difference) > 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": 7}, r"patch_size is 7; expected a divisor of the image's size \(16, 16\)"),
        ({"heads": 5}, r"width is 192; expected a multiple of heads \(5\)"),
        ({"width": 6, "heads": 3, "positions": "sincos"}, "width is 6; expected .* of 4"),
        ({"pooling": "max"}, "pooling is 'max'; expected one of"),
    ],
)
def test_a_vit_of_sizes_that_do_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        models.build("vit", image_shape=(16, 16, 3), num_classes=10, **options)


def _assert_same(ours, theirs, rtol=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-5), ours, theirs)


def test_mobilenetv2s_1x1_convolution_is_flaxs_and_has_its_gradient():
    ours = _pointwise(3, 4, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, 5, 4, 3))

    def outputs(conv_general_dilated):
        def loss(x, kernel):
            y = conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
            return jnp.sum(jnp.sin(y)), y

        return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(x, ours.kernel[...])

    _assert_same(outputs(ours.conv_general_dilated), outputs(jax.lax.conv_general_dilated))
    np.testing.assert_allclose(ours(x), jnp.einsum("bhwi,io->bhwo", x, ours.kernel[0, 0]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("use_running_average", [True, False])
def test_mobilenetv2s_batch_norm_is_flaxs_in_outputs_gradients_and_statistics(use_running_average):
    def outputs(kind):
        norm = kind(3, momentum=0.9, use_running_average=use_running_average, rngs=nnx.Rngs(0))
        graph, params, statistics = nnx.split(norm, nnx.Param, nnx.BatchStat)
        params = jax.tree.map(lambda leaf: leaf + jnp.arange(3.0), params)
        statistics = jax.tree.map(lambda leaf: leaf + jnp.arange(3.0) / 2, statistics)
        x = 2 * jax.random.normal(jax.random.key(1), (4, 5, 6, 3)) + 1

        def loss(params, x, statistics):
            module = nnx.merge(graph, params, statistics)
            y = module(x)
            return jnp.sum(jnp.sin(y)), (y, nnx.to_pure_dict(nnx.state(module, nnx.BatchStat)))

        return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(
            nnx.to_pure_dict(params), x, nnx.to_pure_dict(statistics)
        )

    _assert_same(outputs(_BatchNorm), outputs(nnx.BatchNorm), rtol=1e-4)


def test_other_strides_of_mobilenetv2_are_refused():
    with pytest.raises(ValueError, match="strides is 'large'; expected one of"):
        models.build("mobilenetv2", image_shape=(32, 32, 3), num_classes=10, strides="large")


def test_resnet20_halves_the_image_and_doubles_the_channels_stage_by_stage():
    module = nnx.eval_shape(lambda: models.ResNet20(image_shape=(32, 32, 3), num_classes=10, rngs=nnx.Rngs(0)))
    expected = [(32, 32, 16)] * 3 + [(16, 16, 32)] * 3 + [(8, 8, 64)] * 3
    assert _shapes(module, jax.ShapeDtypeStruct((2, 32, 32, 16), jnp.float32)) == expected


def test_the_shortcut_strides_and_pads_with_zero_channels():
    block = BasicBlock(2, 4, strides=2, rngs=nnx.Rngs(0))
    block.conv2.kernel[...] = jnp.zeros_like(block.conv2.kernel[...])
    block.norm1.use_running_average = block.norm2.use_running_average = True
    x = jax.random.uniform(jax.random.key(0), (1, 4, 4, 2))
    y = block(x)
    np.testing.assert_allclose(y[..., 1:3], x[:, ::2, ::2], rtol=1e-6)
    np.testing.assert_array_equal(y[..., [0, 3]], 0)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("resnet20", (2, 32, 32, 3)), ("mobilenetv2", (2, 32, 32, 3)), ("vit", (2, 64, 64, 3)), ("convnet", (2, 8, 8, 1))],
)
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
