"""What a scheme asks of the other parts of a run: those that cannot be are refused by name."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from sfl_jax.errors import BadInput
from sfl_jax.federated import devices as federated_devices
from sfl_jax.federated.execution import AUTO, Execution
from sfl_jax.fleet import Faults
from sfl_jax.planning import Planner
from sfl_jax.schemes import CHUNKS, DEADLINE, SEVERAL_DEVICES, Scheme


def planner_for(scheme: Scheme, planner: Planner) -> Planner:
    """The planner under the scheme's clock. Without a split there is nothing to choose."""
    if scheme.name == "fl":
        return dataclasses.replace(planner, method="no_split")
    if scheme.clock == "session":
        return planner
    if planner.barrier != "session":
        raise BadInput(f"barrier={planner.barrier}: scheme={scheme.name} has a clock of its own")
    return dataclasses.replace(planner, barrier=scheme.clock)


def devices_for(scheme: Scheme, count: int) -> list[Any]:
    """The devices to use, `count` of each process; 0 is all that the scheme can use."""
    if SEVERAL_DEVICES in scheme.allows:
        return federated_devices.choose_devices(count)
    if count > 1:
        raise BadInput(f"devices={count}: scheme={scheme.name} computes on one device")
    if jax.process_count() > 1:
        raise BadInput(f"num_processes={jax.process_count()}: scheme={scheme.name} computes on one device")
    return federated_devices.choose_devices(1)


def execution_for(scheme: Scheme, execution: Execution, cohort_size: int) -> Execution:
    """The execution with as many clients at once as the scheme must have."""
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
    """BadInput for a fault that the scheme cannot train with."""
    if skip_diverged and scheme.needs_equal_steps:
        raise BadInput(
            "on_divergence=skip_client: server_batch=joined needs every client, so that none can be left out"
        )
    if faults.deadline_factor and DEADLINE not in scheme.allows:
        raise BadInput(
            f"deadline_factor={faults.deadline_factor:g}: scheme={scheme.name} has no deadline, since a late "
            "client has moved the server already"
        )
    if faults.drop_probability and scheme.needs_equal_steps:
        raise BadInput(
            f"drop_probability={faults.drop_probability:g}: must be 0 with server_batch=joined, which needs "
            "every client"
        )


def check_steps(scheme: Scheme, division: Sequence[np.ndarray], batch_size: int) -> None:
    """BadInput where clients have other numbers of steps and the scheme needs equal ones."""
    steps = [max(len(share) // batch_size, 1) for share in division]
    if scheme.needs_equal_steps and len(set(steps)) > 1:
        raise BadInput(
            f"server_batch=joined: needs clients of equal numbers of steps; they have {min(steps)} to "
            f"{max(steps)} an epoch"
        )
