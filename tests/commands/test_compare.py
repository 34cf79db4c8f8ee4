"""launch.compare: one training with every method's clock, and plans without training."""

import csv
import json
import os

import numpy as np
import pytest
from disks import fill

from sfl_jax import files
from sfl_jax.commands import compare
from sfl_jax.commands.config import Config
from sfl_jax.planning import comparison

TINY = ["--model=efficientnetv2-tiny", "--server_flops=3e9", "--layer_form=conv"]
PNG = b"\x89PNG\r\n\x1a\n"


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_one_training_and_every_clock(tmp_path, capsys):
    small = ["--clients=600", "--cohort_size=2", "--rounds=3", "--eval_every=2", "--clients_per_chunk=2"]
    assert compare.main([*TINY, *small, f"--workdir={tmp_path}"]) == 0
    rows = table(tmp_path / "clocks.csv")
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [int(row["round"]) for row in rows] == [line["round"] for line in lines] == [1, 2, 3]
    assert [float(row["exact_s"]) for row in rows] == pytest.approx([line["simulated_s"] for line in lines])
    assert rows[0]["test_accuracy"] == ""
    assert float(rows[2]["test_accuracy"]) == lines[2]["test_accuracy"]
    for method in comparison.methods("session"):
        column = method.replace(", ", "_").replace(" ", "_")
        seconds = np.array([float(row[f"{column}_s"]) for row in rows])
        assert (seconds >= [line["simulated_s"] * (1 - 1e-9) for line in lines]).all()
    assert (tmp_path / "clocks.png").read_bytes()[:8] == PNG
    page = (tmp_path / "report.html").read_text()
    assert all(f"<td>{method}<td" in page for method in comparison.methods("session"))
    out = capsys.readouterr().out
    assert "no_split" in out
    assert f"written: {tmp_path / 'clocks.csv'}" in out


def test_plans_without_training(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(comparison, "DRAWS", 3)
    monkeypatch.setattr(comparison, "RANDOM_FLEETS", 2)
    few = ("exact", "alternating", "no_split")  # each is compiled
    monkeypatch.setattr(comparison, "methods", lambda barrier: few)
    errors = comparison.errors
    monkeypatch.setattr(comparison, "errors", lambda *given: errors(*given, draws=3))
    cohorts = ["--clients=6", "--cohort_size=3"]
    assert compare.main([*TINY, "--plan_only", *cohorts, f"--workdir={tmp_path}"]) == 0
    rows = table(tmp_path / "methods.csv")
    assert list(rows[0]) == list(comparison.Row._fields)
    methods = len(comparison.methods("session"))
    assert sum(row["sweep"] == "error" for row in rows) == 2 * 3 * methods
    swept = [row for row in rows if row["sweep"] == "server_flops"]
    assert len(swept) == len(comparison.FACTORS) * comparison.RANDOM_FLEETS * methods
    page = (tmp_path / "methods.html").read_text()
    for title in ("Server", "Clients that share it", "Uplink", "Heterogeneity", "Rates wrong by up to 10 %"):
        assert f"<h3>{title}</h3>" in page
    assert "no_split: " in page
    assert "--plan_only=true" in page
    for name in ("methods.png", "errors.png"):
        assert (tmp_path / name).read_bytes()[:8] == PNG
    for name, mark in compare.PLAN_FILES.items():  # the second run replaces its own files
        files.ensure_ours(tmp_path / name, mark, "workdir", "w")
    assert sorted(os.listdir(tmp_path)) == ["errors.png", "methods.csv", "methods.html", "methods.png"]
    ratio = max(
        float(row["round_s"]) / float(row["optimum_s"]) for row in swept if row["method"] == "no_split"
    )
    said = capsys.readouterr()
    assert "all 6 clients share the server in one round; for rounds of 3 clients" in said.err
    (line,) = (line for line in said.out.splitlines() if line.strip().startswith("no_split"))
    assert f"({ratio:.3f})" in line


def test_what_is_infinite_or_missing_is_empty_in_the_table(tmp_path):
    compare.write_csv(tmp_path / "a.csv", ("x", "y", "z"), [(1.5, None, float("inf")), (2, "a,b", 0.0)])
    assert (tmp_path / "a.csv").read_text() == 'x,y,z\n1.5,,\n2,"a,b",0.0\n'


@pytest.mark.parametrize(("flag", "words"), [
    ("--num_classes=7", "--num_classes=7: needs --plan_only"),
    ("--samples_per_client=7", "--samples_per_client=7: needs --plan_only"),
    ("--bits_per_float=7", "--bits_per_float=7: needs --plan_only; in training it is 32"),
    ("--band=pooled --plan_only", "--band=pooled: must be fixed with --plan_only"),
    ("--cohort_size=101", "--cohort_size=101: must be at most --clients=100"),
    ("--workdir=file/below", "--workdir=file/below: cannot be written"),
])  # fmt: skip
def test_what_makes_no_sense_is_refused_in_one_line(tmp_path, monkeypatch, capsys, flag, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert compare.main(flag.split()) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert words in err
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("clocks.csv", []),
        ("clocks.png", []),
        *((n, ["--plan_only"]) for n in ("methods.csv", "errors.png", "methods.html")),
    ],
)
def test_a_file_of_the_users_own_stays(name, flags, tmp_path, capsys):
    (tmp_path / name).write_text("mine")
    assert compare.main([*TINY, *flags, f"--workdir={tmp_path}"]) == 2
    assert f"would replace {tmp_path / name}, which sfl_jax did not write" in capsys.readouterr().err
    assert (tmp_path / name).read_text() == "mine"


def test_plans_are_not_written_beside_a_training(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    assert compare.main([*TINY, "--plan_only", f"--workdir={tmp_path}"]) == 2
    assert f"--workdir={tmp_path}: has a training; choose another" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["config.json"]


def test_plans_alone_need_no_cohort():
    assert Config.from_dict({"clients": 5, "plan_only": True}, "compare").clients == 5


def test_a_table_that_does_not_fit_is_an_error_that_names_it(small_disk):
    fill(small_disk / "filler")
    with pytest.raises(OSError, match=r"No space left on device: '.*/disk/table.csv'"):
        compare.write_csv(small_disk / "table.csv", ["a", "b"], [(1.5, number) for number in range(99_999)])
    assert os.listdir(small_disk) == ["filler"]
