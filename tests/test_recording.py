"""What a run leaves on disk round by round, without any training."""

import contextlib

import jax.numpy as jnp
import numpy as np
import pytest

from sfl_jax import experiment, metrics, recording
from sfl_jax.checkpoints import Checkpoints
from sfl_jax.config import Config
from sfl_jax.federated.round import Model

ROUNDS = 7


@pytest.fixture
def clock(monkeypatch):
    """The machine's seconds, in a list of one."""
    now = [0.0]
    monkeypatch.setattr(recording.time, "monotonic", lambda: now[0])
    return now


def recorder(config, progress=None):
    checkpoints = Checkpoints(recording.Path(config.workdir) / "checkpoints", config.keep)
    given = metrics.Stopwatch(), metrics.CompileClock()
    return contextlib.closing(recording.Recorder(config, checkpoints, progress, *given))


def state(round):
    return experiment.State(round, Model({"x": jnp.full(3, float(round))}), {"exact": 0.5 * round})  # pyright: ignore


def line(round):
    return metrics.Round(round, 0.25, None, None, 0.5, 0.5, 0.5 * round, 1.0, 1.0, 1, 1.0)


def go(config, clock, rounds, progress=None):
    with recorder(config, progress) as own:
        own.begin(state(progress.round if progress else 0), {"fleet": "ab"}, {})
        for round in rounds:
            clock[0] += 1.0
            own.add(state(round), line(round))


@pytest.mark.parametrize(
    ("flags", "saved"),
    [
        ({"checkpoint_every_rounds": 2, "checkpoint_every_s": 0.0, "keep": 9}, [0, 2, 4, 6]),
        ({"checkpoint_every_rounds": 2, "checkpoint_every_s": 0.0, "keep": 1}, [6]),
        ({"checkpoint_every_rounds": 2, "checkpoint_every_s": 0.0, "keep": 3}, [2, 4, 6]),
        ({"checkpoint_every_rounds": 0, "checkpoint_every_s": 2.5, "keep": 9}, [0, 3, 6]),
        ({"checkpoint_every_rounds": 4, "checkpoint_every_s": 3.0, "keep": 9}, [0, 3, 4, 7]),
        ({"checkpoint_every_rounds": 0, "checkpoint_every_s": 0.0, "keep": 9}, [0]),
        ({}, [0]),  # 300 s
    ],
)
def test_checkpoints_come_by_rounds_or_seconds_and_as_many_stay_as_are_kept(flags, saved, clock, tmp_path):
    go(Config(workdir=str(tmp_path), **flags), clock, range(1, ROUNDS + 1))
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == saved


def test_a_run_goes_on_with_what_it_had_reached(clock, tmp_path):
    config = Config(workdir=str(tmp_path), checkpoint_every_rounds=2, checkpoint_every_s=0.0)
    go(config, clock, range(1, 6))  # a line after the last checkpoint, as of a run that was killed
    whole = (tmp_path / recording.LOG).read_bytes()
    checkpoints = Checkpoints(tmp_path / "checkpoints", 2)
    progress = recording.reached(config, checkpoints)
    assert progress is not None
    assert (progress.round, progress.simulated_s, progress.inputs) == (4, {"exact": 2.0}, {"fleet": "ab"})
    assert progress.wall_s > 0
    restored = checkpoints.restore(progress, Model({"x": np.zeros(3, np.float32)}))  # pyright: ignore
    np.testing.assert_array_equal(restored.packed["x"], 4.0)
    go(config, clock, range(5, 6), progress)
    assert (tmp_path / recording.LOG).read_bytes() == whole
    assert whole.count(b"\n") == 5
