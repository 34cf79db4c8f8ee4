"""Several devices against one, in other processes, because virtual devices must be set before JAX starts."""

import os
import subprocess
import sys
from pathlib import Path

import compiling
import pytest

from sfl_jax.errors import BadInput
from sfl_jax.federated import devices

# Both sides of every comparison are compiled with the same settings.
SLOW = (
    "executions_and_cohorts", "mutations", "divergence", "checkpoints_move", "evaluations_of_both_forms",
    "own_normalisation", "crossing_bytes_of_both_forms", "work_of_devices", "benchmark",
    "work_of_a_step", "other_platforms",
)  # fmt: skip
# Some share a process, because starting one takes seconds.
CASES = (("small_network", "evaluations", "placement", "crossing_bytes"),)


def run_cases(*names, flags=compiling.FAST_FLAGS):
    """Runs functions of `device_cases` on eight virtual devices. An error names the one that failed."""
    tests = Path(__file__).parents[1]
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count=8 {flags}",
        "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)]),
    }
    program = "from federated import device_cases\n" + "".join(f"device_cases.{name}()\n" for name in names)
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "cases", [*CASES, *(pytest.param([case], marks=pytest.mark.slow) for case in SLOW)], ids=" ".join
)
def test_on_eight_devices(cases):
    run_cases(*cases)


@pytest.mark.slow
def test_several_devices_give_the_numbers_of_one():
    """The whole network, compiled like in use."""
    run_cases("whole_network", flags="")


CORES = """
import os, jax
from sfl_jax.federated import cores
cores.cores_as_devices(int(os.environ["MOST"]))
print(len(jax.devices()))
cores.cores_as_devices(1)
print(len(jax.devices()))
"""


@pytest.mark.parametrize(
    ("most", "flags", "found"),
    [
        ("64", "", len(os.sched_getaffinity(0))),
        pytest.param("1", "", 1, marks=pytest.mark.slow),
        pytest.param("64", "--xla_force_host_platform_device_count=3", 3, marks=pytest.mark.slow),
    ],
)
def test_a_core_is_a_device_unless_something_else_is_said(most, flags, found):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "MOST": most}
    command = [sys.executable, "-c", CORES]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(found)] * 2, "once found, devices stay"


LATE = """
import time, jax, numpy as np
from sfl_jax.federated import cores
cores.cores_as_devices(2)
def late(x):
    time.sleep(62 * float(x[0]))
    return x
def total(x):
    return jax.lax.psum(jax.pure_callback(late, jax.ShapeDtypeStruct(x.shape, x.dtype), x), "devices")
print(*np.ravel(jax.pmap(total, axis_name="devices")(np.array([[0.0], [1.0]]))))
"""


@pytest.mark.slow
def test_a_device_may_wait_for_another_for_longer_than_xla_allows():
    flags = "--xla_force_host_platform_device_count=2"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    done = subprocess.run(
        [sys.executable, "-c", LATE], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "1.0 1.0\n", "")


def test_more_devices_than_there_are():
    with pytest.raises(BadInput, match=r"^devices=99: must be 0 to \d+"):
        devices.choose_devices(99)
