"""The small CNN of McMahan et al. (arXiv 1602.05629): 1,663,370 parameters on MNIST of 28x28."""

from typing import Any

import jax
from flax import linen as nn

from sfl_jax.models.mlp import INITIALISER, Dense

FILTERS, WIDTH = (32, 64), 512


class Stage(nn.Module):
    """A 5x5 convolution, ReLU and 2x2 max pooling: (B, H, W, C) -> (B, H/2, W/2, features)."""

    features: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = nn.Conv(self.features, (5, 5), dtype=self.dtype, kernel_init=INITIALISER, name="conv")
        return nn.max_pool(nn.relu(conv(x)), (2, 2), strides=(2, 2))


def units(
    name: str, num_classes: int, in_channels: int, form: str, dtype: Any, drop_rate_scale: float
) -> tuple[nn.Module, ...]:
    """Two stages, a dense layer and the classifier."""
    stages = [Stage(features, dtype, name=f"stage{n}") for n, features in enumerate(FILTERS, 1)]
    dense = Dense(WIDTH, dtype=dtype, name="dense")
    return *stages, dense, Dense(num_classes, is_last=True, dtype=dtype, name="classifier")
