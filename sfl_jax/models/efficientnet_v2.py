"""EfficientNetV2 (Tan & Le, arXiv 2104.00298): the tables of every variant and the Flax unit of each kind.

Tables, scaling rules and initialisers follow Google's release (google/automl, efficientnetv2/).
"""

import functools
import math
from typing import Any, NamedTuple

import jax
from flax import linen as nn

from sfl_jax.models import layers
from sfl_jax.models.units import OwnUnit

STOCHASTIC_DEPTH = 0.2  # the last block's drop rate; Google's survival_prob of 0.8


class Stage(NamedTuple):
    """Equal blocks in a row. Only the first one has the stride and changes the number of channels."""

    repeats: int
    kernel_size: int
    stride: int
    expansion: int
    in_channels: int
    out_channels: int
    squeeze_excite: float  # ratio of squeeze-excite in an MBConv; 0 makes it a Fused-MBConv


class Variant(NamedTuple):
    """A network: stages before scaling, width and depth factors, dropout rate, image size in evaluation."""

    stages: tuple[Stage, ...]
    width: float
    depth: float
    dropout: float
    eval_size: int
    head_channels: int = 1280


def _stages(*rows: tuple[int, int, int, int, int, float]) -> tuple[Stage, ...]:
    """Rows of (repeats, stride, expansion, in, out, squeeze-excite), all with 3x3 kernels."""
    return tuple(
        Stage(repeats, 3, stride, expansion, in_channels, out_channels, squeeze_excite)
        for repeats, stride, expansion, in_channels, out_channels, squeeze_excite in rows
    )


_BASE = _stages(
    (1, 1, 1, 32, 16, 0), (2, 2, 4, 16, 32, 0), (2, 2, 4, 32, 48, 0),
    (3, 2, 4, 48, 96, 0.25), (5, 1, 6, 96, 112, 0.25), (8, 2, 6, 112, 192, 0.25),
)  # fmt: skip
_S = _stages(
    (2, 1, 1, 24, 24, 0), (4, 2, 4, 24, 48, 0), (4, 2, 4, 48, 64, 0),
    (6, 2, 4, 64, 128, 0.25), (9, 1, 6, 128, 160, 0.25), (15, 2, 6, 160, 256, 0.25),
)  # fmt: skip
_M = _stages(
    (3, 1, 1, 24, 24, 0), (5, 2, 4, 24, 48, 0), (5, 2, 4, 48, 80, 0), (7, 2, 4, 80, 160, 0.25),
    (14, 1, 6, 160, 176, 0.25), (18, 2, 6, 176, 304, 0.25), (5, 1, 6, 304, 512, 0.25),
)  # fmt: skip
_L = _stages(
    (4, 1, 1, 32, 32, 0), (7, 2, 4, 32, 64, 0), (7, 2, 4, 64, 96, 0), (10, 2, 4, 96, 192, 0.25),
    (19, 1, 6, 192, 224, 0.25), (25, 2, 6, 224, 384, 0.25), (7, 1, 6, 384, 640, 0.25),
)  # fmt: skip
_XL = _stages(
    (4, 1, 1, 32, 32, 0), (8, 2, 4, 32, 64, 0), (8, 2, 4, 64, 96, 0), (16, 2, 4, 96, 192, 0.25),
    (24, 1, 6, 192, 256, 0.25), (32, 2, 6, 256, 512, 0.25), (8, 1, 6, 512, 640, 0.25),
)  # fmt: skip
_TINY = _stages((1, 1, 1, 8, 8, 0), (2, 2, 4, 8, 16, 0), (2, 2, 4, 16, 24, 0.25))

VARIANTS = {
    "efficientnetv2-b0": Variant(_BASE, 1.0, 1.0, 0.2, 224),
    "efficientnetv2-b1": Variant(_BASE, 1.0, 1.1, 0.2, 240),
    "efficientnetv2-b2": Variant(_BASE, 1.1, 1.2, 0.3, 260),
    "efficientnetv2-b3": Variant(_BASE, 1.2, 1.4, 0.3, 300),
    "efficientnetv2-s": Variant(_S, 1.0, 1.0, 0.2, 384),
    "efficientnetv2-m": Variant(_M, 1.0, 1.0, 0.3, 480),
    "efficientnetv2-l": Variant(_L, 1.0, 1.0, 0.4, 480),
    "efficientnetv2-xl": Variant(_XL, 1.0, 1.0, 0.4, 512),
    "efficientnetv2-tiny": Variant(_TINY, 1.0, 1.0, 0.2, 32, head_channels=64),  # ours: every kind of unit
}


class Stem(OwnUnit):
    """(B, H, W, in_channels) images -> (B, ceil(H/2), ceil(W/2), features)."""

    in_channels: int
    features: int
    form: str = "product"
    dtype: Any = None
    norm: str = "batch"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        if x.shape[-1] != self.in_channels:
            raise ValueError(f"images have {x.shape[-1]} channels; the stem takes {self.in_channels}")
        x = layers.Conv(self.features, 3, 2, self.form, self.dtype, name="conv")(x)
        return nn.silu(layers.NORM_LAYERS[self.norm](name="bn")(x, train))


class FusedMBConv(OwnUnit):
    """kxk expansion and 1x1 projection, or one kxk convolution if the expansion is 1; with a residual."""

    in_channels: int
    out_channels: int
    expansion: int
    kernel_size: int
    stride: int
    survival: float
    form: str = "product"
    dtype: Any = None
    norm: str = "batch"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        conv = functools.partial(layers.Conv, form=self.form, dtype=self.dtype)
        if self.expansion == 1:
            branch = conv(self.out_channels, self.kernel_size, self.stride, name="project_conv")(x)
            branch = nn.silu(layers.NORM_LAYERS[self.norm](name="project_bn")(branch, train))
        else:
            expanded = self.in_channels * self.expansion
            branch = conv(expanded, self.kernel_size, self.stride, name="expand_conv")(x)
            branch = nn.silu(layers.NORM_LAYERS[self.norm](name="expand_bn")(branch, train))
            branch = conv(self.out_channels, name="project_conv")(branch)
            branch = layers.NORM_LAYERS[self.norm](name="project_bn")(branch, train)
        return _residual(self, x, branch, train)


class MBConv(OwnUnit):
    """1x1 expansion, kxk depthwise, squeeze-excite, 1x1 projection; with a residual."""

    in_channels: int
    out_channels: int
    expansion: int
    kernel_size: int
    stride: int
    squeeze_excite: float
    survival: float
    form: str = "product"
    dtype: Any = None
    norm: str = "batch"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        conv = functools.partial(layers.Conv, form=self.form, dtype=self.dtype)
        branch = conv(self.in_channels * self.expansion, name="expand_conv")(x)
        branch = nn.silu(layers.NORM_LAYERS[self.norm](name="expand_bn")(branch, train))
        depthwise = layers.DepthwiseConv(
            self.kernel_size, self.stride, self.form, self.dtype, name="depthwise_conv"
        )
        branch = nn.silu(layers.NORM_LAYERS[self.norm](name="depthwise_bn")(depthwise(branch), train))
        reduced = max(1, int(self.in_channels * self.squeeze_excite))
        branch = layers.SqueezeExcite(reduced, self.dtype, name="squeeze_excite")(branch)
        branch = conv(self.out_channels, name="project_conv")(branch)
        branch = layers.NORM_LAYERS[self.norm](name="project_bn")(branch, train)
        return _residual(self, x, branch, train)


class Head(OwnUnit):
    """1x1 convolution, batch norm, SiLU and the mean over the image: (B, H, W, C) -> (B, features)."""

    features: int
    form: str = "product"
    dtype: Any = None
    norm: str = "batch"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = layers.Conv(self.features, 1, 1, self.form, self.dtype, name="conv")(x)
        return nn.silu(layers.NORM_LAYERS[self.norm](name="bn")(x, train)).mean((1, 2))


class Classifier(OwnUnit):
    """Dropout and the dense layer: (B, C) -> logits (B, classes)."""

    num_classes: int
    dropout: float
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.Dropout(self.dropout, rng_collection="drop")(x, deterministic=not train)
        return layers.Dense(self.num_classes, dtype=self.dtype, name="dense")(x)


def units(
    name: str,
    num_classes: int,
    in_channels: int,
    form: str = "product",
    dtype: Any = None,
    drop_rate_scale: float = 1.0,
    norm: str = "batch",
) -> tuple[nn.Module, ...]:
    """The units of a variant: stem, blocks, head, classifier. An unknown name raises KeyError.

    `drop_rate_scale` multiplies the published rates of dropout and stochastic depth. norm: "batch" or
    "group".
    """
    variant = VARIANTS[name]
    stages = [_scaled(stage, variant) for stage in variant.stages]
    blocks = sum(stage.repeats for stage in stages)
    chain: list[nn.Module] = [Stem(in_channels, stages[0].in_channels, form, dtype, norm, name="stem")]
    for number, stage in enumerate(stages, start=1):
        for repeat in range(stage.repeats):
            survival = 1 - drop_rate_scale * STOCHASTIC_DEPTH * (len(chain) - 1) / blocks
            name = f"block{number}{_letters(repeat)}"
            chain.append(_block(stage, repeat, survival, form, dtype, norm, name))
    chain.append(Head(_round_filters(variant.head_channels, variant.width), form, dtype, norm, name="head"))
    chain.append(Classifier(num_classes, drop_rate_scale * variant.dropout, dtype, name="classifier"))
    return tuple(chain)


def _residual(block, x, branch, train):
    if block.stride != 1 or block.in_channels != block.out_channels:
        return branch
    return x + layers.DropPath(block.survival, name="drop_path")(branch, train)


def _block(stage, repeat, survival, form, dtype, norm, name):
    in_channels, stride = (stage.in_channels, stage.stride) if repeat == 0 else (stage.out_channels, 1)
    shared = {"expansion": stage.expansion, "kernel_size": stage.kernel_size, "stride": stride,
              "survival": survival, "form": form, "dtype": dtype, "norm": norm, "name": name}  # fmt: skip
    if stage.squeeze_excite:
        return MBConv(in_channels, stage.out_channels, squeeze_excite=stage.squeeze_excite, **shared)
    return FusedMBConv(in_channels, stage.out_channels, **shared)


def _scaled(stage, variant):
    return stage._replace(
        repeats=math.ceil(stage.repeats * variant.depth),
        in_channels=_round_filters(stage.in_channels, variant.width),
        out_channels=_round_filters(stage.out_channels, variant.width),
    )


def _round_filters(filters, width):
    return max(8, int(filters * width + 4) // 8 * 8)


def _letters(repeat):
    """0 -> a, 25 -> z, 26 -> aa: the suffix of a block's name."""
    return (_letters(repeat // 26 - 1) if repeat >= 26 else "") + chr(ord("a") + repeat % 26)
