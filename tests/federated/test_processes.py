"""Runs of several real processes on this machine: the numbers of one, and what happens when one dies."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sfl_jax.commands import train

ROOT = Path(__file__).parents[2]
RUN = [
    "--model=efficientnetv2-tiny", "--image_size=16", "--clients=600", "--cohort_size=5",
    "--clients_per_chunk=2", "--server_flops=1e10", "--layer_form=product",
]  # fmt: skip
# Compiled fast, and alike in all runs that are compared.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
}


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.fixture
def launch(tmp_path):
    """launch(count, workdir, *flags) starts a run of that many processes; none outlives the test."""
    started = []

    def launch(count, workdir, *flags):
        port, processes = free_port(), []
        for process in range(count):
            where = f"--coordinator_address=127.0.0.1:{port}", f"--process_id={process}"
            command = [
                sys.executable, "-m", "launch.train", *RUN, f"--workdir={workdir}", *flags,
                f"--num_processes={count}", *(where if count > 1 else ()),
            ]  # fmt: skip
            said = [tmp_path / f"{len(started)}.{name}" for name in ("out", "err")]
            with said[0].open("w") as out, said[1].open("w") as err:
                child = subprocess.Popen(
                    command, cwd=ROOT, env=os.environ | ENVIRONMENT, stdout=out, stderr=err
                )
            processes.append((child, *said))
            started.append(child)
        return processes

    yield launch
    for child in started:
        child.kill()
        child.wait()


def finish(processes, timeout=1200):
    """(exit code, stdout, stderr) of each."""
    ends = time.monotonic() + timeout
    results = []
    for child, *said in processes:
        code = child.wait(ends - time.monotonic())
        # Gloo itself says on stdout that it is connected.
        texts = [re.sub(r"\[Gloo\].*\n", "", path.read_text()) for path in said]
        results.append((code, *texts))
    return results


def lines(workdir):
    path = workdir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def assert_same_numbers(one, several):
    assert [line["round"] for line in one] == [line["round"] for line in several]
    for a, b in zip(one, several, strict=True):
        for name in a.keys() - {"wall_s", "client_samples_per_s"}:
            same = a[name] is None and b[name] is None
            assert same or b[name] == pytest.approx(a[name], rel=1e-5), name


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_several_processes_give_the_numbers_of_one(count, launch, tmp_path):
    """5 clients in chunks of 2: the processes have unequal work. Only the first writes and speaks."""
    flags = "--rounds=3", "--eval_every=3", "--heartbeat_timeout_seconds=1000"
    [(code, _, said)] = finish(launch(1, tmp_path / "one", *flags))
    assert code == 0, said
    results = finish(launch(count, tmp_path / "several", *flags))
    assert [code for code, *_ in results] == [0] * count, results[0][2]
    assert_same_numbers(lines(tmp_path / "one"), lines(tmp_path / "several"))
    assert "test accuracy" in results[0][1]
    assert not any(out for _, out, _ in results[1:])
    config = json.loads((tmp_path / "several" / "config.json").read_text())
    assert len(config["environment"]["devices"]) == count, "each process brought its device"


def test_processes_that_cannot_be_are_refused(capsys, tmp_path):
    for flags, line in (
        (["--num_processes=2", "--process_id=2"], "--process_id=2: must be below --num_processes=2"),
        (["--process_id=-2"], "--process_id=-2: must be an integer, at least -1"),
    ):
        assert train.main([*RUN, f"--workdir={tmp_path / 'run'}", *flags]) == 2
        assert line in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


def after_lines(workdir, count, processes, timeout=1200):
    """Waits until metrics.jsonl has so many lines."""
    ends = time.monotonic() + timeout
    while len(lines(workdir)) < count:
        assert time.monotonic() < ends
        assert all(child.poll() is None for child, *_ in processes), finish(processes)
        time.sleep(0.05)


@pytest.mark.slow
def test_one_process_killed_ends_all(launch, tmp_path):
    heartbeat_s = 60
    flags = "--rounds=60", "--eval_every=60"
    processes = launch(2, tmp_path / "run", *flags, f"--heartbeat_timeout_seconds={heartbeat_s}")
    after_lines(tmp_path / "run", 12, processes)
    processes[1][0].send_signal(signal.SIGKILL)
    killed_at = time.monotonic()
    results = finish(processes)
    # Some seconds more, since this machine may be busy.
    assert time.monotonic() - killed_at < heartbeat_s + 30
    for process, (code, _, said) in enumerate(results):
        assert code != 0
        if process != 1:
            assert re.search(r"error: process \d of \d stops|the JAX distributed service detected", said), (
                said
            )
    assert len(lines(tmp_path / "run")) < 60
