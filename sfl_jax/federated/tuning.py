"""Settles what an `Execution` leaves open: the form of the layers, and how many clients a device computes at
once.
"""

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
from sfl_jax.federated.cores import has_core_each
from sfl_jax.federated.execution import AUTO, Alternative, Execution
from sfl_jax.models import Profile
from sfl_jax.models.layers import FORMS

FAR_TOO_MUCH = 1.5  # a round expected to need more than this times the budget is refused before compiling
# From this many multiply-accumulates in a client's step on, several clients at once gain nothing on one core:
# the time around kernels no longer counts. B0's step at batch 32 has 1.5e9. There 2 to 5 clients at once take
# 1.16 to 1.20 times as long as one after the other (docs/log/compiling.md).
LONG_MACS = 1e9
GIB = 2**30


class Facts(NamedTuple):
    """What decides the speed and memory of a round.

    profile: of the network. slots: how many numbers the optimiser keeps for each parameter. name:
    distinguishes network, types of numbers and image size in the notes for later runs.
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
    """Returns (`asked` with nothing left open, the measured seconds of each alternative).

    The chunk size is the one that runs: no larger than what a device has to do.

    Args:
      before: the execution of the run that goes on. Its choices are kept, because others would round
        differently.
      seconds: measures an alternative. With several processes, the first one's choice counts for all.
      notes: a file with measurements of earlier runs, which is read first.
      placed_bytes: what the model and the samples already take on each device.

    Raises:
      BadInput: the memory is far too small for any choice.
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
    """Returns `asked` if a round in chunks of its size fits into the memory.

    If not, and the size was left open, returns it with the largest smaller size that should fit. BadInput if
    there is none. needed: bytes by chunk size, of all rounds compiled so far, with this one.
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
    """Returns an estimate of a round's bytes by chunk size.

    It is a line through two compiled rounds, or the estimate of `expected_bytes` scaled to one.
    """
    (size, bytes_), *larger = sorted(needed.items())
    if larger:
        slope = (larger[0][1] - bytes_) / (larger[0][0] - size)
        return lambda other: bytes_ + slope * (other - size)
    scale = bytes_ / expected_bytes(facts, size)
    return lambda other: scale * expected_bytes(facts, other)


def budget_bytes(asked: Execution, devices: Sequence[Any], placed_bytes: int = 0) -> int:
    """The bytes that a round may take on each device beside what is placed: the least over all devices."""
    if asked.memory_budget_gib:
        return max(int(GIB * asked.memory_budget_gib) - placed_bytes, 0)
    own = _own(devices)
    host = zlib.crc32(platform.node().encode()) % 2**31
    sharers = len(own) * int((processes.of_all(host) == host).sum())
    # In GiB, because processes exchange numbers of 32 bits.
    free = min(memory.available_bytes(device, sharers) for device in own) / GIB
    return int(GIB * processes.of_all(free).min())


def most_bytes(needed: int) -> int:
    """The bytes that the process with the largest need needs, so that all processes decide alike."""
    return int(GIB * processes.of_all(needed / GIB).max())


def expected_bytes(facts: Facts, clients_per_chunk: int) -> int:
    """A rough estimate of the bytes of a round with such chunks."""
    return memory.expected_bytes(facts.profile, facts.batch_size, clients_per_chunk, facts.slots)


def gains_from_one_alone(facts: Facts) -> bool:
    """Whether each device is a core that the step of one client keeps busy with large kernels."""
    macs = facts.batch_size * (facts.profile.forward_macs + facts.profile.backward_macs).sum()
    return bool(macs >= LONG_MACS) and has_core_each(_own(facts.devices))


def _sizes(asked, facts, budget) -> list[int]:
    """The chunk sizes to choose from: those that are asked for and should fit into the memory."""
    cohort, devices = facts.cohort_size, len(facts.devices)
    most = 1 if asked.mode == "map" else asked.clients_per_chunk
    forced = most and chunk_size(cohort, most, devices)
    least = expected_bytes(facts, forced or 1)
    if least > FAR_TOO_MUCH * budget:
        raise _too_much(asked, facts, forced or 1, least, budget)
    if forced:
        return [forced]
    if asked.mode == AUTO and gains_from_one_alone(facts):
        return [1]
    sizes = [
        size for size in execution.chunk_sizes(cohort, devices)
        if size == 1 or expected_bytes(facts, size) <= budget
    ]  # fmt: skip
    return [size for size in sizes if size > 1 or asked.mode != "vmap"] or sizes


def _own(devices):
    """Those of this process."""
    return [device for device in devices if device.process_index == jax.process_index()]


def _circumstances(facts):
    """What decides the speed of an alternative."""
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
