"""Integers of 8 or 4 bits with one scale a sample, rounded up or down by chance."""

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
    """The payload is `Scaled`: whole steps of a sample's scale, max|x| / limit.

    A number between two steps goes to the upper one with a chance equal to its distance from the lower one.
    So the mean over keys of what arrives is x, to 2⁻²⁴ of a step and the rounding of float32, and every error
    is less than a step.

    Chance is dear: random bits take most of the time. A number has 8 random bits of its own, a quarter of a
    drawn uint32. Alone they would leave a bias of up to 1/512 of a step. 15 more bits, which a sample draws
    once for all its numbers, place the 256 values between each other, and this removes the bias.

    A sample with a number that is not finite is NaN throughout. One with no number of 1.2e-38 · limit or more
    in size is 0 throughout, as machines differ in what they do to smaller ones.
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
    """Whole steps from -7 to 7, two in a byte: the first half of a sample in the lower four bits."""

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
    """Numbers rounded up where what they are above a whole number is more than the dither, else down."""
    lower = jnp.floor(steps)
    return (lower + (dither < steps - lower)).astype(jnp.int8)


def _dither(key: Key[Array, ""], batch: int, count: int) -> Float[Array, "batch count"]:
    """Numbers between 0 and 1, each one of the 2²³ odd multiples of 2⁻²⁴ with the same chance."""
    own, shared = jax.random.split(key)
    words = jax.random.bits(own, (batch, -(-count // 4)), jnp.uint32)
    own_bits = jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(batch, 4 * words.shape[1])[:, :count]
    shared_bits = jax.random.bits(shared, (batch, 1), jnp.uint32) >> 17
    return own_bits.astype(jnp.float32) / 2**8 + (2 * shared_bits + 1).astype(jnp.float32) / 2**24
