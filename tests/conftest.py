import gc
import os
import subprocess
import tempfile

import compiling
import finite  # noqa: F401 from now on NaN never equals NaN
import hypothesis
import jax
import pytest

# An example's time depends more on the machine and on compiling than on the code. Hypothesis' profile for CI
# servers has no deadline either, and repeats the same examples every time.
hypothesis.settings.register_profile("project", deadline=None)
if hypothesis.settings.get_current_profile_name() != "ci":
    hypothesis.settings.load_profile("project")

os.environ["KERAS_BACKEND"] = "jax"  # Keras, an oracle here, reads it at its import
_CACHE = {
    "jax_enable_compilation_cache": True,
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}


def pytest_configure(config):
    """Makes compiling cheap, which is most of the tests' time: all processes of a session share a cache, and
    programs are compiled with few optimisations. Slow tests are compiled as for users.
    """
    gc.disable()  # nothing that is imported is garbage
    if hasattr(config, "workerinput"):
        return  # workers inherit the environment
    config.own_caches = tempfile.TemporaryDirectory(prefix="sfl_jax_tests_")
    os.environ["XDG_CACHE_HOME"] = config.own_caches.name  # not the user's
    os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{config.own_caches.name}/programs"
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
    for name, value in _CACHE.items():
        os.environ[name.upper()] = str(value)
        jax.config.update(name, value)
    if config.option.markexpr == "not slow":
        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "true"  # else JAX sets two of the flags itself
        jax.config.update("jax_disable_most_optimizations", True)
        os.environ["XLA_FLAGS"] = f"{compiling.FAST_FLAGS} {os.environ.get('XLA_FLAGS', '')}"


def pytest_sessionstart():
    """The processes of a session read each other's programs while they write them."""
    from sfl_jax.commands import compilation_cache  # not before the types are checked at run time

    compilation_cache.write_whole()


def pytest_collection_finish():
    """Python searches for garbage less often: that was an eighth of the tests' time. What is imported by now
    stays, and is not searched.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    gc.enable()


def pytest_unconfigure(config):
    if hasattr(config, "own_caches"):
        config.own_caches.cleanup()


@pytest.fixture(scope="session", autouse=True)
def full_float32():
    """By default GPUs and TPUs round the inputs of products to fewer bits."""
    if jax.default_backend() != "cpu":
        jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture
def small_disk(tmp_path):
    """A separate file system of 4 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", place], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("a file system cannot be mounted here")
    yield place
    subprocess.run(["umount", "-l", place], check=True)
