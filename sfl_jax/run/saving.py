"""Saves a `Run` and reads it back, with a fingerprint of each part."""

import dataclasses
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from sfl_jax.digests import digest, digest_of_columns
from sfl_jax.errors import BadInput
from sfl_jax.federated import devices as federated_devices
from sfl_jax.run import metrics
from sfl_jax.run.checkpoints import Checkpoints, Progress
from sfl_jax.run.parts import Parts
from sfl_jax.run.recording import LOG, logged
from sfl_jax.run.state import State, model_like

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def save(
    path: Path, parts: Parts, state: State, lines: Sequence[metrics.Round], wall_s: float, compile_s: float
) -> None:
    """Write metrics.jsonl and a checkpoint of the state; OSError where the disk does not let it."""
    path.mkdir(parents=True, exist_ok=True)
    log = metrics.Log(path / LOG)
    for line in lines:
        log.write(line)
    log.sync()
    chosen = dataclasses.asdict(parts.execution)
    progress = Progress(
        state.round, state.simulated_s, wall_s, compile_s, log.bytes, log.sha256, chosen,
        fingerprints(parts), {},
    )  # fmt: skip
    log.close()
    checkpoints = Checkpoints(path / "checkpoints", keep=1)
    checkpoints.save(federated_devices.on_first(state.model), progress)
    checkpoints.wait()
    checkpoints.close()


def read(path: Path, parts: Parts) -> tuple[Checkpoints, Progress, list[metrics.Round]]:
    """(the checkpoints, what the newest has reached, its lines); BadInput where they are of other parts."""
    checkpoints = Checkpoints(path / "checkpoints", keep=1)
    log = path / LOG
    progress = checkpoints.newest(log.read_bytes() if log.is_file() else b"")
    if progress is None:
        raise BadInput(f"{path}: no run is saved here")
    now = fingerprints(parts)
    if differ := [name for name in now if now[name] != progress.inputs.get(name)]:
        raise BadInput(f"{path}: was saved with another {' and another '.join(differ)}")
    return checkpoints, progress, logged(str(path))[: progress.round] if progress.round else []


def fingerprints(parts: Parts) -> dict[str, str]:
    """What tells each part of a run from another."""
    training = parts.training
    model = model_like(training, parts.image_shape)
    like = jax.eval_shape(lambda model: model.variables, model)
    variables = [(jax.tree_util.keystr(path), x.shape, str(x.dtype)) for path, x in _leaves(like)]
    state = jax.eval_shape(training.optimizer.init, like.params)
    of_server = jax.tree.map(lambda x: (x.shape, str(x.dtype)), model.server_state)
    return {
        "chain": described(training.chain.in_form("conv").units, variables),
        "data": parts.data.digest,
        "partition": digest(parts.division),
        "fleet": digest_of_columns(parts.fleet.columns()),
        "optimizer": described(jax.tree.structure(state)),
        "server_optimizer": described(of_server),
        "loss": described(training.loss),
        "metric": described(parts.metric),
        "planner": described(parts.planner),
        "faults": described(parts.faults),
        "cohort_size": str(parts.cohort_size),
        "local_epochs": str(parts.local_epochs),
        "batch_size": str(parts.batch_size),
        "seed": str(parts.seed),
        "rivals": ",".join(parts.rivals),
    }


def described(*things: Any) -> str:
    """SHA-256 of how Python writes something, without addresses of this process."""
    return hashlib.sha256(_ADDRESS.sub("", repr(things)).encode()).hexdigest()


def _leaves(tree):
    return jax.tree_util.tree_leaves_with_path(tree)
