import csv
import io
import json

import pytest
from matplotlib import image

from sfl_jax.commands import plan

FLEET = """client,flops,uplink_bps,downlink_bps,memory_bytes,samples,cycles_per_s,kappa,transmit_w
cam-1,1e8,1e7,2e7,1e9,64,1e9,1e-27,0.2
"cam, 2",2e8,1e7,2e7,1e9,100,1e9,1e-27,0.2
cam-3,1e9,1e7,2e7,1e9,40,1e9,2e-27,0.1
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fleet.csv").write_text(FLEET)
    return tmp_path


def run(*argv):
    flags = ["--model=efficientnetv2-tiny", "--fleet=fleet.csv", "--server_flops=1e9", "--output=p.json"]
    return plan.main([*flags, *argv])


def rows_of(path):
    return list(csv.DictReader(io.StringIO(path.read_text())))


@pytest.mark.parametrize(
    ("of", "column"), [("energy", "energy_j"), pytest.param("bytes", "bytes", marks=pytest.mark.slow)]
)
def test_a_frontier_is_a_table_a_picture_and_a_plan_on_it(here, capsys, of, column):
    assert run(f"--frontier={of}", "--plot") == 0
    curve, out = rows_of(here / "p_frontier.csv"), capsys.readouterr().out
    times_s, amounts, bounds = ([float(row[name]) for row in curve] for name in curve[0])
    assert list(curve[0]) == ["round_at_most_s", column, f"bound_{column}"]
    assert times_s == sorted(times_s)
    assert amounts == sorted(amounts, reverse=True)
    assert all(
        0 < bound <= amount <= bound * (1 + 1e-6) for bound, amount in zip(bounds, amounts, strict=True)
    )
    written, clients = json.loads((here / "p.json").read_text()), rows_of(here / "p.csv")
    assert written["round_s"] == pytest.approx(written["shortest_round_s"], rel=1e-8)
    assert written[column] == pytest.approx(amounts[0])
    assert sum(float(row[column]) for row in clients) == pytest.approx(written[column])
    assert image.imread(here / "p.png").shape[0] > 100
    assert any(line.startswith("energy is") for line in written["assumptions"]) == (of == "energy")
    assert "this one takes the least, to" in out
    assert "p_frontier.csv" in out
    # A plan between two rows of the frontier takes no more than the first and no less than the second.
    limit_s = 0.5 * (times_s[-2] + times_s[-1])
    assert run(f"--frontier={of}", f"--round_s={limit_s}") == 0
    slow = json.loads((here / "p.json").read_text())
    assert slow["round_s"] <= limit_s * (1 + 1e-9)
    assert amounts[-1] * (1 - 1e-9) <= slow[column] <= amounts[-2] * (1 + 1e-9)
    assert slow["bound_s"] <= slow["shortest_round_s"]
    # The shortest round within what it takes is no longer.
    assert run(f"--frontier={of}", f"--budget={slow[column] * (1 + 1e-9)}") == 0
    short = json.loads((here / "p.json").read_text())
    assert short["bound_s"] * (1 - 1e-9) <= short["round_s"] <= slow["round_s"] * (1 + 1e-8)
    assert short[column] <= slow[column] * (1 + 1e-8)
    assert "proven for all plans within" in capsys.readouterr().out


def test_energy_needs_columns_and_keeps_each_clients_budget(here, capsys):
    lines = FLEET.strip().splitlines()
    (here / "poor.csv").write_text("\n".join(line.rpartition(",")[0] for line in lines) + "\n")
    assert run("--frontier=energy", "--fleet=poor.csv") == 2
    assert "--frontier=energy: the fleet has no column transmit_w" in capsys.readouterr().err
    assert run("--frontier=energy") == 0
    free = [float(row["energy_j"]) for row in rows_of(here / "p.csv")]
    budgets = [f"{1.001 * free[0]}", f"{1.001 * free[1]}", "1e9"]
    with_budgets = [f"{lines[0]},energy_j"] + [f"{a},{b}" for a, b in zip(lines[1:], budgets, strict=True)]
    (here / "budget.csv").write_text("\n".join(with_budgets) + "\n")
    assert run("--frontier=energy", "--fleet=budget.csv") == 0
    kept = [float(row["energy_j"]) for row in rows_of(here / "p.csv")]
    assert all(used <= float(most) for used, most in zip(kept, budgets, strict=True))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--frontier=time"], "--frontier=time: must be one of none, energy, bytes"),
        (["--round_s=3"], "--round_s=3: needs --frontier=energy or --frontier=bytes"),
        (["--budget=3"], "--budget=3: needs --frontier=energy or --frontier=bytes"),
        (["--frontier=bytes", "--round_s=1e-3"], "--round_s=0.001: no round is shorter than"),
        (["--frontier=bytes", "--budget=3"], "--budget=3: must be at least"),
        (["--frontier=bytes", "--budget=3", "--round_s=1"], "--budget=3: leave it out with --round_s"),
        (["--frontier=bytes", "--barrier=staged"], "--barrier=staged: leave it out with --frontier=bytes"),
        (["--frontier=bytes", "--scheme=psl"], "--scheme=psl: leave it out with --frontier=bytes"),
        (["--frontier=bytes", "--band=pooled"], "--band=pooled: leave it out with --frontier=bytes"),
        (["--frontier=bytes", "--round_s=-1"], "--round_s=-1.0: must be a finite number, at least 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_does_not_fit_is_one_line(here, capsys, flags, words):
    assert run(*flags) == 2
    assert words in capsys.readouterr().err.splitlines()[-1]
    assert not (here / "p.json").exists()


def test_a_table_of_the_users_own_stays(here, capsys):
    (here / "p_frontier.csv").write_text("my,results\n")
    assert run("--frontier=bytes") == 2
    assert "would replace p_frontier.csv, which sfl_jax did not write" in capsys.readouterr().err
    assert (here / "p_frontier.csv").read_text() == "my,results\n"
