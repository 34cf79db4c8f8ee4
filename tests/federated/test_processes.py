"""Runs of several real processes on this machine: they give the numbers of one, and one may end early.

All use one compilation cache, so that a start takes seconds. A cached program is the same program.
"""

import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import compiling
import plain
import pytest
import stand_ins

from sfl_jax.commands import train
from sfl_jax.run import metrics

ROOT = Path(__file__).parents[2]
ROUNDS = 12
# 5 unequal clients in chunks of 2: the processes have unequal work. Small steps keep rounding small.
RUN = [
    *plain.FLAGS,
    "--model=efficientnetv2-tiny", "--layer_form=conv", "--image_size=8", "--partition=dirichlet",
    "--dirichlet_alpha=2", "--clients=1000", "--cohort_size=5", "--clients_per_chunk=2",
    "--learning_rate=0.001", "--server_momentum=0.5", "--server_flops=1e10", f"--rounds={ROUNDS}",
    f"--eval_every={ROUNDS}", "--checkpoint_every_rounds=3",
]  # fmt: skip
PATIENT = "--heartbeat_timeout_seconds=1000"


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        # Compiled fast, and with the same settings in all runs that are compared.
        "XLA_FLAGS": compiling.FAST_FLAGS,
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("programs")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def free_port(ports=(0,)):
    """The first of these ports that is free. 0 means any."""
    for port in ports:
        with socket.socket() as server:
            try:
                server.bind(("127.0.0.1", port))
            except OSError:
                continue
            return server.getsockname()[1]
    raise OSError("no free port")


class Process:
    """A process that trains. `said` is its stdout and stderr."""

    def __init__(self, command, environment, directory):
        self.paths = [directory / f"{id(self)}.{name}" for name in ("out", "err")]
        with self.paths[0].open("w") as out, self.paths[1].open("w") as err:
            self.child = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=err)

    @property
    def said(self):
        # Gloo prints on stdout that it is connected.
        return [re.sub(r"\[Gloo\].*\n", "", path.read_text()) for path in self.paths]


@pytest.fixture(scope="module")
def launch(environment, tmp_path_factory):
    """launch(count, workdir, *flags) starts a run with that many processes. None outlives the tests."""
    started = []

    def launch(count, workdir, *flags, variables=None):
        port = free_port()
        for process in range(count):
            where = f"--coordinator_address=127.0.0.1:{port}", f"--process_id={process}"
            command = [sys.executable, "-m", "launch.train", *RUN, f"--workdir={workdir}", *flags]
            if variables is None:
                command += [f"--num_processes={count}", *(where if count > 1 else ())]
            own = environment | (variables(process) if variables else {})
            started.append(Process(command, own, tmp_path_factory.mktemp("said")))
        return started[-count:]

    yield launch
    for process in started:
        process.child.kill()
        process.child.wait()


def finish(processes, timeout=1800):
    """(exit code, stdout, stderr) of each process."""
    ends = time.monotonic() + timeout
    return [(one.child.wait(ends - time.monotonic()), *one.said) for one in processes]


@pytest.fixture(scope="module")
def one(launch, tmp_path_factory):
    """The workdir of an undisturbed run with one process."""
    workdir = tmp_path_factory.mktemp("one")
    [(code, _, said)] = finish(launch(1, workdir))
    assert code == 0, said
    return workdir


@pytest.fixture(scope="module")
def two(launch, tmp_path_factory):
    """(workdir, output of its processes) of an undisturbed run of two, started like by Open MPI's mpirun."""
    workdir, port = tmp_path_factory.mktemp("two"), free_port(range(61440, 65536))

    def variables(process):
        return {
            "OMPI_MCA_orte_hnp_uri": f"{(port - 61440) * 4096}.0;tcp://127.0.0.1:1",
            "OMPI_COMM_WORLD_SIZE": "2",
            "OMPI_COMM_WORLD_RANK": str(process),
            "OMPI_COMM_WORLD_LOCAL_RANK": str(process),
        }

    return workdir, finish(launch(2, workdir, PATIENT, variables=variables))


def lines(workdir):
    path = workdir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def numbers(workdir):
    """The lines of metrics.jsonl without the machine's clocks."""
    return [{name: line[name] for name in line.keys() - {*metrics.CLOCKS}} for line in lines(workdir)]


def assert_close(workdir, other):
    """Equal except for rounding."""
    for a, b in zip(numbers(workdir), numbers(other), strict=True):
        assert {name: value is None for name, value in a.items()} == {
            name: value is None for name, value in b.items()
        }
        known = [name for name, value in a.items() if value is not None]
        assert [a[name] for name in known] == pytest.approx([b[name] for name in known], rel=1e-5)
    losses = [line["train_loss"] for line in numbers(workdir)]
    assert len(losses) == ROUNDS
    assert all(abs(a / b - 1) > 1e-4 for a, b in itertools.pairwise(losses)), "rounds are alike"


def after_lines(workdir, count, processes, timeout=1800):
    """Waits until metrics.jsonl has this many lines."""
    ends = time.monotonic() + timeout
    while len(lines(workdir)) < count:
        assert time.monotonic() < ends
        assert all(one.child.poll() is None for one in processes), [one.said for one in processes]
        time.sleep(0.01)


@pytest.mark.slow
def test_processes_started_by_open_mpi_give_the_numbers_of_one(one, two):
    """Only the first writes and prints."""
    workdir, results = two
    assert [code for code, *_ in results] == [0, 0], results
    assert_close(workdir, one)
    assert "test accuracy" in results[0][1]
    assert results[1][1:] == ("", "")
    config = json.loads((workdir / "config.json").read_text())
    assert len(config["environment"]["devices"]) == 2, "each process brought its device"


@pytest.mark.slow
def test_a_run_goes_on_with_other_numbers_of_processes(launch, one, tmp_path):
    """2, then 3, then 1. Only one is asked to stop; all stop, and the first says so."""
    for count, until in ((2, 3), (3, 7)):
        processes = launch(count, tmp_path, PATIENT)
        after_lines(tmp_path, until, processes)
        processes[-1].child.terminate()
        results = finish(processes)
        assert [code for code, *_ in results] == [75] * count, results
        told = [f"interrupted, round {len(lines(tmp_path))} of {ROUNDS}" in err for *_, err in results]
        assert told == [True] + [False] * (count - 1)
    [(code, out, err)] = finish(launch(1, tmp_path))
    assert code == 0, err
    assert "going on after round" in out
    assert_close(tmp_path, one)


@pytest.mark.slow
@pytest.mark.parametrize(("count", "victim"), [(2, 0), (2, 1), (3, 1)])
def test_one_process_killed_ends_all_and_the_same_command_goes_on(count, victim, launch, one, two, tmp_path):
    heartbeat_s = 60
    flags = (f"--heartbeat_timeout_seconds={heartbeat_s}",)
    processes = launch(count, tmp_path, *flags)
    after_lines(tmp_path, 5, processes)
    processes[victim].child.kill()
    killed_at = time.monotonic()
    results = finish(processes)
    # Some seconds more, because this machine may be busy.
    assert time.monotonic() - killed_at < heartbeat_s + 30
    assert results[victim][0] == -signal.SIGKILL
    for code, _, said in results[:victim] + results[victim + 1 :]:
        print(f"process {victim} killed: {code} after {time.monotonic() - killed_at:.1f} s; {said}")
        assert code in (1, -signal.SIGABRT)
        assert re.search(rf"error: process \d of {count} stops|JAX distributed service detected", said), said
    assert len(lines(tmp_path)) < ROUNDS
    first_said = results[0][2]
    results = finish(launch(count, tmp_path, *flags))
    assert [code for code, *_ in results] == [0] * count, results
    # The round of a checkpoint, or the newest round that process 0 had finished when it lost the others.
    kept = re.search(r"round (\d+) of 12 is saved", first_said)
    begun = int(re.search(r"going on after round (\d+) of 12", results[0][1])[1])
    assert begun == int(kept[1]) if kept else begun in (3, 6, 9)
    if count == 2:
        assert numbers(tmp_path) == numbers(two[0])
    else:
        assert_close(tmp_path, one)


@pytest.mark.slow
def test_preempted_under_slurm_it_is_requeued_and_goes_on(environment, two, tmp_path):
    """The job script itself, with two tasks. SLURM asks all its processes to stop."""
    job = free_port(range(62000, 65536)) - 61440
    workdir = tmp_path / "run"
    queue = Process(
        ["sbatch", "launch/cluster/slurm.sh", *RUN, f"--workdir={workdir}", PATIENT],
        environment | stand_ins.variables(tmp_path, job, tasks=2) | {"PYTHON": sys.executable},
        tmp_path,
    )
    try:
        after_lines(workdir, 3, [queue])
        os.killpg(int((tmp_path / "record.job").read_text()), signal.SIGTERM)
        [(code, out, err)] = finish([queue])
    finally:
        queue.child.kill()
    assert code == 0, err
    assert out.count(f"job {job} was interrupted; requeued") == 1
    done = int(re.search(r"interrupted, round (\d+) of 12 is saved", err)[1])
    assert f"going on after round {done} of {ROUNDS}" in out
    assert numbers(workdir) == numbers(two[0])


def case(name, environment, **variables):
    """A function of `process_cases` in another process."""
    tests = Path(__file__).parents[1]
    return subprocess.Popen(
        [sys.executable, "-c", f"from federated import process_cases; process_cases.{name}()"],
        env=environment | {"PYTHONPATH": os.pathsep.join([str(tests), str(ROOT)])} | variables,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.slow
def test_a_process_reads_the_samples_of_its_own_clients(environment):
    address = f"127.0.0.1:{free_port()}"
    both = [case("own_samples", environment, ADDRESS=address, PROCESS=str(process)) for process in (0, 1)]
    for process in both:
        _, said = process.communicate()
        assert process.returncode == 0, said


def test_processes_find_each_other_on_every_system(environment):
    process = case("systems", environment)
    _, said = process.communicate()
    assert process.returncode == 0, said


def test_processes_that_cannot_be_are_refused(capsys, tmp_path):
    for flags, line in (
        (["--num_processes=2", "--process_id=2"], "--process_id=2: must be below --num_processes=2"),
        (["--coordinator_address=host0"], "--coordinator_address=host0: must be host:port"),
        (["--coordinator_address=host0:port"], "--coordinator_address=host0:port: must be host:port"),
        (["--process_id=-2"], "--process_id=-2: must be an integer, at least -1"),
    ):
        assert train.main([*RUN, f"--workdir={tmp_path / 'run'}", *flags]) == 2
        assert line in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


def test_a_task_whose_others_never_come_says_so_and_ends(environment, tmp_path):
    """Once at once, and once instead of JAX's abort."""
    port = free_port(range(61440, 65536))
    task = {
        "SLURM_JOB_ID": str(port - 61440), "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": "4",
        "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
    }  # fmt: skip
    command = [sys.executable, "-m", "launch.train", f"--workdir={tmp_path / 'run'}", "--join_timeout_s=2"]
    done = subprocess.run(command, env=environment | task, capture_output=True, text=True, check=False)
    address = f"127.0.0.1:{port}"
    said = [line for line in done.stderr.splitlines() if not line.startswith("  ")]  # of a slow start
    assert (done.returncode, said[-2:]) == (2, [
        f"process 0 of 4: waiting for the others at {address}; --num_processes=1 trains alone",
        f"error: --coordinator_address={address}: the other processes cannot be reached (--join_timeout_s=2"
        " is over); --num_processes=1 trains alone",
    ])  # fmt: skip


@pytest.mark.parametrize("variable", ["SLURM_NTASKS", "SLURM_PROCID"])
def test_a_task_that_cannot_meet_the_others_does_not_train_alone(variable, capsys, tmp_path, monkeypatch):
    """Otherwise every task of a job would train in the same workdir."""
    for name, value in {
        "SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "node1", "SLURM_NTASKS": "2", "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0", variable: "none",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("jax._src.xla_bridge.backends_are_initialized", lambda: False)
    assert train.main([*RUN, f"--workdir={tmp_path / 'run'}"]) == 2
    *_, said = capsys.readouterr().err.splitlines()
    assert said.startswith("error: --coordinator_address=(as found): the other processes cannot be reached")
    assert "--num_processes=1 trains alone" in said
    assert not list((tmp_path / "run").iterdir())
