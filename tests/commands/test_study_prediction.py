"""Predicted rounds beside real ones. Plans of `sfl` change the seconds to an accuracy, not the rounds."""

import pathlib

import numpy as np
import pytest
from commands import small_world

from sfl_jax.commands import study, study_prediction
from sfl_jax.optim.rounds_model import RoundsModel


def case(**values):
    return study.Case(values, [], pathlib.Path())


def test_an_accuracy_is_reached_between_two_evaluations():
    assert study_prediction.crossing([0.2, None, 0.6, 0.9], 0.4) == pytest.approx(2.0)
    assert study_prediction.crossing([0.2, 0.5, 0.9], 0.1) == pytest.approx(0.5)
    assert study_prediction.crossing([0.2, 0.9], 0.9) == 2
    assert study_prediction.crossing([0.2, None, 0.3], 0.4) is None


def test_pilots_differ_much():
    cases = [case(cut=cut, codec=codec) for cut in ("1", "2", "3") for codec in ("a", "b")]
    chosen = study_prediction.spread(cases, 3)
    assert chosen[:2] == [0, 5]
    assert len(set(chosen)) == 3
    assert len(study_prediction.spread(cases, 99)) == 6


def test_the_table_begins_with_the_shortest_predicted_time():
    rows = [
        study_prediction.Row({"max_cut": "1"}, 4.0, 8.0, 5.0, 10.0),
        study_prediction.Row({"max_cut": "2"}, None, None, 3.0, 4.5),
        study_prediction.Row({"max_cut": "3"}, None, None, np.inf, np.inf),
    ]
    title, _, *body, constants = study_prediction.table(
        rows, RoundsModel(0.1, 0.2, 0.0, 2.0), 0.9
    ).splitlines()
    assert title == "to 90 %, each predicted from the other trainings; off by 25% in the mean, 25% at most"
    assert [line.split()[0] for line in body] == ["2", "1", "3"]
    assert body[1].split() == ["1", "4.0", "5.0", "8.00", "s", "10.00", "s"]
    assert constants == "constants: own_rate 0.1, shared_rate 0.2, length_cost 0, noise_cost 2"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--predict=2"], "--predict=2: must be an accuracy above 0 and at most 1"),
        (["--predict=a"], "--predict=a: must be an accuracy"),
        (["--pilots=3"], "--pilots=3: needs --predict"),
        (["--predict=0.5", "--pilots=1"], "--pilots=1: must be an integer, at least 2"),
        (
            ["--predict=0.5", "--vary=seed=0,1"],
            "--vary=seed: must be one of cut, max_cut, local_epochs, codec",
        ),
    ],
)
def test_what_cannot_be_predicted_is_refused_in_a_line(arguments, said, capsys, tmp_path):
    assert study.main(["--vary=max_cut=1,2", *arguments, f"--workdir={tmp_path}"]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_a_study_shows_predicted_rounds_beside_real_ones(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, "_train", lambda cases: small_world.run(cases[0].directory, *cases[0].flags))
    flags = [
        *small_world.FLAGS,
        "--scheme=psl",
        "--max_cut=2",
        "--rounds=3",
        "--cohort_size=2",
        "--clients_per_chunk=0",
    ]
    flags = [flag for flag in flags if not flag.startswith(("--clients_per_chunk=4", "--cohort_size=4"))]
    varied = ["--vary=local_epochs=1,2", f"--workdir={tmp_path}"]
    with small_world.world():
        assert study.main([*varied, *flags, "--predict=0.03", "--pilots=2"]) == 0
        said = capsys.readouterr().out
        assert "to 3 %, each predicted from the other trainings" in said
        assert "constants: own_rate" in said
        assert study.main([*varied, *flags, "--predict=1"]) == 2
        assert "no training reached this accuracy" in capsys.readouterr().err
        assert study.main([*varied, *flags, "--predict=0.03", "--scheme=sfl", f"--workdir={tmp_path}2"]) == 2
        assert "needs --scheme=psl or sfl_v2, not sfl" in capsys.readouterr().err


@pytest.mark.slow
def test_the_shortest_round_is_the_shortest_way_to_any_accuracy_of_sfl(tmp_path):
    """Cohort, batch and epochs are the same: losses and accuracies do not depend on the plan."""
    runs = {}
    for method in ("exact", "common_cut", "random_cut", "no_split"):
        with small_world.world():
            assert small_world.run(tmp_path / method, f"--method={method}", "--rounds=4") == 0
        lines = small_world.lines(tmp_path / method)
        runs[method] = {
            name: np.array([line[name] for line in lines])
            for name in ("train_loss", "test_accuracy", "simulated_s", "mean_cut")
        }
    best = runs.pop("exact")
    for own in runs.values():
        np.testing.assert_allclose(own["train_loss"], best["train_loss"], rtol=1e-5)
        np.testing.assert_allclose(own["test_accuracy"], best["test_accuracy"], atol=1e-6)
        assert (own["mean_cut"] != best["mean_cut"]).any()
        assert (best["simulated_s"] <= own["simulated_s"] * (1 + 1e-9)).all()
    assert any((best["simulated_s"] < own["simulated_s"] * (1 - 1e-6)).all() for own in runs.values())
