"""What a run writes round by round, without training."""

import contextlib
import dataclasses
import json
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest

from sfl_jax.commands import workdir
from sfl_jax.commands.config import Config, settings
from sfl_jax.errors import BadInput
from sfl_jax.federated.round import Model
from sfl_jax.run import metrics, recording
from sfl_jax.run.checkpoints import Checkpoints
from sfl_jax.run.ledger import Ledger
from sfl_jax.run.state import State

ROUNDS = 7


@pytest.fixture
def clock(monkeypatch):
    """The machine's seconds, in a list with one number."""
    now = [0.0]
    monkeypatch.setattr(recording.time, "monotonic", lambda: now[0])
    return now


def recorder(config, progress=None):
    checkpoints = Checkpoints(recording.Path(config.workdir) / "checkpoints", config.keep)
    saving = recording.Saving(
        config.checkpoint_every_rounds, config.checkpoint_every_s, config.on_write_error == "stop"
    )
    given = checkpoints, progress, metrics.Stopwatch(), metrics.CompileClock()
    own = recording.Recorder(config.workdir, saving, settings(config, "train"), *given)
    return contextlib.closing(own)


def state(round):
    return State(round, Model({"x": jnp.full(3, float(round))}), {"exact": 0.5 * round})  # pyright: ignore


def line(round):
    return metrics.Round(round, 0.25, None, None, 0.5, 0.5, 0.5 * round, 1.0, 1.0, 1, 1.0)


def go(config, clock, rounds, progress=None):
    with recorder(config, progress) as own:
        own.begin(state(progress.round if progress else 0), {"fleet": "ab"}, {}, {})
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
    go(config, clock, range(1, 6))  # a line after the last checkpoint, like that of a killed run
    whole = (tmp_path / recording.LOG).read_bytes()
    checkpoints = Checkpoints(tmp_path / "checkpoints", 2)
    progress = workdir.reached(config, checkpoints)
    assert progress is not None
    assert (progress.round, progress.simulated_s, progress.inputs) == (4, {"exact": 2.0}, {"fleet": "ab"})
    assert progress.wall_s > 0
    restored = checkpoints.restore(progress, Model({"x": np.zeros(3, np.float32)}))  # pyright: ignore
    np.testing.assert_array_equal(restored.packed["x"], 4.0)
    go(config, clock, range(5, 6), progress)
    assert (tmp_path / recording.LOG).read_bytes() == whole
    assert whole.count(b"\n") == 5


class Fails:
    """The disk is full for the next `times` saves."""

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
        own.begin(state(0), {}, {}, {})
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
        own.begin(state(0), {}, {}, {})
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


def test_bytes_are_read_back_and_missing_in_lines_of_older_releases():
    own = line(1)._replace(**Ledger(*range(1, 10))._asdict())
    assert own.to_json()["labels_up_bytes"] == 3
    assert metrics.Round.from_json(own.to_json()) == own
    old = {name: value for name, value in own.to_json().items() if name not in Ledger._fields}
    assert metrics.Round.from_json(old) == line(1)
    assert line(1).to_json() == old | dict.fromkeys(Ledger._fields)
    assert metrics.Round._fields[-9:] == Ledger._fields


def test_clients_are_counted_over_the_whole_run(clock, tmp_path, monkeypatch):
    """Also in lines before it went on, and in lines that are not written yet."""
    config = Config(workdir=str(tmp_path), checkpoint_every_rounds=1, on_write_error="continue")
    go(config, clock, range(1, 3))
    progress = workdir.reached(config, Checkpoints(tmp_path / "checkpoints", 2))
    with recorder(config, progress) as own:
        own.begin(state(2), {"fleet": "ab"}, {}, {})
        broken = mock.Mock(wraps=own.log._file, write=mock.Mock(side_effect=OSError(28, "full")))
        file, own.log._file = own.log._file, broken
        own.add(state(3), line(3)._replace(clients=0))
        own.log._file = file
        assert own.came() == [1, 1, 0]


def differences(before, after, rounds, tmp_path, clock):
    """What refuses a run that has finished some rounds with `before` and would go on with `after`."""
    config = Config(workdir=str(tmp_path), checkpoint_every_rounds=1, learning_rate=0.5, **before)
    go(config, clock, range(1, rounds + 1))
    try:
        workdir.reached(dataclasses.replace(config, **after), Checkpoints(tmp_path / "checkpoints", 2))
    except BadInput as error:
        return str(error).split(": the run in")[0]
    return None


CONSTANT = {"learning_rate_schedule": "constant", "warmup_rounds": 0}


@pytest.mark.parametrize(
    ("before", "rounds", "after", "refusal"),
    [
        ({**CONSTANT, "rounds": 3}, 3, {"rounds": 9}, None),
        ({**CONSTANT, "rounds": 9}, 3, {"rounds": 4}, None),
        ({**CONSTANT, "rounds": 9, "warmup_rounds": 4}, 6, {"rounds": 20}, None),
        ({**CONSTANT, "rounds": 9}, 3, {"rounds": 4, "seed": 1}, "--seed=1 (was 0)"),
        (
            {**CONSTANT, "rounds": 4, "warmup_rounds": 8}, 4, {"rounds": 8},
            "--rounds=8 (was 4; with --warmup_rounds=8 the rate of every round depends on it)",
        ),
        (
            {"learning_rate_schedule": "cosine", "rounds": 4, "warmup_rounds": 0}, 4, {"rounds": 8},
            "--rounds=8 (was 4; with --learning_rate_schedule=cosine the rate of every round depends on it)",
        ),
        # The finished rounds have the same rates in a run with these rounds.
        ({"learning_rate_schedule": "cosine", "rounds": 9, "warmup_rounds": 2}, 2, {"rounds": 8}, None),
    ],
)  # fmt: skip
def test_more_rounds_need_no_flag_where_those_that_are_done_stay_as_they_are(
    before, rounds, after, refusal, tmp_path, clock
):
    assert differences(before, after, rounds, tmp_path, clock) == refusal


def test_what_a_run_goes_on_with_all_the_same_is_said(tmp_path, clock, caplog):
    after = {"seed": 1, "method": "common_cut", "allow_config_change": True}
    assert differences({}, after, 1, tmp_path, clock) is None
    said = [message for message in caplog.messages if "going on with" in message]
    assert said == [
        "--allow_config_change: going on with --method=common_cut (was exact)",
        "--allow_config_change: going on with --seed=1 (was 0)",
    ]
    caplog.clear()
    progress = Checkpoints(tmp_path / "checkpoints", 2).newest((tmp_path / recording.LOG).read_bytes())
    config = Config(workdir=str(tmp_path), fleet="f.csv", allow_config_change=True)
    workdir.check_inputs(config, progress, {"fleet": "cd"})
    [said] = caplog.messages
    assert said.endswith("going on with --fleet=f.csv (has other contents now)")
    with pytest.raises(BadInput, match=r"^--fleet=f.csv \(has other contents now\): the run in "):
        workdir.check_inputs(
            dataclasses.replace(config, allow_config_change=False), progress, {"fleet": "cd"}
        )


@pytest.mark.parametrize(
    ("name", "content", "is_ours"),
    [
        ("config.json", '{"model_type": "bert"}', False),
        ("config.json", "not json", False),
        ("config.json", "", True),
        ("config.json", json.dumps(Config().to_dict() | {"environment": {}}), True),
        ("report.html", "<!doctype html><p>thesis", False),
        ("report.html", '<!doctype html>\n<meta name="generator" content="sfl_jax">', True),
        ("notes.txt", "mine", True),
    ],
)
def test_files_of_somebody_else_refuse_the_workdir(name, content, is_ours, tmp_path):
    (tmp_path / name).write_text(content)
    config = Config(workdir=str(tmp_path))
    if is_ours:
        assert workdir.reached(config, Checkpoints(tmp_path / "checkpoints", 2)) is None
    else:
        said = rf"^workdir={tmp_path}: would replace {tmp_path / name}, which sfl_jax did not write"
        with pytest.raises(BadInput, match=said):
            workdir.reached(config, Checkpoints(tmp_path / "checkpoints", 2))
    assert (tmp_path / name).read_text() == content
