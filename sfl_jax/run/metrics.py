"""The lines of metrics.jsonl, and clocks that keep compiling apart from training."""

import hashlib
import json
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

# The fields of a line that are clocks of this machine.
CLOCKS = ("wall_s", "client_samples_per_s", "train_wall_s", "test_wall_s", "compile_wall_s")


class Round(NamedTuple):
    """One line of metrics.jsonl. The test numbers are None if the round was not evaluated.

    round_s, bound_s, simulated_s: seconds of the simulated fleet. wall_s, client_samples_per_s: clocks of
    this machine, and so are train_wall_s and test_wall_s, of this round alone, and compile_wall_s, of all
    compiling so far. client_accuracy_mean, client_accuracy_worst: over all clients, see `clients.accuracies`.
    The other fields are those of `Ledger`. Fields with a default are None in lines of releases without them.
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
    client_accuracy_mean: float | None = None
    client_accuracy_worst: float | None = None
    train_wall_s: float | None = None
    test_wall_s: float | None = None
    compile_wall_s: float | None = None
    model_down_bytes: int | None = None
    smashed_up_bytes: int | None = None
    labels_up_bytes: int | None = None
    gradient_down_bytes: int | None = None
    model_up_bytes: int | None = None
    client_peak_bytes: int | None = None
    server_peak_bytes: int | None = None
    client_flop: int | None = None
    server_flop: int | None = None

    @classmethod
    def from_json(cls, values: Any) -> "Round":
        """The round with these values. Raises TypeError for missing or unknown names."""
        return cls(**values)

    def to_json(self) -> dict[str, int | float | None]:
        """The values of the line by name. A number that is not finite becomes None."""
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in self._asdict().items()
        }


def attendance(cohort_size: int, clients: int, came: Sequence[int]) -> str:
    """For example "4 of 100 clients, of which 2.3 contributed on average". came: the number in each round."""
    asked = f"{cohort_size} of {clients} clients"
    mean = sum(came) / max(len(came), 1)
    return (
        asked if mean == cohort_size or not came else f"{asked}, of which {mean:.1f} contributed on average"
    )


class Log:
    """Writes metrics.jsonl after its first `kept_bytes`. Half a line never stays on the disk.

    bytes, sha256: size and digest of the lines on the disk. came, mean_cuts: from every round, also from
    lines that are not on the disk yet. A round to which nobody came has no mean cut.
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
        """Adds a line. Raises OSError if the disk refuses it; the next write tries it again."""
        self._pending += json.dumps(metrics.to_json()).encode() + b"\n"
        self.came.append(metrics.clients)
        self.mean_cuts += [metrics.mean_cut] if math.isfinite(metrics.mean_cut) else []
        self.flush()

    def flush(self) -> None:
        """Writes the lines that the disk refused before. Raises OSError if that fails again."""
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
        """Flushes, then waits until all lines are on the disk."""
        self.flush()
        os.fsync(self._file.fileno())

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def close(self) -> None:
        self._file.close()


class CompileClock:
    """Counts JAX's compilations within a `with`, and the seconds of tracing, lowering and compiling."""

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
    """Wall seconds since it was made, plus `before_s`."""

    def __init__(self, before_s: float = 0.0):
        self._start = time.perf_counter() - before_s

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start
