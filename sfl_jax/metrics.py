"""What a run measures: a line of JSON a round, and clocks that keep compiling apart from training."""

import json
import math
import time
from pathlib import Path
from typing import IO, NamedTuple

import jax


class Round(NamedTuple):
    """One line of metrics.jsonl. None where a round was not evaluated.

    round_s, bound_s, simulated_s: seconds of the simulated fleet; the others are clocks of this machine.
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


class Log:
    """metrics.jsonl, appended line by line; each line is on disk when `write` returns to its caller."""

    def __init__(self, path: Path):
        self._file: IO[str] = path.open("a", encoding="utf-8")

    def write(self, metrics: Round) -> None:
        values = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in metrics._asdict().items()
        }
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class CompileClock:
    """Seconds that JAX spent tracing, lowering and compiling, and how often it compiled, since this clock
    was made.
    """

    def __init__(self):
        self.seconds, self.compilations = 0.0, 0
        jax.monitoring.register_event_duration_secs_listener(self._add)

    def _add(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event.startswith("/jax/core/compile/"):
            self.seconds += duration_secs
            self.compilations += event.endswith("backend_compile_duration")


class Stopwatch:
    """Wall seconds since it was made."""

    def __init__(self):
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start
