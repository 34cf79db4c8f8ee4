"""ResNet-18 (He et al., arXiv 1512.03385) in its form for small images: a 3x3 stem without pooling after it.

Shortcuts have projections where the shape changes, as in the networks for ImageNet. 11,173,962 parameters for
10 classes of colour images.
"""

import functools
from typing import Any

import jax
from flax import linen as nn

from sfl_jax.models.layers import GroupNorm

STAGES = ((64, 1), (128, 2), (256, 2), (512, 2))  # features, stride of the first block
BLOCKS = 2  # per stage
HE = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
OF_CLASSIFIER = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class Stem(nn.Module):
    """3x3 convolution, batch norm, ReLU."""

    features: int
    dtype: Any = None
    norm: str = "batch"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = _conv(self.features, 3, 1, self.dtype, "conv")(x)
        return nn.relu(_norm(self.norm, train, self.dtype, "bn")(x))


class Block(nn.Module):
    """Two 3x3 convolutions with batch norm, and a shortcut."""

    features: int
    stride: int = 1
    dtype: Any = None
    norm: str = "batch"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        conv = functools.partial(_conv, self.features, dtype=self.dtype)
        norm = functools.partial(_norm, self.norm, train, self.dtype)
        y = nn.relu(norm("bn1")(conv(3, self.stride, name="conv1")(x)))
        y = norm("bn2")(conv(3, 1, name="conv2")(y))
        if x.shape != y.shape:
            x = norm("shortcut_bn")(conv(1, self.stride, name="shortcut_conv")(x))
        return nn.relu(x + y)


class Pool(nn.Module):
    """The mean over the image: (B, H, W, C) -> (B, C)."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return x.mean((1, 2))


class Classifier(nn.Module):
    """The dense layer: (B, C) -> logits (B, classes)."""

    num_classes: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(self.num_classes, dtype=self.dtype, kernel_init=OF_CLASSIFIER, name="dense")(x)


def units(
    name: str,
    num_classes: int,
    in_channels: int,
    form: str,
    dtype: Any,
    drop_rate_scale: float,
    norm: str = "batch",
) -> tuple[nn.Module, ...]:
    """Stem, eight blocks, pooling and the classifier."""
    chain: list[nn.Module] = [Stem(STAGES[0][0], dtype, norm, name="stem")]
    for stage, (features, stride) in enumerate(STAGES, 1):
        for repeat in range(BLOCKS):
            step = stride if repeat == 0 else 1
            chain.append(Block(features, step, dtype, norm, name=f"block{stage}{'ab'[repeat]}"))
    return *chain, Pool(name="pool"), Classifier(num_classes, dtype, name="classifier")


def _conv(features, size, stride, dtype, name):
    return nn.Conv(
        features, (size, size), strides=(stride, stride), padding=size // 2, use_bias=False, dtype=dtype,
        kernel_init=HE, name=name,
    )  # fmt: skip


def _norm(kind, train, dtype, name):
    if kind == "group":
        return GroupNorm(epsilon=1e-5, name=name)
    return nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=dtype, name=name)
