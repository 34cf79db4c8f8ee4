"""Checkpoints on disk. A checkpoint is whole or absent, is written while training goes on, and is checked
before use.

`checkpoints/000012/` is the state after round 12. It gets this name in one step, when all its files are on
the disk:
- `model/`: the model's numbers, one array for each type, saved by orbax;
- `arrays.json`: path, type and shape of each leaf, whatever the packing;
- `progress.json`: `Progress`;
- `SHA256SUMS`: digests of the other files, in the form of `sha256sum -c`. Files that it does not list are
ignored.
"""

import collections
import contextlib
import errno
import fcntl
import hashlib
import itertools
import json
import logging
import math
import os
import re
import shutil
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from sfl_jax.errors import BadInput
from sfl_jax.federated.packing import as_packed, plain, plain_like
from sfl_jax.files import ensure_room, unfinished

MODEL, ARRAYS, PROGRESS, SUMS = "model", "arrays.json", "progress.json", "SHA256SUMS"
STAGING_SPARE_BYTES = 10**6  # for other files than the arrays
STAGING_AGE_S = 60.0  # by this age, a staging directory in use is locked
_UNFINISHED = re.compile(r"\.\d{6,}\.(part|old)(\..+)?")  # checkpoints that were being written or replaced


class Progress(NamedTuple):
    """How far a run has come, beside its model.

    round: rounds done. simulated_s: the clock of each planning method. wall_s, compile_s: clocks of the
    machine. log_bytes, log_sha256: size and digest of these rounds' part of metrics.jsonl. settings: the
    flags of the run. inputs: digests of the files that flags name. network: what else identifies the network
    and its input: num_classes, image_channels, input_scaling.
    """

    round: int
    simulated_s: dict[str, float]
    wall_s: float
    compile_s: float
    log_bytes: int
    log_sha256: str
    settings: dict[str, Any]
    inputs: dict[str, str]
    network: dict[str, Any]


class SavedModel(NamedTuple):
    """A model in the form in which it is saved. A few large arrays save faster than many small ones with
    orbax.

    numbers: all leaves of one type in one vector, by the type's name. arrays: path, type and shape of each
    leaf.
    """

    numbers: dict[str, np.ndarray]
    arrays: list[list[Any]]


class Damaged(Exception):
    """A checkpoint cannot be used. The message says why."""


class OtherForm(ValueError):
    """A model's arrays are not those expected. The message names the first that differs."""


class Checkpoints:
    """The checkpoints of one run. The newest `keep` stay. One thread writes them, one at a time."""

    def __init__(self, directory: Path, keep: int):
        # Orbax takes no relative path. Resolved once, so that a later change of directory does not matter.
        self.directory, self.keep = directory.absolute(), keep
        self._damaged: set[str] = set()
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None

    def save(self, model: Any, progress: Progress) -> None:
        """Copies `model` to the host and writes it in the background. Raises what the last save raised."""
        self.wait()
        # A copy, because the next round reuses the buffers of this one.
        self._writing = self._writer.submit(self._write, to_saved(model), progress)

    def wait(self) -> None:
        """Waits until nothing is being written. Raises what the writing raised."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """Waits until nothing is being written. Raises nothing."""
        self._writer.shutdown()

    def newest(self, log: bytes) -> Progress | None:
        """The progress of the newest usable checkpoint, or None if there is no checkpoint.

        A checkpoint is usable if it is whole and its rounds are in `log`. Damaged ones are skipped with a
        warning.

        Raises:
          BadInput: there are checkpoints, but none is usable.
        """
        damages = {}
        for path in reversed(self._paths()):
            try:
                progress = _read(path, log)
            except Damaged as error:
                damages[path.name] = str(error)
                continue
            if damages:
                self._damaged |= set(damages)
                logging.warning("%s; going on from checkpoint %s", _listed(damages), path.name)
            return progress
        if damages:
            raise BadInput(
                f"{self.directory}: no checkpoint can be used: {_listed(damages)}; nothing was deleted; "
                "choose another workdir"
            )
        return None

    def ensure_room(self, workdir: str, model: Any) -> None:
        """Raises BadInput if the coming checkpoints do not fit on the disk.

        Raises OSError if one does not fit into the temporary directory.
        """
        missing = max(1, self.keep + 1 - len(self._paths()))
        model_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
        ensure_room(self.directory.parent, "workdir", workdir, missing * model_bytes)
        _ensure_staging_room(model)

    def restore(self, progress: Progress, like: Any) -> Any:
        """The model of a checkpoint in NumPy arrays, with the structure, shapes and types of `like`.

        Raises:
          BadInput: it belongs to another network, or its numbers cannot be read although their digests are
            right.
        """
        path = self.directory / _name(progress.round)
        try:
            return _restore_model(path, like)
        except OtherForm as error:
            raise BadInput(f"{path}: is not a checkpoint of this network and release ({error})") from error

    def _write(self, model, progress):
        try:
            with unfinished(self.directory / f".{_name(progress.round)}.part"):
                self._put(model, progress)
        except Exception as error:
            for left in self._unfinished("part"):
                shutil.rmtree(left, ignore_errors=True)
            raise OSError(f"checkpoint of round {progress.round}: {_line(error)}") from error

    def _put(self, model, progress):
        path = self.directory / _name(progress.round)
        part, old = path.with_name(f".{path.name}.part"), path.with_name(f".{path.name}.old")
        for left in (part, old):  # left by a run that was killed
            _remove(left)
        part.mkdir(parents=True)
        # On a full disk orbax prints tracebacks from its threads; a copy fails with a plain error.
        _ensure_staging_room(model.numbers)
        with _staging() as staging:
            _save_numbers(staging / MODEL, model.numbers)
            _copy(staging / MODEL, part / MODEL)
        (part / ARRAYS).write_text(json.dumps(model.arrays))
        (part / PROGRESS).write_text(json.dumps(progress._asdict()))
        (part / SUMS).write_text(_sums(part))
        for inside in [*part.rglob("*"), part]:
            _sync(inside)
        if path.exists():  # damaged, or from rounds that are now run again
            path.rename(old)
        part.rename(path)
        _sync(self.directory)
        self._damaged.discard(path.name)
        self._delete_superseded(progress.round)

    def _delete_superseded(self, round):
        """Deletes superseded checkpoints. If one cannot be deleted, the next save tries again."""
        paths = [path for path in self._paths() if int(path.name) <= round]
        whole = [path for path in paths if path.name not in self._damaged]
        for path in {*paths} - {*whole[-self.keep :]} | self._unfinished("part", "old"):
            shutil.rmtree(path, ignore_errors=True)

    def _unfinished(self, *kinds):
        """Paths of these kinds that an interrupted writing left."""
        found = ((path, _UNFINISHED.fullmatch(path.name)) for path in self.directory.glob(".*"))
        return {path for path, match in found if match and match[1] in kinds}

    def _paths(self):
        """Finished checkpoints, the oldest first."""
        paths = (path for path in self.directory.glob("[0-9]*") if path.name.isdecimal() and path.is_dir())
        return sorted(
            (path for path in paths if path.name == _name(int(path.name))), key=lambda p: int(p.name)
        )


def to_saved(model: Any) -> SavedModel:
    """Copies a model's leaves to the host."""
    own, by_type = plain(model), {}
    for leaf in map(np.asarray, jax.tree.leaves(own)):
        by_type.setdefault(leaf.dtype.name, []).append(leaf.ravel())
    return SavedModel({name: np.concatenate(parts) for name, parts in by_type.items()}, _arrays(own))


def from_saved(model: SavedModel, like: Any) -> Any:
    """The saved model, packed like `like`. OtherForm if its leaves are not those of `like`."""
    wanted = plain_like(like)
    _check_arrays(model.arrays, wanted)
    leaves, used = [], dict.fromkeys(model.numbers, 0)
    for leaf in jax.tree.leaves(wanted):
        name, start = leaf.dtype.name, used[leaf.dtype.name]
        used[name] += math.prod(leaf.shape)
        leaves.append(model.numbers[name][start : used[name]].reshape(leaf.shape))
    return as_packed(jax.tree.unflatten(jax.tree.structure(wanted), leaves), like)


def _arrays(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [[jax.tree_util.keystr(path), leaf.dtype.name, [*leaf.shape]] for path, leaf in leaves]


def _check_arrays(arrays, like):
    wanted = _arrays(like)
    if not isinstance(arrays, list):
        raise OtherForm(f"not a list of {len(wanted)} arrays")
    for there, own in itertools.zip_longest(arrays, wanted):
        if there == own:
            continue
        if ".arrays[" in str(there):
            raise OtherForm("its arrays have no names; an earlier release saved it and can go on from it")
        raise OtherForm(f"{there} instead of {own}")


def _name(round):
    return f"{round:06d}"


def _read(path, log) -> Progress:
    try:
        _check_sums(path)
        progress = Progress(**json.loads((path / PROGRESS).read_text()))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise Damaged(_line(error)) from error
    if [*map(type, progress)] != [int, dict, float, float, int, str, dict, dict, dict]:
        raise Damaged(f"{PROGRESS} has other fields or types")
    if path.name != _name(progress.round):
        raise Damaged(f"it is of round {progress.round}")
    if hashlib.sha256(log[: progress.log_bytes]).hexdigest() != progress.log_sha256:
        raise Damaged("metrics.jsonl does not hold its rounds")
    return progress


def _check_sums(path):
    """Damaged if a file that SHA256SUMS lists is missing or differs, or if its list is not complete.

    Other files do not matter: file managers and NFS leave some.
    """
    listed = [line.split("  ", 1) for line in (path / SUMS).read_text().splitlines()]
    if any(len(pair) != 2 for pair in listed):
        raise Damaged(f"{SUMS} has a line without a name")
    for digest, name in listed:
        if not (path / name).resolve().is_relative_to(path.resolve()) or _digest(path / name) != digest:
            raise Damaged(f"{name} differs from {SUMS}")
    tops = {Path(name).parts[0] for _, name in listed}
    if missing := sorted({MODEL, ARRAYS, PROGRESS} - tops):
        raise Damaged(f"{SUMS} lacks {', '.join(missing)}")


def _sums(path) -> str:
    """One line with digest and name for every file below `path`."""
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.name != SUMS)
    return "".join(f"{_digest(file)}  {file.relative_to(path)}\n" for file in files)


def _digest(file):
    return hashlib.sha256(file.read_bytes()).hexdigest()


@contextlib.contextmanager
def _staging():
    """A temporary directory for one save. It is locked, so that no other run takes it for a dead run's."""
    place, prefix = Path(tempfile.gettempdir()), f"sfl_jax-{os.getuid()}-"
    for left in place.glob(f"{prefix}*"):
        _sweep(left)
    path = Path(tempfile.mkdtemp(prefix=prefix, dir=place))
    handle = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # on a file system without locks, _sweep removes nothing either
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with unfinished(path):
            yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(handle)


def _sweep(path):
    """Removes the staging directory of a run that was killed. It is old, and nobody holds its lock."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if time.time() - os.fstat(handle).st_mtime > STAGING_AGE_S:
                shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(handle)


def _remove(path):
    """Frees this name. What cannot be deleted, such as a file being read on NFS, is renamed."""
    shutil.rmtree(path, ignore_errors=True)
    if path.exists():
        path.rename(tempfile.mkdtemp(prefix=f"{path.name}.", dir=path.parent))


def _checkpointer():
    """Works in this process alone: only one process writes, and each reads for itself."""
    here = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=here, active_processes={here}, barrier_sync_key_prefix=f"process{here}"
    )
    # Compression hardly shrinks trained floats, and it takes the cores away from the running round.
    handler = ocp.PyTreeCheckpointHandler(use_compression=False, multiprocessing_options=alone)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def _save_numbers(path, numbers):
    with _checkpointer() as writer:
        writer.save(path, args=ocp.args.PyTreeSave(numbers))


def _ensure_staging_room(model):
    """OSError if the temporary directory has no room for a copy of `model` and some spare bytes."""
    place, size = tempfile.gettempdir(), sum(leaf.nbytes for leaf in jax.tree.leaves(model))
    if shutil.disk_usage(place).free < 1.1 * size + STAGING_SPARE_BYTES:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), place)


def _copy(source, target):
    target.mkdir()
    for path in sorted(source.rglob("*")):
        copied = target / path.relative_to(source)
        copied.mkdir() if path.is_dir() else shutil.copyfile(path, copied)


def _restore_model(path, like):
    """Reads arrays as they are on the disk: neither cast, nor cut, nor placed on devices."""
    try:
        arrays = json.loads((path / ARRAYS).read_text())
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path / ARRAYS}: cannot be read ({_line(error)})") from error
    wanted = plain_like(like)
    _check_arrays(arrays, wanted)
    return from_saved(SavedModel(_read_numbers(path / MODEL, wanted), arrays), like)


def _read_numbers(path, like):
    """The numbers of a model like `like`, by type."""
    sizes = collections.Counter()
    for leaf in jax.tree.leaves(like):
        sizes[leaf.dtype] += math.prod(leaf.shape)
    wanted = {dtype.name: jax.ShapeDtypeStruct((size,), dtype) for dtype, size in sizes.items()}
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
    try:
        with _checkpointer() as reader:
            numbers = reader.restore(path, args=ocp.args.PyTreeRestore(wanted, restore_args=as_numpy))
    except MemoryError:
        raise
    except Exception as error:  # any: the digests are right, so orbax or the disk failed
        raise BadInput(f"{path}: cannot be read ({_line(error)})") from error
    for name, one in wanted.items():
        if (numbers[name].shape, numbers[name].dtype) != (one.shape, one.dtype):
            raise BadInput(f"{path}: holds {numbers[name].shape} numbers of {name} instead of {one.shape}")
    return numbers


def _sync(path):
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _listed(damages):
    return "; ".join(f"checkpoint {name} is damaged ({reason})" for name, reason in damages.items())


def _line(error):
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
