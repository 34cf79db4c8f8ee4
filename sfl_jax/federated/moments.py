"""The part that each unit has in the gradient of the loss."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float64, Int

from sfl_jax.federated.session import Training, batch_loss
from sfl_jax.models import Variables


def squared_gradients(
    training: Training, variables: Variables, images: Array, labels: Int[Array, " B"]
) -> Float64[np.ndarray, " L"]:
    """The squared norm of each unit's gradient of the mean loss of some stored images; nothing is cut."""
    whole = len(training.chain)
    scaled = training.preprocess(images)

    def loss(params):
        own = variables._replace(params=params)
        return batch_loss(training, own, scaled, labels, whole, jax.random.key(0))[0]

    gradient = jax.grad(loss)(variables.params)
    return np.array([sum(float(jnp.vdot(x, x)) for x in jax.tree.leaves(unit)) for unit in gradient])
