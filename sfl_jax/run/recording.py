"""Writes a run's files round by round."""

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
from sfl_jax.files import CONFIG, HTML_MARK, NotWritten, whole_file
from sfl_jax.run import metrics
from sfl_jax.run.checkpoints import Checkpoints, Progress
from sfl_jax.run.state import State, is_held

LOG, PAGE = "metrics.jsonl", "report.html"
# Every file of this name that this package writes contains this text. A file without it belongs to the user.
MARKS = {CONFIG: b'"allow_config_change"', PAGE: HTML_MARK}


def logged(workdir: str) -> list[metrics.Round]:
    """Returns the rounds of a run from its metrics.jsonl, without an unfinished last line.

    Raises BadInput if there are no rounds, or if the file is damaged.
    """
    path = Path(paths.expand("workdir", workdir)) / LOG
    try:
        *whole, _ = path.read_bytes().split(b"\n")
        lines = [metrics.Round.from_json(json.loads(line)) for line in whole]
    except OSError as error:
        raise BadInput(f"workdir={workdir}: has no rounds; {LOG} cannot be read") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise BadInput(f"{path}: is damaged ({error})") from error
    values = [value for line in lines for value in line.to_json().values()]
    are_numbers = all(isinstance(value, int | float | None) for value in values)
    if not lines or not are_numbers or [line.round for line in lines] != list(range(1, len(lines) + 1)):
        raise BadInput(f"{path}: must hold rounds 1, 2, ..., one a line")
    return lines


@dataclasses.dataclass(frozen=True)
class Saving:
    """When a run saves checkpoints: every `every_rounds` rounds and every `every_s` seconds. 0 turns a rule
    off.

    stops: whether the run ends with NotWritten if the disk refuses a file. If not, the run warns and goes on.
    The next round or checkpoint tries again.
    """

    every_rounds: int = 0
    every_s: float = 300.0
    stops: bool = True


class Recorder:
    """Writes config.json at the start, a line for every round, and checkpoints when they are due.

    settings: describe the run in config.json and in its checkpoints. clock, compiling: the run's clocks.
    saved_round: the round of the newest checkpoint.
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
        """Writes config.json and saves the first state. Raises BadInput or OSError if the disk refuses."""
        self._inputs, self._network = inputs, network
        self.checkpoints.ensure_room(str(self.workdir), state.model)
        with whole_file(self.workdir / CONFIG) as file:
            described = self.settings | {"environment": environment}
            file.write(json.dumps(described, indent=2).encode())
        try:
            self.save(state, wait=True)
        except NotWritten as error:
            raise BadInput(f"workdir={self.workdir}: {error}; choose another place") from error

    def add(self, state: State, line: metrics.Round) -> metrics.Round:
        """Writes the line of a round. Saves a checkpoint if one is due and the state is still held.

        Returns the line as it is written, with the compiling so far.
        """
        line = line._replace(compile_wall_s=self.compiling.seconds)
        self._try(lambda: self.log.write(line))
        if self.is_due(state.round) and is_held(state):
            self.save(state)
        return line

    def is_due(self, round: int) -> bool:
        """Whether a checkpoint is due after `round` rounds."""
        every, every_s = self.saving.every_rounds, self.saving.every_s
        late = every_s and time.monotonic() - self._saved_at >= every_s
        return bool(late or (every and round % every == 0))

    def save(self, state: State, wait: bool = False) -> None:
        """Saves a checkpoint of `state` unless there is one. `wait`: return when it is on the disk."""
        self._wait()  # if the last writing failed, saved_round must say so first
        if state.round != self.saved_round and self._try(lambda: self._save(state)):
            self.saved_round, self._saved_at = state.round, time.monotonic()
        if wait:
            self._wait()

    def _wait(self):
        own, self.saved_round = self.saved_round, -1  # stays -1 if waiting raises
        if self._try(self.checkpoints.wait):
            self.saved_round = own

    def came(self) -> list[int]:
        """How many clients contributed to each round, also to rounds whose lines are not written yet."""
        return self.log.came

    def mean_cuts(self) -> list[float]:
        """The mean cut of each round to which somebody came."""
        return self.log.mean_cuts

    def rescue(self, state: State) -> bool:
        """Saves the state before an error ends the run. Returns whether the state is on the disk. Raises
        nothing, so that the first error is the one that is reported.
        """
        with contextlib.suppress(Exception):
            if is_held(state):
                self.save(state, wait=True)
        return self.saved_round == state.round

    def close(self) -> None:
        """Ends all writing, so that another run may use the workdir."""
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
        """Whether the writing succeeded."""
        try:
            write()
        except OSError as error:
            if self.saving.stops:
                raise NotWritten(str(error)) from error
            logging.warning("not written: %s", error)
            return False
        return True


class Silent(Recorder):
    """The recorder of a process that writes nothing, because another process writes."""

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

    def add(self, state: State, line: metrics.Round) -> metrics.Round:
        return line

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
