"""Tiny versions of known networks, each written as one Flax module without units."""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn


def norm(x, train):
    return nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)


class ResidualBlock(nn.Module):
    """Two convolutions, and a third where the shape changes."""

    features: int
    stride: int = 1

    @nn.compact
    def __call__(self, x, train):
        conv = functools.partial(nn.Conv, use_bias=False)
        branch = nn.relu(norm(conv(self.features, (3, 3), self.stride)(x), train))
        branch = norm(conv(self.features, (3, 3))(branch), train)
        if branch.shape != x.shape:
            x = norm(conv(self.features, (1, 1), self.stride)(x), train)
        return nn.relu(x + branch)


class ResNet(nn.Module):
    """ResNet-18: a stem with pooling, and stages of blocks."""

    stages: tuple[int, ...] = (1, 1)

    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(norm(nn.Conv(2, (3, 3), use_bias=False)(x), train))
        x = nn.max_pool(x, (2, 2), (2, 2))
        for stage, blocks in enumerate(self.stages):
            for block in range(blocks):
                x = ResidualBlock(2 << stage, 2 if stage and not block else 1)(x, train)
        return nn.Dense(3)(x.mean((1, 2)))


class EncoderBlock(nn.Module):
    """Attention and two dense layers."""

    @nn.compact
    def __call__(self, x, train):
        y = nn.LayerNorm()(x)
        x = x + nn.Dropout(0.5, deterministic=not train)(nn.MultiHeadDotProductAttention(2)(y, y))
        return x + nn.Dense(4)(nn.gelu(nn.Dense(8)(nn.LayerNorm()(x))))


class Encoder(nn.Module):
    """Positions and a row of blocks."""

    blocks: int

    @nn.compact
    def __call__(self, x, train):
        x = x + self.param("positions", nn.initializers.normal(0.5), (1, *x.shape[1:]))
        for _ in range(self.blocks):
            x = EncoderBlock()(x, train)
        return nn.LayerNorm()(x)


class VisionTransformer(nn.Module):
    """Patches, a class token, an encoder and a classifier."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(4, (4, 4), strides=4, padding="VALID")(x)
        x = x.reshape(len(x), -1, 4)
        token = self.param("token", nn.initializers.normal(0.5), (1, 1, 4))
        x = jnp.concatenate([jnp.broadcast_to(token, (len(x), 1, 4)), x], 1)
        return nn.Dense(3)(Encoder(2)(x, train)[:, 0])


class DoubleConv(nn.Module):
    """Two convolutions."""

    features: int

    @nn.compact
    def __call__(self, x, train):
        for _ in range(2):
            x = nn.relu(norm(nn.Conv(self.features, (3, 3))(x), train))
        return x


class UNet(nn.Module):
    """Down twice and up twice, with a skip on each level."""

    @nn.compact
    def __call__(self, x, train):
        skips = []
        for features in (2, 3):
            x = DoubleConv(features)(x, train)
            skips.append(x)
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = DoubleConv(4)(x, train)
        for skip in reversed(skips):
            x = nn.ConvTranspose(skip.shape[-1], (2, 2), strides=(2, 2))(x)
            x = DoubleConv(2)(jnp.concatenate([x, skip], -1), train)
        return nn.Conv(1, (1, 1))(x)


class SqueezeExcite(nn.Module):
    """A gate for each channel."""

    @nn.compact
    def __call__(self, x):
        gate = nn.silu(nn.Conv(1, (1, 1))(x.mean((1, 2), keepdims=True)))
        return x * nn.sigmoid(nn.Conv(x.shape[-1], (1, 1))(gate))


class MBConv(nn.Module):
    """An inverted bottleneck, fused or not."""

    features: int
    stride: int
    is_fused: bool

    @nn.compact
    def __call__(self, x, train):
        wide, conv = 2 * x.shape[-1], functools.partial(nn.Conv, use_bias=False)
        if self.is_fused:
            branch = nn.silu(norm(conv(wide, (3, 3), self.stride)(x), train))
        else:
            branch = nn.silu(norm(conv(wide, (1, 1))(x), train))
            branch = conv(wide, (3, 3), self.stride, feature_group_count=wide)(branch)
            branch = SqueezeExcite()(nn.silu(norm(branch, train)))
        branch = norm(conv(self.features, (1, 1))(branch), train)
        return x + branch if x.shape == branch.shape else branch


class EfficientNetV2(nn.Module):
    """A stem, blocks of both kinds, a head and a classifier."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.silu(norm(nn.Conv(2, (3, 3), 2, use_bias=False)(x), train))
        for features, stride, is_fused in ((2, 1, True), (3, 2, True), (4, 1, False), (4, 1, False)):
            x = MBConv(features, stride, is_fused)(x, train)
        x = nn.silu(norm(nn.Conv(5, (1, 1), use_bias=False)(x), train))
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=not train)(x.mean((1, 2))))


class Tied(nn.Module):
    """A language model that uses its table of words at both ends, with two other layers between."""

    is_tied: bool = True

    @nn.compact
    def __call__(self, words):
        table = nn.Embed(7, 4)
        x = nn.relu(nn.Dense(4)(table(words)))
        x = nn.Dense(4, name="last")(x)
        x = table.attend(x) if self.is_tied else x
        return nn.Dense(2, name="head")(x)


class SharedMask(nn.Module):
    """Drops at two places, by one shared mask or by two."""

    is_shared: bool

    @nn.compact
    def __call__(self, x, train):
        masks = (
            [jax.random.bernoulli(self.make_rng("dropout"), 0.5, x.shape) for _ in range(2)] if train else []
        )
        for number in range(2):
            x = nn.Dense(x.shape[-1])(x)
            x = jnp.where(masks[0 if self.is_shared else number], x, 0) if train else x
        return nn.Dense(2)(x)


class Remembering(nn.Module):
    """Two layers that each store the mean of their outputs, which nothing reads; and two outputs."""

    @nn.compact
    def __call__(self, x, train):
        for number in range(2):
            x = nn.Dense(3)(x)
            mean = self.variable("seen", f"mean{number}", jnp.zeros, 3)
            if train:
                mean.value = x.mean(0)
        return {"logits": x, "class": x.argmax(1)}


class Averaging(nn.Module):
    """Two products without parameters, and a mean."""

    def __call__(self, x):
        return (x @ jnp.ones((3, 3))).mean(1, keepdims=True) @ jnp.ones((1, 2))
