"""Codecs of 8-bit or 4-bit integers with one scale for each sample and stochastic rounding."""

import dataclasses
import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer, Key
from jaxtyping import Int8 as Int8Array

from sfl_jax.codecs.codec import Codec, flat, shaped

TINY = jnp.finfo(jnp.float32).tiny


class Scaled(NamedTuple):
    """values: (B, n) int8, or (B, ⌈n/2⌉) uint8 with two numbers in each. scale: (B,), the size of a step."""

    values: Integer[Array, "B m"]
    scale: Float[Array, " B"]


@dataclasses.dataclass(frozen=True)
class _Quantised(Codec):
    """The payload is `Scaled`: whole steps of the sample's scale, max|x| / limit.

    A number between two steps is rounded up with a probability equal to its distance from the lower step. So
    the mean of what arrives, over keys, is x. It is exact to 2⁻²⁴ of a step and float32 rounding. Every error
    is less than a step.

    Drawing random bits takes most of the time. So each number has only 8 random bits of its own, a quarter of
    a drawn uint32. These alone would leave a bias of up to 1/512 of a step. A sample draws 15 more bits once,
    for all its numbers. They shift the 256 values and so remove the bias.

    A sample with a number that is not finite becomes NaN throughout. A sample without a number of at least
    1.2e-38 · limit in size becomes 0 throughout, because machines treat smaller numbers differently.
    """

    limit: ClassVar[int]

    def encode(self, x, key) -> Any:
        samples = flat(x)
        scale = jnp.max(jnp.abs(samples), axis=1, initial=0) / self.limit
        scale = jnp.where(scale < TINY, 0, scale)
        is_usable = ((scale > 0) & jnp.isfinite(scale))[:, None]
        steps = jnp.where(is_usable, samples / jnp.where(is_usable, scale[:, None], 1), 0)
        chosen = rounded_up_by(_dither(key, *samples.shape), jnp.clip(steps, -self.limit, self.limit))
        return Scaled(self._pack(chosen), scale)

    def decode(self, payload, like):
        values = self._unpack(payload.values, math.prod(like.shape[1:]))
        return shaped(values.astype(jnp.float32) * payload.scale[:, None], like)

    def _pack(self, values: Int8Array[Array, "B n"]) -> Integer[Array, "B m"]:
        return values

    def _unpack(self, values: Integer[Array, "B m"], count: int) -> Int8Array[Array, "B n"]:
        return values


class Int8(_Quantised):
    """Whole steps from -127 to 127, one byte each."""

    name, limit = "int8", 127

    def bits(self, shape: tuple[int, ...]) -> int:
        return 8 * math.prod(shape) + 32


class Int4(_Quantised):
    """Whole steps from -7 to 7, two in a byte. The lower four bits hold the first half of the sample."""

    name, limit = "int4", 7

    def bits(self, shape: tuple[int, ...]) -> int:
        return 8 * -(-math.prod(shape) // 2) + 32

    def _pack(self, values):
        half = -(-values.shape[1] // 2)
        nibbles = values.astype(jnp.uint8) & 15
        upper = jnp.pad(nibbles[:, half:], ((0, 0), (0, 2 * half - values.shape[1])))
        return nibbles[:, :half] | upper << 4

    def _unpack(self, values, count):
        nibbles = jnp.concatenate([values & 15, values >> 4], axis=1)[:, :count]
        return (nibbles.astype(jnp.int8) ^ 8) - 8


def rounded_up_by(dither: Float[Array, "B n"], steps: Float[Array, "B n"]) -> Int8Array[Array, "B n"]:
    """Rounds a number up if its fraction is more than the dither, else down."""
    lower = jnp.floor(steps)
    return (lower + (dither < steps - lower)).astype(jnp.int8)


def _dither(key: Key[Array, ""], batch: int, count: int) -> Float[Array, "batch count"]:
    """Random numbers between 0 and 1: each odd multiple of 2⁻²⁴ has the same probability."""
    own, shared = jax.random.split(key)
    words = jax.random.bits(own, (batch, -(-count // 4)), jnp.uint32)
    own_bits = jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(batch, 4 * words.shape[1])[:, :count]
    shared_bits = jax.random.bits(shared, (batch, 1), jnp.uint32) >> 17
    return own_bits.astype(jnp.float32) / 2**8 + (2 * shared_bits + 1).astype(jnp.float32) / 2**24
