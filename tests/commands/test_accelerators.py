import contextlib
import os
import subprocess
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sfl_jax.commands import accelerators
from sfl_jax.errors import BadInput
from sfl_jax.models import layers


@pytest.fixture
def settings_restored(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_own=1")
    before = jax.config.jax_default_matmul_precision
    yield
    jax.config.update("jax_default_matmul_precision", before)


OTHERWISE = {
    "jax_enable_x64": True, "jax_numpy_dtype_promotion": "strict", "jax_numpy_rank_promotion": "raise",
    "jax_default_prng_impl": "rbg", "jax_threefry_partitionable": False, "jax_random_seed_offset": 1,
    "jax_transfer_guard": "disallow", "jax_transfer_guard_host_to_device": "disallow",
    "jax_transfer_guard_device_to_device": "disallow", "jax_transfer_guard_device_to_host": "disallow",
    "jax_disable_jit": True, "jax_no_tracing": True, "jax_no_execution": True,
}  # fmt: skip


def test_what_the_environment_says_against_the_code_is_set_back(capsys):
    assert OTHERWISE.keys() == accelerators.RELIED_ON.keys()
    accelerators.start()
    assert capsys.readouterr().err == ""
    expected = jax.random.normal(jax.random.key(3), (8,))
    for name, value in OTHERWISE.items():
        jax.config.update(name, value)
        accelerators.start()
        assert capsys.readouterr().err.startswith(f"without {name.upper()}, "), name
        drawn = np.ones((1, 8)) * jax.random.normal(jax.random.key(3), (8,))
        assert (drawn.dtype, drawn[0].tolist()) == (jnp.float32, expected.tolist()), name


EVERY_COMMAND = """
import sys
from sfl_jax.commands import compare, plan, report, train
place = sys.argv[1]
for main, *given in (
    (report.main,), (train.main,), (compare.main,), (compare.main, "--plan_only"), (plan.main,),
):
    print(main([*given, f"--output={place}/p.json" if main is plan.main else f"--workdir={place}/w"]))
    if "jax" not in sys.modules:  # for it could not be imported: begin again
        for name in [name for name in sys.modules if name.startswith("jax.")]:
            del sys.modules[name]
"""


@pytest.mark.parametrize(
    ("variable", "line"),
    [
        (
            "JAX_NUM_CPU_DEVICES=x",
            'error: JAX cannot start: Invalid value "x" for JAX flag jax_num_cpu_devices',
        ),
        ("JAX_PLATFORMS=cuda", "error: JAX finds no cuda here (JAX_PLATFORMS=cuda); set JAX_PLATFORMS=cpu"),
    ],
)
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="there is a GPU")
def test_what_jax_cannot_start_with_is_one_line_of_every_command(variable, line, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", EVERY_COMMAND, tmp_path], env=os.environ | dict([variable.split("=")]),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.split() == ["2"] * 5, done.stderr
    errors = [said for said in done.stderr.splitlines() if said.startswith("error: ")]
    assert [said[: len(line)] for said in errors] == [line] * 5


@pytest.mark.parametrize(
    ("asked", "found", "reads", "line"),
    [
        (None, "cpu", None, ""),
        ("cpu", "cpu", "cpu", ""),
        ("cuda,cpu", "cpu", "cuda,cpu", ""),
        ("cuda", "gpu", "cuda,cpu", ""),  # planning computes on the host
        ("cuda", "cpu", "cuda", r"JAX finds no cuda here \(JAX_PLATFORMS=cuda\); set JAX_PLATFORMS=cpu$"),
        (
            "tpu",
            RuntimeError("no libtpu"),
            "tpu",
            r"finds no tpu here .*; set JAX_PLATFORMS=cpu \(no libtpu\)$",
        ),
        (None, RuntimeError("no driver"), None, r"JAX finds no device here \(no driver\)$"),
    ],
)
def test_the_platform_that_is_asked_for(asked, found, reads, line, monkeypatch):
    config = mock.Mock(jax_platforms=asked)
    config.update.side_effect = lambda name, value: setattr(config, name, value)
    monkeypatch.setattr(jax, "config", config)
    monkeypatch.setattr(jax, "default_backend", mock.Mock(side_effect=[found]))
    with pytest.raises(BadInput, match=line) if line else contextlib.nullcontext():
        accelerators.find()
    assert config.jax_platforms == reads


def test_the_older_variable_for_a_platform_is_named_too(monkeypatch):
    monkeypatch.setattr(jax, "config", mock.Mock(jax_platforms="cpu"))
    monkeypatch.setattr(jax, "default_backend", mock.Mock(side_effect=RuntimeError("no such backend")))
    monkeypatch.setenv("JAX_PLATFORM_NAME", "cuda")
    line = r"no cuda here \(JAX_PLATFORM_NAME=cuda\); set JAX_PLATFORM_NAME=cpu \(no such backend\)$"
    with pytest.raises(BadInput, match=line):
        accelerators.find()


def lowered_for_gpu():
    layer = layers.Conv(4, 3, 1, "product")
    images = jnp.zeros((1, 8, 8, 2))
    variables = layer.init(jax.random.key(0), images)
    return jax.jit(layer.apply).trace(variables, images).lower(lowering_platforms=("cuda",)).as_text()


def test_products_take_the_precision_asked_for(settings_restored):
    for precision, word in (("high", "HIGH"), ("highest", "HIGHEST")):
        accelerators.switch(matmul_precision=precision)
        assert f"precision = [{word}, {word}]" in lowered_for_gpu()


def test_nothing_is_set_unasked(settings_restored):
    accelerators.switch(matmul_precision="highest")
    accelerators.switch()
    assert jax.config.jax_default_matmul_precision == "highest"
    assert os.environ["XLA_FLAGS"] == "--xla_own=1"


def test_own_flags_of_xla_come_last_and_win(settings_restored):
    accelerators.switch(deterministic=True)
    assert os.environ["XLA_FLAGS"] == f"{accelerators.DETERMINISTIC} --xla_own=1"


@pytest.mark.parametrize("flags", [accelerators.DETERMINISTIC, "--xla_gpu_no_such_flag=true"])
def test_xla_reads_the_flags_although_jax_is_imported(flags):
    """XLA also checks them: it ends a process that gives it unknown flags."""
    program = (
        "import jax; from sfl_jax.commands import accelerators;"
        f"accelerators.DETERMINISTIC = {flags!r};"
        "accelerators.switch(deterministic=True); print(jax.numpy.ones(3).sum())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    known = flags == accelerators.DETERMINISTIC
    assert (done.returncode == 0) == known, done.stderr
    assert ("Unknown flag" in done.stderr) != known
