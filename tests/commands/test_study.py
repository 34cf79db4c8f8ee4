"""Many runs and one table: what is measured of a run by hand, what is refused, and a study end to end."""

import json
import os
import subprocess
import sys
import time

import pytest

from sfl_jax.commands import study, study_page, study_plot, study_table
from sfl_jax.errors import BadInput
from sfl_jax.files import locked
from sfl_jax.run.ledger import Ledger
from sfl_jax.run.metrics import Round

SENT = Ledger(*(100, 20, 3, 40, 100, 7, 8, 9, 10))  # 263 bytes cross


def lines(*accuracies, ledger=SENT):
    return [
        Round(number, 1.0, None if x is None else 1.0, x, 2.0, 2.0, 2.0 * number, 0.5 * number, 9.0, 3, 1.0,
              x, None if x is None else x - 0.1, **(ledger._asdict() if ledger else {}))
        for number, x in enumerate(accuracies, 1)
    ]  # fmt: skip


def test_what_a_run_came_to():
    found = study_table.measured(lines(None, 0.8, 0.95, 0.93), (0.9, 0.99))
    assert found == {
        "test_accuracy": 0.93, "best_accuracy": 0.95, "client_accuracy_worst": pytest.approx(0.83),
        "simulated_s": 8.0, "bytes": 4 * 263.0, "wall_s": 2.0,
        "rounds_to_0.9": 3, "seconds_to_0.9": 6.0, "bytes_to_0.9": 3 * 263.0,
        "rounds_to_0.99": None, "seconds_to_0.99": None, "bytes_to_0.99": None,
    }  # fmt: skip


def test_runs_that_counted_no_bytes_have_none():
    found = study_table.measured(lines(0.95, ledger=None), (0.9,))
    assert (found["bytes"], found["bytes_to_0.9"], found["rounds_to_0.9"]) == (None, None, 1)
    assert "-" in study_table.table(
        study_table.summarised([({"codec": "int8"}, lines(0.95, ledger=None))], (0.9,)), (0.9,)
    )


def test_seeds_become_one_row_with_mean_and_deviation():
    runs = [
        ({"codec": c, "seed": s}, lines(x)) for c, s, x in (("a", "0", 0.8), ("a", "1", 0.9), ("b", "0", 0.7))
    ]
    rows = study_table.summarised(runs, (0.85,))
    assert [row["settings"] for row in rows] == [{"codec": "a"}, {"codec": "b"}]
    assert rows[0]["test_accuracy"] == pytest.approx(0.85)
    assert rows[0]["test_accuracy_sd"] == pytest.approx(0.05 * 2**0.5)
    assert rows[0]["rounds_to_0.85"] is None, "one of two runs did not reach it"
    assert "85.00 % ± 7.07" in study_table.table(rows, (0.85,))


@pytest.mark.parametrize(
    "more", [[], ["--targets="], ["--targets=0.3,0.45"], ["--predict=0.9"], ["--predict=0.9", "--pilots=3"]]
)
def test_the_command_on_the_page_is_read_as_the_one_that_was_given(more):
    read = study._split(["--vary=scheme=sfl,psl", "--vary=cut=1,3", "--rounds=2", "--workdir=runs/x", *more])
    assert study._split(study._joined(*read)) == read
    assert set(study._joined(*read)) >= set(more)


def test_the_page_has_every_run_its_table_and_its_command():
    runs = [
        ({"codec": c, "seed": s}, lines(None, x))
        for c, s, x in (("a", "0", 0.8), ("a", "1", 0.9), ("<b>", "0", 0.7))
    ]
    made = study_page.study_page(
        runs, study_table.summarised(runs, (0.85,)), (0.85,), ["study", "--vary=codec=a,<b>"]
    )
    assert "<h1>Study of codec, seed</h1>" in made
    assert "<b>85.00 %</b><small>codec a</small>" in made
    assert '"codec a, seed 1\\n90.00 % after round 2"' in made, "the round is said once"
    assert "<h3>Means over seeds</h3>" in made
    assert "<pre><code>study</code> <code>'--vary=codec=a,&lt;b&gt;'</code></pre>" in made
    assert made.count("<figure>") == 3
    assert "<b>," not in made
    none = [({"codec": "a"}, lines(None, ledger=None))]
    assert "not known of this run" in study_page.study_page(none, study_table.summarised(none, ()), (), [])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--vary: missing; for example --vary=scheme=sfl,psl\n"),
        (["--vary", "--targets=1"], "--vary: needs a value, for example --vary=scheme=sfl,psl\n"),
        (["--vary", "scheme"], "--vary: 'scheme': must be NAME=VALUE,VALUE"),
        (["--vary=scheme"], "--vary: 'scheme': must be NAME=VALUE,VALUE"),
        (["--vary=seed=0,"], "must be NAME=VALUE,VALUE"),
        (["--vary=seed=0", "--vary=seed=1"], "must be NAME=VALUE,VALUE, each name once"),
        (["--vary=seed=0", "--targets=90"], "--targets=90: must be auto, or accuracies above 0"),
        (["--vary=seedz=0,1"], "--vary: no combination can be trained"),
        (["--vary=seeds=0,1"], "--vary=seeds: must be --vary=seed"),
    ],
)
def test_what_cannot_be_studied_is_refused_in_a_line(arguments, said, capsys, tmp_path):
    assert study.main([*arguments, f"--workdir={tmp_path}"]) == 2
    assert said in capsys.readouterr().err


def test_the_picture_names_each_setting_once(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(study_plot.Figure, "savefig", lambda figure, file, **_: drawn.append(figure))
    settings = ({"codec": "a", "seed": "0"}, {"codec": "a", "seed": "1"}, {"codec": "b", "seed": "0"})
    study_plot.write(tmp_path / "study.png", [(values, lines(0.8, 0.9)) for values in settings])
    (figure,) = drawn
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["codec a", "codec b"]
    assert [len(panel.lines) for panel in figure.axes] == [3, 3, 3]


def test_help_names_the_settings(capsys):
    assert study.main(["--help"]) == 0
    assert "--vary=NAME=V1,V2" in capsys.readouterr().out


@pytest.mark.slow
def test_a_study_trains_what_can_be_trained_and_goes_on_where_it_stopped(tmp_path, capsys):
    flags = [
        "--vary=scheme=sl,fl", "--vary=cut=1,2", "--model=mlp", "--image_size=28", "--clients=20",
        "--cohort_size=2", "--rounds=2", "--batch_size=100", "--targets=0.3", f"--workdir={tmp_path}",
    ]  # fmt: skip
    assert study.main(flags) == 0
    said = capsys.readouterr()
    assert said.err.count("left out: scheme=fl") == 2
    rows = json.loads((tmp_path / study.TABLE).read_text())["rows"]
    assert [row["settings"] for row in rows] == [{"scheme": "sl", "cut": "1"}, {"scheme": "sl", "cut": "2"}]
    assert rows[0]["test_accuracy"] == pytest.approx(rows[1]["test_accuracy"], abs=1e-3), "sl knows no cut"
    assert rows[0]["bytes"] != rows[1]["bytes"]
    assert (tmp_path / study.PICTURE).stat().st_size > 10_000
    assert "scheme sl, cut 2" in (tmp_path / study.REPORT).read_text()
    before = (tmp_path / "scheme=sl,cut=1" / "metrics.jsonl").read_bytes()
    assert study.main(flags) == 0
    assert (tmp_path / "scheme=sl,cut=1" / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_a_signal_to_the_study_alone_saves_the_round_and_ends_both(tmp_path):
    flags = ["--vary=seed=0,1", "--model=mlp", "--image_size=28", "--clients=20", "--cohort_size=2"]
    command = [
        sys.executable,
        "-m",
        "sfl_jax.commands.study",
        *flags,
        "--rounds=5000",
        f"--workdir={tmp_path}",
    ]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "seed=0" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") > 1):
        assert child.poll() is None
        time.sleep(0.1)
    child.terminate()
    _, said = child.communicate(timeout=60)
    assert child.returncode == 75
    assert "stopping after the round, which is saved" in said
    assert "interrupted; the same command goes on" in said
    assert "rounds are saved" in (tmp_path / "runs.log").read_text()


def test_a_run_that_another_process_trains_is_left_alone(tmp_path):
    """As after kill -9 of a study, whose training goes on."""
    case = study._case({"seed": "0"}, [], str(tmp_path))
    case.directory.mkdir()
    log = tmp_path / "seed=0.log"
    log.write_text("of the other")
    with (
        locked(case.directory, "workdir", ""),
        pytest.raises(BadInput, match=f"run {os.getpid()} is using it"),
    ):
        study._train([case])
    assert log.read_text() == "of the other"


def test_a_run_that_fails_leaves_the_others_in_the_table(tmp_path, monkeypatch, capsys):
    written = []
    monkeypatch.setattr(study, "_train", lambda cases: 3 if cases[0].values["codec"] == "int8" else 0)
    monkeypatch.setattr(study, "write", lambda varied, cases, *_: written.extend(cases))
    assert study.main(["--vary=codec=float32,int8,int4", f"--workdir={tmp_path}"]) == 3
    assert [case.values["codec"] for case in written] == ["float32", "int4"]


def test_runs_that_differ_in_seed_and_rate_are_trained_in_one_program(tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(study, "_train", lambda cases: trained.append(cases) or 3)
    vary = ["--vary=seed=0,1", "--vary=codec=int8,int4", "--vary=learning_rate=0.1,0.2"]
    study.main([*vary, "--model=mlp", "--seed=3", f"--workdir={tmp_path}"])
    assert [len(cases) for cases in trained] == [4, 4]
    assert trained[1][0].directory == tmp_path / "codec=int4" / "seed=0,learning_rate=0.1"
    flags = study._flags_for(trained[1])
    assert flags == [
        "--model=mlp", "--codec=int4", "--seeds=0,1", "--learning_rates=0.1,0.2",
        f"--workdir={tmp_path}/codec=int4",
    ]  # fmt: skip
