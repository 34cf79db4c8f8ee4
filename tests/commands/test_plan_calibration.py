"""launch.plan --measured: what it says and writes, and what it refuses."""

import csv
import json
import re

import numpy as np
import pytest
from matplotlib import image

from sfl_jax.commands import parts, plan
from sfl_jax.commands.config import Config
from sfl_jax.commands.plan_calibration import RATES, RESIDUALS

FLEET = """client,flops,uplink_bps,downlink_bps,memory_bytes,samples
cam,1e8,1e7,2e7,1e9,64
phone,2e8,1e7,2e7,1e9,100
idle,1e10,1e7,2e7,1e9,32
"""
FACTORS = {"cam": (3.0, 2.0, 1.0), "phone": (0.5, 1.0, 4.0)}
TERMS = ("client_forward", "client_backward", "smashed_up", "model_up", "model_down", "gradient_down")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Rounds in which cam and phone take FACTORS times the predicted seconds, with 1 % of noise."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fleet.csv").write_text(FLEET)
    config = Config(model="efficientnetv2-tiny", fleet="fleet.csv", server_flops=1e9)
    fleet, _, terms = parts.read_terms(config)
    rng, rows = np.random.default_rng(0), [("round", "client", "cut", *(f"{name}_s" for name in TERMS))]
    for round_ in range(6):
        for k, factors in enumerate(FACTORS.values()):
            cut = 1 + (round_ + k) % 7
            own = terms.seconds(np.full(3, cut), np.ones(3))
            by_term = np.repeat(factors, 2) * np.exp(0.01 * rng.standard_normal(6))
            seconds = [getattr(own, name)[k] * times for name, times in zip(TERMS, by_term, strict=True)]
            rows.append((round_, fleet.client[k], cut, *seconds))
    with open(tmp_path / "rounds.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    return tmp_path


def run(*argv):
    return plan.main(["--model=efficientnetv2-tiny", "--fleet=fleet.csv", "--server_flops=1e9", *argv])


def table(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def test_a_plan_by_measured_rounds(here, capsys):
    assert run("--output=old.json") == 0
    old = json.loads((here / "old.json").read_text())
    capsys.readouterr()
    assert run("--measured=rounds.csv", "--plot", "--write_fleet=fitted.csv") == 0
    out, new = capsys.readouterr().out, json.loads((here / "plan.json").read_text())
    assert "measured    12 rows of 2 of 3 clients in rounds.csv" in out
    assert f"as planned  {old['round_s']:.5g} s by the rates of fleet.csv; that plan would last" in out
    assert f"now         {new['round_s']:.5g} s with a plan for the fitted rates" in out
    assert re.search(r"^idle +0  not measured", out, re.MULTILINE)
    assert new["measured"] == "rounds.csv"
    rates = {row["client"]: row for row in table(here / f"plan{RATES}")}
    for client, factors in FACTORS.items():
        for name, factor in zip(("compute", "uplink", "downlink"), factors, strict=True):
            low, high = (float(rates[client][f"{name}_factor_{end}"]) for end in ("low", "high"))
            assert float(rates[client][f"{name}_factor"]) == pytest.approx(factor, rel=0.02)
            assert low < float(rates[client][f"{name}_factor"]) < high
        assert float(rates[client]["flops_low"]) < float(rates[client]["flops"])
    assert rates["idle"]["compute_factor"] == ""
    residuals = table(here / f"plan{RESIDUALS}")
    assert len(residuals) == 12
    assert max(abs(float(row["residual_percent"])) for row in residuals) < 5
    assert max(abs(float(row["measured_s"]) / float(row["predicted_s"]) - 1) for row in residuals) > 0.3
    assert image.imread(here / "plan.residuals.png").shape[1] == 1320
    assert image.imread(here / "plan.png").shape[1] == 1320
    fitted = {row["client"]: row for row in table(here / "fitted.csv")}
    for client, row in fitted.items():
        expected = 1e10 if client == "idle" else float(rates[client]["flops"])
        assert float(row["flops"]) == pytest.approx(expected, rel=1e-12)
    # The written fleet has the same plan.
    assert run("--fleet=fitted.csv", "--output=again.json") == 0
    again = json.loads((here / "again.json").read_text())
    assert again["round_s"] == pytest.approx(new["round_s"], rel=1e-9)


REFUSED = [
    (["--fleet=random"], "--measured=rounds.csv: needs --fleet, a file with the clients that were measured"),
    (["--band=pooled"], "--measured=rounds.csv: needs --band=fixed; with pooled rates follow from parts"),
    (["--links=shannon"], "--measured=rounds.csv: needs --links=fixed"),
    (["--measured=none.csv"], "--measured=none.csv: no such file"),
    (["--measured=fleet.csv"], "--measured: fleet.csv:1: columns 'flops', 'uplink_bps', "),
    pytest.param(
        ["--codec=int8+int4"],
        "rounds.csv: measured rounds have no codec; choose one",
        marks=pytest.mark.slow,
    ),
    (["--output=mine.json"], "would replace mine.rates.csv, which sfl_jax did not write"),
]


@pytest.mark.parametrize(("argv", "words"), REFUSED)
def test_what_cannot_be_fitted_is_one_line(here, capsys, argv, words):
    (here / f"mine{RATES}").write_text("my,own")
    assert run("--measured=rounds.csv", *argv) == 2
    *_, said = capsys.readouterr().err.splitlines()
    assert said.startswith("error: ")
    assert words in said
    assert not (here / "plan.json").exists()


def totals(here, times, shares):
    """Rounds without noise of clients as in the fleet, with a server that takes `times` its seconds."""
    config = Config(model="efficientnetv2-tiny", fleet="fleet.csv", server_flops=1e9)
    fleet, _, terms = parts.read_terms(config)
    rows = [("round", "client", "cut", "client_s", "share_flops")]
    for round_, share in enumerate(shares):
        for k in range(2):
            own = terms.seconds(np.full(3, 2), np.full(3, share / times))
            rows.append((round_, fleet.client[k], 2, float(sum(part[k] for part in own)), share))
    with open(here / "totals.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)


def test_a_slower_server_is_found_and_planned_for(here, capsys):
    assert run("--output=old.json") == 0
    old = json.loads((here / "old.json").read_text())
    totals(here, 1.6, [1e8, 3e8, 5e8, 2e8])
    assert run("--measured=totals.csv", "--write_fleet=fitted.csv") == 0
    out, new = capsys.readouterr().out, json.loads((here / "plan.json").read_text())
    assert (
        "server      takes 1.6 times the predicted seconds (1.6 to 1.6 with 95 %), from totals; planned"
        in out
    )
    assert "planned with 6.25e+08 FLOP/s, rated 1e+09" in out
    assert new["server_flops"] == pytest.approx(1e9 / 1.6, rel=1e-6)
    assert new["server_factor"]["factor"] == pytest.approx(1.6, rel=1e-6)
    kept_s = max(client["client_s"] + 0.6 * client["server_s"] for client in old["clients"])
    assert f"that plan would last {kept_s:.5g} s at the fitted rates" in out
    assert run("--fleet=fitted.csv", f"--server_flops={new['server_flops']}", "--output=again.json") == 0
    assert json.loads((here / "again.json").read_text())["round_s"] == pytest.approx(new["round_s"], rel=1e-9)


def test_rounds_in_another_unit_are_asked_about(here, capsys):
    totals(here, 1.0, [1e8, 3e8])
    head, *rows = (here / "totals.csv").read_text().splitlines()
    cells = [row.split(",") for row in rows]
    lines = [",".join([*row[:3], f"{1000 * float(row[3])}", f"{float(row[4]) / 1e9}"]) for row in cells]
    (here / "totals.csv").write_text("\n".join([head, *lines]))
    assert run("--measured=totals.csv") == 0
    assert (
        "units       share_flops is 0.3 FLOP/s at most; are the numbers in GFLOP/s?"
        in capsys.readouterr().out
    )
    lines = [",".join([*row[:3], f"{1000 * float(row[3])}", row[4]]) for row in cells]
    (here / "totals.csv").write_text("\n".join([head, *lines]))
    assert run("--measured=totals.csv") == 0
    out = capsys.readouterr().out
    assert "units       the rounds took 1e+03 times the predicted seconds; are they in milliseconds?" in out
    totals(here, 1.0, [1e8, 3e8])
    assert run("--measured=totals.csv") == 0
    assert "units  " not in capsys.readouterr().out


def test_a_server_that_nothing_tells_keeps_its_speed(here, capsys):
    totals(here, 1.6, [3e8] * 4)
    assert run("--measured=totals.csv") == 0
    out, new = capsys.readouterr().out, json.loads((here / "plan.json").read_text())
    assert (
        "server      keeps its speed: other speeds of the clients fit these rounds as well; rounds of" in out
    )
    assert (new["server_flops"], "server_factor" in new) == (1e9, False)
    assert run("--measured=rounds.csv") == 0
    assert (
        "server      keeps its speed: no row says it; server_s or client_s, with share_"
        in capsys.readouterr().out
    )
