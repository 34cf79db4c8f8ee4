"""Events for TensorBoard: the same numbers as metrics.jsonl, each round once."""

import json
import logging
import struct
from unittest import mock

import pytest
from commands import small_world
from tensorboardX.proto.event_pb2 import Event

from sfl_jax.commands import tensorboard, train
from sfl_jax.run import metrics


def events(workdir):
    """Reads the one event file: records of length, checksum, content, checksum."""
    (path,) = (workdir / "tensorboard").glob("events.out.tfevents.*")
    content, found, at = path.read_bytes(), [], 0
    while at < len(content):
        (length,) = struct.unpack_from("<Q", content, at)
        found.append(Event.FromString(content[at + 12 : at + 12 + length]))
        at += 16 + length
    return found


def rounds(workdir):
    """[(round, {tag: value})]"""
    found = [(e.step, {v.tag: v.simple_value for v in e.summary.value}) for e in events(workdir)]
    return [(step, values) for step, values in found if values]


def check(workdir):
    """Every number of metrics.jsonl is an event of its round, in the same order."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    found = rounds(workdir)
    assert [step for step, _ in found] == [line.pop("round") for line in lines]
    for (_, values), line in zip(found, lines, strict=True):
        known = {tensorboard.tag(name): value for name, value in line.items() if value is not None}
        assert values == pytest.approx(known, rel=1e-6)
    return found


@pytest.mark.slow
def test_a_run_that_goes_on_has_every_round_once(tmp_path):
    run = ["--tensorboard", "--learning_rate_schedule=constant", "--eval_every=2", "--seed=3"]
    with small_world.world():
        assert small_world.run(tmp_path, "--rounds=2", *run) == 0
        first = check(tmp_path)
        assert small_world.run(tmp_path, "--rounds=3", *run) == 0
    found = check(tmp_path)
    assert [(step, values.keys()) for step, values in found[:2]] == [(s, v.keys()) for s, v in first]
    times = [event.wall_time for event in events(tmp_path)[1:]]
    assert times == sorted(times)
    tags = found[1][1].keys()
    assert {"loss/train_loss", "accuracy/test_accuracy", "plan/simulated_s", "plan/mean_cut"} <= tags
    assert {"bytes/model_up_bytes", "work/server_flop", "machine/wall_s", "machine/train_wall_s"} <= tags
    assert all(tensorboard.tag(name).split("/")[0] != "machine" or name in metrics.CLOCKS
               for name in metrics.Round._fields[1:])  # fmt: skip


def test_without_the_package_one_line_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tensorboard.importlib.util, "find_spec", lambda name: None)
    assert train.main(["--tensorboard", f"--workdir={tmp_path / 'run'}"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "--tensorboard=true: needs the package tensorboardX; install sfl_jax[tensorboard]" in said
    assert not (tmp_path / "run").exists()


def line(round):
    return metrics.Round(round, 0.25, None, None, 0.5, 0.5, 0.5 * round, 1.0, 1.0, 1, 1.0)


def test_the_file_begins_with_the_rounds_that_are_done(tmp_path):
    """A second start replaces the first file. Unknown numbers have no event."""
    for done in ((), (line(1), line(2))):
        own = tensorboard.Events(str(tmp_path), done)
        own.add(line(len(done) + 1))
        own.close()
    found = rounds(tmp_path)
    assert [step for step, _ in found] == [1, 2, 3]
    for step, values in found:
        known = {name: value for name, value in line(step).to_json().items() if value is not None}
        del known["round"]
        assert values == pytest.approx({tensorboard.tag(name): value for name, value in known.items()})


def test_a_full_disk_ends_the_events_and_not_the_run(tmp_path, caplog):
    own = tensorboard.Events(str(tmp_path))
    own.add(line(1))
    with (
        mock.patch.object(own._writer, "write_event", side_effect=small_world.FULL),
        caplog.at_level(logging.WARNING),
    ):
        own.add(line(2))
        own.add(line(3))
    own.close()
    assert [record.message for record in caplog.records] == [
        f"TensorBoard: not written: {small_world.FULL}; its file ends here"
    ]


def test_files_of_others_stay(tmp_path):
    (tmp_path / "tensorboard").mkdir()
    other = tmp_path / "tensorboard" / "events.out.tfevents.1.host"
    other.write_text("mine")
    tensorboard.Events(str(tmp_path)).close()
    assert other.read_text() == "mine"
    assert len(list(other.parent.iterdir())) == 2
