"""The state of a run: what changes from round to round."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sfl_jax.federated import devices as federated_devices
from sfl_jax.federated.round import Model, start_model
from sfl_jax.federated.session import Training
from sfl_jax.run.parts import Parts


class State(NamedTuple):
    """All that changes from round to round.

    model: on the devices. simulated_s: the simulated seconds so far, by planning method.
    """

    round: int
    model: Model
    simulated_s: dict[str, float]


def start(parts: Parts) -> State:
    """The state before the first round."""
    clocks = dict.fromkeys((parts.planner.method, *parts.rivals), 0.0)
    return State(0, federated_devices.replicate(initial_model(parts), parts.devices), clocks)


def resume(parts: Parts, checkpoints: Any, progress: Any) -> State:
    """The state saved in a checkpoint."""
    model = checkpoints.restore(progress, model_like(parts.training, parts.image_shape))
    now, before = parts.planner.method, next(iter(progress.simulated_s))
    # If the run's method changed, its clock goes on from that of the method before.
    clocks = {name: progress.simulated_s[before if name == now else name] for name in (now, *parts.rivals)}
    return State(progress.round, federated_devices.replicate(model, parts.devices), clocks)


def initial_model(parts: Parts) -> Model:
    """The model before the first round."""
    return start_model(parts.training, jax.device_get(parts.initial()), np)


def model_like(training: Training, image_shape: tuple[int, ...]) -> Model:
    """The shapes of a run's model. Computes nothing."""
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.result_type(float))
    return jax.eval_shape(
        lambda key, images: start_model(training, training.chain.init(key, images)), jax.random.key(0), images
    )


def is_held(state: State) -> bool:
    """Whether the model of this state still exists, and is not donated to a round."""
    return not any(leaf.is_deleted() for leaf in jax.tree.leaves(state.model))
