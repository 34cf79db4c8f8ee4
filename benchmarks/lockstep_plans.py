"""How far lockstep plans of clients with unequal numbers of steps are from their bound, over random fleets.

    .venv/bin/python -m benchmarks.lockstep_plans --fleets=200

prints, for each number of clients, the mean and the worst gap, and the CPU seconds of a plan.
"""

import time

import numpy as np
from absl import app, flags

from sfl_jax import fleet, models, optim

FLEETS = flags.DEFINE_integer("fleets", 200, "random fleets in all", lower_bound=1)
CLIENTS = flags.DEFINE_list("clients", ["10", "20", "50", "100"], "numbers of clients, in turn")
MODEL = flags.DEFINE_string("model", "efficientnetv2-b0", "network that is planned for")
BATCH, LEAST, MOST = 32, 32, 3200  # samples of a client are drawn log-uniformly
SERVER_FLOPS = 1e10, 1e11, 1e12


def drawn(clients: int, seed: int, profile: models.Profile) -> tuple[optim.Terms, float]:
    """The terms of a random fleet whose clients have unequal numbers of steps, and the server's FLOP/s."""
    rng = np.random.default_rng(seed)
    samples = np.exp(rng.uniform(np.log(LEAST), np.log(MOST), clients)).astype(int)
    own = fleet.random_fleet(clients, seed=seed).with_samples(samples)
    return optim.terms(profile, own, optim.Work(batch_size=BATCH)), SERVER_FLOPS[seed % len(SERVER_FLOPS)]


def main(_):
    chain = models.create(MODEL.value, num_classes=10, in_channels=3)
    profile = models.profile(chain, (32, 32, 3))
    groups = [int(one) for one in CLIENTS.value]
    each = -(-FLEETS.value // len(groups))
    print("clients  mean gap  worst gap  proven  CPU s")
    for clients in groups:
        gaps, begun = [], time.process_time()
        for seed in range(each):
            terms, flops = drawn(clients, seed, profile)
            gaps.append(optim.solve(terms, flops, "exact", "lockstep").gap)
        seconds = (time.process_time() - begun) / each
        proven = np.mean(np.array(gaps) < 1e-8)
        print(f"{clients:7d} {np.mean(gaps):9.3%} {max(gaps):10.3%} {proven:7.0%} {seconds:6.2f}", flush=True)


if __name__ == "__main__":
    app.run(main)
