"""How a device computes its clients: the form of the layers, and how many clients at once. Chosen by
measurement.

Shapes and device decide what is fastest. So a few of the network's units, those with the most work, are timed
in their real shapes under each alternative: forward, backward and update, vmapped over clients.
"""

import contextlib
import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sfl_jax.errors import BadInput
from sfl_jax.federated.balance import chunk_size
from sfl_jax.files import whole_file
from sfl_jax.models import Chain, Profile, units
from sfl_jax.models.layers import FORMS
from sfl_jax.registry import EXECUTIONS as MODES

AUTO = "auto"
UNITS = 2  # how many kinds of units are timed
CHUNKS = 1, 2, 4, 8, 16
WORSE, FAR_WORSE = 1.15, 2.0  # factors of time at which a search stops
STEPS = 2  # steps in a timed call
ENOUGH_S = 0.3  # timed seconds that are enough for one kind of unit


@dataclasses.dataclass(frozen=True)
class Execution:
    """How devices compute a round. Choices left open are settled by a measurement.

    Attributes:
      layer_form: "product" or "conv", see `models.layers`. "auto" measures which is faster.
      clients_per_chunk: the most clients that a device computes at once. 0 means the fastest number that
        fits.
      mode: "vmap" computes the clients of a chunk at once, "map" one after the other. "auto" measures.
      memory_budget_gib: GiB of a device's memory that rounds may take. 0 means all that is free.

    Raises:
      BadInput: a value is out of range.
    """

    layer_form: str = AUTO
    clients_per_chunk: int = 0
    mode: str = AUTO
    memory_budget_gib: float = 0.0

    def __post_init__(self) -> None:
        for name, allowed in (("layer_form", FORMS), ("mode", MODES)):
            if getattr(self, name) not in (AUTO, *allowed):
                raise BadInput(f"{name}={getattr(self, name)}: must be one of {', '.join((AUTO, *allowed))}")
        for name in ("clients_per_chunk", "memory_budget_gib"):
            if not 0 <= getattr(self, name) < math.inf:
                raise BadInput(f"{name}={getattr(self, name)}: must be at least 0")

    @property
    def left_open(self) -> tuple[str, ...]:
        """The fields that the run settles itself. A run that goes on keeps its choices."""
        return tuple(name for name, value in OPEN.items() if getattr(self, name) == value)


OPEN = {"layer_form": AUTO, "clients_per_chunk": 0, "mode": AUTO}


class Alternative(NamedTuple):
    """One way to compute clients.

    layer_form: see `models.create`. clients_per_chunk: clients that a device computes at once, vmapped. One
    client alone is computed without a client axis.
    """

    layer_form: str
    clients_per_chunk: int

    def __str__(self) -> str:
        return f"{self.layer_form} form, {self.clients_per_chunk} at once"


def chunk_sizes(clients: int, devices: int) -> list[int]:
    """The chunk sizes worth trying, in rising order."""
    return sorted({chunk_size(clients, size, devices) for size in CHUNKS})


def choose(
    forms: Sequence[str],
    sizes: Sequence[int],
    seconds: Callable[[Alternative], float],
    places: Callable[[int], float] = lambda size: 1.0,
) -> tuple[Alternative, dict[Alternative, float]]:
    """Returns the fastest alternative, and the seconds of one client in each that was tried.

    If there is only one alternative, nothing is tried. `seconds` measures one place of a chunk. A client
    takes the time of `places(size)` places, see `places_per_client`. `sizes` rise. A form is given up if it
    is far slower than another, or if its larger chunks become slower.
    """
    if len(forms) * len(sizes) == 1:
        return Alternative(forms[0], sizes[0]), {}
    tried: dict[Alternative, float] = {}
    for form in forms:
        best = math.inf
        for size in sizes:
            one = Alternative(form, size)
            now = seconds(one)
            tried[one] = places(size) * now
            if now > WORSE * best or tried[one] > FAR_WORSE * min(tried.values()):
                break
            best = min(best, now)
    return min(tried, key=tried.__getitem__), tried


def seconds_per_client(
    chain: Chain,
    profile: Profile,
    images: jax.ShapeDtypeStruct,
    clients_per_chunk: int,
    devices: Sequence[Any],
) -> float:
    """Measured seconds of one client's local step, in the kinds of units with the most work.

    images: (B, H, W, C) in the network's float type; only the shape matters. devices: those of this process.
    CPU devices share the cores, so all of them are measured at the same time, as in a run. A process measures
    the same thing once, so that two of its runs with the same settings make the same choice and round alike.
    """
    here = tuple(devices if devices[0].platform == "cpu" else devices[:1])
    chain = chain.alone() if clients_per_chunk == 1 else chain
    inputs = _inputs(chain, images)
    macs = profile.forward_macs + profile.backward_macs
    kinds: dict[Any, list[int]] = {}
    for index, x in enumerate(inputs):
        entering = tuple(leaf.shape for leaf in jax.tree.leaves(x))
        kinds.setdefault((entering, int(profile.parameters[index]), int(macs[index])), []).append(index)
    heaviest = sorted(kinds.values(), key=lambda alike: -macs[alike].sum())[:UNITS]
    return sum(
        len(alike) * _seconds_of_unit(chain, alike[-1], images, clients_per_chunk, here) for alike in heaviest
    )


@functools.cache  # the same for every size of a chunk
def _inputs(chain, images):
    """The shape of each unit's input."""
    inputs = []

    def note(_, x):
        inputs.append(jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), x))
        return x

    def run(key, images):
        return chain.apply(chain.init(key, images), images, at_boundary=note)

    jax.eval_shape(run, jax.random.key(0), images)
    return inputs


@functools.cache
def _seconds_of_unit(chain, index, images, clients, devices):
    """Seconds of one client's step in one unit. Variables are ones, because subnormal numbers are slow."""
    unit, x, rng = chain.units[index], _inputs(chain, images)[index], np.random.default_rng(0)
    shapes = units.shapes(unit, x).variables
    axes = () if clients == 1 else (clients,)
    arguments = (
        jax.tree.map(lambda s: np.ones((*axes, *s.shape), s.dtype), shapes),
        jax.tree.map(lambda s: rng.normal(size=(*axes, *s.shape)).astype(s.dtype), x),
        jax.random.split(jax.random.key(0), axes) if axes else jax.random.key(0),
    )

    def session(variables, x, key):
        params = variables.pop("params", {})

        def size(params, x, step):
            rngs = units.streams(unit, jax.random.fold_in(key, step))
            y, _ = units.apply(unit, {"params": params, **variables}, x, True, rngs, chain.layer_form)
            return sum(jnp.square(leaf).mean(dtype=jnp.float32) for leaf in jax.tree.leaves(y))

        def step(index, now):
            gradients = jax.grad(size, (0, 1), allow_int=True)(*now, index)
            return jax.tree.map(_moved, now, gradients)

        return lax.fori_loop(0, STEPS, step, (params, x))

    together = session if clients == 1 else jax.vmap(session)
    if len(devices) == 1:
        placed, run = jax.device_put(arguments, devices[0]), jax.jit(together)
    else:  # every device computes the same
        every = NamedSharding(Mesh(np.asarray(devices), ("devices",)), PartitionSpec("devices"))
        repeated = jax.tree.map(functools.partial(_repeated, len(devices)), arguments)
        placed, run = jax.device_put(repeated, every), jax.pmap(together, devices=devices)
    jax.block_until_ready(run(*placed))
    times: list[float] = []
    while sum(times) < ENOUGH_S and len(times) < 5:
        begun = time.perf_counter()
        jax.block_until_ready(run(*placed))
        times.append(time.perf_counter() - begun)
    return min(times) / STEPS / clients


def _repeated(times, x):
    """The array repeated along a new axis, made by NumPy if possible: else every shape compiles a program."""
    return np.stack([x] * times) if isinstance(x, np.ndarray) else jnp.stack([x] * times)


def _moved(value, gradient):
    """The value after one step. Tokens and masks have no gradient and do not change."""
    return value if gradient.dtype == jax.dtypes.float0 else value - 1e-3 * gradient


def remembered(path: Path, key: Sequence[Any]) -> tuple[Alternative, dict[Alternative, float]] | None:
    """What an earlier run measured under the same key. None if it cannot be read."""
    try:
        choice, tried = json.loads(path.read_text())[json.dumps(key)]
        return Alternative(*choice), {Alternative(form, size): seconds for form, size, seconds in tried}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def remember(path: Path, key: Sequence[Any], choice: Alternative, tried: dict[Alternative, float]) -> None:
    """Keeps a measurement for later runs, if the disk allows it."""
    try:
        entries = json.loads(path.read_text())
    except (OSError, ValueError):
        entries = {}
    entries[json.dumps(key)] = choice, [(*one, seconds) for one, seconds in tried.items()]
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            file.write(json.dumps(entries, indent=1).encode())
