"""Codec that clips each sample's norm and adds Gaussian noise, for privacy that can be stated."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from sfl_jax.codecs import privacy
from sfl_jax.codecs.codec import Codec, flat


@dataclasses.dataclass(frozen=True)
class Gaussian(Codec):
    """Clips each sample to l2 norm `clip`, then adds noise of standard deviation sigma · clip to each number.
    The payload is the float32 array (B, ...).

    A sample with a number that is not finite becomes NaN throughout.

    clip: from 1e-30 to 1e30, in the units of the smashed data. sigma: 0 for no noise, or from 1e-6 to 1e6.
    Raises BadInput outside these ranges, where float32 could lose the noise.
    """

    name = "gaussian"
    clip: float
    sigma: float

    def __post_init__(self):
        self._require(1e-30 <= self.clip <= 1e30, "clip, the largest norm, must be from 1e-30 to 1e30")
        self._require(
            self.sigma == 0 or 1e-6 <= self.sigma <= 1e6,
            "sigma, the noise, must be 0 or from 1e-6 to 1e6",
        )

    def encode(self, x, key) -> Any:
        samples = flat(x)
        # Squares of large numbers overflow, so all numbers are divided by the largest. XLA may multiply by
        # its reciprocal instead, which becomes 0 if the largest is above 8.5e37. `smaller` prevents this.
        largest = jnp.max(jnp.abs(samples), axis=1, keepdims=True, initial=0)
        largest = jnp.where(largest < jnp.finfo(jnp.float32).tiny, 1, largest)
        smaller = jnp.where(largest > 1, 2.0**-10, 1.0)
        directions = (samples * smaller) / (largest * smaller)
        allowed = self.clip / jnp.sqrt(jnp.sum(directions**2, axis=1, keepdims=True))
        clipped = jnp.where(largest <= allowed, samples, directions * allowed)
        noise = self.sigma * self.clip * jax.random.normal(key, samples.shape, jnp.float32)
        return (clipped + noise).reshape(x.shape)

    def decode(self, payload, like):
        return payload.astype(like.dtype)

    def bits(self, shape: tuple[int, ...]) -> int:
        return 32 * math.prod(shape)

    def epsilon(self, messages: int, delta: float) -> float:
        """ε for a sample that this codec sends `messages` times; see `privacy.epsilon`."""
        return privacy.epsilon(self.sigma, messages, delta)
