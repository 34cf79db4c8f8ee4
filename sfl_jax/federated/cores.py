"""Makes devices of CPU cores. Imports only JAX, because it must run before JAX looks for devices."""

import os
from collections.abc import Sequence
from typing import Any

import jax
from jax._src import xla_bridge  # nothing public knows whether JAX has looked for devices

_FORCED = "xla_force_host_platform_device_count"
# Seconds until XLA says that a device waits for another, and then until it ends the process; else 20, 40.
_PATIENCE_S = {
    "xla_cpu_collective_call_warn_stuck_timeout_seconds": 3600,
    "xla_cpu_collective_call_terminate_timeout_seconds": 1_000_000,
}


def cores_as_devices(most: int) -> None:
    """Makes a device of each CPU core that this process may use, at most `most`.

    Several CPU devices that each compute one client are faster than one device that computes a client with
    all cores. A device that computes alone still uses all cores. This has an effect only before JAX has
    looked for devices, in a run of one process. JAX_NUM_CPU_DEVICES or XLA_FLAGS override it if they say how
    many devices the CPU has.

    At the end of a round a device may wait for another by as long as a client trains. XLA takes that for an
    error, so it is told to wait, unless XLA_FLAGS say how long.
    """
    if xla_bridge.backends_are_initialized():
        return
    flags = os.environ.get("XLA_FLAGS", "")
    patient = [f"--{name}={seconds}" for name, seconds in _PATIENCE_S.items() if name not in flags]
    os.environ["XLA_FLAGS"] = " ".join([flags, *patient]).strip()
    said = jax.config.jax_num_cpu_devices >= 0 or _FORCED in flags  # pyright: ignore[reportAttributeAccessIssue] set by JAX at run time
    if said or jax.distributed.is_initialized():
        return
    jax.config.update("jax_num_cpu_devices", max(1, min(most, _own())))


def has_core_each(devices: Sequence[Any]) -> bool:
    """Whether these devices of one process are CPU cores, so that none computes with several cores."""
    return devices[0].platform == "cpu" and len(devices) >= _own()


def _own() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
