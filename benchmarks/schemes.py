"""The cost of schemes and codecs in training, in one run: python -m benchmarks.schemes

Whole rounds as `launch.train` computes them, each scheme on all devices that it can use, with clients at
different cuts. Prints milliseconds per client-sample, their ratio to `sfl` without a codec (median over
interleaved rounds), and the memory that XLA needs for the round beside model and samples.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from sfl_jax import models, schemes
from sfl_jax.federated import cores, devices, optimizers
from sfl_jax.federated.round import start_model
from sfl_jax.federated.session import Assignment, Samples, Training
from sfl_jax.run import wires
from sfl_jax.schemes.psl import Psl
from sfl_jax.schemes.sfl_v2 import SflV2


def cases(units, codecs):
    """(name, scheme, codec) of every row."""
    half = units // 2
    several = {
        "sfl": schemes.create("sfl"), "sl": schemes.create("sl"), "sfl_v2, client": SflV2(),
        "sfl_v2, step": SflV2(order="step"), f"psl, max_cut {half}": Psl(most=half),
        f"psl, max_cut {half}, joined": Psl(most=half, server_batch="joined"),
    }  # fmt: skip
    return [
        *((name, scheme, "float32") for name, scheme in several.items()),
        *(("sfl", several["sfl"], codec) for codec in codecs),
    ]


def round_of(name, scheme, codec, options):
    """(a function that runs a round, the bytes that it needs)."""
    chain, clients = models.create(name, 10, 1), options.clients
    several = schemes.SEVERAL_DEVICES in scheme.allows
    where = devices.choose_devices(0 if several else 1)
    rng, side, units = np.random.default_rng(0), options.size, len(chain)
    variables = chain.init(jax.random.key(0), jnp.zeros((1, side, side, 1)))
    samples = Samples(
        rng.integers(0, 256, (1024, side, side, 1), np.uint8), rng.integers(0, 10, 1024).astype(np.int32)
    )
    work = Assignment(
        np.arange(clients, dtype=np.int32),
        (1 + np.arange(clients) % max(units // 2, 1)).astype(np.int32),
        np.ones(clients, np.float32),
        np.full(clients, options.steps, np.int32),
        rng.integers(0, 1024, (clients, options.steps, options.batch)).astype(np.int32),
        np.arange(clients, dtype=np.int32) if scheme.has_order else None,
    )
    training = Training(
        chain, optimizers.sgd(0.9), lambda x: x.astype(jnp.float32) / 127.5 - 1,
        codecs=wires.cut_codecs(wires.pairs(codec)), scheme=scheme.engine(),
    )  # fmt: skip
    chunk = 1 if schemes.CHUNKS not in scheme.allows and scheme.has_order else options.clients_per_chunk
    if scheme.needs_equal_steps:
        chunk = clients
    rounds, key = devices.Rounds(training, chunk, where), jax.random.key(1)
    placed = devices.place_samples(samples, where)
    now = devices.replicate(start_model(training, variables), where)
    needed = rounds.bytes_needed(now, placed, work, key, 0.02)

    def run():
        nonlocal now
        now, *_ = jax.block_until_ready(rounds(now, placed, work, key, 0.02))

    run()
    return run, needed


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="cnn")
    parser.add_argument("--codecs", default="bfloat16+int8+int4+topk:0.1+gaussian:10,0.1")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--clients_per_chunk", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--only", default="", help="the first row, and rows whose scheme begins so")
    options = parser.parse_args()
    cores.cores_as_devices(options.clients)
    rows = cases(len(models.create(options.model, 10, 1)), options.codecs.split("+"))
    rows = [row for place, row in enumerate(rows) if place == 0 or row[0].startswith(options.only)]
    made = [(row, *round_of(options.model, row[1], row[2], options)) for row in rows]
    times = [[] for _ in made]
    for _ in range(options.pairs):
        for own, (_, run, _) in zip(times, made, strict=True):
            begun = time.perf_counter()
            run()
            own.append(time.perf_counter() - begun)
    samples = options.clients * options.steps * options.batch
    print(
        f"{options.model}, {options.clients} clients, batch {options.batch}, {jax.devices()[0].device_kind}"
    )
    for ((name, _, codec), _, needed), own in zip(made, times, strict=True):
        ratio = statistics.median(one / first for one, first in zip(own, times[0], strict=True))
        each_ms = 1e3 * statistics.median(own) / samples
        print(f"{name:28} {codec:18} {each_ms:8.3f} ms  {ratio:6.2f} x sfl  {needed / 2**20:8.0f} MiB")


if __name__ == "__main__":
    main()
