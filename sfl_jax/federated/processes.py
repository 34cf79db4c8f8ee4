"""The processes of a run on several hosts: how they find each other, which one speaks, how they end.

Every process runs the same program, plans every round by itself and holds the same model; `devices.py` sees
to it that each computes its own clients. Only the first writes.
"""

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from sfl_jax.config import Config
from sfl_jax.errors import BadInput

LOST = 1  # exit code where another process is gone


def join(config: Config) -> None:
    """Meet the other processes of this run, by the flags or as JAX finds them by itself: under SLURM's srun,
    Open MPI's mpirun, on Cloud TPU pods and in GKE. Alone where there are none.

    Must come before JAX computes anything. BadInput where the flags make no sense together.
    """
    given = {
        "coordinator_address": config.coordinator_address or None,
        "num_processes": config.num_processes or None,
        "process_id": None if config.process_id < 0 else config.process_id,
    }
    if config.num_processes == 1 or jax.distributed.is_initialized():
        return
    try:
        jax.distributed.initialize(
            **given,
            heartbeat_timeout_seconds=config.heartbeat_timeout_seconds,
            shutdown_timeout_seconds=config.heartbeat_timeout_seconds,
        )
    except (ValueError, RuntimeError) as error:
        # Nothing asked for and nothing found; or JAX is at work already, as in a notebook's second run.
        if any(value is not None for value in given.values()) or "JAX_COORDINATOR_ADDRESS" in os.environ:
            raise BadInput(f"--coordinator_address={config.coordinator_address}: {error}") from error


def is_first() -> bool:
    """Whether this process is the one that writes files and lines."""
    return jax.process_index() == 0


def is_alone() -> bool:
    """Whether there is no other process."""
    return jax.process_count() == 1


def of_all(value: Any) -> np.ndarray:
    """(processes, ...): a number or numbers of each process, as 32 bits, in their order; all must ask."""
    own = np.asarray(value)
    return own[None] if is_alone() else np.asarray(multihost_utils.process_allgather(own))


def any_of(here: bool) -> bool:
    """Whether it is true in any process; all must ask."""
    return bool(of_all(here).any())


def agree(value: int, complaint: str) -> None:
    """BadInput with this complaint where the processes have different values; all must ask."""
    values = of_all(value)
    if (values != values[0]).any():
        raise BadInput(f"{complaint} (process by process: {', '.join(map(str, values))})")


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Ends this process at once, with a line, where the block fails because another process is gone.

    A process that waits inside a collective cannot see that; JAX's heartbeat ends it, with a line of its own.
    """
    try:
        with contextlib.ExitStack() as stack:
            if not is_first():
                stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
            yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        # What XLA raises begins with a status code; it is a ValueError where it shows on dispatch.
        if jax.process_count() == 1 or not re.match(r"[A-Z_]+: ", str(error)):
            raise
        reason = " ".join(str(error).split())
        print(
            f"error: process {jax.process_index()} of {jax.process_count()} stops, since it cannot reach the"
            f" others ({reason[:200]}); the same command goes on from the last checkpoint",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        os._exit(LOST)  # the usual way out would wait for the others
