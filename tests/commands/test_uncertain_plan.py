import csv
import io
import json

import numpy as np
import pytest
from matplotlib import image

from sfl_jax.commands import plan, train, uncertain_plan

FLEET = """client,flops,uplink_bps,downlink_bps,memory_bytes,samples
cam-1,1e8,1e7,2e7,1e9,64
"cam, 2",2e8,1e7,2e7,1e9,100
cam-3,1e9,1e7,2e7,1e9,40
"""
NAMES = "cam-1", "cam, 2", "cam-3"


def traces(rounds=8):
    rng = np.random.default_rng(0)
    lines = ["round,client,uplink_bps"]
    for round in range(rounds):
        lines += [f'{round},"{name}",{1e7 * np.exp(0.6 * rng.normal())}' for name in NAMES]
    return "\n".join([*lines, ""])


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fleet.csv").write_text(FLEET)
    (tmp_path / "rates.csv").write_text(traces())
    return tmp_path


def run(*argv):
    flags = ["--model=efficientnetv2-tiny", "--fleet=fleet.csv", "--server_flops=1e9", "--output=p.json"]
    return plan.main([*flags, *argv])


def test_a_quantile_of_traces_is_planned_and_tested(here, capsys):
    assert run("--traces=rates.csv", "--quantile=0.75", "--plot") == 0
    written, out = json.loads((here / "p.json").read_text()), capsys.readouterr().out
    rows = list(csv.DictReader(io.StringIO((here / "p.csv").read_text())))
    assert [row["client"] for row in rows] == list(NAMES)
    assert 0 < written["bound_s"] <= written["round_s"] * (1 + 1e-9)
    assert max(float(row["client_s"]) for row in rows) == pytest.approx(written["round_s"])
    assert (written["tested_on_rounds"], written["compared_plans_made_on_rounds"]) == (4, 4)
    tested = {row["plan"]: row for row in written["tested"]}
    assert list(tested) == [
        "this plan", "plan on means", "worst case", "plan on means, shares stay", "best cuts of each round",
    ]  # fmt: skip
    best = tested.pop("best cuts of each round")
    for row in tested.values():
        for name in ("quantile_round_s", "mean_round_s", "longest_round_s"):
            assert row[name] >= best[name] * (1 - 1e-9)
    for name in ("mean_round_s", "longest_round_s"):
        following, staying = tested["plan on means"], tested["plan on means, shares stay"]
        assert staying[name] >= following[name] * (1 - 1e-9)
    assert "75% of the sampled rounds last at most" in out
    assert "with the best shares in every round; this plan is" in out
    assert image.imread(here / "p.png").shape[0] > 100
    assert run("--traces=rates.csv") == 0  # replaces its own files
    assert "at the least rates" in capsys.readouterr().out


def test_the_worst_case_of_an_interval_is_the_plan_of_its_least_rates(here, capsys):
    assert run("--interval=0.5,1.2") == 0
    worst = json.loads((here / "p.json").read_text())
    half = FLEET.replace("1e8,1e7,2e7", "5e7,5e6,1e7").replace("2e8,1e7,2e7", "1e8,5e6,1e7")
    (here / "fleet.csv").write_text(half.replace("1e9,1e7,2e7", "5e8,5e6,1e7"))
    assert run() == 0
    assert worst["round_s"] == pytest.approx(json.loads((here / "p.json").read_text())["round_s"])
    longest = [row["longest_round_s"] for row in worst["tested"] if row["plan"] == "this plan"]
    assert longest[0] <= worst["round_s"]
    assert "rates times 0.5 to 1.2" in capsys.readouterr().out


def test_the_quantile_of_an_interval_is_drawn_by_the_seed(here, monkeypatch):
    monkeypatch.setattr(uncertain_plan, "SAMPLES", 10)
    monkeypatch.setattr(uncertain_plan, "TESTS", 5)
    rounds_s = []
    for seed in (0, 0, 1):
        assert run("--interval=0.5,1.5", "--quantile=0.9", f"--seed={seed}") == 0
        rounds_s.append(json.loads((here / "p.json").read_text())["round_s"])
    assert rounds_s[0] == rounds_s[1] != rounds_s[2]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--traces=none.csv"], "--traces=none.csv: no such file; give the path of a CSV file"),
        (["--traces=fleet.csv"], "--traces: fleet.csv:1: columns 'memory_bytes', 'samples': must be one of"),
        (["--quantile=0.9"], "--quantile=0.9: needs --traces or --interval"),
        (["--quantile=1.5", "--traces=rates.csv"], "--quantile=1.5: must be a finite number, at least 0 and"),
        (["--interval=0.8"], "--interval=0.8: must be two numbers, LOW,HIGH, with 0 < LOW <= HIGH"),
        (["--interval=1.2,0.8"], "--interval=1.2,0.8: must be two numbers"),
        (["--interval=0,1"], "--interval=0,1: must be two numbers"),
        (["--interval=1,inf"], "--interval=1,inf: must be two numbers"),
        (["--interval=a,b"], "--interval=a,b: must be two numbers"),
        (["--interval=1,2", "--traces=rates.csv"], "--interval=1,2: leave it out with --traces"),
        (["--interval=1,2", "--method=greedy"], "--method=greedy: leave it out with --interval"),
        (["--interval=1,2", "--barrier=staged"], "--barrier=staged: leave it out with --interval"),
        (["--interval=1,2", "--links=fading"], "--links=fading: leave it out with --interval"),
        (["--traces=rates.csv", "--band=pooled"], "--band=pooled: leave it out with --traces"),
        (["--traces=rates.csv", "--scheme=psl"], "--scheme=psl: leave it out with --traces"),
        (["--traces=rates.csv", "--server_memory_bytes=1G"], "--server_memory_bytes=1000000000.0: leave it"),
        (["--traces=rates.csv", "--frontier=bytes"], "--frontier=bytes: leave it out with --traces"),
        (["--traces=rates.csv", "--target_round_s=3"], "--target_round_s=3.0: leave it out with --traces"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_does_not_fit_is_one_line(here, capsys, flags, words):
    assert run(*flags) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert words in error
    assert not (here / "p.json").exists()


def test_traces_of_one_round_cannot_be_tested(here, capsys):
    (here / "rates.csv").write_text(traces(1))
    assert run("--traces=rates.csv") == 2
    assert "--traces=rates.csv: has 1 round; must have 2 or more" in capsys.readouterr().err
    (here / "rates.csv").write_text(traces(2).replace('0,"cam, 2"', '0,"cam, 9"'))
    assert run("--traces=rates.csv") == 2
    assert "rates.csv:3: column client: 'cam, 9': must be a client of the fleet" in capsys.readouterr().err


def test_training_takes_no_traces(capsys):
    assert train.main(["--traces=rates.csv", "--workdir=w"]) == 2
    assert "traces" in capsys.readouterr().err
