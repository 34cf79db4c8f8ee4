"""Convolutions, batch norm and squeeze-excite in forms that stay fast when clients are vmapped.

`vmap` over per-client convolution weights makes grouped convolutions, which XLA runs in naive loops on CPU
and slowly on GPU. So each convolution has three forms with equal results:

- `product`: matrix products and shifted sums, see `products`; a client axis becomes a batch axis;
- `conv`: `lax.conv_general_dilated`, the reference, from which costs are traced;
- `alone`: `product` for a device that computes one client at a time, see `convolutions`.

Images are (B, H, W, C); kernels (kh, kw, C_in, C_out), depthwise ones (kh, kw, 1, C).
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from jax import core, lax

from sfl_jax import registry
from sfl_jax.models import convolutions, products

BN_MOMENTUM = 0.9
BN_EPSILON = 1e-3
GROUP = 8  # channels of a group of `GroupNorm`, or fewer where they do not divide
FORMS = registry.LAYER_FORMS
ALONE = "alone"  # "product" for one client at a time


def kernel_init(key: jax.Array, shape: tuple[int, ...], dtype: Any = np.float32) -> Any:
    """EfficientNet's convolution initialiser: normal(0, sqrt(2 / (kh * kw * C_out))); a matrix is a 1x1."""
    fan_out = math.prod(shape) // shape[-2]
    return (math.sqrt(2 / fan_out) * _draw("normal", key, shape)).astype(dtype)


def depthwise_init(key: jax.Array, shape: tuple[int, ...], dtype: Any = np.float32) -> Any:
    """EfficientNet's depthwise initialiser: normal(0, sqrt(2 / (kh * kw)))."""
    return (math.sqrt(2 / (shape[0] * shape[1])) * _draw("normal", key, shape)).astype(dtype)


def dense_init(key: jax.Array, shape: tuple[int, ...], dtype: Any = np.float32) -> Any:
    """EfficientNet's classifier initialiser: uniform(+-1 / sqrt(classes))."""
    return ((2 * _draw("uniform", key, shape) - 1) / math.sqrt(shape[-1])).astype(dtype)


def zeros(_: jax.Array | None, shape: tuple[int, ...], dtype: Any = np.float32) -> Any:
    """Initialiser of biases and running means."""
    return np.zeros(shape, dtype)


def ones(_: jax.Array | None, shape: tuple[int, ...], dtype: Any = np.float32) -> Any:
    """Initialiser of batch norm's scales and running variances."""
    return np.ones(shape, dtype)


INITIALISERS = {  # by the variable's name
    "kernel": kernel_init, "depthwise_kernel": depthwise_init, "dense_kernel": dense_init,
    "scale": ones, "bias": zeros, "mean": zeros, "var": ones,
}  # fmt: skip


def _draw(distribution, key, shape):
    """Draws with NumPy from a concrete key: compiling jax.random for every shape takes half a minute."""
    if isinstance(key, core.Tracer):
        return getattr(jax.random, distribution)(key, shape)
    generator = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    return (generator.standard_normal if distribution == "normal" else generator.random)(shape, np.float32)


class Conv(nn.Module):
    """SAME convolution without bias: (B, H, W, C) -> (B, ceil(H / stride), ceil(W / stride), features)."""

    features: int
    kernel_size: int = 1
    stride: int = 1
    form: str = "product"
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
        x, kernel = promote_dtype(x, self.param("kernel", kernel_init, shape), dtype=self.dtype)
        if self.form == "conv":
            return _lax_conv(x, kernel, self.stride)
        convolution = convolutions.convolution if self.form == ALONE else products.convolution
        return convolution(x, kernel, self.stride)


class DepthwiseConv(nn.Module):
    """Depthwise convolution without bias, SAME padding: every channel has its own kernel."""

    kernel_size: int = 3
    stride: int = 1
    form: str = "product"
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        shape = (self.kernel_size, self.kernel_size, 1, channels)
        x, kernel = promote_dtype(x, self.param("depthwise_kernel", depthwise_init, shape), dtype=self.dtype)
        if self.form == "conv":
            return _lax_conv(x, kernel, self.stride, groups=channels)
        return products.depthwise(x, kernel, self.stride)


class BatchNorm(nn.Module):
    """Batch norm over all axes but the last. Biased batch variance; statistics in float32 or wider."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        channels = (x.shape[-1],)
        scale = self.param("scale", ones, channels)
        bias = self.param("bias", zeros, channels)
        running_mean = self.variable("batch_stats", "mean", zeros, None, channels)
        running_var = self.variable("batch_stats", "var", ones, None, channels)
        rows = x.reshape(-1, x.shape[-1])  # XLA:CPU sums faster over one axis than over three
        if train:
            wide = rows.astype(jnp.promote_types(x.dtype, jnp.float32))
            mean = wide.mean(0)
            var = jnp.maximum((wide * wide).mean(0) - mean * mean, 0)
            if not self.is_initializing():
                running_mean.value = BN_MOMENTUM * running_mean.value + (1 - BN_MOMENTUM) * mean
                running_var.value = BN_MOMENTUM * running_var.value + (1 - BN_MOMENTUM) * var
        else:
            mean, var = running_mean.value, running_var.value
        multiplier = scale * lax.rsqrt(var + BN_EPSILON)
        return (rows * multiplier + (bias - mean * multiplier)).astype(x.dtype).reshape(x.shape)


class GroupNorm(nn.Module):
    """Group norm (Wu and He, arXiv 1803.08494) of one image, over groups of 8 channels; it keeps no
    statistics.

    Its parameters are those of `BatchNorm`.
    """

    epsilon: float = BN_EPSILON

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        channels = x.shape[-1]
        scale, bias = (
            self.param("scale", ones, (channels,)),
            self.param("bias", zeros, (channels,)),
        )
        pixels = x.reshape(len(x), -1, channels)
        wide = pixels.astype(jnp.promote_types(x.dtype, jnp.float32))
        size = math.gcd(channels, GROUP)
        mean, square = (
            jnp.repeat(of.mean(1).reshape(len(x), -1, size).mean(-1), size, axis=1)[:, None]
            for of in (wide, wide * wide)
        )
        multiplier = scale * lax.rsqrt(jnp.maximum(square - mean * mean, 0) + self.epsilon)
        return (pixels * multiplier + (bias - mean * multiplier)).astype(x.dtype).reshape(x.shape)


NORM_LAYERS = {"batch": BatchNorm, "group": GroupNorm}


class SqueezeExcite(nn.Module):
    """Scales every channel by a gate in 0..1: mean over the image, dense, SiLU, dense, sigmoid."""

    reduced: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        gate = x.mean((1, 2))
        gate = nn.silu(Dense(self.reduced, "kernel", self.dtype, name="reduce")(gate))
        gate = nn.sigmoid(Dense(channels, "kernel", self.dtype, name="expand")(gate))
        return x * gate[:, None, None, :]


class Dense(nn.Module):
    """Affine map of the last axis. `kernel` is the kernel's name, which selects its initialiser."""

    features: int
    kernel: str = "dense_kernel"
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param(self.kernel, INITIALISERS[self.kernel], (x.shape[-1], self.features))
        bias = self.param("bias", zeros, (self.features,))
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        return x @ kernel + bias


class DropPath(nn.Module):
    """Stochastic depth: drops the whole branch of a sample, and scales the other samples by 1 / survival.

    A chain may give the factors, which `drop_path_factors` draws for many blocks at once.
    """

    survival: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        if not train or self.survival == 1:
            return x
        given = self.has_variable("factors", "samples")
        factors = self.get_variable("factors", "samples") if given else self.draw(len(x))
        return x * factors.astype(x.dtype)[:, None, None, None]

    def draw(self, samples: int) -> jax.Array:
        """(samples,): 0 for a dropped branch, 1 / survival for the others."""
        return (jax.random.uniform(self.make_rng("drop"), (samples,)) < self.survival) / self.survival


class _Block(nn.Module):
    """A block with the same module names as a real one, so that it draws the same numbers."""

    survival: Any
    samples: int

    @nn.compact
    def __call__(self):
        return DropPath(self.survival, name="drop_path").draw(self.samples)


def drop_path_factors(key: jax.Array, survival: jax.Array, samples: int) -> jax.Array:
    """The factors (samples,) that a block with this key and survival would draw itself."""
    factors = _Block(survival, samples).apply({}, rngs={"drop": key})
    assert isinstance(factors, jax.Array)
    return factors


def _lax_conv(x, kernel, stride, groups=1):
    padding = [axis.padding for axis in products.axes(x.shape, kernel.shape, stride)]
    axes = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=axes, feature_group_count=groups
    )
