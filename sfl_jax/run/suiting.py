"""Checks that the other parts of a run suit its scheme."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from sfl_jax import optim
from sfl_jax.errors import BadInput
from sfl_jax.federated import devices as federated_devices
from sfl_jax.federated.execution import AUTO, Execution
from sfl_jax.federated.personal import LAYERS, STATISTICS, Personal
from sfl_jax.fleet import Faults
from sfl_jax.planning import WITHIN_MEMORY, Planner
from sfl_jax.registry import BATCH_NORMS
from sfl_jax.schemes import CHUNKS, DEADLINE, OWN_NORM, SEVERAL_DEVICES, Scheme


def planner_for(scheme: Scheme, planner: Planner) -> Planner:
    """The planner with the scheme's clock, and with its method if it has only one."""
    if scheme.only_method:
        planner = dataclasses.replace(planner, method=scheme.only_method)
    if scheme.clock == "session":
        return planner
    for name, wanted in (("barrier", "session"), ("band", "fixed")):
        if (value := getattr(planner, name)) != wanted:
            raise BadInput(f"{name}={value}: must be {wanted}; scheme={scheme.name} has its own clock")
    if scheme.clock in optim.CLOCKS and planner.method not in optim.STAGED_METHODS:
        raise BadInput(
            f"method={planner.method}: must be one of {', '.join(optim.STAGED_METHODS)} with"
            f" scheme={scheme.name}"
        )
    if planner.server_memory_bytes:
        raise BadInput(
            f"server_memory_bytes={planner.server_memory_bytes:g}: needs scheme=sfl, where the server holds a"
            f" half for every client, not {scheme.name}"
        )
    return dataclasses.replace(planner, barrier=scheme.clock)


def rivals_for(planner: Planner, rivals: Sequence[str]) -> tuple[str, ...]:
    """The methods whose plans keep the planner's limits: within the server's memory, those that know it."""
    if not planner.server_memory_bytes:
        return tuple(rivals)
    return tuple(name for name in rivals if name in WITHIN_MEMORY)


def check_rivals(planner: Planner, rivals: Sequence[str]) -> None:
    """BadInput for a rival whose plans do not keep the planner's limits."""
    for name in rivals:
        if name not in rivals_for(planner, rivals):
            raise BadInput(
                f"rivals: {name} does not know server_memory_bytes={planner.server_memory_bytes:g}; choose"
                f" some of {', '.join(WITHIN_MEMORY)}"
            )


def devices_for(scheme: Scheme, count: int) -> list[Any]:
    """The devices to use, `count` of each process. 0 means all that the scheme can use."""
    if SEVERAL_DEVICES in scheme.allows:
        return federated_devices.choose_devices(count)
    if count > 1:
        raise BadInput(f"devices={count}: must be 0 or 1 with scheme={scheme.name}")
    if jax.process_count() > 1:
        raise BadInput(f"num_processes={jax.process_count()}: must be 1 with scheme={scheme.name}")
    return federated_devices.choose_devices(1)


def execution_for(scheme: Scheme, execution: Execution, cohort_size: int) -> Execution:
    """The execution, with the number of clients at once that the scheme needs."""
    if CHUNKS in scheme.allows:
        return execution
    size = 1 if scheme.has_order else cohort_size
    asked, mode = execution.clients_per_chunk, "map" if size == 1 else "vmap"
    if asked not in (0, size):
        raise BadInput(f"clients_per_chunk={asked}: must be 0 or {size} with scheme={scheme.name}")
    if execution.mode not in (AUTO, mode):
        raise BadInput(f"execution={execution.mode}: must be {AUTO} or {mode} with scheme={scheme.name}")
    return dataclasses.replace(execution, clients_per_chunk=size, mode=mode)


def check_faults(scheme: Scheme, faults: Faults, skip_diverged: bool) -> None:
    """BadInput for a fault that the scheme does not allow."""
    if skip_diverged and scheme.needs_equal_steps:
        raise BadInput(
            "on_divergence=skip_client: must be stop with server_batch=joined, which needs every client"
        )
    if faults.deadline_factor and DEADLINE not in scheme.allows:
        raise BadInput(
            f"deadline_factor={faults.deadline_factor:g}: must be 0 with scheme={scheme.name}, where a late "
            "client has changed the server already"
        )
    if faults.drop_probability and scheme.needs_equal_steps:
        raise BadInput(
            f"drop_probability={faults.drop_probability:g}: must be 0 with server_batch=joined, which needs "
            "every client"
        )


def personal_for(scheme: Scheme, batch_norm: str, clients: int) -> Personal | None:
    """What each of the clients of the fleet keeps of its own, None where it is nothing."""
    if batch_norm not in BATCH_NORMS:
        raise BadInput(f"batch_norm={batch_norm}: must be one of {', '.join(BATCH_NORMS)}")
    if batch_norm != "averaged" and OWN_NORM not in scheme.allows:
        raise BadInput(
            f"batch_norm={batch_norm}: must be averaged with scheme={scheme.name}, whose clients share copies"
        )
    return Personal(batch_norm, clients) if batch_norm in (STATISTICS, LAYERS) else None


def check_steps(scheme: Scheme, division: Sequence[np.ndarray], batch_size: int) -> None:
    """BadInput if the scheme needs equal numbers of steps and the clients' numbers differ."""
    steps = [max(len(share) // batch_size, 1) for share in division]
    if scheme.needs_equal_steps and len(set(steps)) > 1:
        raise BadInput(
            f"server_batch=joined: needs the same number of steps from every client; they have {min(steps)} "
            f"to {max(steps)} in an epoch"
        )
