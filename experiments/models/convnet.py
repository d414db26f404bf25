"""A small convolutional network with BatchNorm, for the embedded digits."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

_conv = functools.partial(nnx.Conv, kernel_size=(3, 3), use_bias=False)
_batch_norm = functools.partial(nnx.BatchNorm, momentum=0.9)


class ConvNet(nnx.Module):
    """Two convolutions with BatchNorm, average pooling, a linear head: 19,562 parameters for the digits."""

    def __init__(self, *, image_shape: tuple[int, int, int], num_classes: int, rngs: nnx.Rngs):
        """Builds the network for images `[B, *image_shape]`."""
        self.conv1 = _conv(image_shape[-1], 32, rngs=rngs)
        self.norm1 = _batch_norm(32, rngs=rngs)
        self.conv2 = _conv(32, 64, strides=2, rngs=rngs)
        self.norm2 = _batch_norm(64, rngs=rngs)
        self.head = nnx.Linear(64, num_classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns logits `[B, num_classes]`."""
        x = nnx.relu(self.norm1(self.conv1(x)))
        x = nnx.relu(self.norm2(self.conv2(x)))
        return self.head(jnp.mean(x, axis=(1, 2)))
