"""Spreads the client axis over devices. No other file knows that there may be several.

The body of a round is written once, in `round.py`. On one device it is jitted. On several devices, of one
process or many, `jax.pmap` maps it over the client axis. Each device has the model and runs its own clients.
One `psum` adds up the weighted sums. Each device also has all samples if they fit. If not, each round sends a
device the samples of its own clients.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sfl_jax.errors import BadInput
from sfl_jax.federated import evaluation
from sfl_jax.federated.balance import fill_chunks
from sfl_jax.federated.kept import NOTHING, Kept
from sfl_jax.federated.packing import PackedVariables
from sfl_jax.federated.round import Diverged, Outcome, normalised, run_round
from sfl_jax.federated.session import Assignment, Loss, Samples, Training, cross_entropy
from sfl_jax.models import Chain

AXIS = "devices"
RESIDENT = 0.5  # samples stay on a device if they take at most this part of its free memory


def choose_devices(count: int) -> list[Any]:
    """The first `count` devices of every process, process by process. 0 means all.

    Raises BadInput if a process has fewer.
    """
    here = jax.local_devices()
    if count > len(here):
        raise BadInput(f"devices={count}: must be 0 to {len(here)}, the {here[0].platform} devices here")
    groups = (jax.local_devices(process_index=process) for process in range(jax.process_count()))
    return [device for group in groups for device in group[: count or None]]


def replicate(tree: Any, devices: Sequence[Any]) -> Any:
    """The arrays of `tree`, whole on every device of this process."""
    return jax.device_put(tree, _sharding(devices, PartitionSpec()), may_alias=False)


def on_first(tree: Any) -> Any:
    """A replicated tree as arrays of the first device alone. Copies nothing."""
    return jax.tree.map(lambda x: x.addressable_shards[0].data, tree)


def bytes_placed(tree: Any) -> int:
    """The bytes that the JAX arrays of `tree` take on each device. Arrays on the host do not count."""
    arrays = (leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array))
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in arrays)


def place_samples(samples: Samples, devices: Sequence[Any], free_bytes: float = math.inf) -> Samples:
    """Returns the samples in the form that `Rounds` takes.

    If they take at most half of `free_bytes`, they go to every device. If not, they stay in NumPy on the
    host.
    """
    if sum(x.nbytes for x in samples) > RESIDENT * free_bytes:
        return samples
    # Indexing checks the checksums of images that are in a file.
    return replicate(Samples(samples.images[:], samples.labels), devices)


class Rounds:
    """round(model, samples, assignments, key, learning_rate, previous) -> (model, loss, diverged), like
    `run_round`, with replicated results.

    samples: from `place_samples`. assignments: NumPy, for any number of clients; this class arranges and
    places them. The given model is donated. Compiles once for each shape.

    execution: "vmap" computes a chunk's clients at once, "map" one after the other.
    kept: where programs are looked for before they are compiled. facts: see `Kept.compiled`.
    """

    def __init__(
        self,
        training: Training,
        clients_per_chunk: int,
        devices: Sequence[Any],
        execution: str = "vmap",
        kept: Kept = NOTHING,
        facts: tuple[Any, ...] = (),
    ):
        self._devices = devices
        self._ready = _Ready("round", kept, facts)
        self._most = 1 if execution == "map" else clients_per_chunk
        self._program = functools.cache(functools.partial(map_round, training, devices))
        self._room = 0

    def __call__(self, *arguments: Any):
        placed, program = self._place(*arguments)
        return self._ready.program(placed, program)(*placed)

    def placed(self, *arguments: Any) -> tuple[tuple[Any, ...], int]:
        """(what the compiled round takes for these arguments, the clients in a chunk). Runs nothing."""
        return self._arranged(*arguments)

    def bytes_needed(self, *arguments: Any) -> int:
        """The memory that such a round needs on each device, beside the model and the samples placed already.

        It counts temporary and result arrays. It counts the round's input twice, because the next round may
        be sent while one runs. Compiles the round for later calls and runs nothing.
        """
        placed, program = self._place(*arguments)
        sent = bytes_placed(placed[2] if _are_placed(arguments[1]) else placed[1:3])
        results = placed[0], *placed[-1][:2]  # the model, the loss and who diverged
        return program_bytes(self._ready.compiled(placed, program, results)) + 2 * sent

    def _place(self, *arguments):
        placed, size = self._arranged(*arguments)
        return placed, self._program(size, _are_placed(arguments[1]))

    def _arranged(self, model, samples, assignments, key, learning_rate, previous=None):
        assignments = assignments._replace(weight=normalised(assignments.weight))
        arranged, size = fill_chunks(assignments, self._most, len(self._devices))
        if _are_placed(samples):
            placed = samples, _by_device(_parts(arranged, self._devices), self._devices)
        else:
            # Never smaller than before, so that rounds with few samples do not compile again.
            self._room = max(self._room, room(arranged, len(samples.labels), len(self._devices)))
            placed = place_clients(samples, arranged, self._devices, self._room)
        if previous is None:  # an outcome that does not end the run
            nobody = Diverged(*(np.full(len(arranged.client), number, np.int32) for number in (-1, 0)))
            previous = Outcome(*replicate((np.float32(0), nobody, np.int32(0)), self._devices))
        scalars = replicate((key, np.float32(learning_rate)), self._devices)
        return (model, *placed, *scalars, previous), size


class _Ready:
    """Programs of one name that are compiled, or were found on the disk, by the shapes that they take."""

    def __init__(self, name: str, kept: Kept, facts: tuple[Any, ...]):
        self._name, self._kept, self._facts = name, kept, facts
        self._programs: dict[Any, Any] = {}

    def compiled(self, arguments: tuple[Any, ...], program: Any, results: Any) -> Any:
        """The program as it is kept, or else compiled, for the calls to come, and kept."""
        found = self._kept.compiled(self._name, program, arguments, results, *self._facts)
        if jax.process_count() == 1:  # pmap takes one process's arrays; its compiled program, those of all
            self._programs[_shapes(arguments)] = found
        return found

    def program(self, arguments: tuple[Any, ...], program: Any) -> Any:
        """The one that is ready for these arguments, else `program`, which compiles when it is called."""
        return self._programs.get(_shapes(arguments), program) if self._programs else program


def _shapes(arguments):
    return tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(arguments))


def map_round(training: Training, devices: Sequence[Any], size: int, samples_stay: bool = False) -> Any:
    """`run_round` for chunks of `size` clients: jitted on one device, mapped by `jax.pmap` on several.

    Its arguments must be placed already. With `samples_stay` each device has all samples; if not, see
    `place_clients`. The given model is donated.
    """
    round_of = run_round if training.scheme is None else training.scheme.run_round
    body = functools.partial(round_of, training, size)
    if len(devices) == 1:
        return jax.jit(functools.partial(body, None), donate_argnums=0)
    samples_axis = None if samples_stay else 0
    return jax.pmap(
        functools.partial(body, AXIS), AXIS, in_axes=(None, samples_axis, 0, None, None, None), out_axes=None,
        devices=devices, donate_argnums=0,
    )  # fmt: skip


def map_rounds(training: Training, devices: Sequence[Any], size: int, at_once: bool) -> Any:
    """`run_round` for several runs in one program, for samples that stay on every device.

    Its arguments are those of `map_round`, but each is a tuple with one entry for each run. Only the samples
    are shared. Returns a tuple with the results of each run. The given models are donated.

    at_once: vmaps the runs. If not, a device computes them one after the other.
    """
    round_of = run_round if training.scheme is None else training.scheme.run_round

    def body(axis, models, samples, *others):
        def one(given):
            model, *rest = given
            return round_of(training, size, axis, model, samples, *rest)

        stacked = tuple(jax.tree.map(lambda *x: jnp.stack(x), *of_runs) for of_runs in (models, *others))
        results = jax.vmap(one)(stacked) if at_once else jax.lax.map(one, stacked)
        return tuple(jax.tree.map(lambda x, i=i: x[i], results) for i in range(len(models)))

    if len(devices) == 1:
        return jax.jit(functools.partial(body, None), donate_argnums=0)
    return jax.pmap(
        functools.partial(body, AXIS), AXIS, in_axes=(None, None, 0, None, None, None), out_axes=None,
        devices=devices, donate_argnums=0,
    )  # fmt: skip


def program_bytes(program: Any) -> int:
    """The memory that a compiled program needs on each device, beside its arguments."""
    need = program.memory_analysis()
    return need.temp_size_in_bytes + need.output_size_in_bytes - need.alias_size_in_bytes


def place_clients(
    samples: Samples, arranged: Assignment, devices: Sequence[Any], rows: int
) -> tuple[Samples, Assignment]:
    """Places what `fill_chunks` arranged on the devices of this process, with the samples of each device's
    clients.

    Each device has room for `rows` samples, see `room`. If there are several devices, the leading axis
    becomes (devices here, ...).
    """
    parts = []
    for own in _parts(arranged, devices):
        is_used = _are_used(own)
        used, local = np.unique(own.batches[is_used], return_inverse=True)
        batches = np.zeros_like(own.batches)
        batches[is_used] = local.reshape(-1, own.batches.shape[-1])
        images, labels = (np.zeros((rows, *x.shape[1:]), x.dtype) for x in samples)
        images[: len(used)], labels[: len(used)] = samples.images[used], samples.labels[used]
        parts.append((Samples(images, labels), own._replace(batches=batches)))
    return _by_device(parts, devices)


def room(arranged: Assignment, samples: int, devices: int) -> int:
    """The rows for samples that every device needs.

    This is the number of samples on the device with the most, rounded up to a power of two, so that rounds
    have few shapes. It is at most one row for each index, and at most `samples`.
    """
    most = 1
    for device in range(devices):
        own = _part(arranged, device, devices)
        most = max(most, np.count_nonzero(np.bincount(own.batches[_are_used(own)].reshape(-1))))
    return min(1 << (int(most) - 1).bit_length(), arranged.batches.size // devices, samples)


def place_held_out(
    images: np.ndarray, labels: np.ndarray, devices: Sequence[Any], batch: int = evaluation.BATCH
) -> Samples:
    """Returns the test samples in the form that `Evaluation` takes: each device has a part."""
    parts = evaluation.in_batches(images, labels, len(devices), batch)
    return _by_device([jax.tree.map(lambda x, i=i: x[i], parts) for i in _indices_here(devices)], devices)


class Evaluation:
    """evaluate(packed variables, samples from `place_held_out`) -> what `evaluation.evaluate` returns,
    replicated.
    """

    def __init__(
        self,
        chain: Chain,
        preprocess: Callable[[jax.Array], jax.Array],
        devices: Sequence[Any],
        loss: Loss = cross_entropy,
        metric: evaluation.Metric = evaluation.accuracy,
        kept: Kept = NOTHING,
        facts: tuple[Any, ...] = (),
    ):
        self._ready = _Ready("evaluation", kept, facts)
        body = functools.partial(evaluation.evaluate, chain, preprocess, loss, metric)
        if len(devices) == 1:
            self._program: Any = jax.jit(functools.partial(body, None))
        else:
            self._program = jax.pmap(
                functools.partial(body, AXIS), AXIS, in_axes=(None, 0), out_axes=None, devices=devices
            )

    def __call__(self, packed: PackedVariables, held_out: Samples) -> tuple[jax.Array, ...]:
        return self._ready.program((packed, held_out), self._program)(packed, held_out)

    def bytes_needed(self, packed: PackedVariables, held_out: Samples) -> int:
        """The memory that it needs on each device, beside its arguments. Compiles it for later calls."""
        return program_bytes(self._ready.compiled((packed, held_out), self._program, (0, 0, 0)))


def _are_placed(samples: Samples) -> bool:
    return isinstance(samples.labels, jax.Array)


def _are_used(own: Assignment) -> Any:
    """Which of the (K, S) batches belong to a step that is run."""
    return np.arange(own.batches.shape[1]) < own.steps[:, None]


def _part(arranged: Assignment, device: int, devices: int) -> Assignment:
    """What `fill_chunks` arranged for one device."""
    own = len(arranged.client) // devices
    return jax.tree.map(lambda x: x[own * device : own * (device + 1)], arranged)


def _parts(arranged: Assignment, devices: Sequence[Any]) -> list[Assignment]:
    """The parts of the devices of this process."""
    return [_part(arranged, device, len(devices)) for device in _indices_here(devices)]


def _by_device(parts: Sequence[Any], devices: Sequence[Any]) -> Any:
    """Places each part on its device of this process. With several devices there is a leading axis."""
    if len(devices) == 1:
        return jax.device_put(parts[0], devices[0])
    stacked = jax.tree.map(lambda *xs: np.stack(xs), *parts)
    return jax.device_put(stacked, _sharding(devices, PartitionSpec(AXIS)))


def _indices_here(devices) -> list[int]:
    return [i for i, device in enumerate(devices) if device.process_index == jax.process_index()]


def _sharding(devices, spec):
    here = [devices[i] for i in _indices_here(devices)]
    return NamedSharding(Mesh(np.asarray(here), (AXIS,)), spec)
