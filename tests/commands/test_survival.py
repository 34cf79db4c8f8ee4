"""Runs that are killed, interrupted, or have too little room, in their own processes.

All use one compilation cache, so that a start takes seconds. A cached program is the same program.
"""

import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import finite
import numpy as np
import plain
import pytest
from commands import small_world
from disks import fill

from sfl_jax.commands import train
from sfl_jax.commands.config import Config
from sfl_jax.run import metrics

ROUNDS = 8
FLAGS = [
    *plain.FLAGS,
    "--model=efficientnetv2-tiny", "--layer_form=conv", "--image_size=8", "--clients=1200", "--cohort_size=2",
    "--clients_per_chunk=2", "--execution=vmap", f"--rounds={ROUNDS}", "--eval_every=4",
    "--server_flops=1e10", "--server_momentum=0.5", "--drop_probability=0.2", "--jitter=0.1",
    "--deadline_factor=1.3", "--checkpoint_every_rounds=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    return {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[2]),  # launch/ is not in the package
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("programs")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "false",  # as users have it
        "XLA_FLAGS": "",
    }


@pytest.fixture(scope="module")
def begin(environment):
    """begin(workdir, *flags, devices=1) -> a process that trains, started like a user does: in some
    directory, with a relative workdir.
    """

    def begin(workdir, *flags, devices=1):
        virtual = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        return subprocess.Popen(
            [sys.executable, "-m", "launch.train", *FLAGS, f"--workdir={workdir.name}", *flags],
            cwd=workdir.parent, env=environment | virtual,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    return begin


@pytest.fixture(scope="module")
def quiet(begin, tmp_path_factory):
    """The workdir of an undisturbed run."""
    workdir = tmp_path_factory.mktemp("quiet")
    finish(begin(workdir))
    return workdir


def finish(process, code=0):
    out, err = process.communicate()
    assert process.returncode == code, err
    assert "Traceback" not in err
    return out, err


def numbers(workdir):
    """The lines of metrics.jsonl without the machine's clocks."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in metrics.CLOCKS} for line in lines]


def final_model(workdir):
    """The arrays of the last checkpoint."""
    from sfl_jax.commands import parts
    from sfl_jax.run.checkpoints import Checkpoints
    from sfl_jax.run.state import model_like

    settings = json.loads((workdir / "config.json").read_text())
    del settings["environment"]
    own = parts.build(Config.from_dict(settings | {"devices": 1})).parts
    checkpoints = Checkpoints(workdir / "checkpoints", 2)
    progress = checkpoints.newest((workdir / "metrics.jsonl").read_bytes())
    assert progress.round == settings["rounds"]
    import jax

    model = checkpoints.restore(progress, model_like(own.training, own.image_shape))
    return jax.tree.leaves(model)


def wait_for(path, process, lines=1):
    """Waits until a file has this many lines."""
    while not path.exists() or path.read_bytes().count(b"\n") < lines:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)


def check_close(lines, others, rel):
    for a, b in zip(lines, others, strict=True):
        known = {name for name, value in b.items() if value is not None}
        assert "train_loss" in known
        assert known == {name for name, value in a.items() if value is not None}
        assert {name: a[name] for name in known} == pytest.approx({name: b[name] for name in known}, rel=rel)


def same(workdir, quiet):
    assert numbers(workdir) == numbers(quiet)
    for a, b in zip(final_model(workdir), final_model(quiet), strict=True):
        assert (a.dtype, a.tobytes()) == (b.dtype, b.tobytes())


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bits(begin, quiet, tmp_path):
    finish(begin(tmp_path))
    same(tmp_path, quiet)
    assert any(line["clients"] < 2 for line in numbers(quiet)), "nobody dropped out"
    finish(begin(tmp_path / "other", "--seed=1", "--rounds=4"))
    assert numbers(tmp_path / "other") != numbers(quiet)[:4]


@pytest.mark.slow
def test_killed_at_a_line_it_goes_on_bitwise(begin, quiet, tmp_path):
    process = begin(tmp_path)
    wait_for(tmp_path / "metrics.jsonl", process, lines=3)
    process.kill()
    process.communicate()
    out, _ = finish(begin(tmp_path))
    assert "going on after round" in out
    same(tmp_path, quiet)


def half_written(workdir):
    """{(name, when it was last changed)} of checkpoints that are being written, or were left so."""
    found = set()
    for path in (workdir / "checkpoints").glob(".*.part"):
        with contextlib.suppress(FileNotFoundError):  # it is written by now
            found.add((path.name, path.stat().st_mtime_ns))
    return found


def halt_while_writing(process, workdir, first):
    """Halts the process while it writes the checkpoint of round `first` or a later one, if it writes any."""
    left = half_written(workdir)
    while process.poll() is None:
        process.send_signal(signal.SIGCONT)
        time.sleep(0.001)
        if any(name >= f".{first:06d}" for name, _ in half_written(workdir) - left):
            process.send_signal(signal.SIGSTOP)  # so that it cannot finish it meanwhile
            if half_written(workdir) - left:
                return True
    return False


@pytest.mark.slow
def test_killed_at_twenty_moments_it_goes_on_bitwise(begin, quiet, tmp_path):
    """Runs of a few seconds. They are killed at any moment, also while they start, and every second time
    while a checkpoint is written.
    """
    rng, start = random.Random(0), time.monotonic()
    finish(begin(tmp_path / "timed"))
    whole_s = time.monotonic() - start
    killed = while_writing = 0
    numbers_of_runs = itertools.count()
    while killed < 20:
        workdir = tmp_path / str(next(numbers_of_runs))  # also if nothing was killed in the last
        for _ in range(4):
            process = begin(workdir, "--checkpoint_every_rounds=1")
            if killed % 2:
                while_writing += halt_while_writing(process, workdir, rng.randrange(ROUNDS))
            else:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(rng.uniform(0.2, 1.0) * whole_s)
            killed += process.poll() is None
            process.kill()
            process.communicate()
        finish(begin(workdir))
        same(workdir, quiet)
    print(f"{killed} killed, {while_writing} of them while a checkpoint was written")
    assert while_writing > 5


@pytest.mark.slow
def test_a_run_that_is_asked_to_stop_goes_on_when_it_is_typed_again(tmp_path, monkeypatch, capsys):
    """In a directory without code, with a relative workdir, on the network of `small_world`."""
    root = Path(__file__).parents[2]
    flags = ["--workdir=runs/mine", "--eval_every=4"]
    process = subprocess.Popen(
        [sys.executable, "-m", "commands.small_world", "{}", "--rounds=2000", *flags],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": f"{root}:{root / 'tests'}"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    workdir = tmp_path / "runs" / "mine"
    wait_for(workdir / "metrics.jsonl", process, lines=2)
    process.send_signal(signal.SIGINT)
    _, err = finish(process, 75)
    done = numbers(workdir)
    saved = f"interrupted, round {len(done)} of 2000 is saved; run the same command again to go on"
    assert saved in err
    monkeypatch.chdir(tmp_path)
    rounds = len(done) + 1
    with small_world.world():
        assert train.main([*small_world.FLAGS, f"--rounds={rounds}", *flags]) == 0
    assert f"going on after round {len(done)} of {rounds}" in capsys.readouterr().out
    lines = numbers(workdir)
    assert lines[:-1] == done
    assert [line["round"] for line in lines] == [*range(1, rounds + 1)]
    assert lines[-1]["simulated_s"] > done[-1]["simulated_s"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop_it_saves_and_ends_with_75(number, begin, quiet, tmp_path):
    process = begin(tmp_path, "--checkpoint_every_rounds=0")
    wait_for(tmp_path / "metrics.jsonl", process, lines=2)
    process.send_signal(number)
    _, err = finish(process, 75)
    done = len(numbers(tmp_path))
    assert f"interrupted, round {done} of {ROUNDS} is saved; run the same command again to go on" in err
    out, _ = finish(begin(tmp_path))
    assert f"going on after round {done} of {ROUNDS}" in out
    same(tmp_path, quiet)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_while_it_compiles_it_ends_at_once(number, begin, tmp_path):
    """With a network that is not in the others' cache. Python handlers would have to wait."""
    process = begin(tmp_path, "--batch_size=5")
    said = iter(process.stderr.readline, "")
    assert any("compiling" in line for line in said)
    time.sleep(1.0)
    process.send_signal(number)
    _, err = process.communicate(timeout=10)
    assert process.returncode == 130
    assert err.endswith("\nstopped while measuring and compiling; nothing was trained yet\n")
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.slow
def test_jax_variables_that_would_change_the_numbers_do_not(begin, environment, quiet, tmp_path, monkeypatch):
    for name, value in {
        "ENABLE_X64": "1", "DEFAULT_PRNG_IMPL": "rbg", "NUMPY_DTYPE_PROMOTION": "strict",
        "NUMPY_RANK_PROMOTION": "raise", "THREEFRY_PARTITIONABLE": "0", "TRANSFER_GUARD": "disallow",
    }.items():  # fmt: skip
        monkeypatch.setitem(environment, f"JAX_{name}", value)
    _, err = finish(begin(tmp_path))
    assert "without JAX_ENABLE_X64, JAX_NUMPY_DTYPE_PROMOTION, " in err
    same(tmp_path, quiet)


@pytest.mark.slow
def test_with_the_settings_of_a_newcomer_it_is_stopped_goes_on_and_is_reported(environment, tmp_path):
    """All choices are left open. Every command is typed again in the first command's directory."""
    train = [
        sys.executable,
        "-m",
        "launch.train",
        "--model=efficientnetv2-tiny",
        "--image_size=8",
        "--rounds=6",
    ]
    start = {
        "cwd": tmp_path,
        "env": environment,
        "text": True,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
    }
    process = subprocess.Popen(train, **start)
    wait_for(tmp_path / "runs" / "demo" / "metrics.jsonl", process, lines=1)
    process.send_signal(signal.SIGINT)
    _, err = finish(process, 75)
    assert "is saved; run the same command again to go on" in err
    out, _ = finish(subprocess.Popen(train, **start))
    assert "going on after round" in out
    assert [line["round"] for line in numbers(tmp_path / "runs" / "demo")] == [1, 2, 3, 4, 5, 6]
    out, _ = finish(subprocess.Popen([sys.executable, "-m", "launch.report"], **start))
    assert "no_split" in out
    export = "from sfl_jax.commands import workdir; print(workdir.trained('runs/demo').round)"
    out, _ = finish(subprocess.Popen([sys.executable, "-c", export], **start))
    assert out == "6\n"


@pytest.mark.slow
def test_a_second_run_in_the_workdir_is_refused_and_a_dead_one_is_not_in_the_way(begin, tmp_path):
    process = begin(tmp_path)
    wait_for(tmp_path / "metrics.jsonl", process)
    _, err = finish(begin(tmp_path), 2)
    assert f"run {process.pid} is using it" in err
    process.kill()
    process.communicate()
    assert (tmp_path / ".lock").read_text() == f"sfl_jax {process.pid}\n"
    finish(begin(tmp_path))


@pytest.mark.slow
def test_other_chunks_give_the_same_numbers_but_for_rounding(begin, quiet, tmp_path):
    finish(begin(tmp_path, "--clients_per_chunk=1"))
    check_close(numbers(tmp_path), numbers(quiet), rel=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_resumed_with_other_chunks_and_devices_it_goes_on_but_for_rounding(devices, begin, quiet, tmp_path):
    workdir = shutil.copytree(quiet, tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints" / f"{ROUNDS:06d}")
    more = ["--clients_per_chunk=1", f"--devices={devices}"]
    out, _ = finish(begin(workdir, *more, devices=devices))
    assert f"going on after round {ROUNDS - 2} of {ROUNDS}" in out
    assert numbers(workdir)[:-2] == numbers(quiet)[:-2]
    check_close(numbers(workdir)[-2:], numbers(quiet)[-2:], rel=1e-3)
    apart = [
        np.abs(a - b).max() / max(np.abs(b).max(), 0.01)
        for a, b in finite.pairs(final_model(workdir), final_model(quiet))
    ]
    print(f"{devices} devices: {max(apart):.1e} apart")
    assert max(apart) < 1e-3


@pytest.mark.slow
def test_a_full_disk_stops_the_run_which_goes_on_bitwise_once_there_is_room(begin, quiet, small_disk):
    process = begin(small_disk / "run", "--checkpoint_every_rounds=1")
    wait_for(small_disk / "run" / "metrics.jsonl", process, lines=2)
    fill(small_disk / "filler")
    _, err = finish(process, 75)
    assert "solve this, then run the same command again to go on" in err
    text = (small_disk / "run" / "metrics.jsonl").read_text()
    assert all(json.loads(line) for line in text.splitlines()), "a half line"
    _, err = finish(begin(small_disk / "run"), 2)
    assert "MB needed; free some space" in err
    (small_disk / "filler").unlink()
    finish(begin(small_disk / "run"))
    same(small_disk / "run", quiet)
