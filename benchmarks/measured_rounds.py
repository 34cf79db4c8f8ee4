"""Rounds run on this machine, and what a calibration makes of them: python -m benchmarks.measured_rounds

One client and one server, both this machine, train the two halves of a network at every cut. Their seconds
are written as rounds. Rates are then fitted to them twice: for a client whose FLOP/s were guessed, and for
one with a device file. Nothing is sent, so the links keep their rates. All seconds are CPU seconds of this
process, since wall seconds of a shared machine say more of its other users.
"""

import argparse
import csv
import os
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from sfl_jax import fleet, models
from sfl_jax.commands import parts, plan
from sfl_jax.commands.config import Config

FLEET = "client,{column},uplink_bps,downlink_bps,memory_bytes,samples\nhere,{value},1e7,2e7,8e9,{samples}\n"
GUESS, SERVER = "1e10", "1e11"  # FLOP/s of the client and of the server
ROUNDS, STEPS = 5, 10  # rounds at each cut, and steps of a round


def directions(chain):
    """Compiled forward and backward of a half of a network, as a step of training runs them."""

    def forward(params, state, x, key):
        def run(params, x):
            output, _ = chain.apply(state._replace(params=params), x, train=True, key=key)
            return output

        return jax.vjp(run, params, x)

    return jax.jit(forward), jax.jit(lambda pull, gradient: pull(gradient))


def session(halves, variables, x, key, steps):
    """Seconds of a session: client forward, server both ways, client backward."""
    spent = np.zeros(3)
    (front, pull_front), (back, pull_back) = halves
    for _ in range(steps):
        begun = time.process_time()
        smashed, pull = jax.block_until_ready(front(variables[0].params, variables[0], x, key))
        sent = time.process_time()
        gradient = jnp.zeros_like(smashed)
        if variables[1].params:
            logits, own = back(variables[1].params, variables[1], smashed, key)
            _, gradient = jax.block_until_ready(pull_back(own, logits / logits.size))
        returned = time.process_time()
        jax.block_until_ready(pull_front(pull, gradient))
        spent += np.diff([begun, sent, returned, time.process_time()])
    return spent


def profile(model, batch_size, path):
    """Writes the device file of this machine."""
    chain, config = models.create(model, num_classes=10, in_channels=1), Config(model=model)
    timed = models.unit_seconds(chain, (32, 32, 1), batch_size, 20, clock=time.process_time)
    names, forward_s, backward_s = zip(*timed, strict=True)
    network = parts.network_name(config, 1, 10)
    fleet.write_device(
        path, fleet.Device(network, batch_size, names, np.array(forward_s), np.array(backward_s))
    )


def measure(model, batch_size, path):
    """Writes the rounds of every cut, in turn, so that a busy minute does not fall on one cut alone."""
    chain, key = models.create(model, num_classes=10, in_channels=1), jax.random.key(0)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((batch_size, 32, 32, 1)), jnp.float32)
    whole, halves, parts = chain.init(key, x), {}, {}
    for cut in range(1, len(chain.units) + 1):
        halves[cut] = [directions(half) for half in chain.split(cut)]
        parts[cut] = chain.split_variables(whole, cut)
        session(halves[cut], parts[cut], x, key, 1)  # compiles
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["round", "client", "cut", "client_forward_s", "server_s", "client_backward_s", "share_flops"]
        )
        for round_ in range(ROUNDS * len(halves)):
            cut = 1 + round_ % len(halves)
            forward_s, server_s, backward_s = session(halves[cut], parts[cut], x, key, STEPS).tolist()
            on_server = [server_s, SERVER] if parts[cut][1].params else ["", ""]
            writer.writerow([round_, "here", cut, forward_s, on_server[0], backward_s, on_server[1]])


def main():
    """Measures, and plans with the rounds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="efficientnetv2-tiny")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--folder", default="runs/measured_rounds")
    options = parser.parse_args()
    folder = Path(options.folder)
    folder.mkdir(parents=True, exist_ok=True)
    network = [f"--model={options.model}", f"--batch_size={options.batch_size}"]
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    profile(options.model, options.batch_size, folder / "here.json")
    measure(options.model, options.batch_size, folder / "rounds.csv")
    for column, value in (("flops", GUESS), ("device", "here.json")):
        text = FLEET.format(column=column, value=value, samples=STEPS * options.batch_size)
        (folder / f"{column}.csv").write_text(text)
        plan.main(
            [*network, f"--fleet={folder}/{column}.csv", f"--measured={folder}/rounds.csv", "--plot",
             f"--server_flops={SERVER}", f"--output={folder}/by_{column}.json"]
        )  # fmt: skip


if __name__ == "__main__":
    main()
