"""The scaling of rounds over this machine's devices: python -m benchmarks.scaling --devices=1,2,4,8

Weak scaling gives each device `--clients` clients; strong scaling divides `--clients` among all devices.
Prints the seconds of a round, and the work and bytes of a device by `docs/scaling.md`. Under srun, mpirun or
on a TPU pod `--all_hosts` uses the devices of all processes. Virtual devices of a CPU
(XLA_FLAGS=--xla_force_host_platform_device_count=8) share its cores, so their seconds mean nothing.
"""

import argparse
import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from sfl_jax import models
from sfl_jax.federated import devices, optimizers
from sfl_jax.federated.balance import fill_chunks
from sfl_jax.federated.round import Model
from sfl_jax.federated.session import Assignment, Samples, Training

CLASSES = 10
FLOAT_BYTES = 4


def reduced_bytes(profile: models.Profile, places: int) -> int:
    """The bytes that each device adds to the sum of a round.

    They are parameters, batch-norm statistics, loss, weight, and for each place of the cohort whether it
    diverged, and at which step.
    """
    return FLOAT_BYTES * (int(profile.parameters.sum() + profile.state.sum()) + 2 + 2 * places)


def sent_bytes(profile: models.Profile, places: int, count: int) -> float:
    """The bytes that a device sends (and receives) in a round if `count` devices reduce in a ring."""
    return 2 * (count - 1) / count * reduced_bytes(profile, places)


def device_steps(arranged: Assignment, size: int, count: int) -> np.ndarray:
    """Client steps that each of `count` devices runs, including masked steps of shorter sessions."""
    longest = arranged.steps.reshape(count, -1, size).max(-1)
    return size * longest.sum(-1)


def step_macs(profile: models.Profile, batch: int) -> int:
    """The multiply-accumulates of a client's step."""
    return batch * int(profile.forward_macs.sum() + profile.backward_macs.sum())


def cohort(clients: int, steps: int, batch: int, samples: int, seed: int = 0) -> Assignment:
    """Clients with 1 to `steps` local steps, half of `steps` on average."""
    rng = np.random.default_rng(seed)
    return Assignment(
        np.arange(clients, dtype=np.int32),
        np.ones(clients, np.int32),
        np.ones(clients, np.float32),
        rng.integers(1, steps + 1, clients).astype(np.int32),
        rng.integers(0, samples, (clients, steps, batch)).astype(np.int32),
    )


def measure(options, count, clients):
    """One row: `clients` in all on `count` devices of every process."""
    chain = models.create(options.model, CLASSES, 1, layer_form=options.layer_form)
    shape = options.size, options.size, 1
    profile = models.profile(chain, shape)
    chosen = devices.choose_devices(count)
    training = Training(chain, optimizers.sgd(0.9), lambda x: x.astype(jnp.float32) / 127.5 - 1)
    rng = np.random.default_rng(0)
    samples = Samples(
        rng.integers(0, 256, (4096, *shape), np.uint8), rng.integers(0, CLASSES, 4096).astype(np.int32)
    )
    work = cohort(clients, options.steps, options.batch, len(samples.labels))
    run = devices.Rounds(training, options.clients_per_chunk, chosen)
    samples = devices.place_samples(samples, chosen)
    model = devices.replicate(Model.of(chain.init(jax.random.key(0), jnp.zeros((1, *shape)))), chosen)

    times = []
    for _ in range(options.rounds + 1):
        start = time.perf_counter()
        model, *rest = run(model, samples, work, jax.random.key(1), 0.02)
        jax.block_until_ready((model, rest))
        times.append(time.perf_counter() - start)
    arranged, size = fill_chunks(work, options.clients_per_chunk, len(chosen))
    steps = device_steps(arranged, size, len(chosen))
    return {
        "model": options.model,
        "devices": len(chosen),
        "clients": clients,
        "round_s": round(statistics.median(times[1:]), 4),
        "steps_needed": int(work.steps.sum()),
        "steps_of_the_busiest_device": int(steps.max()),
        "flop_of_the_busiest_device": 2 * step_macs(profile, options.batch) * int(steps.max()),
        "sent_bytes_of_a_device": round(sent_bytes(profile, len(arranged.steps), len(chosen))),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="efficientnetv2-b0")
    parser.add_argument("--layer_form", default="product")
    parser.add_argument("--devices", default="1", help="devices per process; several numbers with commas")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clients_per_chunk", type=int, default=4)
    parser.add_argument("--all_hosts", action="store_true")
    options = parser.parse_args()
    if options.all_hosts:
        jax.distributed.initialize()
    counts = [int(count) for count in options.devices.split(",")]
    for kind in ("weak", "strong"):
        base = None
        for count in counts:
            devices_in_all = count * jax.process_count()
            row = measure(options, count, options.clients * (devices_in_all if kind == "weak" else 1))
            # Client steps per second and device, relative to the first row.
            rate = row["steps_needed"] / row["round_s"] / devices_in_all
            base = base or rate
            if jax.process_index() == 0:
                print(json.dumps({"scaling": kind, **row, "efficiency": round(rate / base, 3)}), flush=True)


if __name__ == "__main__":
    main()
