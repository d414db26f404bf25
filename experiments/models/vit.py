"""A Vision Transformer (Dosovitskiy et al., 2021, https://arxiv.org/abs/2010.11929)."""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

Pooling = Literal["mean", "token"]
Positions = Literal["learned", "sincos"]


class EncoderBlock(nnx.Module):
    """Self-attention and an MLP, each behind a LayerNorm and added to its input."""

    def __init__(self, *, width: int, heads: int, mlp_width: int, rngs: nnx.Rngs):
        """Builds `[B, N, width]` to the same."""
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
            num_classes: of the labels.
            rngs: of the initialisation.
            patch_size: height and width of a patch, in pixels; divides the image's.
            depth: encoder blocks.
            width: features of a patch.
            heads: of the attention; divides the width.
            mlp_width: features within the MLP.
            pooling: of the features for the head: their mean over the patches, or a class token's.
            positions: what is added to the patches' features: learned, or fixed sines and cosines.

        Raises:
            ValueError: sizes that do not divide one another, or an unknown pooling or kind of positions.
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
    """Sines and cosines of row and column at geometric frequencies, `[1, rows * columns, width]` (Vaswani et al.)."""
    frequencies = 1e4 ** -(np.arange(width // 4) / (width // 4))
    grid = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), axis=-1).reshape(-1, 2, 1)
    angles = grid * frequencies
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1).reshape(1, -1, width).astype(np.float32)
