"""`launch.train --seeds=…`: each run is what it is alone, and all go on after a signal."""

import json
import signal

import pytest
from commands import small_world

from sfl_jax.commands import study
from sfl_jax.run import metrics, recording

SEEDS = ("0", "3")


@pytest.fixture(autouse=True, scope="module")
def in_small_world():
    with small_world.world():
        yield


def bare(workdir):
    return [line._replace(**dict.fromkeys(metrics.CLOCKS, 0.0)) for line in recording.logged(str(workdir))]


def train(workdir, *flags):
    return small_world.run(workdir, "--rounds=4", *flags)


@pytest.mark.slow
def test_each_run_is_what_it_is_alone_and_the_table_has_mean_and_spread(tmp_path):
    assert train(tmp_path, "--seeds=0,3") == 0
    for seed in SEEDS:
        assert train(f"{tmp_path}-{seed}", f"--seed={seed}") == 0
        for line, other in zip(bare(tmp_path / f"seed={seed}"), bare(f"{tmp_path}-{seed}"), strict=True):
            assert [*line] == pytest.approx([*other], rel=1e-5, nan_ok=False)
    (row,) = json.loads((tmp_path / study.TABLE).read_text())["rows"]
    accuracies = [bare(tmp_path / f"seed={seed}")[-1].test_accuracy for seed in SEEDS]
    assert row["test_accuracy"] == pytest.approx(sum(accuracies) / 2)
    assert row["by_round"][-1]["round"] == 4
    assert row["by_round"][-1]["test_accuracy_sd"] == row["test_accuracy_sd"]
    assert all((tmp_path / f"seed={seed}" / "report.html").exists() for seed in SEEDS)
    before = (tmp_path / "seed=3" / "metrics.jsonl").read_bytes()
    assert train(tmp_path, "--seeds=0,3") == 0
    assert (tmp_path / "seed=3" / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_a_run_that_diverges_is_not_in_the_table(tmp_path, capsys):
    assert train(tmp_path, "--learning_rates=0.01,1e38") == 3
    assert "error: --learning_rate=1e+38: round 1:" in capsys.readouterr().err
    (row,) = json.loads((tmp_path / study.TABLE).read_text())["rows"]
    assert row["settings"] == {"learning_rate": "0.01"}
    assert len(bare(tmp_path / "learning_rate=0.01")) == 4
    assert not (tmp_path / "learning_rate=1e+38" / recording.LOG).read_text()


@pytest.mark.slow
def test_after_a_signal_all_runs_go_on_where_they_were(tmp_path):
    with small_world.faults(signal_after=2, number=signal.SIGTERM):
        assert train(tmp_path / "a", "--seeds=0,3") == 75
    assert 2 <= len(bare(tmp_path / "a" / "seed=3")) < 4
    assert train(tmp_path / "a", "--seeds=0,3") == 0
    assert train(tmp_path / "b", "--seeds=0,3") == 0
    for seed in SEEDS:
        assert bare(tmp_path / "a" / f"seed={seed}") == bare(tmp_path / "b" / f"seed={seed}")


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--seeds=0,x", "--seeds=0,x: must be integers, at least 0, each once"),
        ("--seeds=1,1", "--seeds=1,1: must be integers"),
        ("--learning_rates=0.1,0", "--learning_rates=0.1,0: must be numbers above 0"),
    ],
)
def test_a_list_that_is_none_is_refused(flag, said, capsys, tmp_path):
    from sfl_jax.commands import train as command

    assert command.main([flag, f"--workdir={tmp_path}"]) == 2
    assert said in capsys.readouterr().err
