"""Codec that sends the largest numbers of a sample and their places."""

import dataclasses
import math
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt

from sfl_jax.codecs.codec import Codec, flat, shaped


class Largest(NamedTuple):
    """values: (B, k), the largest in size first. indices: (B, k), their places in the flat sample."""

    values: Float[Array, "B k"]
    indices: UInt[Array, "B k"]


@dataclasses.dataclass(frozen=True)
class TopK(Codec):
    """Sends the ⌈part · n⌉ of a sample's n numbers that are largest in size. The others arrive as 0.

    The payload is `Largest`: float32 values, and indices in the smallest of uint8, uint16 and uint32 that
    holds them. Among equal numbers, the first are kept. Numbers that are not finite are kept before all
    others. There is no error feedback: it would need memory for every sample. The key is not used.

    part: above 0 and at most 1. It means the decimal number as written. Raises BadInput otherwise.
    """

    name = "topk"
    part: float

    def __post_init__(self):
        self._require(0 < self.part <= 1, "the part must be above 0 and at most 1")

    def encode(self, x, key) -> Any:
        samples = flat(x)
        count = samples.shape[1]
        sizes = jnp.where(jnp.isnan(samples), jnp.inf, jnp.abs(samples))
        _, indices = jax.lax.top_k(sizes, self._kept(count))
        values = jnp.take_along_axis(samples, indices, axis=1)
        return Largest(values, indices.astype(_index_type(count)))

    def decode(self, payload, like):
        rows = jnp.arange(like.shape[0])[:, None]
        empty = jnp.zeros((like.shape[0], math.prod(like.shape[1:])), jnp.float32)
        return shaped(empty.at[rows, payload.indices].set(payload.values, unique_indices=True), like)

    def bits(self, shape: tuple[int, ...]) -> int:
        count = math.prod(shape)
        return self._kept(count) * (32 + 8 * _index_type(count).itemsize)

    def _kept(self, count: int) -> int:
        # A fraction, because 0.1 · 30 in floats is more than 3.
        return math.ceil(Fraction(repr(float(self.part))) * count)


def _index_type(count: int) -> jnp.dtype:
    """The smallest unsigned type that indexes `count` numbers."""
    return jnp.dtype(jnp.uint8 if count <= 2**8 else jnp.uint16 if count <= 2**16 else jnp.uint32)
