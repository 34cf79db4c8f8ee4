"""Codecs that round each number to a float type of 32 or 16 bits."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp

from sfl_jax.codecs.codec import Codec


@dataclasses.dataclass(frozen=True)
class _Rounded(Codec):
    """The payload is the array (B, ...) in the float type with the codec's name.

    Numbers are rounded to nearest, ties to even. A finite float32 beyond the type's range becomes the type's
    largest finite number. Infinity and NaN stay the same. The key is not used.
    """

    def encode(self, x, key) -> Any:
        single, kind = x.astype(jnp.float32), jnp.dtype(self.name)
        if kind == jnp.float32:
            return single
        limit = jnp.finfo(kind).max.astype(jnp.float32)
        return jnp.where(jnp.isinf(single), single, jnp.clip(single, -limit, limit)).astype(kind)

    def decode(self, payload, like):
        return payload.astype(like.dtype)

    def bits(self, shape: tuple[int, ...]) -> int:
        return 8 * jnp.dtype(self.name).itemsize * math.prod(shape)


class Float32(_Rounded):
    """The numbers as float32. Numbers of float64 are rounded; beyond float32's range they become infinite."""

    name = "float32"


class BFloat16(_Rounded):
    """8 bits of precision, the range of float32."""

    name = "bfloat16"


class Float16(_Rounded):
    """11 bits of precision, numbers up to 65504."""

    name = "float16"
