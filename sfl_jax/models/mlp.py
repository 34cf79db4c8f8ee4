"""The two-layer perceptron of McMahan et al. (arXiv 1602.05629, "2NN"): 199,210 parameters on MNIST."""

from typing import Any

import jax
from flax import linen as nn

WIDTH = 200
INITIALISER = nn.initializers.glorot_uniform()


class Dense(nn.Module):
    """A dense layer on flat samples: (B, ...) -> (B, features), with ReLU unless it is the last."""

    features: int
    is_last: bool = False
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        layer = nn.Dense(self.features, dtype=self.dtype, kernel_init=INITIALISER, name="dense")
        x = layer(x.reshape(len(x), -1))
        return x if self.is_last else nn.relu(x)


def units(
    name: str, num_classes: int, in_channels: int, form: str, dtype: Any, drop_rate_scale: float
) -> tuple[nn.Module, ...]:
    """Two hidden layers and the classifier."""
    hidden = [Dense(WIDTH, dtype=dtype, name=f"hidden{number}") for number in (1, 2)]
    return *hidden, Dense(num_classes, is_last=True, dtype=dtype, name="classifier")
