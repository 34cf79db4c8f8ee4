"""Settings that are left open: in which form, and how many clients at once, a device computes."""

import dataclasses
import functools
import platform
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from sfl_jax import models
from sfl_jax.config import LAYER_FORMS, Config, left_open
from sfl_jax.errors import BadInput
from sfl_jax.federated import execution, memory, processes
from sfl_jax.federated.balance import chunk_size, places_per_client
from sfl_jax.federated.execution import Execution

FAR_TOO_MUCH = 1.5  # times the budget: a round that is expected to need that is refused before it is compiled
GIB = 2**30


def settle(
    config: Config,
    before: Mapping[str, Any] | None,
    profile: models.Profile,
    devices: Sequence[Any],
    seconds: Callable[[Execution], float],
    notes: Path | None = None,
    placed_bytes: int = 0,
) -> tuple[Config, dict[Execution, float]]:
    """(`config` with nothing left open, what was measured of each alternative). Its chunk is the one that
    runs: no larger than what a device has to do.

    Args:
      before: the settings of the run that goes on. Its choices stay, since others would round otherwise.
      profile: of the network.
      seconds: measures an alternative; the first of several processes decides for all.
      notes: a file of what earlier runs measured, looked up first.
      placed_bytes: of each device, that the model and the samples take already.

    Raises:
      BadInput: the memory is far too small, whatever is chosen.
    """
    if before is not None:
        config = dataclasses.replace(config, **{name: before[name] for name in left_open(config)})
    forms = LAYER_FORMS if config.layer_form == "auto" else (config.layer_form,)
    sizes = _sizes(config, profile, devices, budget_bytes(config, devices, placed_bytes))
    key = (*_circumstances(config, devices), *forms, *sizes)
    places = functools.partial(places_per_client, config.cohort_size, devices=len(devices))
    choice, tried = (notes and execution.remembered(notes, key)) or execution.choose(
        forms, sizes, seconds, places
    )
    if notes and tried:
        execution.remember(notes, key, choice, tried)
    form, size = processes.of_all((LAYER_FORMS.index(choice.layer_form), choice.clients_per_chunk))[
        0
    ].tolist()
    settled = {"layer_form": LAYER_FORMS[form], "clients_per_chunk": size, "execution": _name(size)}
    said = {"clients_per_chunk", *left_open(config)}
    return dataclasses.replace(config, **{name: settled[name] for name in said}), tried


def fit(
    config: Config,
    opened: Collection[str],
    needed: Mapping[int, int],
    profile: models.Profile,
    devices: Sequence[Any],
    placed_bytes: int = 0,
) -> Config:
    """`config` itself where a round in chunks of its size fits into the memory. Otherwise with the largest
    smaller size that promises to fit, if the size was left open. BadInput where there is none.

    needed: bytes by the size of the chunk, of all rounds that were compiled so far, this one included.
    """
    budget, size = budget_bytes(config, devices, placed_bytes), config.clients_per_chunk
    if needed[size] <= budget:
        return config
    smaller = sorted({chunk_size(config.cohort_size, most, len(devices)) for most in range(1, size)})
    if "clients_per_chunk" not in opened or not smaller:
        raise _too_much(config, size, needed[size], budget)
    promises = _promises(config, profile, needed)
    size = next((size for size in reversed(smaller) if promises(size) <= budget), smaller[0])
    changes = {"clients_per_chunk": size, "execution": _name(size)}
    return dataclasses.replace(config, **{name: changes[name] for name in changes if name in opened})


def _promises(config, profile, needed) -> Callable[[int], float]:
    """What a round is likely to need in chunks of another size: a line through what two needed, or what one
    needed in proportion to what was expected.
    """
    (size, bytes_), *larger = sorted(needed.items())
    if larger:
        slope = (larger[0][1] - bytes_) / (larger[0][0] - size)
        return lambda other: bytes_ + slope * (other - size)
    scale = bytes_ / expected_bytes(config, profile, size)
    return lambda other: scale * expected_bytes(config, profile, other)


def budget_bytes(config: Config, devices: Sequence[Any], placed_bytes: int = 0) -> int:
    """The memory of each device that a round may take beside what is placed: that of the device that has
    least.
    """
    if config.memory_budget_gib:
        return max(int(GIB * config.memory_budget_gib) - placed_bytes, 0)
    own = [device for device in devices if device.process_index == jax.process_index()]
    host = zlib.crc32(platform.node().encode()) % 2**31
    sharers = len(own) * int((processes.of_all(host) == host).sum())
    # In GiB: what the processes tell each other are 32 bits.
    free = min(memory.available_bytes(device, sharers) for device in own) / GIB
    return int(GIB * processes.of_all(free).min())


def most_bytes(needed: int) -> int:
    """What the process that needs most needs, so that all decide alike."""
    return int(GIB * processes.of_all(needed / GIB).max())


def expected_bytes(config: Config, profile: models.Profile, clients_per_chunk: int) -> int:
    """Roughly what a round of such chunks needs."""
    moments = 2 if config.optimizer == "adam" else int(config.momentum > 0)
    return memory.expected_bytes(profile, config.batch_size, clients_per_chunk, moments)


def _sizes(config, profile, devices, budget) -> list[int]:
    """The chunks to choose among: what the flags allow and the memory is expected to hold."""
    asked = 1 if config.execution == "map" else config.clients_per_chunk
    forced = asked and chunk_size(config.cohort_size, asked, len(devices))
    least = expected_bytes(config, profile, forced or 1)
    if least > FAR_TOO_MUCH * budget:
        raise _too_much(config, forced or 1, least, budget)
    if forced:
        return [forced]
    sizes = [
        size for size in execution.chunk_sizes(config.cohort_size, len(devices))
        if size == 1 or expected_bytes(config, profile, size) <= budget
    ]  # fmt: skip
    return [size for size in sizes if size > 1 or config.execution != "vmap"] or sizes


def _circumstances(config, devices):
    """What the speed of an alternative depends on."""
    names = "model", "image_size", "batch_size", "compute_dtype", "optimizer", "momentum", "cohort_size"
    return devices[0].device_kind, len(devices), *(getattr(config, name) for name in names)


def _name(size):
    return "vmap" if size > 1 else "map"


def _too_much(config, size, needed, budget):
    flag = "clients_per_chunk" if size > 1 else "batch_size"
    value = size if size > 1 else config.batch_size
    there = "allowed by --memory_budget_gib" if config.memory_budget_gib else "free"
    return BadInput(
        f"--{flag}={value}: a round needs {needed / GIB:.3g} GiB, {budget / GIB:.3g} GiB are {there}; "
        f"try {max(value // 2, 1)}"
    )
