"""Settings that are left open: in which form, and how many clients at once, a device computes."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from sfl_jax import models
from sfl_jax.config import LAYER_FORMS, Config, left_open
from sfl_jax.errors import BadInput
from sfl_jax.federated import execution, memory, processes
from sfl_jax.federated.balance import chunk_size
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
) -> tuple[Config, dict[Execution, float]]:
    """(`config` with nothing left open, what was measured of each alternative).

    Args:
      before: the settings of the run that goes on. Its choices stay, since others would round otherwise.
      profile: of the network.
      seconds: measures an alternative; the first of several processes decides for all.
      notes: a file of what earlier runs measured, looked up first.

    Raises:
      BadInput: the memory is far too small, whatever is chosen.
    """
    if before is not None:
        config = dataclasses.replace(config, **{name: before[name] for name in left_open(config)})
    forms = LAYER_FORMS if config.layer_form == "auto" else (config.layer_form,)
    sizes = _sizes(config, profile, devices)
    key = (*_circumstances(config, devices), *forms, *sizes)
    choice, tried = (notes and execution.remembered(notes, key)) or execution.choose(forms, sizes, seconds)
    if notes and tried:
        execution.remember(notes, key, choice, tried)
    form, size = processes.of_all((LAYER_FORMS.index(choice.layer_form), choice.clients_per_chunk))[
        0
    ].tolist()
    settled = {"layer_form": LAYER_FORMS[form], "clients_per_chunk": size, "execution": _name(size)}
    return dataclasses.replace(config, **{name: settled[name] for name in left_open(config)}), tried


def fit(config: Config, is_open: bool, needed_bytes: int, devices: Sequence[Any]) -> Config:
    """`config` itself where a round that needs so much fits into the memory; else, where the chunk `is_open`,
    with one of half the size. BadInput where there is no way.
    """
    budget = budget_bytes(config, devices)
    if needed_bytes <= budget:
        return config
    size = config.clients_per_chunk
    if is_open and size > 1:
        return dataclasses.replace(config, clients_per_chunk=size // 2, execution=_name(size // 2))
    raise _too_much(config, size, needed_bytes, budget)


def budget_bytes(config: Config, devices: Sequence[Any]) -> int:
    """The memory of each device that a round may take: that of the device that has least."""
    if config.memory_budget_gib:
        return int(GIB * config.memory_budget_gib)
    own = [device for device in devices if device.process_index == jax.process_index()]
    # In GiB: what the processes tell each other are 32 bits.
    return int(GIB * processes.of_all(min(map(memory.available_bytes, own)) / GIB).min())


def expected_bytes(config: Config, profile: models.Profile, clients_per_chunk: int) -> int:
    """Roughly what a round of such chunks needs."""
    moments = 2 if config.optimizer == "adam" else int(config.momentum > 0)
    return memory.expected_bytes(profile, config.batch_size, clients_per_chunk, moments)


def _sizes(config, profile, devices) -> list[int]:
    """The chunks to choose among: what the flags allow and the memory is expected to hold."""
    budget = budget_bytes(config, devices)
    forced = 1 if config.execution == "map" else config.clients_per_chunk
    least = expected_bytes(config, profile, forced or 1)
    if least > FAR_TOO_MUCH * budget:
        raise _too_much(config, forced or 1, least, budget)
    if forced:
        return [chunk_size(config.cohort_size, forced, len(devices))]
    most = next(
        size for size in (*reversed(execution.CHUNKS), 0)
        if size <= 1 or expected_bytes(config, profile, size) <= budget
    )  # fmt: skip
    sizes = execution.chunk_sizes(config.cohort_size, len(devices), max(most, 1))
    return [size for size in sizes if size > 1 or config.execution != "vmap"] or sizes


def _circumstances(config, devices):
    """What the speed of an alternative depends on."""
    names = "model", "image_size", "batch_size", "compute_dtype", "optimizer", "momentum"
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
