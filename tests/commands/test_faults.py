"""Runs in which numbers, clients or the disk fail: what is printed, what is kept, and how they go on."""

import dataclasses

import finite
import numpy as np
import pytest
from commands import small_world
from commands.small_world import lines, model, run, same, saved_rounds

from sfl_jax import datasets, fleet
from sfl_jax.errors import BadInput
from sfl_jax.run import loop
from sfl_jax.run.rounds import prepare

SEED, CLIENTS, COHORT = 0, small_world.CLIENTS, 4


def newcomer(round):
    """A client that comes to this round (from 1) for the first time."""
    before = {client for r in range(round - 1) for client in fleet.cohort(SEED, r, CLIENTS, COHORT)}
    return next(int(c) for c in fleet.cohort(SEED, round - 1, CLIENTS, COHORT) if c not in before)


def test_a_client_that_diverges_stops_the_run_or_is_left_out(tmp_path, capsys, caplog):
    broken = newcomer(3)
    with small_world.world():
        assert run(tmp_path / "quiet", "--rounds=3", "--checkpoint_every_rounds=1") == 0
    capsys.readouterr()
    with small_world.world(poisoned=[broken]):
        assert run(tmp_path / "run", "--rounds=4") == 3
        [said] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        name = f"round 3: the loss or the update of client {broken}, cut "
        assert said.startswith(f"error: {name}")
        assert " is not finite; round 2 is saved; try a lower --learning_rate, " in said
        # The last good state is kept bitwise. The run goes on from it, without the client if asked to.
        assert max(saved_rounds(tmp_path / "run")) == 2
        assert same(model(tmp_path / "run", 2), model(tmp_path / "quiet", 2))
        assert run(tmp_path / "run", "--rounds=4") == 3
        assert len(lines(tmp_path / "run")) == 2
        assert run(tmp_path / "run", "--rounds=4", "--on_divergence=skip_client") == 0
    *before, skipped, _ = lines(tmp_path / "run")
    *quiet, healthy = lines(tmp_path / "quiet")
    assert before == quiet
    assert [line["clients"] for line in lines(tmp_path / "run")] == [4, 4, 3, 4]
    cut = int(said.removeprefix(f"error: {name}").split(",")[0])
    assert 3 * skipped["mean_cut"] == pytest.approx(4 * healthy["mean_cut"] - cut)
    [warning] = [message for message in caplog.messages if "left out" in message]
    assert warning.startswith(name)


@pytest.mark.slow
def test_a_diverged_state_that_cannot_be_saved_is_not_said_to_be(tmp_path, capsys):
    with small_world.world(poisoned=[newcomer(2)]), small_world.faults(failing_saves=[1]):
        assert run(tmp_path, "--rounds=3", "--on_write_error=continue") == 3
    assert "is not finite; round 1 is not saved; " in capsys.readouterr().err
    assert saved_rounds(tmp_path) == [0]


@pytest.mark.parametrize("error", [BadInput("no more"), pytest.param(KeyError("x"), marks=pytest.mark.slow)])
def test_an_error_in_the_middle_of_a_run_costs_no_round_that_is_done(error, tmp_path, capsys, monkeypatch):
    def fail_once(own, round):
        if round == 2:
            monkeypatch.undo()
            raise error
        return prepare(own, round)

    with small_world.world():
        monkeypatch.setattr(loop, "prepare", fail_once)
        if isinstance(error, BadInput):
            assert run(tmp_path, "--rounds=3") == 2
        else:
            with pytest.raises(KeyError):
                run(tmp_path, "--rounds=3")
        said = capsys.readouterr().err
        assert "round 2 of 3 is saved; solve the error, then run the same command again to go on" in said
        assert (saved_rounds(tmp_path), len(lines(tmp_path))) == ([0, 2], 2)
        assert run(tmp_path, "--rounds=3") == 0
    assert [line["round"] for line in lines(tmp_path)] == [1, 2, 3]


@pytest.mark.slow
def test_nobody_comes_the_model_stays_and_the_rounds_count_as_failed(tmp_path, capsys, caplog):
    with small_world.world():
        assert (
            run(tmp_path, "--rounds=3", "--drop_probability=1", "--checkpoint_every_s=1e-9", "--keep=4") == 0
        )
    assert saved_rounds(tmp_path) == [0, 1, 2, 3]
    assert same(model(tmp_path, 3), model(tmp_path, 0))
    for line in lines(tmp_path):
        assert (line["clients"], line["train_loss"]) == (0, None)
        assert line["round_s"] > 0
    failed = [f"round {number}: no client's work is left; the model does not change" for number in (1, 2, 3)]
    assert [message for message in caplog.messages if "work is left" in message] == failed
    assert [*map(str.split, capsys.readouterr().out.splitlines())].count(
        ["failed", "rounds,", "without", "a", "client", "3"]
    ) == 1


@pytest.mark.slow
def test_other_settings_are_taken_by_those_who_insist(tmp_path, capsys, caplog):
    """From then on they hold, also for later runs."""
    with small_world.world():
        assert run(tmp_path / "run", "--rounds=2") == 0
        assert run(tmp_path / "straight", "--rounds=4") == 0
        capsys.readouterr()
        more = ["--rounds=4", "--learning_rate=0.02", "--method=common_cut"]
        assert run(tmp_path / "run", *more) == 2
        differences = "--method=common_cut (was exact)", "--learning_rate=0.02 (was 0.01)"
        assert ", ".join(differences) + ": " in capsys.readouterr().err
        assert run(tmp_path / "run", *more, "--allow_config_change") == 0
        for difference in differences:
            assert f"--allow_config_change: going on with {difference}" in caplog.messages
    assert "going on after round 2 of 4" in capsys.readouterr().out
    changed, straight = lines(tmp_path / "run"), lines(tmp_path / "straight")
    assert changed[:2] == straight[:2]
    assert finite.differ_everywhere(changed[3]["train_loss"], straight[3]["train_loss"])
    clocks = [line["simulated_s"] for line in changed]
    np.testing.assert_allclose(clocks, np.cumsum([line["round_s"] for line in changed]))
    with small_world.world():
        assert run(tmp_path / "run", *more) == 0
        assert run(tmp_path / "run", "--rounds=4") == 2


@pytest.mark.slow
def test_another_dataset_or_fleet_behind_the_same_flag_is_refused(tmp_path, capsys, caplog):
    clients = fleet.random_fleet(CLIENTS, seed=3)
    fleet.write_fleet(tmp_path / "fleet.csv", clients)
    given = [f"--fleet={tmp_path / 'fleet.csv'}", "--on_divergence=skip_client"]
    with small_world.world(poisoned=[newcomer(3)]):
        assert run(tmp_path / "run", *given, "--rounds=3") == 0
    before = lines(tmp_path / "run")
    capsys.readouterr()
    more = [*given, "--rounds=4", "--allow_config_change"]
    with small_world.world():  # no image is black any more
        assert run(tmp_path / "run", *given, "--rounds=4") == 2
        assert "--dataset=mnist (has other contents now): the run in " in capsys.readouterr().err
        faster = dataclasses.replace(clients, uplink_bps=2 * clients.uplink_bps)
        fleet.write_fleet(tmp_path / "fleet.csv", faster)
        assert run(tmp_path / "run", *given, "--rounds=4") == 2
        said = capsys.readouterr().err
        assert "--dataset=mnist (has other contents now), --fleet=" in said
        assert "fleet.csv (has other contents now): the run in " in said
        assert lines(tmp_path / "run") == before
        assert run(tmp_path / "run", *more) == 0
        for name in ("dataset=mnist", f"fleet={tmp_path / 'fleet.csv'}"):
            line = f"--allow_config_change: going on with --{name} (has other contents now)"
            assert line in caplog.messages
    assert lines(tmp_path / "run")[:3] == before
    assert len(lines(tmp_path / "run")) == 4


@pytest.mark.slow
def test_a_disk_that_fails_for_a_while(tmp_path, capsys, caplog):
    """Either it stops the run, which goes on bitwise. Or it does not, and everything is written later."""
    given = ["--rounds=6", "--checkpoint_every_rounds=1", "--eval_every=6"]
    with small_world.world():
        assert run(tmp_path / "quiet", *given) == 0
        for broken in ({"failing_saves": [3]}, {"failing_lines": [3]}):
            stopped, going = (tmp_path / f"{next(iter(broken))} {word}" for word in ("stop", "continue"))
            capsys.readouterr()
            with small_world.faults(**broken):
                assert run(stopped, *given) == 75
            [said] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
            assert "No space left on device" in said
            assert said.endswith("; solve this, then run the same command again to go on")
            assert max(saved_rounds(stopped)) == 2
            assert run(stopped, *given) == 0
            caplog.clear()
            with small_world.faults(**broken):
                assert run(going, *given, "--on_write_error=continue") == 0
            assert [message for message in caplog.messages if "No space left" in message]
            for workdir in (stopped, going):
                assert lines(workdir) == lines(tmp_path / "quiet")
                assert saved_rounds(workdir) == [5, 6]
                assert same(model(workdir, 6), model(tmp_path / "quiet", 6))


@pytest.mark.parametrize(
    ("name", "is_directory"),
    [("checkpoints", False), ("metrics.jsonl", True),
     pytest.param("config.json", True, marks=pytest.mark.slow)],
)  # fmt: skip
def test_what_cannot_be_written_at_the_start_is_bad_input_and_not_worth_another_try(
    name, is_directory, tmp_path, capsys
):
    path = tmp_path / name
    path.mkdir() if is_directory else path.write_text("")
    with small_world.world():
        assert run(tmp_path, "--rounds=2") == 2
    [said] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert str(path) in said
    assert "run the same command again" not in said


@pytest.mark.slow
def test_a_first_state_that_cannot_be_saved_is_bad_input(tmp_path, capsys):
    with small_world.world(), small_world.faults(failing_saves=[0]):
        assert run(tmp_path, "--rounds=2") == 2
    assert "checkpoint of round 0: [Errno 28] No space left on device; choose" in capsys.readouterr().err
    assert saved_rounds(tmp_path) == []


def test_the_small_world_is_the_same_every_time():
    """Without this, two equal runs would prove nothing."""
    one, other = small_world.noise(poisoned=[5]), small_world.noise()
    part = datasets.partition(other.train_labels, CLIENTS)[5]
    assert (one.train_images[part] == 0).all()
    rest = np.setdiff1d(np.arange(len(other.train_images)), part)
    np.testing.assert_array_equal(one.train_images[rest], other.train_images[rest])
    assert (other.train_images > 0).all()
