import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from sfl_jax import accelerators
from sfl_jax.config import Config
from sfl_jax.models import layers


@pytest.fixture
def settings_restored(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_own=1")
    before = jax.config.jax_default_matmul_precision
    yield
    jax.config.update("jax_default_matmul_precision", before)


def lowered_for_gpu():
    layer = layers.Conv(4, 3, 1, "product")
    images = jnp.zeros((1, 8, 8, 2))
    variables = layer.init(jax.random.key(0), images)
    return jax.jit(layer.apply).trace(variables, images).lower(lowering_platforms=("cuda",)).as_text()


def test_products_take_the_precision_asked_for(settings_restored):
    for precision, word in (("high", "HIGH"), ("highest", "HIGHEST")):
        accelerators.switch(Config(matmul_precision=precision))
        assert f"precision = [{word}, {word}]" in lowered_for_gpu()


def test_nothing_is_set_unasked(settings_restored):
    accelerators.switch(Config(matmul_precision="highest"))
    accelerators.switch(Config())
    assert jax.config.jax_default_matmul_precision == "highest"
    assert os.environ["XLA_FLAGS"] == "--xla_own=1"


def test_own_flags_of_xla_come_last_and_win(settings_restored):
    accelerators.switch(Config(deterministic=True))
    assert os.environ["XLA_FLAGS"] == f"{accelerators.DETERMINISTIC} --xla_own=1"


@pytest.mark.parametrize("flags", [accelerators.DETERMINISTIC, "--xla_gpu_no_such_flag=true"])
def test_xla_reads_the_flags_although_jax_is_imported(flags):
    """And knows them: it ends a process that gives it others."""
    program = (
        "import jax; from sfl_jax import accelerators; from sfl_jax.config import Config;"
        f"accelerators.DETERMINISTIC = {flags!r};"
        "accelerators.switch(Config(deterministic=True)); print(jax.numpy.ones(3).sum())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    known = flags == accelerators.DETERMINISTIC
    assert (done.returncode == 0) == known, done.stderr
    assert ("Unknown flag" in done.stderr) != known
