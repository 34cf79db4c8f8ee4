"""Several devices against one, in a process of its own: virtual devices must be asked for before JAX
starts.
"""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from sfl_jax.errors import BadInput
from sfl_jax.federated import devices

PROGRAM = textwrap.dedent("""
    import jax
    import numpy as np
    from federated import rounds
    from sfl_jax.federated import devices
    from sfl_jax.federated.round import Model

    def mean(count, execution="vmap"):
        chosen = devices.choose_devices(count)
        run = devices.compile_round(rounds.training(link=rounds.SCALING), 2, chosen, execution)
        variables, samples = (devices.replicate(tree, chosen) for tree in rounds.start())
        model = Model(variables)
        for seed in range(2):
            result = run(model, samples, rounds.assignments(seed=seed), jax.random.key(7), rounds.RATE)
            model, loss = result
        for leaf in jax.tree.leaves(result):
            assert leaf.sharding.is_fully_replicated and len(leaf.sharding.device_set) == count
        return jax.tree.map(np.asarray, devices.on_first(result))

    one = mean(1)
    assert rounds.difference(one, mean(4)) < 1e-5
    assert rounds.difference(one[0].variables, rounds.start()[0]) > 0.01
""")


@pytest.mark.filterwarnings("default")
def test_four_devices_give_the_numbers_of_one():
    """9 clients on 4 devices: chunks do not divide evenly, and one device gets an idle client more."""
    tests = Path(__file__).parents[1]
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)]),
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_more_devices_than_there_are():
    with pytest.raises(BadInput, match=r"^--devices=99: must be 0 to \d+"):
        devices.choose_devices(99)
