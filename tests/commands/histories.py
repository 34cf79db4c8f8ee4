"""Made-up histories of runs."""

import numpy as np

from sfl_jax.run.history import History


def told(rounds=3, clients=4, units=5, **changes):
    """A history of made-up plans."""
    rng = np.random.default_rng(0)
    cuts = np.zeros((rounds, units + 1), np.int64)
    cuts[:, 2], cuts[:, units] = 3, 1
    made = History(
        cuts, rng.random((rounds, 7)), rng.random(rounds), rng.integers(0, clients, rounds),
        np.full(clients, rounds), rng.random(clients), rng.random(clients), rng.random(clients),
        rng.integers(0, 7, clients), np.array([f"phone-{i}" for i in range(clients)]),
        1e9 * (1 + rng.random(clients)), tuple(f"block{i}" for i in range(units)),
    )  # fmt: skip
    return made._replace(**changes)
