"""Runs with rounds of milliseconds: a dataset of noise, and faults at chosen moments.

`python -m commands.small_world FAULTS FLAG...` trains in it. FAULTS are the arguments of `faults` in JSON.
"""

import contextlib
import errno
import json
import os
import signal
import sys
import threading
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import networks
import numpy as np
import plain

from sfl_jax import datasets, models
from sfl_jax.commands import parts, train
from sfl_jax.fleet import faults as fleet_faults
from sfl_jax.run import checkpoints, metrics, recording

CLIENTS = 48
FLAGS = [
    "--model=efficientnetv2-tiny", "--layer_form=conv", "--image_size=8", f"--clients={CLIENTS}",
    "--cohort_size=4", "--clients_per_chunk=4", "--execution=vmap", "--batch_size=4", "--server_flops=1e10",
    "--learning_rate=0.01", *plain.FLAGS,
]  # fmt: skip
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def noise(poisoned=(), samples=8 * CLIENTS):
    """A dataset that is the same every time. Images of `poisoned` clients of an IID division are black."""
    rng = np.random.default_rng(0)
    images = rng.integers(1, 256, (samples + 32, 8, 8, 1), np.uint8)
    labels = rng.integers(0, 10, samples + 32).astype(np.int32)
    shares = datasets.partition(labels[:samples], CLIENTS)
    for client in poisoned:
        images[shares[client]] = 0
    return datasets.Dataset(
        images[:samples], labels[:samples], images[samples:], labels[samples:], 10, "mnist"
    )


@contextlib.contextmanager
def world(poisoned=(), absent=(), samples=8 * CLIENTS, create=networks.create):
    """In this block, runs train the model that `create` makes, on noise. `poisoned` clients compute NaN, and
    `absent` clients never come.
    """
    preprocessing, availability = parts.preprocessing, fleet_faults.availability

    def black_is_nan(*given):
        scaled = preprocessing(*given)
        return lambda images: jnp.where((images == 0).all((1, 2, 3), keepdims=True), jnp.nan, scaled(images))

    def without_the_absent(seed, round, ids, probability):
        return availability(seed, round, ids, probability) & ~np.isin(ids, absent)

    data = noise(poisoned, samples)
    with (
        mock.patch.object(datasets, "load", return_value=data),
        mock.patch.object(models, "create", create),
        mock.patch.object(parts, "preprocessing", black_is_nan),
        mock.patch.object(fleet_faults, "availability", without_the_absent),
    ):
        yield


@contextlib.contextmanager
def faults(failing_saves=(), failing_lines=(), signal_after=0, number=0, delay_s=0.0, memory=None):
    """In this block, faults happen after chosen rounds.

    The disk is full for the checkpoints of these rounds, and for the first try at their lines. This process
    gets the signal `number` some time after a round. The file `memory` gets a line for each round: live
    arrays, their bytes, this process's bytes.
    """
    put, write, add = checkpoints.Checkpoints._put, metrics.Log.write, recording.Recorder.add

    def put_unless_full(self, model, progress):
        if progress.round in failing_saves:
            raise FULL
        put(self, model, progress)

    def write_unless_full(self, line):
        file = self._file
        if line.round in failing_lines:
            self._file = mock.Mock(wraps=file, write=mock.Mock(side_effect=FULL))
        try:
            write(self, line)
        finally:
            self._file = file

    def add_and_look(self, state, line):
        written = add(self, state, line)
        if memory:
            with Path(memory).open("a") as file:
                arrays = jax.live_arrays()
                resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
                print(json.dumps([len(arrays), sum(x.nbytes for x in arrays), resident]), file=file)
        if line.round == signal_after:
            threading.Timer(delay_s, os.kill, (os.getpid(), number)).start()
        return written

    with (
        mock.patch.object(checkpoints.Checkpoints, "_put", put_unless_full),
        mock.patch.object(metrics.Log, "write", write_unless_full),
        mock.patch.object(recording.Recorder, "add", add_and_look),
    ):
        yield


def run(workdir, *flags):
    """Trains in this process. Returns the exit code."""
    return train.main([*FLAGS, f"--workdir={workdir}", *flags])


def lines(workdir, *without):
    """The lines of metrics.jsonl without the machine's clocks."""
    left_out = {*metrics.CLOCKS, *without}
    parsed = map(json.loads, (Path(workdir) / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key not in left_out} for line in parsed]


def saved_rounds(workdir):
    return sorted(int(path.name) for path in (Path(workdir) / "checkpoints").glob("[0-9]*"))


def model(workdir, round):
    """The arrays of a checkpoint on disk."""
    with checkpoints._checkpointer() as reader:
        tree = reader.restore(Path(workdir).resolve() / "checkpoints" / f"{round:06d}" / "model")
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def same(arrays, others):
    return all(np.array_equal(a, b) for a, b in zip(arrays, others, strict=True))


if __name__ == "__main__":
    told = json.loads(sys.argv[1])
    in_world = {name: told.pop(name) for name in ("poisoned", "absent") if name in told}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with world(**in_world), faults(**told):
        sys.exit(train.main([*FLAGS, *sys.argv[2:]]))
