"""What a run measures: a line of JSON a round, and clocks that keep compiling apart from training."""

import hashlib
import json
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax


class Round(NamedTuple):
    """One line of metrics.jsonl. None where a round was not evaluated.

    round_s, bound_s, simulated_s: seconds of the simulated fleet; wall_s and client_samples_per_s are clocks
    of this machine. The bytes are those of all clients that came, see `ledger`; older runs noted none.
    """

    round: int
    train_loss: float
    test_loss: float | None
    test_accuracy: float | None
    round_s: float
    bound_s: float
    simulated_s: float
    wall_s: float
    client_samples_per_s: float
    clients: int
    mean_cut: float
    model_down_bytes: int = 0
    smashed_up_bytes: int = 0
    labels_up_bytes: int = 0
    gradient_down_bytes: int = 0
    model_up_bytes: int = 0


def attendance(cohort_size: int, clients: int, came: Sequence[int]) -> str:
    """ "4 of 100 clients, of which 2.3 contributed on average"; `came`: how many did in each round."""
    asked = f"{cohort_size} of {clients} clients"
    mean = sum(came) / max(len(came), 1)
    return (
        asked if mean == cohort_size or not came else f"{asked}, of which {mean:.1f} contributed on average"
    )


class Log:
    """metrics.jsonl, of which the first `kept_bytes` stay; never half a line of it is on the disk for long.

    bytes, sha256: of the lines that are on the disk. came, mean_cuts: of every round, also of lines that are
    still to be written; no cut of a round to which nobody came.
    """

    def __init__(self, path: Path, kept_bytes: int = 0):
        path.touch()
        self.path = path
        self._file = path.open("r+b", buffering=0)
        self._file.truncate(kept_bytes)
        kept = self._file.read()
        self._digest = hashlib.sha256(kept)
        self._pending = b""
        lines = [json.loads(line) for line in kept.splitlines()]
        self.came: list[int] = [line["clients"] for line in lines]
        self.mean_cuts: list[float] = [line["mean_cut"] for line in lines if line["mean_cut"] is not None]
        self.bytes = kept_bytes

    def write(self, metrics: Round) -> None:
        """Add a line. OSError where it cannot be written; it is tried again with the next."""
        values = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in metrics._asdict().items()
        }
        self._pending += json.dumps(values).encode() + b"\n"
        self.came.append(metrics.clients)
        self.mean_cuts += [metrics.mean_cut] if math.isfinite(metrics.mean_cut) else []
        self.flush()

    def flush(self) -> None:
        """Write the lines that could not be written before. OSError where that fails again."""
        rest = self._pending
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError:
            self._file.truncate(self.bytes)
            self._file.seek(self.bytes)
            raise
        self._digest.update(self._pending)
        self.bytes += len(self._pending)
        self._pending = b""

    def sync(self) -> None:
        """Flush, and wait until the disk has it all."""
        self.flush()
        os.fsync(self._file.fileno())

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def close(self) -> None:
        self._file.close()


class CompileClock:
    """Seconds that JAX spends tracing, lowering and compiling, and how often it compiles, within a `with`."""

    def __init__(self, seconds: float = 0.0):
        self.seconds, self.compilations = seconds, 0

    def __enter__(self) -> "CompileClock":
        jax.monitoring.register_event_duration_secs_listener(self._add)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._add)

    def _add(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event.startswith("/jax/core/compile/"):
            self.seconds += duration_secs
            self.compilations += event.endswith("backend_compile_duration")


class Stopwatch:
    """Wall seconds since it was made, added to those of before."""

    def __init__(self, before_s: float = 0.0):
        self._start = time.perf_counter() - before_s

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start
