"""The client axis over devices. No other file knows that there may be several.

The body of a round is written once, in `round.py`. With one device it is jitted; with several, of one process
or many, `jax.pmap` maps it over the client axis: the model is on every device, each device has the samples
of its own clients and runs them, and the weighted sums meet in one `psum`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sfl_jax.errors import BadInput
from sfl_jax.federated import evaluation
from sfl_jax.federated.balance import fill_chunks
from sfl_jax.federated.round import Outcome, run_round
from sfl_jax.federated.session import Assignment, Samples, Training
from sfl_jax.models import Chain

AXIS = "devices"


def choose_devices(count: int) -> list[Any]:
    """The first `count` devices of every process, process by process, 0 meaning all; BadInput where there are
    fewer.
    """
    here = jax.local_devices()
    if count > len(here):
        raise BadInput(f"--devices={count}: must be 0 to {len(here)}, the {here[0].platform} devices here")
    groups = (jax.local_devices(process_index=process) for process in range(jax.process_count()))
    return [device for group in groups for device in group[: count or None]]


def replicate(tree: Any, devices: Sequence[Any]) -> Any:
    """The arrays of `tree`, whole on every device of this process."""
    return jax.device_put(tree, _sharding(devices, PartitionSpec()), may_alias=False)


def on_first(tree: Any) -> Any:
    """A replicated tree as arrays of the first device alone; nothing is copied."""
    return jax.tree.map(lambda x: x.addressable_shards[0].data, tree)


def samples_are_sent(devices: Sequence[Any]) -> bool:
    """Whether a device is sent, with every round, the samples of its own clients; a single device has all."""
    return len(devices) > 1


def place_samples(samples: Samples, devices: Sequence[Any]) -> Samples:
    """What `Rounds` takes: NumPy samples go whole to a single device, and stay here for several."""
    return samples if samples_are_sent(devices) else replicate(samples, devices)


class Rounds:
    """round(model, samples, assignments, key, learning_rate, previous) -> (model, loss, diverged) as of
    `run_round`, replicated; samples from `place_samples`, assignments NumPy, of any number of clients,
    arranged and placed here. The model given is donated. Compiles once for each shape.

    `execution`: "vmap" computes a chunk's clients at once, "map" one after the other.
    """

    def __init__(
        self, training: Training, clients_per_chunk: int, devices: Sequence[Any], execution: str = "vmap"
    ):
        self._devices = devices
        self._most = 1 if execution == "map" else clients_per_chunk
        self._program = functools.cache(functools.partial(map_round, training, devices))

    def __call__(self, *arguments: Any):
        placed, size = self._place(*arguments)
        return self._program(size)(*placed)

    def bytes_needed(self, *arguments: Any) -> int:
        """Of memory on each device, for all that such a round reads, makes and keeps in between. Compiles it
        for the calls to come, and runs nothing.
        """
        placed, size = self._place(*arguments)
        need = self._program(size).lower(*placed).compile().memory_analysis()
        made = need.output_size_in_bytes - need.alias_size_in_bytes
        return need.argument_size_in_bytes + need.temp_size_in_bytes + made

    def _place(self, model, samples, assignments, key, learning_rate, previous=None):
        arranged, size = fill_chunks(assignments, self._most, len(self._devices))
        if len(self._devices) == 1:
            placed = samples, jax.device_put(arranged, self._devices[0])
        else:
            placed = place_clients(samples, arranged, self._devices)
        if previous is None:  # as good a round as any
            nobody = np.full(len(arranged.client), -1, np.int32)
            previous = Outcome(*replicate((np.float32(0), nobody, np.int32(0)), self._devices))
        scalars = replicate((key, np.float32(learning_rate)), self._devices)
        return (model, *placed, *scalars, previous), size


def map_round(training: Training, devices: Sequence[Any], size: int) -> Any:
    """`run_round` over the devices for chunks of `size` clients: jitted on one, mapped by `jax.pmap` on more.

    What it takes is placed already, see `place_clients`; the model given is donated.
    """
    body = functools.partial(run_round, training, size)
    if len(devices) == 1:
        return jax.jit(functools.partial(body, None), donate_argnums=0)
    return jax.pmap(
        functools.partial(body, AXIS), AXIS, in_axes=(None, 0, 0, None, None, None), out_axes=None,
        devices=devices, donate_argnums=0,
    )  # fmt: skip


def place_clients(
    samples: Samples, arranged: Assignment, devices: Sequence[Any]
) -> tuple[Samples, Assignment]:
    """What `fill_chunks` arranged, on the devices of this process, each with the samples of its clients.

    The leading axis becomes (devices here, ...). A device has room for one sample an index, or for all that
    there are if these are fewer, so that shapes do not change from round to round.
    """
    by_device = jax.tree.map(lambda x: x.reshape(len(devices), -1, *x.shape[1:]), arranged)
    parts = []
    for device in _indices_here(devices):
        own: Assignment = jax.tree.map(lambda x, device=device: x[device], by_device)
        room = min(own.batches.size, len(samples.labels))
        is_used = np.arange(own.batches.shape[1]) < own.steps[:, None]
        rows, local = np.unique(own.batches[is_used], return_inverse=True)
        batches = np.zeros_like(own.batches)
        batches[is_used] = local.reshape(-1, own.batches.shape[-1])
        images, labels = (np.zeros((room, *x.shape[1:]), x.dtype) for x in samples)
        images[: len(rows)], labels[: len(rows)] = samples.images[rows], samples.labels[rows]
        parts.append((Samples(images, labels), own._replace(batches=batches)))
    stacked = jax.tree.map(lambda *xs: np.stack(xs), *parts)
    return jax.device_put(stacked, _sharding(devices, PartitionSpec(AXIS)))


def place_held_out(
    images: np.ndarray, labels: np.ndarray, devices: Sequence[Any], batch: int = evaluation.BATCH
) -> Samples:
    """What the evaluations of `compile_evaluation` take: each device has a part."""
    parts = evaluation.in_batches(images, labels, len(devices), batch)
    if len(devices) == 1:
        return jax.device_put(jax.tree.map(lambda x: x[0], parts), devices[0])
    own = jax.tree.map(lambda x: x[_indices_here(devices)], parts)
    return jax.device_put(own, _sharding(devices, PartitionSpec(AXIS)))


def compile_evaluation(
    chain: Chain, preprocess: Callable[[jax.Array], jax.Array], devices: Sequence[Any]
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """evaluate(packed variables, samples from `place_held_out`) -> (mean loss, accuracy), replicated."""
    body = functools.partial(evaluation.evaluate, chain, preprocess)
    if len(devices) == 1:
        return jax.jit(functools.partial(body, None))
    return jax.pmap(functools.partial(body, AXIS), AXIS, in_axes=(None, 0), out_axes=None, devices=devices)


def _indices_here(devices) -> list[int]:
    return [i for i, device in enumerate(devices) if device.process_index == jax.process_index()]


def _sharding(devices, spec):
    here = [devices[i] for i in _indices_here(devices)]
    return NamedSharding(Mesh(np.asarray(here), (AXIS,)), spec)
