"""What `test_devices.py` runs in processes of their own, where there are eight virtual devices."""

import jax
import numpy as np
from federated import rounds

from sfl_jax.federated import devices
from sfl_jax.federated.round import Model
from sfl_jax.federated.session import Samples


def after_rounds(count, chunk=2, execution="vmap", clients=None, training=None):
    """(model, loss, …) after two rounds on `count` devices, as NumPy."""
    training = training or rounds.training(link=rounds.SCALING)
    chosen = devices.choose_devices(count)
    run = devices.compile_round(training, chunk, chosen, execution)
    variables, samples = rounds.start(training.chain)
    samples = devices.place_samples(Samples(*map(np.asarray, samples)), chosen)
    model = Model(devices.replicate(variables, chosen))
    cuts = np.arange(clients or rounds.CUTS) % (len(training.chain) + 1)
    for seed in range(2):
        work = rounds.assignments(cuts, seed=seed)
        model, *rest = result = run(model, samples, work, jax.random.key(7), rounds.RATE)
    for leaf in jax.tree.leaves(result):
        assert leaf.sharding.is_fully_replicated
        assert len(leaf.sharding.device_set) == count
    return jax.tree.map(np.asarray, devices.on_first((model, *rest)))


def equality():
    """9 clients, unequal, in chunks of 2: nothing divides evenly."""
    one = after_rounds(1)
    assert rounds.difference(one[0].variables, rounds.start()[0]) > 0.01
    for count in (2, 4, 8):
        assert rounds.difference(one[:2], after_rounds(count)[:2]) < 1e-5, count
