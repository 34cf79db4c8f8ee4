import functools
import os
import subprocess

import hypothesis
import jax
import numpy as np
import pytest

# How long an example takes says more about the machine, and about compiling, than about the code. The profile
# that CI servers get by themselves knows this already, and repeats the same examples every time.
hypothesis.settings.register_profile("project", deadline=None)
if hypothesis.settings.get_current_profile_name() != "ci":
    hypothesis.settings.load_profile("project")

# NaN on both sides is no agreement.
np.testing.assert_allclose = functools.partial(np.testing.assert_allclose, equal_nan=False)

os.environ["KERAS_BACKEND"] = "jax"  # read when Keras, an oracle here, is first imported
# Neither use nor fill the user's cache of compiled programs: processes that tests start, and this one.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
jax.config.update("jax_enable_compilation_cache", False)


@pytest.fixture(scope="session", autouse=True)
def full_float32():
    """GPUs and TPUs round the inputs of products to fewer bits unless told otherwise."""
    if jax.default_backend() != "cpu":
        jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", place], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("a file system cannot be mounted here")
    yield place
    subprocess.run(["umount", "-l", place], check=True)
