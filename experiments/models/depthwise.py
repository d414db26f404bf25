"""A depthwise convolution that is fast on a CPU too."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

# The most elements in the images of a chunk, so that they fit a core's cache. An image is never divided.
_CHUNK = 2**16


class DepthwiseConv(nnx.Module):
    """A 3 x 3 convolution of each channel by itself, without a bias."""

    def __init__(self, features: int, *, strides: int, rngs: nnx.Rngs):
        """Builds a map from `[B, H, W, features]` to `[B, ceil(H/strides), ceil(W/strides), features]`.

        The images are padded with zeros.
        """
        initializer = nnx.initializers.variance_scaling(2.0, "fan_in", "normal")
        self.kernel = nnx.Param(initializer(rngs.params(), (3, 3, 1, features)))
        self.strides = strides

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the convolution's output."""
        return depthwise_conv(x, self.kernel[...], self.strides)


def depthwise_conv(x: jax.Array, kernel: jax.Array, strides: int) -> jax.Array:
    """Convolves each channel by itself, with a border of 1 zero.

    On an accelerator this is one grouped convolution. XLA:CPU runs a grouped convolution 10 to 40 times slower than the
    same sum of nine shifted images. So a program that is lowered for a CPU holds that sum. The derivative of the sum is
    written so that the gradient is fast on a CPU too.

    Args:
        x: `[B, H, W, C]`.
        kernel: `[3, 3, 1, C]`.
        strides: the stride of both axes.

    Returns:
        `[B, ceil(H / strides), ceil(W / strides), C]`.
    """
    default = functools.partial(_grouped, strides=strides)
    return jax.lax.platform_dependent(x, kernel, cpu=lambda x, kernel: _on_cpu(x, kernel, strides), default=default)


def _grouped(x: jax.Array, kernel: jax.Array, *, strides: int) -> jax.Array:
    """Returns the convolution with one group for each channel."""
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (strides, strides),
        ((1, 1), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _on_cpu(x: jax.Array, kernel: jax.Array, strides: int) -> jax.Array:
    """Returns the sum of nine shifted images. Its gradient is fast."""
    return _shifted(x, kernel, strides=strides)


@_on_cpu.defjvp
def _on_cpu_jvp(
    strides: int, primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Returns the derivative, in a form whose transpose is fast. The transpose is the gradient."""
    x, kernel = primals
    of_x, of_kernel = _shifted(tangents[0], kernel, strides=strides), _in_chunks(x, tangents[1], strides=strides)
    return _on_cpu(x, kernel, strides), of_x + of_kernel


def _shifted(x: jax.Array, kernel: jax.Array, *, strides: int) -> jax.Array:
    """Returns the sum of nine shifted images, each times its weights."""
    height, width = x.shape[1:3]
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    terms = [
        padded[:, row : row + height : strides, column : column + width : strides] * kernel[row, column][None, None]
        for row in range(3)
        for column in range(3)
    ]
    return functools.reduce(jnp.add, terms)


def _in_chunks(x: jax.Array, kernel: jax.Array, *, strides: int) -> jax.Array:
    """Computes `_shifted` of a few images at a time, so that the gradient for `kernel` reads them from the cache."""
    batch = len(x)
    size = max(1, min(batch, _CHUNK // (x.size // batch)))
    size = next(divisor for divisor in range(size, 0, -1) if batch % divisor == 0)

    # Without the checkpoint, all nine shifted images would be stored for the gradient.
    @jax.checkpoint
    def chunk(index: jax.Array, kernel: jax.Array) -> jax.Array:
        return _shifted(jax.lax.dynamic_slice_in_dim(x, index * size, size), kernel, strides=strides)

    chunks = jax.lax.map(lambda index: chunk(index, kernel), jnp.arange(batch // size))
    return chunks.reshape(batch, *chunks.shape[2:])
