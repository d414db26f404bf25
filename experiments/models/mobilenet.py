"""MobileNetV2 (Sandler et al., 2018, https://arxiv.org/abs/1801.04381)."""

import functools
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.models.depthwise import DepthwiseConv

Strides = Literal["paper", "small_images"]
STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
"""For each stage: expansion, channels, number of blocks, and stride of the first block (Table 2 of its paper)."""

_conv = functools.partial(
    nnx.Conv, use_bias=False, kernel_init=nnx.initializers.variance_scaling(2.0, "fan_in", "normal")
)


def _pointwise_product(x: jax.Array, kernel: jax.Array, strides: Any, padding: Any, **options: Any) -> jax.Array:
    """Returns a 1 x 1 convolution.

    On a CPU it is a matrix product, so its gradient needs no transposed copy of the images.
    """

    def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return (x.reshape(-1, x.shape[-1]) @ kernel[0, 0]).reshape(*x.shape[:-1], -1)

    default = functools.partial(jax.lax.conv_general_dilated, window_strides=strides, padding=padding, **options)
    return jax.lax.platform_dependent(x, kernel, cpu=product, default=default)


_pointwise = functools.partial(_conv, kernel_size=(1, 1), conv_general_dilated=_pointwise_product)


class _BatchNorm(nnx.BatchNorm):
    """BatchNorm as one product and one sum. So XLA:CPU stores no centred copy of the input for the gradient."""

    def __call__(self, x: jax.Array) -> jax.Array:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Returns the output. If it normalises by the minibatch, it updates the running statistics."""
        assert self.scale is not None
        assert self.bias is not None
        axes = tuple(range(x.ndim - 1))
        if self.use_running_average:
            mean, var = self.mean[...], self.var[...]
        else:
            mean = jnp.mean(x, axes)
            var = jnp.maximum(0.0, jnp.mean(jnp.square(x), axes) - jnp.square(mean))
            for running, value in ((self.mean, mean), (self.var, var)):
                running[...] = self.momentum * running[...] + (1 - self.momentum) * value
        factor = self.scale[...] * jax.lax.rsqrt(var + self.epsilon)
        factor, offset = (jnp.expand_dims(values, axes) for values in (factor, self.bias[...] - mean * factor))
        return x * factor + offset


_batch_norm = functools.partial(_BatchNorm, momentum=0.9)


class InvertedResidual(nnx.Module):
    """Expansion, a depthwise convolution and a linear projection. The input is added if the shapes agree."""

    def __init__(self, in_features: int, out_features: int, *, expansion: int, strides: int, rngs: nnx.Rngs):
        """Builds a map from `[B, H, W, in_features]` to `[B, ceil(H/strides), ceil(W/strides), out_features]`."""
        features = expansion * in_features
        if expansion > 1:
            self.expand = _pointwise(in_features, features, rngs=rngs)
            self.norm1 = _batch_norm(features, rngs=rngs)
        self.depthwise = DepthwiseConv(features, strides=strides, rngs=rngs)
        self.norm2 = _batch_norm(features, rngs=rngs)
        self.project = _pointwise(features, out_features, rngs=rngs)
        self.norm3 = _batch_norm(out_features, rngs=rngs)
        self.expands = expansion > 1
        self.adds = strides == 1 and in_features == out_features

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the block's output."""
        y = nnx.relu6(self.norm1(self.expand(x))) if self.expands else x
        y = nnx.relu6(self.norm2(self.depthwise(y)))
        y = self.norm3(self.project(y))
        return x + y if self.adds else y


class MobileNetV2(nnx.Module):
    """17 inverted residuals: 3.5 million parameters with 1000 classes, 2,236,682 with 10. Without dropout."""

    def __init__(
        self,
        *,
        image_shape: tuple[int, int, int],
        num_classes: int,
        rngs: nnx.Rngs,
        strides: Strides = "small_images",
    ):
        """Builds the network for images `[B, *image_shape]`.

        Args:
            image_shape: height, width and channels.
            num_classes: the number of classes.
            rngs: the random numbers of the initialisation.
            strides: `paper` is the strides of MobileNetV2's paper. `small_images` has stride 1 in the stem and in the
                first strided stage, for images of about 32 pixels.

        Raises:
            ValueError: if `strides` has another value.
        """
        if strides not in get_args(Strides):
            raise ValueError(f"strides is {strides!r}; expected one of {get_args(Strides)}")
        is_small = strides == "small_images"
        self.conv = _conv(image_shape[-1], 32, (3, 3), strides=1 if is_small else 2, padding=1, rngs=rngs)
        self.norm1 = _batch_norm(32, rngs=rngs)
        blocks = []
        features = 32
        for expansion, channels, count, stride in STAGES:
            for index in range(count):
                is_first_strided = channels == 24
                step = stride if index == 0 and not (is_small and is_first_strided) else 1
                blocks.append(InvertedResidual(features, channels, expansion=expansion, strides=step, rngs=rngs))
                features = channels
        self.blocks = nnx.List(blocks)
        self.last_conv = _pointwise(features, 1280, rngs=rngs)
        self.norm2 = _batch_norm(1280, rngs=rngs)
        self.head = nnx.Linear(1280, num_classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns logits `[B, num_classes]`."""
        x = nnx.relu6(self.norm1(self.conv(x)))
        for block in self.blocks:
            x = block(x)
        x = nnx.relu6(self.norm2(self.last_conv(x)))
        return self.head(jnp.mean(x, axis=(1, 2)))
