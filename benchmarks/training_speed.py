"""Compares local training in sfl_jax and PyTorch, in pairs in one run: python -m benchmarks.training_speed

Peers, each with the same network, batches and optimiser:
  processes      a process with one thread per core, each with a part of the clients; PyTorch's best on a CPU
  graphs         on a GPU: each client's step as a CUDA graph, on four streams; PyTorch's best there
  channels_last  one process, one client after the other, as other simulators do
  default        the same in PyTorch's default layout (--all)
  torch_compile  like processes, but compiled (--torch_compile)
  lax_conv       this network with `lax.conv` under vmap, as plain Flax computes it (--lax_conv)
EfficientNetV2 is timm's; resnet18 and cnn are in `torch_networks`. On a GPU all peers run there in one
process.

Our side is a whole round as `launch.train` computes it: one device per core, with the form and chunks that a
short benchmark chooses; with --clients_per_chunk, the product form. Prints a table, and --json saves it:
- milliseconds per local step of all K clients: in a round of `--steps` with its aggregation, and of the steps
  alone;
- busy cores;
- a peer's time over the round's, median over pairs;
- the step's fraction of the FLOP/s that a large matrix product reaches on this machine.
Needs the `benchmark` extra.
"""

import argparse
import functools
import itertools
import json
import pathlib
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.torch_peers import CLASSES, Workers, cuda_graphs, pytorch_steps
from sfl_jax import models
from sfl_jax.federated import cores, devices, execution, optimizers, tuning
from sfl_jax.federated.balance import places_per_client
from sfl_jax.federated.round import Model
from sfl_jax.federated.session import Assignment, Samples, Training
from sfl_jax.models.layers import FORMS
from sfl_jax.registry import NETWORKS


def sfl_jax_round(name, clients, batch, size, steps, clients_per_chunk, layer_form="product"):
    """(a function that runs a round of a given number of local steps, up to `steps`; the FLOP of a step)."""
    chain, where = models.create(name, CLASSES, 1, layer_form=layer_form), devices.choose_devices(0)
    rng = np.random.default_rng(0)
    variables = chain.init(jax.random.key(0), jnp.zeros((1, size, size, 1)))
    samples = Samples(
        rng.integers(0, 256, (1024, size, size, 1), np.uint8), rng.integers(0, CLASSES, 1024).astype(np.int32)
    )
    work = Assignment(
        np.arange(clients, dtype=np.int32),
        np.full(clients, len(chain) // 2, np.int32),
        np.ones(clients, np.float32),
        np.full(clients, steps, np.int32),
        rng.integers(0, 1024, (clients, steps, batch)).astype(np.int32),
    )
    training = Training(chain, optimizers.sgd(0.9), lambda x: x.astype(jnp.float32) / 127.5 - 1)
    rounds, key = devices.Rounds(training, clients_per_chunk, where), jax.random.key(1)
    samples, begin = devices.place_samples(samples, where), Model.of(variables)
    profile = models.profile(chain, (size, size, 1))
    flop = 2 * clients * batch * int(profile.forward_macs.sum() + profile.backward_macs.sum())
    now = devices.replicate(begin, where)

    def run_steps(count):
        nonlocal now
        own = work._replace(steps=np.minimum(work.steps, count))
        now, *_ = jax.block_until_ready(rounds(now, samples, own, key, 0.02))

    return run_steps, flop


def ceiling_flops(size=2048):
    """The FLOP/s of a large float32 matrix product here, the best of several."""
    matrix = jnp.ones((size, size))
    product = jax.jit(jnp.matmul)
    jax.block_until_ready(product(matrix, matrix))
    return (
        2 * size**3 / min(seconds(lambda: jax.block_until_ready(product(matrix, matrix))) for _ in range(10))
    )


def seconds(run, *arguments):
    start = time.perf_counter()
    run(*arguments)
    return time.perf_counter() - start


def measured_execution(name, clients, batch, size):
    """The execution that `launch.train` would choose for this case on these devices."""
    chains = {form: models.create(name, CLASSES, 1, layer_form=form) for form in FORMS}
    profile = models.profile(chains[FORMS[0]], (size, size, 1))
    images, number = jax.ShapeDtypeStruct((batch, size, size, 1), jnp.float32), len(jax.local_devices())
    facts = tuning.Facts(profile, batch, clients, slots=1, devices=jax.local_devices(), name=name)
    alone = tuning.gains_from_one_alone(facts)

    def of_client(one):
        chain = chains[one.layer_form]
        return execution.seconds_per_client(
            chain, profile, images, one.clients_per_chunk, jax.local_devices()
        )

    places = functools.partial(places_per_client, clients, devices=number)
    sizes = [1] if alone else execution.chunk_sizes(clients, number)
    return execution.choose(FORMS, sizes, of_client, places)[0]


def compare(name, clients, batch, size, options):
    """A row: milliseconds of each side, busy cores, and each peer's time over ours, median over pairs."""
    case, steps = (name, clients, batch, size), options.steps
    form, chunk = (
        (FORMS[0], options.clients_per_chunk) if options.clients_per_chunk else measured_execution(*case)
    )
    ours, flop = sfl_jax_round(*case, steps, chunk, form)
    cores = 1 if jax.default_backend() == "gpu" else len(jax.local_devices())
    peers: dict[str, Any] = {"channels_last": pytorch_steps(*case)}
    if jax.default_backend() == "gpu":
        peers = {"graphs": cuda_graphs(*case), **peers}
    if cores > 1:
        peers = {"processes": Workers(*case, cores), **peers}
    if options.all:
        peers["default"] = pytorch_steps(*case, channels_last=False)
    if options.torch_compile:
        peers["torch_compile"] = Workers(*case, cores, compiled=True)
    if options.lax_conv:
        peers["lax_conv"] = sfl_jax_round(*case, steps, chunk, "conv")[0]
    for run in (ours, *peers.values()):
        run(1)
    pairs, busy, begun = [], {}, time.monotonic()
    while len(pairs) < options.pairs and (not pairs or time.monotonic() - begun < 60 * options.minutes):
        before = time.process_time()
        round_s = seconds(ours, steps)
        busy.setdefault("round", []).append((time.process_time() - before) / round_s)
        # A round of one step has a start and an aggregation. Each further step adds only the step.
        times = {"round": round_s / steps, "step": (round_s - seconds(ours, 1)) / (steps - 1)}
        for peer, run in peers.items():
            before, took_s = time.process_time(), seconds(run, steps)
            used_s = getattr(run, "cpu_s", time.process_time() - before)
            times[peer] = took_s / steps
            busy.setdefault(peer, []).append(used_s / took_s)
        pairs.append(times)
    for run in peers.values():
        if isinstance(run, Workers):
            run.close()

    row = {"model": name, "clients": clients, "batch": batch, "size": size, "form": form, "chunk": chunk}
    for side in pairs[0]:
        row[f"{side}_ms"] = round(1e3 * statistics.median(times[side] for times in pairs), 1)
    for side, cores_busy in busy.items():
        row[f"{side}_cores"] = round(statistics.median(cores_busy), 2)
    for peer in peers:
        row[f"{peer}_ratio"] = round(statistics.median(times[peer] / times["round"] for times in pairs), 2)
    row["of_ceiling"] = round(flop / statistics.median(times["step"] for times in pairs) / ceiling_flops(), 3)
    return row


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default="b0", help="variants of EfficientNetV2, resnet18 or cnn")
    parser.add_argument("--clients", default="16")
    parser.add_argument("--batches", default="32")
    parser.add_argument("--sizes", default="32")
    parser.add_argument("--steps", type=int, default=4, help="local steps of a round, at least 2")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=4, help="of a case, after which no pair is begun")
    parser.add_argument("--clients_per_chunk", type=int, default=0, help="0: measured, as in launch.train")
    parser.add_argument("--devices", type=int, default=0, help="1: one with all cores; 0: one per core")
    parser.add_argument("--all", action="store_true", help="also PyTorch's default layout")
    parser.add_argument("--torch_compile", action="store_true", help="also PyTorch compiled; takes minutes")
    parser.add_argument("--lax_conv", action="store_true", help="also lax.conv under vmap; slow on a CPU")
    parser.add_argument("--json", help="a file for all figures")
    options = parser.parse_args()
    cores.cores_as_devices(options.devices or 64)
    print(
        f"jax {jax.__version__}, {jax.devices()[0].device_kind}, ceiling {ceiling_flops() / 1e9:.0f} GFLOP/s"
    )
    cases = itertools.product(
        options.models.split(","),
        *(map(int, text.split(",")) for text in (options.clients, options.batches, options.sizes)),
    )
    rows = []
    for name, clients, batch, size in cases:
        known = name if name in NETWORKS else f"efficientnetv2-{name}"
        row = compare(known, clients, batch, size, options)
        if not rows:
            print("  ".join(row))
        print("  ".join(str(value).rjust(len(key)) for key, value in row.items()), flush=True)
        rows.append(row)
        if options.json:
            pathlib.Path(options.json).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
