"""What a run leaves on disk round by round."""

import contextlib
import dataclasses
import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sfl_jax import paths
from sfl_jax.errors import BadInput
from sfl_jax.federated import devices as federated_devices
from sfl_jax.files import NotWritten, whole_file
from sfl_jax.run import metrics
from sfl_jax.run.checkpoints import Checkpoints, Progress
from sfl_jax.run.state import State, is_held

LOG, CONFIG, PAGE = "metrics.jsonl", "config.json", "report.html"
# What is in every file of this name that this package writes: others are somebody's own.
MARKS = {CONFIG: b'"allow_config_change"', PAGE: b'<meta name="generator" content="sfl_jax">'}


def logged(workdir: str) -> list[metrics.Round]:
    """The rounds of a run so far, but for a line that is not whole yet. BadInput where there are none, or the
    file is damaged.
    """
    path = Path(paths.expand("workdir", workdir)) / LOG
    try:
        *whole, _ = path.read_bytes().split(b"\n")
        lines = [metrics.Round(**json.loads(line)) for line in whole]
    except OSError as error:
        raise BadInput(f"workdir={workdir}: no round is here, {LOG} cannot be read") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise BadInput(f"{path}: is damaged ({error})") from error
    are_numbers = all(isinstance(value, int | float | None) for line in lines for value in line)
    if not lines or not are_numbers or [line.round for line in lines] != list(range(1, len(lines) + 1)):
        raise BadInput(f"{path}: must hold rounds 1, 2, ..., one a line")
    return lines


@dataclasses.dataclass(frozen=True)
class Saving:
    """When a run is saved: every so many rounds or seconds, 0 for never by that clock alone.

    stops: whether a disk that refuses a file ends the run with NotWritten. Otherwise a warning says it, and
    what was not written is tried again with the next round or checkpoint.
    """

    every_rounds: int = 0
    every_s: float = 300.0
    stops: bool = True


class Recorder:
    """Writes config.json at the start, the line of every round, and a checkpoint where one is due.

    settings: what describes the run in config.json and in its checkpoints. clock, compiling: the run's
    clocks. saved_round: that of the newest checkpoint.
    """

    def __init__(
        self,
        workdir: str,
        saving: Saving,
        settings: Mapping[str, Any],
        checkpoints: Checkpoints,
        progress: Progress | None,
        clock: metrics.Stopwatch,
        compiling: metrics.CompileClock,
    ):
        self.saving, self.settings = saving, dict(settings)
        self.checkpoints, self.clock, self.compiling = checkpoints, clock, compiling
        self.workdir = Path(workdir)
        self.saved_round = progress.round if progress else -1
        self.log = metrics.Log(self.workdir / LOG, progress.log_bytes if progress else 0)
        self._inputs: dict[str, str] = {}
        self._network: dict[str, Any] = {}
        self._saved_at = time.monotonic()

    def begin(
        self,
        state: State,
        inputs: dict[str, str],
        network: dict[str, Any],
        environment: dict[str, Any],
    ) -> None:
        """Describe the run, save its first state. BadInput or OSError where the disk does not let it."""
        self._inputs, self._network = inputs, network
        self.checkpoints.ensure_room(str(self.workdir), state.model)
        with whole_file(self.workdir / CONFIG) as file:
            described = self.settings | {"environment": environment}
            file.write(json.dumps(described, indent=2).encode())
        try:
            self.save(state, wait=True)
        except NotWritten as error:
            raise BadInput(f"workdir={self.workdir}: {error}; choose another place") from error

    def add(self, state: State, line: metrics.Round) -> None:
        """The line of a round, and a checkpoint if it is time for one and the state is there still."""
        self._try(lambda: self.log.write(line))
        if self.is_due(state.round) and is_held(state):
            self.save(state)

    def is_due(self, round: int) -> bool:
        """Whether it is time for a checkpoint after so many rounds."""
        every, every_s = self.saving.every_rounds, self.saving.every_s
        late = every_s and time.monotonic() - self._saved_at >= every_s
        return bool(late or (every and round % every == 0))

    def save(self, state: State, wait: bool = False) -> None:
        """A checkpoint of `state`, unless it has one; `wait`: until it is on the disk."""
        self._wait()  # a writing that failed since was none
        if state.round != self.saved_round and self._try(lambda: self._save(state)):
            self.saved_round, self._saved_at = state.round, time.monotonic()
        if wait:
            self._wait()

    def _wait(self):
        own, self.saved_round = self.saved_round, -1  # also where it raises
        if self._try(self.checkpoints.wait):
            self.saved_round = own

    def came(self) -> list[int]:
        """How many clients' work went into each round, of the lines that are still to be written too."""
        return self.log.came

    def mean_cuts(self) -> list[float]:
        """Of those of each round to which somebody came."""
        return self.log.mean_cuts

    def rescue(self, state: State) -> bool:
        """Save what is done, before an error ends the run; whether that is on the disk. Raises nothing: the
        error is what is to be said.
        """
        with contextlib.suppress(Exception):
            if is_held(state):
                self.save(state, wait=True)
        return self.saved_round == state.round

    def close(self) -> None:
        """Nothing is written after it, so that the workdir can be another's."""
        self.checkpoints.close()
        self.log.close()

    def _save(self, state):
        self.log.sync()
        progress = Progress(
            state.round, state.simulated_s, self.clock.seconds, self.compiling.seconds, self.log.bytes,
            self.log.sha256, self.settings, self._inputs, self._network,
        )  # fmt: skip
        self.checkpoints.save(federated_devices.on_first(state.model), progress)

    def _try(self, write) -> bool:
        """Whether it could be written."""
        try:
            write()
        except OSError as error:
            if self.saving.stops:
                raise NotWritten(str(error)) from error
            logging.warning("not written: %s", error)
            return False
        return True


class Silent(Recorder):
    """The recorder of a process that leaves the writing to another."""

    def __init__(self, clock: metrics.Stopwatch, compiling: metrics.CompileClock):
        self.clock, self.compiling = clock, compiling

    def begin(
        self,
        state: State,
        inputs: dict[str, str],
        network: dict[str, Any],
        environment: dict[str, Any],
    ) -> None:
        pass

    def add(self, state: State, line: metrics.Round) -> None:
        pass

    def is_due(self, round: int) -> bool:
        return False

    def save(self, state: State, wait: bool = False) -> None:
        self.saved_round = state.round

    def came(self) -> list[int]:
        return []

    def mean_cuts(self) -> list[float]:
        return []

    def rescue(self, state: State) -> bool:
        return False

    def close(self) -> None:
        pass
