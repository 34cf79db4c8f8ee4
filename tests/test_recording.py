"""What a run leaves on disk round by round, without any training."""

import contextlib
from unittest import mock

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


class Fails:
    """The disk is full for the next saves, so many of them."""

    def __init__(self, monkeypatch, times):
        self.left, put = times, Checkpoints._put

        def put_or_fail(checkpoints, model, progress):
            self.left -= 1
            if self.left >= 0:
                raise OSError(28, "No space left on device")
            put(checkpoints, model, progress)

        monkeypatch.setattr(Checkpoints, "_put", put_or_fail)


def test_a_background_save_that_failed_is_tried_again_at_the_end(clock, tmp_path, monkeypatch, caplog):
    config = Config(workdir=str(tmp_path), checkpoint_every_rounds=2, on_write_error="continue")
    with recorder(config) as own:
        own.begin(state(0), {}, {})
        own.add(state(1), line(1))
        fails = Fails(monkeypatch, 1)
        own.add(state(2), line(2))
        own.save(state(2), wait=True)
        assert own.saved_round == 2
        assert fails.left == -1
        assert "checkpoint of round 2: " in caplog.text
        own.add(state(3), line(3))
        Fails(monkeypatch, 9)
        own.add(state(4), line(4))
        own.save(state(4), wait=True)
        assert own.saved_round == -1
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == [0, 2]


def test_what_is_done_is_saved_before_an_error_ends_the_run(clock, tmp_path, monkeypatch):
    config = Config(workdir=str(tmp_path))
    with recorder(config) as own:
        own.begin(state(0), {}, {})
        own.add(state(1), line(1))
        assert own.rescue(state(1))
        assert own.saved_round == 1
        own.add(state(2), line(2))
        gone = state(2)
        gone.model.packed["x"].delete()
        assert not own.rescue(gone)
        Fails(monkeypatch, 9)
        assert not own.rescue(state(2))
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == [0, 1]


def test_clients_are_counted_over_the_whole_run(clock, tmp_path, monkeypatch):
    """Those of the lines before it went on, and of lines that could not be written yet."""
    config = Config(workdir=str(tmp_path), checkpoint_every_rounds=1, on_write_error="continue")
    go(config, clock, range(1, 3))
    progress = recording.reached(config, Checkpoints(tmp_path / "checkpoints", 2))
    with recorder(config, progress) as own:
        own.begin(state(2), {"fleet": "ab"}, {})
        broken = mock.Mock(wraps=own.log._file, write=mock.Mock(side_effect=OSError(28, "full")))
        file, own.log._file = own.log._file, broken
        own.add(state(3), line(3)._replace(clients=0))
        own.log._file = file
        assert own.came() == [1, 1, 0]
