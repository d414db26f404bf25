"""A small transformer on the patches of digits, in PyTorch and in JAX, with the same weights.

PEFT adapts the transformer in PyTorch. Coefficients are learned on the transformer in JAX.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

_WIDTH, _HEADS, _BLOCKS = 32, 4, 3


def patches(images: np.ndarray) -> np.ndarray:
    """Returns images as 16 patches of 2 x 2 pixels between -1 and 1, float32 `[N, 16, 4]`."""
    split = images.reshape(-1, 4, 2, 4, 2).transpose(0, 1, 3, 2, 4).reshape(-1, 16, 4)
    return split.astype(np.float32) / 127.5 - 1


def network(torch: Any) -> Any:
    """Returns a transformer of PyTorch with new weights, which maps patches `[B, 16, 4]` to logits `[B, 10]`."""
    nn = torch.nn

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in ("query", "key", "value", "project"):
                setattr(self, name, nn.Linear(_WIDTH, _WIDTH))
            self.up, self.down = nn.Linear(_WIDTH, 2 * _WIDTH), nn.Linear(2 * _WIDTH, _WIDTH)
            self.norm1, self.norm2 = nn.LayerNorm(_WIDTH), nn.LayerNorm(_WIDTH)

        def forward(self, x: Any) -> Any:
            y = self.norm1(x)
            heads = (
                layer(y).unflatten(-1, (_HEADS, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
            )
            x = x + self.project(nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))
            return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))

    class Transformer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Linear(4, _WIDTH), nn.Linear(_WIDTH, 10)
            self.position = nn.Parameter(0.1 * torch.randn(16, _WIDTH))
            self.blocks = nn.ModuleList(Block() for _ in range(_BLOCKS))
            self.norm = nn.LayerNorm(_WIDTH)

        def forward(self, x: Any) -> Any:
            x = self.embed(x.to(self.position.dtype)) + self.position
            for block in self.blocks:
                x = block(x)
            return self.head(self.norm(x).mean(1))

    return Transformer()


def outputs(weights: Mapping[str, jax.Array], x: jax.Array) -> jax.Array:
    """Returns the logits `[B, 10]` of patches `[B, 16, 4]`: `network` in JAX, on the weights of its state dict."""

    def linear(name: str, x: jax.Array) -> jax.Array:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"][*[None] * (x.ndim - 1)]

    def norm(name: str, x: jax.Array) -> jax.Array:
        standard = jax.nn.standardize(x, axis=-1, epsilon=1e-5)
        return standard * weights[f"{name}.weight"][None, None] + weights[f"{name}.bias"][None, None]

    x = linear("embed", x) + weights["position"][None]
    for block in (f"blocks.{index}" for index in range(_BLOCKS)):
        y = norm(f"{block}.norm1", x)
        query, key, value = (
            linear(f"{block}.{name}", y).reshape(*y.shape[:2], _HEADS, -1) for name in ("query", "key", "value")
        )
        attended = jax.nn.dot_product_attention(query, key, value)
        x = x + linear(f"{block}.project", attended.reshape(x.shape))
        hidden = linear(f"{block}.up", norm(f"{block}.norm2", x))
        x = x + linear(f"{block}.down", jax.nn.gelu(hidden, approximate=False))
    return linear("head", norm("norm", x).mean(1))
