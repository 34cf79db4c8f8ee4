"""The client axis over devices. No other file knows that there may be several.

The body of a round is written once, in `round.py`. With one device it is jitted; with several, `jax.pmap`
maps it over the client axis: variables and samples are on every device, each device runs its own clients,
and the weighted sums meet in one `psum`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sfl_jax.errors import BadInput
from sfl_jax.federated.round import fill_chunks, run_round
from sfl_jax.federated.session import Assignment, Training

AXIS = "devices"


def choose_devices(count: int) -> list[Any]:
    """The first `count` devices of this process, 0 meaning all; BadInput where there are fewer."""
    devices = jax.local_devices()
    if count > len(devices):
        raise BadInput(
            f"--devices={count}: must be 0 to {len(devices)}, the {devices[0].platform} devices here"
        )
    return devices[: count or None]


def replicate(tree: Any, devices: Sequence[Any]) -> Any:
    """The arrays of `tree`, whole on every device."""
    return jax.device_put(tree, NamedSharding(_mesh(devices), PartitionSpec()), may_alias=False)


def on_first(tree: Any) -> Any:
    """A replicated tree as arrays of the first device alone; nothing is copied."""
    return jax.tree.map(lambda x: x.addressable_shards[0].data, tree)


def compile_round(
    training: Training, clients_per_chunk: int, devices: Sequence[Any], execution: str = "vmap"
) -> Callable[..., Any]:
    """round(model, samples, assignments, key, learning_rate) -> (model, loss), everything
    replicated but for `assignments`: NumPy, any number of clients, arranged and placed here.

    `execution`: "vmap" computes a chunk's clients at once, "map" one after the other. The model given
    are donated.
    """
    most = 1 if execution == "map" else clients_per_chunk

    @functools.cache
    def compiled(size: int):
        body = functools.partial(run_round, training, size)
        if len(devices) == 1:
            return jax.jit(functools.partial(body, None), donate_argnums=0)
        return jax.pmap(
            functools.partial(body, AXIS), AXIS, in_axes=(None, None, 0, None, None), out_axes=None,
            devices=devices, donate_argnums=0,
        )  # fmt: skip

    def run(model, samples, assignments: Assignment, key, learning_rate):
        arranged, size = fill_chunks(assignments, most, len(devices))
        if len(devices) > 1:
            arranged = jax.tree.map(lambda x: x.reshape(len(devices), -1, *x.shape[1:]), arranged)
        placed = jax.device_put(arranged, NamedSharding(_mesh(devices), PartitionSpec(AXIS)))
        return compiled(size)(model, samples, placed, key, np.float32(learning_rate))

    return run


def _mesh(devices):
    return Mesh(np.asarray(devices), (AXIS,))
