"""A Vision Transformer (Dosovitskiy et al., 2021, https://arxiv.org/abs/2010.11929)."""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

Pooling = Literal["mean", "token"]
Positions = Literal["learned", "sincos"]


class EncoderBlock(nnx.Module):
    """Self-attention and an MLP. Each comes after a LayerNorm, and is added to its input."""

    def __init__(self, *, width: int, heads: int, mlp_width: int, rngs: nnx.Rngs):
        """Builds a map from `[B, N, width]` to `[B, N, width]`."""
        self.norm1 = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(heads, width, decode=False, rngs=rngs)
        self.norm2 = nnx.LayerNorm(width, rngs=rngs)
        self.linear1 = nnx.Linear(width, mlp_width, rngs=rngs)
        self.linear2 = nnx.Linear(mlp_width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the block's output."""
        x = x + self.attention(self.norm1(x))
        return x + self.linear2(nnx.gelu(self.linear1(self.norm2(x))))


class ViT(nnx.Module):
    """Patches, positions, encoder blocks, a LayerNorm, pooling and a linear head.

    3,610,570 parameters with 64 x 64 pixels, 10 classes and the default sizes.
    """

    def __init__(
        self,
        *,
        image_shape: tuple[int, int, int],
        num_classes: int,
        rngs: nnx.Rngs,
        patch_size: int = 8,
        depth: int = 8,
        width: int = 192,
        heads: int = 3,
        mlp_width: int = 768,
        pooling: Pooling = "mean",
        positions: Positions = "learned",
    ):
        """Builds the network for images `[B, *image_shape]`.

        Args:
            image_shape: height, width and channels.
            num_classes: the number of classes.
            rngs: the random numbers of the initialisation.
            patch_size: height and width of a patch, in pixels. It divides the height and the width of the image.
            depth: the number of encoder blocks.
            width: the number of features of a patch.
            heads: the number of attention heads. It divides the width.
            mlp_width: the number of features within the MLP.
            pooling: the features for the head. They are the mean over the patches, or those of a class token.
            positions: what is added to the features of the patches: learned numbers, or fixed sines and cosines.

        Raises:
            ValueError: if sizes do not divide one another, or if `pooling` or `positions` is unknown.
        """
        *size, channels = image_shape
        for name, value, expected in (("pooling", pooling, Pooling), ("positions", positions, Positions)):
            if value not in get_args(expected):
                raise ValueError(f"{name} is {value!r}; expected one of {get_args(expected)}")
        if any(pixels % patch_size for pixels in size):
            raise ValueError(f"patch_size is {patch_size}; expected a divisor of the image's size {tuple(size)}")
        if width % heads or (positions == "sincos" and width % 4):
            raise ValueError(f"width is {width}; expected a multiple of heads ({heads}), and of 4 for sincos positions")
        rows, columns = (pixels // patch_size for pixels in size)
        patch = (patch_size, patch_size)
        self.patches = nnx.Conv(channels, width, patch, strides=patch, padding="VALID", rngs=rngs)
        normal = nnx.initializers.normal(0.02)
        if positions == "learned":
            self.positions = nnx.Param(normal(rngs.params(), (1, rows * columns, width)))
        self.grid = (rows, columns)
        if pooling == "token":
            self.token = nnx.Param(jnp.zeros((1, 1, width)))
        self.blocks = nnx.List(
            EncoderBlock(width=width, heads=heads, mlp_width=mlp_width, rngs=rngs) for _ in range(depth)
        )
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, num_classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns logits `[B, num_classes]`."""
        x = self.patches(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        x = x + (self.positions[...] if hasattr(self, "positions") else _sincos(*self.grid, x.shape[-1]))
        has_token = hasattr(self, "token")
        if has_token:
            x = jnp.concatenate([jnp.broadcast_to(self.token[...], (len(x), 1, x.shape[-1])), x], axis=1)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.head(x[:, 0] if has_token else jnp.mean(x, axis=1))


def _sincos(rows: int, columns: int, width: int) -> np.ndarray:
    """Returns sines and cosines of row and column, `[1, rows * columns, width]` (Vaswani et al., 2017)."""
    frequencies = 1e4 ** -(np.arange(width // 4) / (width // 4))
    grid = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), axis=-1).reshape(-1, 2, 1)
    angles = grid * frequencies
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1).reshape(1, -1, width).astype(np.float32)
