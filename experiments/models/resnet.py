"""ResNet-20 for 32 x 32 images (He et al., 2016, section 4.2, https://arxiv.org/abs/1512.03385)."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

_conv = functools.partial(
    nnx.Conv, use_bias=False, kernel_init=nnx.initializers.variance_scaling(2.0, "fan_in", "normal")
)
# ResNets are usually trained with this momentum. NNX's default of 0.99 lags behind in short training.
_batch_norm = functools.partial(nnx.BatchNorm, momentum=0.9)


class BasicBlock(nnx.Module):
    """Two 3 x 3 convolutions and a shortcut without parameters.

    The shortcut is strided, and padded with zero channels.
    """

    def __init__(self, in_features: int, out_features: int, *, strides: int, rngs: nnx.Rngs):
        """Builds a map from `[B, H, W, in_features]` to `[B, H/strides, W/strides, out_features]`."""
        self.conv1 = _conv(in_features, out_features, (3, 3), strides=strides, rngs=rngs)
        self.norm1 = _batch_norm(out_features, rngs=rngs)
        self.conv2 = _conv(out_features, out_features, (3, 3), rngs=rngs)
        self.norm2 = _batch_norm(out_features, rngs=rngs)
        self.strides = strides
        self.new_features = out_features - in_features

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the block's output."""
        residual = self.norm2(self.conv2(nnx.relu(self.norm1(self.conv1(x)))))
        shortcut = x[:, :: self.strides, :: self.strides]
        before = self.new_features // 2
        shortcut = jnp.pad(shortcut, ((0, 0), (0, 0), (0, 0), (before, self.new_features - before)))
        return nnx.relu(residual + shortcut)


class ResNet20(nnx.Module):
    """Three stages of three blocks with 16, 32 and 64 channels: 0.27 million parameters."""

    def __init__(self, *, image_shape: tuple[int, int, int], num_classes: int, rngs: nnx.Rngs):
        """Builds the network for images `[B, *image_shape]`."""
        self.conv = _conv(image_shape[-1], 16, (3, 3), rngs=rngs)
        self.norm = _batch_norm(16, rngs=rngs)
        blocks = []
        features = 16
        for out_features, strides in ((16, 1), (32, 2), (64, 2)):
            for index in range(3):
                stride = strides if index == 0 else 1
                blocks.append(BasicBlock(features, out_features, strides=stride, rngs=rngs))
                features = out_features
        self.blocks = nnx.List(blocks)
        self.head = nnx.Linear(features, num_classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns logits `[B, num_classes]`."""
        x = nnx.relu(self.norm(self.conv(x)))
        for block in self.blocks:
            x = block(x)
        return self.head(jnp.mean(x, axis=(1, 2)))
