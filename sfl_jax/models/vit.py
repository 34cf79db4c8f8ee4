"""A small vision transformer: DeiT-Ti (Touvron et al., arXiv 2012.12877) with patches for small images.

Width 192, depth 12, 3 heads, a class token. Patches are 4x4 in images up to 64x64, 16x16 in larger ones. At
224x224 with 1000 classes it has the 5,717,416 parameters of DeiT-Ti.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from sfl_jax.errors import BadInput

WIDTH, DEPTH, HEADS, EXPANSION = 192, 12, 3, 4
SMALL_IMAGE, SMALL_PATCH, PATCH = 64, 4, 16
EPSILON = 1e-6
INITIALISER = nn.initializers.truncated_normal(0.02)


class Embedding(nn.Module):
    """Patches, a class token and positions: (B, H, W, C) -> (B, 1 + patches, width)."""

    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        side = SMALL_PATCH if max(x.shape[1:3]) <= SMALL_IMAGE else PATCH
        batch, height, width, channels = x.shape
        if height % side or width % side:
            place = f"image_size={height}" if height == width else f"images of {height}x{width}"
            raise BadInput(f"{place}: must be a multiple of {side}, the size of a patch of vit-tiny")
        rows, columns = height // side, width // side
        x = x[:, : rows * side, : columns * side].reshape(batch, rows, side, columns, side, channels)
        x = x.swapaxes(2, 3).reshape(batch, rows * columns, side * side * channels)
        x = nn.Dense(WIDTH, dtype=self.dtype, kernel_init=INITIALISER, name="patches")(x)
        token = self.param("token", INITIALISER, (1, 1, WIDTH))
        positions = self.param("positions", INITIALISER, (1, 1 + rows * columns, WIDTH))
        tokens = jnp.broadcast_to(token, (batch, 1, WIDTH)).astype(x.dtype)
        return jnp.concatenate([tokens, x], axis=1) + positions.astype(x.dtype)


class Block(nn.Module):
    """Attention and a perceptron, each after a layer norm and with a residual."""

    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        attention = nn.MultiHeadDotProductAttention(
            HEADS, dtype=self.dtype, kernel_init=INITIALISER, name="attention"
        )
        x = x + attention(nn.LayerNorm(epsilon=EPSILON, dtype=self.dtype, name="norm1")(x))
        y = nn.LayerNorm(epsilon=EPSILON, dtype=self.dtype, name="norm2")(x)
        y = nn.Dense(EXPANSION * WIDTH, dtype=self.dtype, kernel_init=INITIALISER, name="expand")(y)
        y = nn.gelu(y, approximate=False)
        return x + nn.Dense(WIDTH, dtype=self.dtype, kernel_init=INITIALISER, name="project")(y)


class Token(nn.Module):
    """Layer norm of the class token: (B, tokens, width) -> (B, width)."""

    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.LayerNorm(epsilon=EPSILON, dtype=self.dtype, name="norm")(x[:, 0])


class Classifier(nn.Module):
    """The dense layer: (B, width) -> logits (B, classes)."""

    num_classes: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(self.num_classes, dtype=self.dtype, kernel_init=INITIALISER, name="dense")(x)


def units(
    name: str, num_classes: int, in_channels: int, form: str, dtype: Any, drop_rate_scale: float
) -> tuple[nn.Module, ...]:
    """Embedding, twelve blocks, the class token and the classifier."""
    blocks = [Block(dtype, name=f"block{number}") for number in range(1, DEPTH + 1)]
    head = Token(dtype, name="token"), Classifier(num_classes, dtype, name="classifier")
    return Embedding(dtype, name="embedding"), *blocks, *head
