"""Networks that compile in a second, for tests that do not depend on the network."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from sfl_jax import models
from sfl_jax.models import layers
from sfl_jax.models.units import OwnUnit

WIDTH, DROP_RATE = 6, 0.5


class Front(OwnUnit):
    """A dense layer, tanh, dropout."""

    drop_rate: float

    @nn.compact
    def __call__(self, x, train):
        x = x.reshape(len(x), -1)
        kernel = self.param("kernel", layers.kernel_init, (x.shape[-1], WIDTH))
        x = jnp.tanh(x @ kernel / 4 + self.param("bias", layers.zeros, (WIDTH,)))
        if not train:
            return x
        keep = jax.random.bernoulli(self.make_rng("drop"), 1 - self.drop_rate, x.shape)
        return jnp.where(keep, x / (1 - self.drop_rate), 0)


class Back(OwnUnit):
    """The classifier."""

    num_classes: int = 10

    @nn.compact
    def __call__(self, x, train):
        kernel = self.param("dense_kernel", layers.dense_init, (WIDTH, self.num_classes))
        return x @ kernel + self.param("bias", layers.zeros, (self.num_classes,))


def dense(drop_rate_scale=1.0, num_classes=10):
    """A chain of two units, whose gradient is a few lines of NumPy."""
    return models.Chain((Front(DROP_RATE * drop_rate_scale, name="front"), Back(num_classes, name="back")))


def create(name, num_classes=10, in_channels=1, *, drop_rate_scale=1.0, **_):
    """Replaces `models.create`: always the dense network."""
    return dense(drop_rate_scale, num_classes)
