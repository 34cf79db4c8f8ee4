"""Saves a `Run` and reads it back. A fingerprint of each part tells whether the parts are the same."""

import contextlib
import dataclasses
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sfl_jax.digests import digest, digest_of_columns
from sfl_jax.errors import BadInput
from sfl_jax.federated import devices as federated_devices
from sfl_jax.files import unfinished
from sfl_jax.run import metrics
from sfl_jax.run.checkpoints import Checkpoints, Progress
from sfl_jax.run.parts import Parts
from sfl_jax.run.recording import LOG, logged
from sfl_jax.run.state import State, model_like

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def save(
    path: Path, parts: Parts, state: State, lines: Sequence[metrics.Round], wall_s: float, compile_s: float
) -> None:
    """Writes metrics.jsonl and a checkpoint of the state. OSError if the disk refuses."""
    path.mkdir(parents=True, exist_ok=True)
    with unfinished(path / f".{LOG}.part") as part:  # an earlier file stays whole until it is replaced
        with contextlib.closing(metrics.Log(part)) as log:
            for line in lines:
                log.write(line)
            log.sync()
        part.replace(path / LOG)
    chosen = dataclasses.asdict(parts.execution)
    progress = Progress(
        state.round, state.simulated_s, wall_s, compile_s, log.bytes, log.sha256, chosen,
        fingerprints(parts, state.round), {},
    )  # fmt: skip
    checkpoints = Checkpoints(path / "checkpoints", keep=1)
    checkpoints.save(federated_devices.on_first(state.model), progress)
    checkpoints.wait()
    checkpoints.close()


def read(path: Path, parts: Parts) -> tuple[Checkpoints, Progress, list[metrics.Round]]:
    """Returns the checkpoints, the progress of the newest, and its lines. BadInput if parts differ."""
    checkpoints = Checkpoints(path / "checkpoints", keep=1)
    log = path / LOG
    progress = checkpoints.newest(log.read_bytes() if log.is_file() else b"")
    if progress is None:
        raise BadInput(f"{path}: no run is saved here")
    now = fingerprints(parts, progress.round)
    if differ := [name for name in now if now[name] != progress.inputs.get(name)]:
        raise BadInput(f"{path}: was saved with another {' and another '.join(differ)}")
    return checkpoints, progress, logged(str(path))[: progress.round] if progress.round else []


def fingerprints(parts: Parts, rounds: int) -> dict[str, str]:
    """A fingerprint of each part of a run. That of the rate covers the rounds that are done."""
    training = parts.training
    model = model_like(training, parts.image_shape)
    like = jax.eval_shape(lambda model: model.variables, model)
    variables = [(jax.tree_util.keystr(path), x.shape, str(x.dtype)) for path, x in _leaves(like)]
    return {
        "chain": described(training.chain.in_form("conv").units, variables),
        "data": parts.data.digest,
        "partition": digest(parts.division),
        "preprocess": described(training.preprocess),
        "fleet": digest_of_columns(parts.fleet.contents()),
        "optimizer": described(_behaviour(training.optimizer, like.params)),
        "server_optimizer": described(_behaviour(training.server_optimizer, like.params)),
        "rate": described([f"{parts.rate(round):.6g}" for round in range(rounds)]),
        "loss": described(training.loss),
        "metric": described(parts.metric),
        "scheme": described(parts.scheme),
        "codec": described(training.codecs),
        "augment": described(training.augment),
        "proximal": str(training.proximal),
        "clip_norm": str(training.clip_norm),
        "batch_norm": described(training.personal, training.reestimates),
        "sampling": parts.sampling.by,
        "availability": parts.sampling.digest,
        "planner": described(parts.planner),
        "faults": described(parts.faults),
        "cohort_size": str(parts.cohort_size),
        "local_epochs": str(parts.local_epochs),
        "batch_size": str(parts.batch_size),
        "seed": str(parts.seed),
        "rivals": ",".join(parts.rivals),
    }


def _behaviour(optimizer, params) -> list[str]:
    """The structure of an optimiser's state, and the numbers of two updates.

    An optimiser shows its rates only in its updates. They are computed on small parameters, which have the
    same names and numbers of axes, each axis of size 2.
    """
    if optimizer is None:
        return []
    small = jax.tree.map(lambda x: jnp.ones((2,) * x.ndim, x.dtype), params)
    state, said = optimizer.init(small), [str(jax.tree.structure(jax.eval_shape(optimizer.init, params)))]
    update = jax.jit(optimizer.update)
    for size in (0.5, 0.25):
        updates, state = update(jax.tree.map(lambda x, s=size: s * x, small), state, small)
        numbers = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(updates)])
        said += sorted({f"{number:.4g}" for number in numbers.tolist()})
    return said


def described(*things: Any) -> str:
    """SHA-256 of the `repr` of some things, without memory addresses."""
    return hashlib.sha256(_ADDRESS.sub("", repr(things)).encode()).hexdigest()


def _leaves(tree):
    return jax.tree_util.tree_leaves_with_path(tree)
