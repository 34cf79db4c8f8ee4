"""What a run leaves on disk round by round, and where a run that was stopped goes on."""

import contextlib
import dataclasses
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sfl_jax import experiment, metrics, paths
from sfl_jax.checkpoints import Checkpoints, Progress
from sfl_jax.config import Config, changes, settings
from sfl_jax.errors import BadInput
from sfl_jax.federated import devices as federated_devices
from sfl_jax.files import NotWritten, ensure_ours, whole_file

LOG, CONFIG, PAGE = "metrics.jsonl", "config.json", "report.html"
# What is in every file of this name that this package writes: others are somebody's own.
MARKS = {CONFIG: b'"allow_config_change"', PAGE: b'<meta name="generator" content="sfl_jax">'}


def reached(config: Config, checkpoints: Checkpoints) -> Progress | None:
    """What the run in the workdir has reached; None where there is none.

    Raises:
      BadInput: it was made with other settings, none of its checkpoints can be used, it has none, or there
        are files of somebody else's where it would write.
    """
    log = _log_bytes(config.workdir)
    progress = checkpoints.newest(log)
    if progress is not None:
        _refuse(config, _differences(config, progress))
        return progress
    if log:
        raise BadInput(
            f"--workdir={config.workdir}: has a {LOG} but no checkpoint to go on from; choose another"
        )
    for name, mark in MARKS.items():
        ensure_ours(Path(config.workdir, name), mark, "workdir", config.workdir)
    return None


def saved(workdir: str) -> tuple[experiment.Experiment, experiment.State]:
    """The run in a workdir as its newest checkpoint has it, on whatever devices are here.

    Raises BadInput where there is none, where its dataset or fleet are not to be had any more, and where
    these or the weights that it began with have other contents: `trained` needs none of them.
    """
    config, checkpoints, progress = _newest(workdir)
    built = experiment.build(config, progress=progress)
    ensure_unchanged(built, progress)
    return built, experiment.resume(built, checkpoints, progress)


def trained(workdir: str) -> experiment.Trained:
    """What the run in a workdir has learned, from its newest checkpoint alone; BadInput where none is."""
    return experiment.trained(*_newest(workdir))


def ensure_unchanged(
    built: experiment.Experiment,
    progress: Progress | None = None,
    names: Sequence[str] = ("dataset", "fleet", "init_from"),
) -> None:
    """BadInput where inputs of an experiment are not those of the run in its workdir; `progress`: what that
    has reached, if known.
    """
    progress = progress or _newest(built.config.workdir)[2]
    now = {name: digest for name, digest in experiment.inputs(built).items() if name in names}
    if differ := _other_contents(built.config, progress, now):
        raise BadInput(
            f"{', '.join(differ)}: not what the run in --workdir={built.config.workdir} was made with"
        )


def _newest(workdir):
    """(settings, checkpoints, progress) of the newest checkpoint in a workdir; the devices are open."""
    workdir = paths.expand("workdir", workdir)
    config, _ = described(workdir)
    checkpoints = Checkpoints(Path(workdir) / "checkpoints", config.keep)
    progress = checkpoints.newest(_log_bytes(workdir))
    if progress is None:
        raise BadInput(f"--workdir={workdir}: no checkpoint is here")
    config = Config.from_dict(progress.settings | {"workdir": workdir, "devices": 0}, "report")
    return config, checkpoints, progress


def _log_bytes(workdir):
    path = Path(workdir) / LOG
    return path.read_bytes() if path.exists() else b""


def _differences(config, progress):
    """The settings that make other numbers than those of the rounds that are done.

    More rounds, or fewer, do where the rates of these depend on how many there are.
    """
    found = changes(progress.settings, config, "train")
    if "rounds" in found:
        was = dataclasses.replace(config, rounds=progress.settings["rounds"])
        done = range(min(progress.round, was.rounds, config.rounds))
        if all(experiment.learning_rate(config, i) == experiment.learning_rate(was, i) for i in done):
            del found["rounds"]
        else:
            cosine = config.learning_rate_schedule != "constant"
            flag = "learning_rate_schedule" if cosine else "warmup_rounds"
            reason = f"with --{flag}={getattr(config, flag)} the rates of all rounds depend on it"
            found["rounds"] = f"--rounds={config.rounds} (was {was.rounds}; {reason})"
    return [*found.values()]


def described(workdir: str) -> tuple[Config, dict[str, Any]]:
    """(settings, environment) of the run in a workdir. BadInput where there is none or it is damaged."""
    workdir = paths.expand("workdir", workdir)
    try:
        found = json.loads((Path(workdir) / CONFIG).read_bytes())
    except OSError as error:
        raise BadInput(f"--workdir={workdir}: no run is here, config.json cannot be read") from error
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{workdir}/config.json: is damaged ({error})") from error
    if not isinstance(found, dict):
        raise BadInput(f"{workdir}/config.json: is damaged (no settings)")
    environment = found.pop("environment", None)
    config = Config.from_dict(found | {"workdir": str(workdir)}, "report")  # its files may be gone by now
    return config, environment if isinstance(environment, dict) else {}


def logged(workdir: str) -> list[metrics.Round]:
    """The rounds of a run so far, but for a line that is not whole yet. BadInput where there are none, or the
    file is damaged.
    """
    path = Path(paths.expand("workdir", workdir)) / LOG
    try:
        *whole, _ = path.read_bytes().split(b"\n")
        lines = [metrics.Round(**json.loads(line)) for line in whole]
    except OSError as error:
        raise BadInput(f"--workdir={workdir}: no round is here, {LOG} cannot be read") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise BadInput(f"{path}: is damaged ({error})") from error
    are_numbers = all(isinstance(value, int | float | None) for line in lines for value in line)
    if not lines or not are_numbers or [line.round for line in lines] != list(range(1, len(lines) + 1)):
        raise BadInput(f"{path}: must hold rounds 1, 2, ..., one a line")
    return lines


def check_inputs(config: Config, progress: Progress, inputs: dict[str, str]) -> None:
    """BadInput where the dataset, the fleet or the weights to start from are not those of the run."""
    _refuse(config, _other_contents(config, progress, inputs))


def _other_contents(config, progress, inputs):
    differ = [name for name in inputs if inputs[name] != progress.inputs.get(name)]
    return [f"--{name}={getattr(config, name)} (has other contents now)" for name in differ]


def _refuse(config, differences):
    """BadInput names the differences; where they are allowed, each is said."""
    if config.allow_config_change:
        for difference in differences:
            logging.warning("--allow_config_change: going on with %s", difference)
    elif differences:
        raise BadInput(
            f"{', '.join(differences)}: the run in --workdir={config.workdir} was made with other settings; "
            "take those, or another --workdir, or --allow_config_change to go on all the same"
        )


class Recorder:
    """Writes config.json at the start, the line of every round, and a checkpoint where one is due.

    What the disk refuses raises NotWritten with --on_write_error=stop; with continue it is said, and what was
    not written is tried again with the next round or checkpoint.

    clock, compiling: the run's clocks. saved_round: that of the newest checkpoint.
    """

    def __init__(
        self,
        config: Config,
        checkpoints: Checkpoints,
        progress: Progress | None,
        clock: metrics.Stopwatch,
        compiling: metrics.CompileClock,
    ):
        self.config, self.checkpoints, self.clock, self.compiling = config, checkpoints, clock, compiling
        self.workdir = Path(config.workdir)
        self.saved_round = progress.round if progress else -1
        self.log = metrics.Log(self.workdir / LOG, progress.log_bytes if progress else 0)
        self._inputs: dict[str, str] = {}
        self._network: dict[str, Any] = {}
        self._saved_at = time.monotonic()

    def begin(
        self,
        state: experiment.State,
        inputs: dict[str, str],
        network: dict[str, Any],
        environment: dict[str, Any],
    ) -> None:
        """Describe the run, save its first state. BadInput or OSError where the disk does not let it."""
        self._inputs, self._network = inputs, network
        self.checkpoints.ensure_room(self.config.workdir, state.model)
        with whole_file(self.workdir / CONFIG) as file:
            described = settings(self.config, "train") | {"environment": environment}
            file.write(json.dumps(described, indent=2).encode())
        try:
            self.save(state, wait=True)
        except NotWritten as error:
            raise BadInput(f"--workdir={self.config.workdir}: {error}; choose another place") from error

    def add(self, state: experiment.State, line: metrics.Round) -> None:
        """The line of a round, and a checkpoint if it is time for one and the state is there still."""
        self._try(lambda: self.log.write(line))
        if self.is_due(state.round) and experiment.is_held(state):
            self.save(state)

    def is_due(self, round: int) -> bool:
        """Whether it is time for a checkpoint after so many rounds."""
        every, every_s = self.config.checkpoint_every_rounds, self.config.checkpoint_every_s
        late = every_s and time.monotonic() - self._saved_at >= every_s
        return bool(late or (every and round % every == 0))

    def save(self, state: experiment.State, wait: bool = False) -> None:
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

    def rescue(self, state: experiment.State) -> bool:
        """Save what is done, before an error ends the run; whether that is on the disk. Raises nothing: the
        error is what is to be said.
        """
        with contextlib.suppress(Exception):
            if experiment.is_held(state):
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
            self.log.sha256, settings(self.config, "train"), self._inputs, self._network,
        )  # fmt: skip
        self.checkpoints.save(federated_devices.on_first(state.model), progress)

    def _try(self, write) -> bool:
        """Whether it could be written."""
        try:
            write()
        except OSError as error:
            if self.config.on_write_error == "stop":
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
        state: experiment.State,
        inputs: dict[str, str],
        network: dict[str, Any],
        environment: dict[str, Any],
    ) -> None:
        pass

    def add(self, state: experiment.State, line: metrics.Round) -> None:
        pass

    def is_due(self, round: int) -> bool:
        return False

    def save(self, state: experiment.State, wait: bool = False) -> None:
        self.saved_round = state.round

    def came(self) -> list[int]:
        return []

    def mean_cuts(self) -> list[float]:
        return []

    def rescue(self, state: experiment.State) -> bool:
        return False

    def close(self) -> None:
        pass
