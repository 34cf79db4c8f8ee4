"""Two hundred rounds in which something goes wrong every few rounds."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import small_world
from fuzz import damaged

from sfl_jax.run.ledger import Ledger

ROUNDS = 200
POISONED = [3, 11, 17, 30, 42]
FLAGS = [
    f"--rounds={ROUNDS}", "--eval_every=25", "--checkpoint_every_rounds=3", "--keep=3",
    "--drop_probability=0.2", "--server_momentum=0.5", "--on_divergence=skip_client",
    "--on_write_error=continue",
]  # fmt: skip


@pytest.fixture
def train(tmp_path):
    """train(name, faults, *flags) -> the ended process of a run in tmp_path / name."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "JAX_PLATFORMS": "cpu",
        # On several devices, absent clients change the division over devices, and so the order of sums.
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_ENABLE_COMPILATION_CACHE": "true",  # conftest.py turned it off
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        # Otherwise each thread that computes a round keeps 9 MB of its own.
        "MALLOC_ARENA_MAX": "1",
    }

    def train(name, faults, *flags):
        command = [sys.executable, "-m", "commands.small_world", json.dumps(faults), *FLAGS, *flags]
        done = subprocess.run(
            [*command, f"--workdir={tmp_path / name}"],
            env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert "Traceback" not in done.stderr, done.stderr
        return done

    return train


def disturb(train, workdir, rng):
    """Runs it with faults of the disk every few rounds, starting it again until it is done. Counts the
    events.
    """
    happened = {"killed": 0, "interrupted": 0, "damaged": 0}
    failing = [round for round in range(1, ROUNDS) if rng.random() < 0.1]
    faults = {"poisoned": POISONED, "failing_saves": failing, "failing_lines": failing}
    begun = 0
    while begun < ROUNDS:
        begun += rng.randint(25, 45)
        number = rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
        hit = {"signal_after": begun, "number": number, "delay_s": rng.uniform(0, 0.1)}
        done = train(workdir.name, faults | hit)
        assert done.returncode in {-signal.SIGKILL, 75, 0}, done.stderr
        happened["killed"] += done.returncode == -signal.SIGKILL
        happened["interrupted"] += done.returncode == 75
        if done.returncode == 0:
            break
        if rng.random() < 0.5:
            newest = workdir / "checkpoints" / f"{max(small_world.saved_rounds(workdir)):06d}"
            file = rng.choice(sorted(path for path in newest.rglob("*") if path.is_file()))
            file.write_bytes(damaged(rng, file.read_bytes()))
            happened["damaged"] += 1
    if done.returncode:
        done = train(workdir.name, faults)
    assert done.returncode == 0, done.stderr
    return happened | {"failed writes": 2 * len(failing)}


@pytest.mark.slow
def test_faults_that_have_no_influence_leave_no_trace(train, tmp_path):
    """In the quiet run the clients of POISONED are absent. Otherwise they come with NaN and are skipped."""
    memory = tmp_path / "memory.jsonl"
    done = train("quiet", {"absent": POISONED, "memory": str(memory)})
    assert done.returncode == 0, done.stderr
    happened = disturb(train, tmp_path / "disturbed", random.Random(0))
    print(happened)
    assert min(happened.values()) > 0, happened

    quiet, disturbed = (
        small_world.lines(tmp_path / name, "simulated_s", "round_s", *Ledger._fields)  # NaN are sent too
        for name in ("quiet", "disturbed")
    )
    assert [line["round"] for line in disturbed] == list(range(1, ROUNDS + 1))
    assert disturbed == quiet
    assert sum(line["clients"] < 4 for line in quiet) > ROUNDS / 4, "hardly anybody was away"
    models = [small_world.model(tmp_path / name, ROUNDS) for name in ("quiet", "disturbed")]
    assert small_world.same(*models)
    # If clients of POISONED come with good numbers, they have an influence.
    assert train("healthy", {}, "--rounds=12").returncode == 0
    healthy = small_world.lines(tmp_path / "healthy")
    assert [line["train_loss"] for line in healthy] != [line["train_loss"] for line in quiet[:12]]

    check_flat(memory)


def check_flat(memory: Path):
    """Neither arrays nor the process grow from round to round."""
    arrays, held_bytes, resident_bytes = np.array([*map(json.loads, memory.read_text().splitlines())]).T
    print(f"{arrays[-1]} arrays, {held_bytes[-1]} bytes, resident {resident_bytes[[49, 99, 199]] / 1e6} MB")
    assert len(arrays) == ROUNDS
    # Evaluated rounds hold a few more arrays. Both halves have such rounds.
    assert arrays[100:].max() <= arrays[:100].max()
    assert held_bytes[100:].max() <= held_bytes[:100].max()
    assert resident_bytes[-20:].mean() - resident_bytes[50:70].mean() < 16e6
