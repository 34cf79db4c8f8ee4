"""The time of a checkpoint alone: python -m benchmarks.checkpoint_speed [--models=NAME,...] [--saves=7]

Prints medians: milliseconds that a round waits, seconds until the checkpoint is on the disk, CPU seconds of
both, and seconds to check and restore it.
"""

import argparse
import hashlib
import statistics
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from sfl_jax import models
from sfl_jax.run.checkpoints import Checkpoints, Progress


def measured(model, saves):
    """(held_ms, saved_s, cpu_s, restored_s) of each save."""
    like = jax.eval_shape(lambda: model)
    progress = Progress(0, {}, 0.0, 0.0, 0, hashlib.sha256().hexdigest(), {}, {}, {})
    with tempfile.TemporaryDirectory() as directory:
        checkpoints = Checkpoints(Path(directory), keep=2)
        for round in range(saves):
            start_s, cpu_s = time.perf_counter(), time.process_time()
            checkpoints.save(model, progress._replace(round=round))
            held_s = time.perf_counter() - start_s
            checkpoints.wait()
            saved_s, cpu_s = time.perf_counter() - start_s, time.process_time() - cpu_s
            start_s = time.perf_counter()
            checkpoints.restore(checkpoints.newest(b""), like)
            yield 1e3 * held_s, saved_s, cpu_s, time.perf_counter() - start_s
        checkpoints.close()


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--models", default="efficientnetv2-b0,efficientnetv2-s")
    parser.add_argument("--saves", type=int, default=7)
    options = parser.parse_args()
    draw = np.random.default_rng(0)
    for name in options.models.split(","):
        chain = models.create(name)
        shapes = jax.eval_shape(chain.init, jax.random.key(0), jnp.zeros((1, 32, 32, 1)))
        model = jax.tree.map(lambda leaf: jnp.asarray(draw.standard_normal(leaf.shape, leaf.dtype)), shapes)
        rows = zip(*measured(model, options.saves), strict=True)
        held_ms, saved_s, cpu_s, restored_s = map(statistics.median, rows)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(model)) / 1e6
        print(
            f"{name}, {size:.0f} MB: the round waits {held_ms:.0f} ms, on the disk after {saved_s:.2f} s,"
            f" {cpu_s:.2f} CPU seconds; restored in {restored_s:.2f} s"
        )


if __name__ == "__main__":
    main()
