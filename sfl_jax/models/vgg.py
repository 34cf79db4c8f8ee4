"""VGG-11 (Simonyan & Zisserman, arXiv 1409.1556) with batch norm and one dense layer, for small images.

9,231,114 parameters for 10 classes of colour images.
"""

import functools
from typing import Any

import jax
from flax import linen as nn

from sfl_jax.models.layers import GroupNorm
from sfl_jax.models.resnet import HE, Classifier, Pool

# Features of each convolution, and whether 2x2 max pooling follows.
LAYERS = (
    (64, True), (128, True), (256, False), (256, True), (512, False), (512, True), (512, False), (512, True),
)  # fmt: skip


class Layer(nn.Module):
    """3x3 convolution, batch norm, ReLU, and 2x2 max pooling if `is_pooled` and the image is large enough."""

    features: int
    is_pooled: bool
    dtype: Any = None
    norm: str = "batch"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.Conv(self.features, (3, 3), dtype=self.dtype, kernel_init=HE, name="conv")(x)
        norm = functools.partial(nn.BatchNorm, not train, momentum=0.9, dtype=self.dtype)
        norm = GroupNorm if self.norm == "group" else norm
        x = nn.relu(norm(epsilon=1e-5, name="bn")(x))
        return nn.max_pool(x, (2, 2), strides=(2, 2)) if self.is_pooled and min(x.shape[1:3]) > 1 else x


def units(
    name: str,
    num_classes: int,
    in_channels: int,
    form: str,
    dtype: Any,
    drop_rate_scale: float,
    norm: str = "batch",
) -> tuple[nn.Module, ...]:
    """Eight convolutional layers, pooling and the classifier."""
    layers = [Layer(*layer, dtype, norm, name=f"conv{number}") for number, layer in enumerate(LAYERS, 1)]
    return *layers, Pool(name="pool"), Classifier(num_classes, dtype, name="classifier")
