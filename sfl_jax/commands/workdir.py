"""The run in a workdir: how far it has come, and whether a command goes on with it."""

import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sfl_jax import paths
from sfl_jax.commands import parts
from sfl_jax.commands.config import Config, changes
from sfl_jax.commands.parts import Built, Trained
from sfl_jax.errors import BadInput
from sfl_jax.files import CONFIG, ensure_ours
from sfl_jax.fleet import Sampling
from sfl_jax.run.checkpoints import Checkpoints, Progress
from sfl_jax.run.recording import LOG, MARKS
from sfl_jax.run.state import State, resume


def reached(config: Config, checkpoints: Checkpoints) -> Progress | None:
    """The progress of the run in the workdir, or None if there is no run.

    Raises:
      BadInput: the run has other settings, has no usable checkpoint, or files of the user's own are in the
        way.
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


def saved(workdir: str) -> tuple[Built, State]:
    """The run in a workdir from its newest checkpoint, on the devices that are here.

    Raises BadInput if there is no run, if its dataset or fleet is missing, or if these or its initial weights
    have other contents now. `trained` needs none of them.
    """
    config, checkpoints, progress = _newest(workdir)
    built = parts.build(config, progress=progress)
    ensure_unchanged(built, progress)
    return built, resume(built.parts, checkpoints, progress)


def trained(workdir: str) -> Trained:
    """What the run in a workdir has learned, from its newest checkpoint alone. BadInput if there is none."""
    return parts.trained(*_newest(workdir))


def ensure_unchanged(
    built: Built,
    progress: Progress | None = None,
    names: Sequence[str] = ("dataset", "fleet", "availability", "init_from"),
) -> None:
    """BadInput if the inputs of an experiment are not those of the run in its workdir.

    progress: that of the run, if known.
    """
    progress = progress or _newest(built.config.workdir)[2]
    now = {name: digest for name, digest in parts.inputs(built).items() if name in names}
    if differ := _other_contents(built.config, progress, now):
        raise BadInput(f"{', '.join(differ)}: not the inputs of the run in --workdir={built.config.workdir}")


def _newest(workdir):
    """(settings, checkpoints, progress) from the newest checkpoint in a workdir. Any devices will do."""
    workdir = paths.expand("workdir", workdir)
    config, _ = described(workdir)
    checkpoints = Checkpoints(Path(workdir) / "checkpoints", config.keep)
    progress = checkpoints.newest(_log_bytes(workdir))
    if progress is None:
        raise BadInput(f"--workdir={workdir}: has no checkpoint")
    config = Config.from_dict(progress.settings | {"workdir": workdir, "devices": 0}, "report")
    return config, checkpoints, progress


def _log_bytes(workdir):
    path = Path(workdir) / LOG
    return path.read_bytes() if path.exists() else b""


def _differences(config, progress):
    """The settings that would have made other numbers in the finished rounds.

    Another number of rounds does if the learning rates depend on it.
    """
    found = changes(progress.settings, config, "train")
    if "rounds" in found:
        was = dataclasses.replace(config, rounds=progress.settings["rounds"])
        done = range(min(progress.round, was.rounds, config.rounds))
        if all(parts.rate(config)(i) == parts.rate(was)(i) for i in done):
            del found["rounds"]
        else:
            cosine = config.learning_rate_schedule != "constant"
            flag = "learning_rate_schedule" if cosine else "warmup_rounds"
            reason = f"with --{flag}={getattr(config, flag)} the rate of every round depends on it"
            found["rounds"] = f"--rounds={config.rounds} (was {was.rounds}; {reason})"
    return [*found.values()]


def described(workdir: str) -> tuple[Config, dict[str, Any]]:
    """(settings, environment) of the run in a workdir. BadInput if there is none or it is damaged."""
    workdir = paths.expand("workdir", workdir)
    try:
        found = json.loads((Path(workdir) / CONFIG).read_bytes())
    except OSError as error:
        raise BadInput(f"--workdir={workdir}: has no run; config.json cannot be read") from error
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{workdir}/config.json: is damaged ({error})") from error
    if not isinstance(found, dict):
        raise BadInput(f"{workdir}/config.json: is damaged (no settings)")
    environment = found.pop("environment", None)
    config = Config.from_dict(found | {"workdir": str(workdir)}, "report")  # its files may be missing now
    return config, environment if isinstance(environment, dict) else {}


def check_inputs(config: Config, progress: Progress, inputs: dict[str, str]) -> None:
    """BadInput if the dataset, the fleet or the initial weights are not those of the run."""
    _refuse(config, _other_contents(config, progress, inputs))


def _other_contents(config, progress, inputs):
    # Older runs knew no availability.
    differ = [name for name in inputs if inputs[name] != progress.inputs.get(name, Sampling().digest)]
    return [f"--{name}={getattr(config, name)} (has other contents now)" for name in differ]


def _refuse(config, differences):
    """Raises BadInput with the differences. If they are allowed, warns of each instead."""
    if config.allow_config_change:
        for difference in differences:
            logging.warning("--allow_config_change: going on with %s", difference)
    elif differences:
        raise BadInput(
            f"{', '.join(differences)}: the run in --workdir={config.workdir} was made with other settings; "
            "use those, or another --workdir, or --allow_config_change to go on anyway"
        )
