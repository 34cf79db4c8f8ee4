"""Settles what an `Execution` leaves open: in which form, and how many clients at once, a device computes."""

import dataclasses
import functools
import platform
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from sfl_jax.errors import BadInput
from sfl_jax.federated import execution, memory, processes
from sfl_jax.federated.balance import chunk_size, places_per_client
from sfl_jax.federated.execution import AUTO, Alternative, Execution
from sfl_jax.models import Profile
from sfl_jax.models.layers import FORMS

FAR_TOO_MUCH = 1.5  # times the budget: a round that is expected to need that is refused before it is compiled
GIB = 2**30


class Facts(NamedTuple):
    """What speed and memory of a round depend on.

    profile: of the network. slots: numbers that the optimiser keeps for each parameter. name: tells networks,
    types of numbers and sizes of images apart, where results are kept for later runs.
    """

    profile: Profile
    batch_size: int
    cohort_size: int
    slots: int
    devices: Sequence[Any]
    name: str = ""


def settle(
    asked: Execution,
    before: Execution | None,
    facts: Facts,
    seconds: Callable[[Alternative], float],
    notes: Path | None = None,
    placed_bytes: int = 0,
) -> tuple[Execution, dict[Alternative, float]]:
    """(`asked` with nothing left open, what was measured of each alternative). Its chunk is the one that
    runs: no larger than what a device has to do.

    Args:
      before: the execution of the run that goes on. Its choices stay, since others would round otherwise.
      seconds: measures an alternative; the first of several processes decides for all.
      notes: a file of what earlier runs measured, looked up first.
      placed_bytes: of each device, that the model and the samples take already.

    Raises:
      BadInput: the memory is far too small, whatever is chosen.
    """
    if before is not None:
        kept = {name: getattr(before, name) for name in asked.left_open}
        asked = dataclasses.replace(asked, **kept)
    forms = FORMS if asked.layer_form == AUTO else (asked.layer_form,)
    sizes = _sizes(asked, facts, budget_bytes(asked, facts.devices, placed_bytes))
    key = (*_circumstances(facts), *forms, *sizes)
    places = functools.partial(places_per_client, facts.cohort_size, devices=len(facts.devices))
    choice, tried = (notes and execution.remembered(notes, key)) or execution.choose(
        forms, sizes, seconds, places
    )
    if notes and tried:
        execution.remember(notes, key, choice, tried)
    form, size = processes.of_all((FORMS.index(choice.layer_form), choice.clients_per_chunk))[0].tolist()
    settled = {"layer_form": FORMS[form], "clients_per_chunk": size, "mode": _mode(size)}
    said = {"clients_per_chunk", *asked.left_open}
    return dataclasses.replace(asked, **{name: settled[name] for name in said}), tried


def fit(
    asked: Execution,
    opened: Collection[str],
    needed: Mapping[int, int],
    facts: Facts,
    placed_bytes: int = 0,
) -> Execution:
    """`asked` itself where a round in chunks of its size fits into the memory. Otherwise with the largest
    smaller size that promises to fit, if the size was left open. BadInput where there is none.

    needed: bytes by the size of the chunk, of all rounds that were compiled so far, this one included.
    """
    budget, size = budget_bytes(asked, facts.devices, placed_bytes), asked.clients_per_chunk
    if needed[size] <= budget:
        return asked
    smaller = sorted({chunk_size(facts.cohort_size, most, len(facts.devices)) for most in range(1, size)})
    if "clients_per_chunk" not in opened or not smaller:
        raise _too_much(asked, facts, size, needed[size], budget)
    promises = _promises(facts, needed)
    size = next((size for size in reversed(smaller) if promises(size) <= budget), smaller[0])
    changes = {"clients_per_chunk": size, "mode": _mode(size)}
    return dataclasses.replace(asked, **{name: changes[name] for name in changes if name in opened})


def _promises(facts, needed) -> Callable[[int], float]:
    """What a round is likely to need in chunks of another size: a line through what two needed, or what one
    needed in proportion to what was expected.
    """
    (size, bytes_), *larger = sorted(needed.items())
    if larger:
        slope = (larger[0][1] - bytes_) / (larger[0][0] - size)
        return lambda other: bytes_ + slope * (other - size)
    scale = bytes_ / expected_bytes(facts, size)
    return lambda other: scale * expected_bytes(facts, other)


def budget_bytes(asked: Execution, devices: Sequence[Any], placed_bytes: int = 0) -> int:
    """The memory of each device that a round may take beside what is placed: that of the device that has
    least.
    """
    if asked.memory_budget_gib:
        return max(int(GIB * asked.memory_budget_gib) - placed_bytes, 0)
    own = [device for device in devices if device.process_index == jax.process_index()]
    host = zlib.crc32(platform.node().encode()) % 2**31
    sharers = len(own) * int((processes.of_all(host) == host).sum())
    # In GiB: what the processes tell each other are 32 bits.
    free = min(memory.available_bytes(device, sharers) for device in own) / GIB
    return int(GIB * processes.of_all(free).min())


def most_bytes(needed: int) -> int:
    """What the process that needs most needs, so that all decide alike."""
    return int(GIB * processes.of_all(needed / GIB).max())


def expected_bytes(facts: Facts, clients_per_chunk: int) -> int:
    """Roughly what a round of such chunks needs."""
    return memory.expected_bytes(facts.profile, facts.batch_size, clients_per_chunk, facts.slots)


def _sizes(asked, facts, budget) -> list[int]:
    """The chunks to choose among: what is asked for and the memory is expected to hold."""
    cohort, devices = facts.cohort_size, len(facts.devices)
    most = 1 if asked.mode == "map" else asked.clients_per_chunk
    forced = most and chunk_size(cohort, most, devices)
    least = expected_bytes(facts, forced or 1)
    if least > FAR_TOO_MUCH * budget:
        raise _too_much(asked, facts, forced or 1, least, budget)
    if forced:
        return [forced]
    sizes = [
        size for size in execution.chunk_sizes(cohort, devices)
        if size == 1 or expected_bytes(facts, size) <= budget
    ]  # fmt: skip
    return [size for size in sizes if size > 1 or asked.mode != "vmap"] or sizes


def _circumstances(facts):
    """What the speed of an alternative depends on."""
    kind, number = facts.devices[0].device_kind, len(facts.devices)
    return kind, number, facts.name, facts.batch_size, facts.slots, facts.cohort_size


def _mode(size):
    return "vmap" if size > 1 else "map"


def _too_much(asked, facts, size, needed, budget):
    flag = "clients_per_chunk" if size > 1 else "batch_size"
    value = size if size > 1 else facts.batch_size
    there = "allowed by memory_budget_gib" if asked.memory_budget_gib else "free"
    return BadInput(
        f"{flag}={value}: a round needs {needed / GIB:.3g} GiB, {budget / GIB:.3g} GiB are {there}; "
        f"try {max(value // 2, 1)}"
    )
