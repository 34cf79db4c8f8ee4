"""The processes of a run on several hosts: how they meet, which one writes, and how they end.

Every process runs the same program, plans every round itself and holds the same model. Each computes its own
clients, see `devices.py`. Only the first writes.
"""

import contextlib
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax._src import distributed  # nothing public knows whom JAX waits for
from jax.experimental import multihost_utils

from sfl_jax.errors import BadInput

LOST, UNREACHABLE = 1, 2  # exit codes: another process is gone, or never came
SAID_S, OTHERS_SAID_S = 1, 10  # seconds until the first process says that it waits; until the others do
SPARE_S = 60
_TASKS = ("OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")  # the innermost comes first
ALONE_WAY = "num_processes=1 trains alone"
# JAX's messages if there is nobody to meet: it found nothing, or it is at work already, for example in the
# second run of a notebook.
ALONE = ("coordinator_address should be defined", "before any JAX calls")


def join(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    join_timeout_s: int = 300,
    heartbeat_s: int = 100,
    words: Callable[[str], str] = str,
) -> None:
    """Meets the other processes of this run. Returns at once if there are none.

    They are given by the arguments. If not, JAX finds them under SLURM's srun, Open MPI's mpirun, on Cloud
    TPU pods and in GKE. Call this before JAX computes anything.

    words: turns names and values in messages into those that the user knows.

    Raises:
      BadInput: the arguments do not fit together, or the others cannot be reached.
    """
    given = {
        "coordinator_address": coordinator_address,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    if num_processes == 1 or jax.distributed.is_initialized():
        return
    asked = any(value is not None for value in given.values()) or "JAX_COORDINATOR_ADDRESS" in os.environ
    if not asked and _is_the_only_task(os.environ):
        return
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM away from the command
    try:
        with _patience(join_timeout_s, words):
            jax.distributed.initialize(
                **given,
                initialization_timeout=join_timeout_s + SPARE_S,
                heartbeat_timeout_seconds=heartbeat_s,
                shutdown_timeout_seconds=heartbeat_s,
            )
    except (ValueError, RuntimeError, LookupError) as error:
        if asked or not any(words in str(error) for words in ALONE):
            raise BadInput(_unreachable(coordinator_address, error)) from error


def _is_the_only_task(variables: Mapping[str, str]) -> bool:
    """Whether SLURM or Open MPI started a single task. Then no other comes.

    Tasks of Open MPI inherit the variables of SLURM's task. A step may have fewer tasks than its job, for
    example the shell of salloc.
    """
    counts = (variables.get(name) for name in _TASKS)
    return next(filter(None, counts), "") == "1"


@contextlib.contextmanager
def _patience(timeout_s: float, words: Callable[[str], str]) -> Iterator[None]:
    """While the processes meet, says whom this one waits for. Ends it with code 2 after `timeout_s`.

    JAX itself gets more time, because it ends by an abort.
    """
    begun, met, state = time.monotonic(), threading.Event(), distributed.global_state

    def watch():
        if met.wait(SAID_S) or (state.process_id and met.wait(OTHERS_SAID_S)):
            return
        place = f"process {state.process_id} of {state.num_processes}: waiting for the others at"
        print(words(f"{place} {state.coordinator_address}; {ALONE_WAY}"), file=sys.stderr, flush=True)
        if not met.wait(begun + timeout_s - time.monotonic()):
            reason = f"join_timeout_s={timeout_s} is over"
            said = words(_unreachable(state.coordinator_address, reason))
            print(f"error: {said}", file=sys.stderr, flush=True)
            os._exit(UNREACHABLE)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        met.set()
        watcher.join()


def _unreachable(address: str | None, reason: object) -> str:
    address = address or "(as found)"
    return f"coordinator_address={address}: the other processes cannot be reached ({reason}); {ALONE_WAY}"


def is_first() -> bool:
    """Whether this process writes the files and lines of the run."""
    return jax.process_index() == 0


def say(line: str) -> None:
    """Prints a line on stderr, in the first process only."""
    if is_first():
        print(line, file=sys.stderr)


def is_alone() -> bool:
    """Whether there is no other process."""
    return jax.process_count() == 1


def of_all(value: Any) -> np.ndarray:
    """The numbers of each process, in order, as 32 bits; (processes, ...). All processes must call it."""
    own = np.asarray(value)
    return own[None] if is_alone() else np.asarray(multihost_utils.process_allgather(own))


def any_of(here: bool) -> bool:
    """Whether it is true in any process. All processes must call it."""
    return bool(of_all(here).any())


def agree(value: int, complaint: str) -> None:
    """Raises BadInput with this complaint if processes have different values. All processes must call it."""
    values = of_all(value)
    if (values != values[0]).any():
        raise BadInput(f"{complaint} (process by process: {', '.join(map(str, values))})")


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Lets only the first process print and warn in the block.

    If the block fails because another process is gone, this process ends at once with one line. A process
    that waits inside a collective cannot see that. JAX's heartbeat ends it, with a line of its own.
    """
    try:
        with contextlib.ExitStack() as stack:
            if not is_first():
                stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
                stack.callback(logging.disable, logging.root.manager.disable)
                logging.disable(logging.WARNING)
            yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        # XLA's messages begin with a status code. Errors on dispatch are ValueErrors.
        if jax.process_count() == 1 or not re.match(r"[A-Z_]+: ", str(error)):
            raise
        reason = " ".join(str(error).split())
        print(
            f"error: process {jax.process_index()} of {jax.process_count()} stops: it cannot reach the others"
            f" ({reason[:200]}); run the same command again to go on from the last checkpoint",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        os._exit(LOST)  # a normal exit would wait for the others
