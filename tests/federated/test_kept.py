"""A kept program gives the same bits as the compiled one, in another process too, and is never another's."""

import functools
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sfl_jax.federated import devices, kept
from sfl_jax.federated.kept import Kept
from sfl_jax.run.metrics import CompileClock

FACTS = ("adam", 3)


def step(tree, rate):
    return jax.tree.map(lambda x: jnp.sin(x) @ jnp.cos(x.T) * rate, tree), rate + 1


def arguments(seed=0, side=8):
    values = np.random.default_rng(seed).normal(size=(side, side)).astype(np.float32)
    return jax.device_put(({"b": values, "a": 2 * values}, np.float32(0.1)))


def compiled(directory, facts=FACTS, given=None, begins=False):
    """(the program, whether something was compiled for it)."""
    mine = Kept(directory, jax.devices()[:1], "a network")
    if begins:
        mine.begin("step")
    given = given or arguments()
    with CompileClock() as clock:
        program = mine.compiled("step", jax.jit(functools.partial(step)), given, given, *facts)
        mine.wait()
    return program, clock.compilations > 0


@pytest.fixture
def own_cache(tmp_path):
    """JAX's own cache empty: what it holds is not kept by us."""
    wanted = {
        "jax_compilation_cache_dir": str(tmp_path / "jax"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in wanted}
    for name, value in wanted.items():
        jax.config.update(name, value)
    jax.experimental.compilation_cache.compilation_cache.reset_cache()
    yield tmp_path / "kept"
    for name, value in before.items():
        jax.config.update(name, value)
    jax.experimental.compilation_cache.compilation_cache.reset_cache()


def equal(tree, other):
    return jax.tree.structure(tree) == jax.tree.structure(other) and all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)
    )


@pytest.mark.parametrize("begins", [False, True])
def test_a_kept_program_needs_no_compiling_and_gives_the_same_bits(own_cache, begins):
    first, was_compiled = compiled(own_cache)
    assert was_compiled
    again, was_compiled = compiled(own_cache, begins=begins)
    assert not was_compiled
    for seed in range(2):
        assert equal(again(*arguments(seed)), first(*arguments(seed)))
    assert not equal(again(*arguments(0)), first(*arguments(1)))
    assert devices.program_bytes(again) == devices.program_bytes(first)


@pytest.mark.slow
def test_another_process_finds_it(tmp_path):
    """Two processes of their own: settings of this one may have been changed by other tests."""
    code = (
        "import sys, test_kept, numpy as np, jax; from pathlib import Path\n"
        "program, was_compiled = test_kept.compiled(Path(sys.argv[1]))\n"
        "assert str(was_compiled) == sys.argv[3]\n"
        "np.save(sys.argv[2], jax.tree.leaves(program(*test_kept.arguments()))[0])"
    )
    places = [str(Path(__file__).parent), *sys.path]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(places), "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "jax"),
    }  # fmt: skip
    for result, was_compiled in (("first.npy", "True"), ("second.npy", "False")):
        command = [sys.executable, "-c", code, tmp_path / "kept", tmp_path / result, was_compiled]
        subprocess.run(command, check=True, env=environment)
    np.testing.assert_array_equal(*(np.load(tmp_path / name) for name in ("first.npy", "second.npy")))


@pytest.mark.parametrize(
    "change",
    ["facts", "shapes", "type", "structure", "code", "processor", "flags", "setting"],
)
def test_what_it_follows_from_makes_another_program(own_cache, monkeypatch, change):
    compiled(own_cache)
    facts, given = FACTS, arguments()
    if change == "facts":
        facts = ("adam", 4)
    elif change == "shapes":
        given = arguments(side=9)
    elif change == "type":
        given = jax.tree.map(lambda x: x.astype(jnp.bfloat16), given)
    elif change == "structure":
        given = {"a": given[0]["a"], "c": given[0]["b"]}, given[1]
    elif change == "code":
        monkeypatch.setattr(kept, "code", lambda: "other")
    elif change == "processor":
        monkeypatch.setattr(kept, "surroundings", lambda: ("another",))
    elif change == "flags":
        monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
    loaded = []
    monkeypatch.setattr(kept, "Program", lambda *given: loaded.append(given))
    with jax.default_matmul_precision("highest" if change == "setting" else None):
        compiled(own_cache, facts, given)
    assert not loaded
    if change in ("facts", "code", "shapes", "type", "structure"):
        compiled(own_cache, facts, given)
        assert loaded, "it has taken the place of the other"


@pytest.mark.parametrize("harm", ["cut off", "a flipped bit", "empty", "not ours", "a directory"])
def test_a_damaged_file_is_compiled_again_and_replaced(own_cache, harm):
    expected = compiled(own_cache)[0](*arguments())
    (file,) = own_cache.iterdir()
    whole = file.read_bytes()
    if harm == "a directory":
        file.unlink()
        file.mkdir()
    else:
        flipped = whole[:-100] + bytes([whole[-100] ^ 1]) + whole[-99:]
        file.write_bytes(
            {"cut off": whole[:-9], "a flipped bit": flipped, "empty": b""}.get(harm, b"x\n" * 9)
        )
    jax.config.update("jax_compilation_cache_dir", f"{own_cache}-other")
    jax.experimental.compilation_cache.compilation_cache.reset_cache()
    jax.clear_caches()
    program, was_compiled = compiled(own_cache)
    assert was_compiled
    assert equal(program(*arguments()), expected)
    assert compiled(own_cache)[1] == (harm == "a directory")


def test_what_jax_had_in_its_own_cache_is_not_kept(own_cache):
    """Written out a second time it would lack kernels, which is found when it runs."""
    compiled(own_cache)
    (file,) = own_cache.iterdir()
    file.unlink()
    jax.clear_caches()
    assert compiled(own_cache)[1]
    assert not [*own_cache.iterdir()]


def test_what_says_something_else_is_not_kept_on(own_cache, monkeypatch):
    """Programs of one name and equal arguments, the second of which JAX has in its own cache."""
    other = jax.jit(lambda tree, rate: (jax.tree.map(lambda x: x + rate, tree), rate))
    given = arguments()
    Kept(None, ()).compiled("step", other, given, given)
    compiled(own_cache)
    (file,) = own_cache.iterdir()
    before = file.read_bytes()
    mine = Kept(own_cache, jax.devices()[:1], "a network")
    mine.compiled("step", other, given, given, "other")
    mine.wait()
    assert file.read_bytes() == before


def test_without_a_place_nothing_is_kept():
    assert compiled(None)[1]


def test_several_processes_keep_nothing(own_cache, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    compiled(own_cache)
    assert not own_cache.exists()


def test_other_threads_do_not_count_as_compilations(own_cache):
    jax.config.update("jax_compilation_cache_dir", str(own_cache))
    with kept._compilations() as noted:
        other = threading.Thread(
            target=jax.monitoring.record_event, args=["/jax/compilation_cache/cache_misses"]
        )
        other.start()
        other.join()
        assert not noted
        jax.monitoring.record_event("/jax/compilation_cache/cache_misses")
    assert len(noted) == 1


def test_devices_have_files_of_their_own(own_cache):
    one, other = (Kept(own_cache, [SimpleNamespace(platform="cpu", device_kind=kind, id=0)]) for kind in "ab")
    assert one._path("round") != other._path("round")
    assert one._path("round") != one._path("evaluation")
