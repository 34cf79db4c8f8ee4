import collections
import dataclasses
import itertools
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from disks import fill
from matplotlib import image
from matplotlib.figure import Figure

from sfl_jax import models, optim, planning
from sfl_jax.commands import compilation_cache, parts, plan, plan_plot
from sfl_jax.commands.config import Config
from sfl_jax.commands.plan_summary import WORDS, summary
from sfl_jax.commands.words import clock
from sfl_jax.digests import digest_of_columns
from sfl_jax.fleet import read_fleet

ROOT = pathlib.Path(__file__).parents[2]
FLEET = """client,flops,uplink_bps,downlink_bps,memory_bytes,samples
cam-1,1e8,1e7,2e7,1e9,64
"cam, 2",2e8,1e7,2e7,1e9,100
cam-3,1e10,1e7,2e7,1e9,1
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fleet.csv").write_text(FLEET)
    return tmp_path


def run(*argv):
    return plan.main(["--model=efficientnetv2-tiny", "--fleet=fleet.csv", *argv])


def test_a_plan_says_how_long_the_rounds_of_cohorts_last(here, capsys):
    flags = ["--fleet=random", "--clients=5", "--server_flops=1e10", "--output=p.json"]
    assert run(*flags, "--cohort_size=2") == 0
    written = json.loads((here / "p.json").read_text())
    cohorts = written["cohorts"]
    assert (cohorts.pop("cohort_size"), cohorts.pop("rounds")) == (2, 100)
    low, median, high = (cohorts[f"{name}_round_s"] for name in ("p10", "median", "p90"))
    assert 0 < low <= median <= high <= cohorts["longest_round_s"] <= written["round_s"] * (1 + 1e-9)
    line = f"in cohorts  of 2 (--cohort_size), like in training: {median:.4g} s in the median of 100 rounds"
    assert line in capsys.readouterr().out
    for more, code in (["--cohort_size=5"], 0), (["--cohort_size=6"], 2), ([], 0):
        assert run(*flags, *more) == code
        assert "in cohorts" not in capsys.readouterr().out
    assert "cohorts" not in json.loads((here / "p.json").read_text())


def test_columns_that_no_plan_uses_are_said(here, capsys):
    head, *rows = FLEET.strip().splitlines()
    (here / "far.csv").write_text("\n".join([f"{head},distance_m", *(f"{row},100" for row in rows), ""]))
    assert run("--server_flops=1e10", "--output=p.json", "--fleet=far.csv") == 0
    assert "columns     distance_m of far.csv not used: --links=fixed and no" in capsys.readouterr().out
    assert run("--server_flops=1e10", "--output=p.json") == 0
    assert "columns " not in capsys.readouterr().out


def test_whom_no_plan_serves_is_named_with_the_fleet(here, capsys):
    (here / "small.csv").write_text(FLEET.replace("4e9", "1").replace("1e9", "1"))
    assert run("--server_flops=1e10", "--output=p.json", "--method=no_split", "--fleet=small.csv") == 2
    assert "error: --fleet=small.csv: no plan serves every client: client " in capsys.readouterr().err


@pytest.mark.parametrize("method", ["exact", "no_split", "random_cut", "work_conserving"])
def test_plan_json_is_as_promised(here, capsys, method):
    assert run("--server_flops=1e10", "--output=out/p.json", f"--method={method}") == 0
    written = json.loads((here / "out" / "p.json").read_text())
    expected = {"model": "efficientnetv2-tiny", "image_size": 32, "barrier": "session", "method": method}
    assert {name: written[name] for name in expected} == expected
    assert written["server_flops"] == 1e10
    assert 0 < written["bound_s"] <= written["round_s"]
    # What is needed to make the same plan again.
    fleet = read_fleet("fleet.csv")
    assert (written["fleet"], written["seed"]) == ("fleet.csv", 0)
    faster = dataclasses.replace(fleet, flops=fleet.flops * 2).columns()
    renamed = {name.replace("memory_bytes", "energy_j"): row for name, row in fleet.columns().items()}
    assert written["fleet_sha256"] == digest_of_columns(fleet.columns())
    assert written["fleet_sha256"] not in {digest_of_columns(faster), digest_of_columns(renamed)}
    assert any("constant over the round" in line for line in written["assumptions"])
    assert [client["client"] for client in written["clients"]] == ["cam-1", "cam, 2", "cam-3"]
    for client in written["clients"]:
        terms = [value for name, value in client.items() if name.endswith("_s") and name != "client_s"]
        assert sum(terms) == pytest.approx(client["client_s"], rel=1e-9)
        assert client["client_s"] <= written["round_s"]
        assert isinstance(client["unit"], str)
    assert sum(client["share_flops"] or 0.0 for client in written["clients"]) <= 1e10
    assert 0 < written["any_schedule_bound_s"] <= written["round_s"]
    out = capsys.readouterr().out
    for words in (f"{written['round_s']:.5g} s", f"{written['bound_s']:.5g} s", "2 x multiply-accumulates"):
        assert words in out
    assert sorted(os.listdir(here)) == ["fleet.csv", "out"]
    assert sorted(os.listdir(here / "out")) == ["p.csv", "p.json"]


def test_a_limited_memory_is_told_and_what_is_missing_refused(here, capsys):
    assert run("--server_flops=1e10", "--output=p.json") == 0
    free = json.loads((here / "p.json").read_text())
    assert "server_memory_bytes" not in free
    assert "memory      " not in capsys.readouterr().out
    assert run("--server_flops=1e10", "--output=p.json", "--server_memory_bytes=12M") == 0
    within, out = json.loads((here / "p.json").read_text()), capsys.readouterr().out
    assert within["server_memory_bytes"] == 12e6
    assert 0 < sum(client["server_bytes"] for client in within["clients"]) <= 12e6
    assert within["round_s"] >= free["round_s"]
    assert "of 0.012 GB, taken by 1 copy of the server's half" in out
    assert "proven for all cuts that fit the memory" in out
    assert "+10 %       of memory of the server: " in out
    assert (here / "p.csv").read_text().startswith("client,cut,unit,share_flops,share_percent,server_bytes,")
    (here / "small.csv").write_text(FLEET.replace("1e9", "1e7"))
    assert run("--server_flops=1e10", "--output=p.json", "--fleet=small.csv", "--server_memory_bytes=1M") == 2
    words = "error: --fleet=small.csv: --server_memory_bytes=1e+06: 3 of 3 clients cannot train alone"
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("method", ["exact", "equal_shares"])
def test_the_summary_says_who_holds_up_and_what_would_help(here, capsys, method):
    assert run("--server_flops=1e10", f"--method={method}") == 0
    lines = [line.partition("  ") for line in capsys.readouterr().out.splitlines()]
    said = [(name, text.strip()) for name, _, text in lines]
    config = Config(
        model="efficientnetv2-tiny", fleet=str(here / "fleet.csv"), server_flops=1e10, method=method
    )
    _, planned = parts.planned(config)
    who, gains, plan = planning.binding(planned), planning.gains(planned), planned.plan
    (held_up,) = (text for name, text in said if name == "held up by")
    first, terms = who.clients[0], planning.seconds(planned)._asdict()
    longest = max(terms, key=lambda name: terms[name][first])
    named = f"{planned.fleet.client[first]} (pull {who.pull[0]:.0%}, longest: {WORDS[longest]} "
    assert named + f"{terms[longest][first]:.3g} s)" in held_up
    assert held_up.startswith("a full server: 2 clients end together, first ") == (method == "exact")
    more = [text for name, text in said if name.startswith("+1")]
    named = sorted(zip(gains, ("server", "uplink", "downlink", "compute"), strict=True), key=lambda x: -x[0])
    for text, (gain_s, what) in zip(more, named, strict=True):  # what would help most comes first
        assert text.startswith(f"of {what}")
        assert text.endswith(
            f": {gain_s:.3g} s shorter ({gain_s / plan.round_s:.1%})" if gain_s else ": no change"
        )
    who_pulls = np.zeros(3)
    who_pulls[who.clients] = who.pull
    resources = {
        "uplink": terms["smashed_up"] + terms["model_up"],
        "downlink": terms["model_down"] + terms["gradient_down"],
        "compute": terms["client_forward"] + terms["client_backward"],
    }
    for k, client in enumerate(planned.fleet.client):
        (row,) = (text for name, text in said if name == client)
        assert row.split()[0] == f"{plan.cuts[k]}"
        for value in (plan.shares[k] / 1e8, *(part[k] for part in terms.values()), 100 * who_pulls[k]):
            assert (f"{value:.3g}" if value else "-") in row.split()
        assert f"{plan.client_s[k]:.4g}" in row.split()
        gains_s = {name: who_pulls[k] * part[k] / 11 for name, part in resources.items()}
        best = max(gains_s, key=lambda name: gains_s[name])
        assert row.endswith(f"{best} -{gains_s[best]:.2g} s" if who_pulls[k] else "-")
    (bound,) = (text for name, text in said if name == "bound")
    assert f"at most {plan.gap:.2%} above it" in bound or (method == "exact" and "optimal to" in bound)


def test_the_picture_shows_the_plan(here, monkeypatch):
    drawn = []
    monkeypatch.setattr(plan_plot, "Figure", lambda **options: drawn.append(Figure(**options)) or drawn[0])
    assert run("--server_flops=1e10", "--plot") == 0
    written = json.loads((here / "plan.json").read_text())
    clients, cuts, servers = drawn[0].axes
    # Where each client's time goes: a bar of its terms in order of time. The slowest client's is the highest.
    stacks = clients.containers
    assert [stack.get_label() for stack in stacks] == [WORDS[name] for name in optim.Seconds._fields]
    assert max(bar.get_y() + bar.get_height() for bar in stacks[-1]) == pytest.approx(written["round_s"])
    names = [label.get_text() for label in clients.get_xticklabels()]
    assert sorted(names) == sorted(client["client"] for client in written["clients"])
    units = [label.get_text() for label in cuts.get_xticklabels()]
    heights = {unit: bar.get_height() for unit, bar in zip(units, cuts.patches, strict=True)}
    assert heights == collections.Counter(client["unit"] for client in written["clients"])
    assert drawn[0].get_suptitle().startswith("efficientnetv2-tiny at 32x32, 3 clients (fleet.csv), exact")
    rounds, bounds, this = (line.get_xydata() for line in servers.get_lines())
    assert servers.get_ylim()[0] == 0
    assert this.tolist() == [[1e10, written["round_s"]]]
    assert (np.diff(rounds[:, 1]) <= 0).all()
    assert rounds[0, 1] > written["round_s"] > rounds[-1, 1]
    np.testing.assert_allclose(bounds, rounds, rtol=1e-9)


def test_where_the_server_does_not_matter_its_line_is_flat_and_inside_of_the_picture(here, monkeypatch):
    drawn = []
    monkeypatch.setattr(plan_plot, "Figure", lambda **options: drawn.append(Figure(**options)) or drawn[0])
    assert run("--method=no_split", "--server_flops=1e10", "--plot") == 0
    servers = drawn[0].axes[2]
    low, high = servers.get_ylim()
    heights = servers.get_lines()[0].get_ydata()
    assert low == 0
    assert np.ptp(heights) < 1e-6 * high
    assert 0.8 * high < heights.mean() < 0.95 * high


@pytest.mark.parametrize("flags", [[], ["--method=no_split"], ["--barrier=staged"], ["--band=pooled"]])
def test_the_page_shows_the_plan(here, flags, capsys):
    assert run("--server_flops=1e10", "--report", *flags) == 0
    written, made = json.loads((here / "plan.json").read_text()), (here / "plan.html").read_text()
    assert f"<b>{clock(written['round_s'])}</b>" in made
    on_server = sum(client["cut"] < 8 for client in written["clients"])
    assert f"<b>{on_server} of 3</b>" in made
    for client in written["clients"]:
        assert f"{client['client']}: {clock(client['client_s'])}\\ncut {client['cut']} (" in made
    for title in (
        "Where each client's time goes",
        "Cuts",
        "Who held rounds up",
        "A smaller or larger server",
    ):
        assert f"<h3>{title}</h3>" in made
    assert sorted(os.listdir(here)) == ["fleet.csv", "plan.csv", "plan.html", "plan.json"]
    (here / "plan.html").write_text("mine")
    assert run("--report") == 2
    assert "would replace plan.html, which sfl_jax did not write" in capsys.readouterr().err


def test_plot_and_target(here, capsys):
    assert run("--target_round_s=2", "--plot") == 0
    written = json.loads((here / "plan.json").read_text())
    assert written["target_round_s"] == 2
    assert written["round_s"] == pytest.approx(2)
    assert f"{written['server_flops']:.4g} FLOP/s, the smallest for 2 s" in capsys.readouterr().out
    assert (here / "plan.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert sorted(os.listdir(here)) == ["fleet.csv", "plan.csv", "plan.json", "plan.png"]


@pytest.mark.slow
def test_a_plan_by_regression_says_and_draws_how_well_its_curves_fit(here):
    heights = []
    for method in ("exact", "regression"):
        assert run(f"--method={method}", "--plot", "--model=efficientnetv2-b0") == 0
        heights.append(image.imread(here / "plan.png").shape[0])
    assert heights[1] == 1.5 * heights[0]
    written = json.loads((here / "plan.json").read_text())
    quantities = ["forward_flop", "backward_flop", "model_bits", "smashed_bits"]
    assert [fit["quantity"] for fit in written["fits"]] == quantities
    assert all(0.5 < fit["r2"] <= 1 and 0 <= fit["worst_error"] < 0.5 for fit in written["fits"])
    assert all(fit["family"] and fit["parameters"] for fit in written["fits"])
    # The written curve, a straight line through some knots, equals the traced costs of the network.
    profile = models.profile(models.create("efficientnetv2-b0", 10, 1), (32, 32, 1))
    fit, cuts = written["fits"][0], np.arange(1, 25)
    assert fit["family"].startswith("piecewise")
    knots = np.linspace(0, fit["last_cut"], len(fit["parameters"]))
    fitted = fit["scale"] * np.interp(cuts, knots, fit["parameters"])
    traced = 2 * np.cumsum(profile.forward_macs)
    assert np.abs(fitted - traced).max() == pytest.approx(fit["worst_error"] * traced[-1], rel=1e-6)
    assert written["iterations"] >= 1


def test_a_client_that_no_server_helps_is_named_with_what_it_lacks(here, capsys):
    (here / "fleet.csv").write_text(FLEET + "far-away,1e10,1e4,1e4,1e9,64\n")
    assert run("--server_flops=1e12") == 0
    (held_up,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("held up by")]
    assert "client far-away alone: it needs" in held_up
    assert "with any server" in held_up
    assert held_up.endswith("s of them for its uplink")


@pytest.mark.parametrize(("factor", "asked"), [(1, False), (1e-6, True)])
def test_rates_in_another_unit_are_asked_about(here, capsys, factor, asked):
    rows = [f"c{k},{1e10 * factor},{2e7 * factor},{5e7 * factor},1e9,64\n" for k in (1, 2)]
    (here / "fleet.csv").write_text(FLEET.partition("\n")[0] + "\n" + "".join(rows))
    assert run() == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("units")]
    assert len(lines) == 3 * asked
    assert not asked or "uplink_bps is 20 bit/s at most; are the numbers in Mbit/s?" in lines[1]


def test_a_method_that_finds_a_worse_plan_is_said_to(here):
    config = Config(model="efficientnetv2-tiny", fleet=str(here / "fleet.csv"))
    _, planned = parts.planned(config)
    worse = planning.Gains(server_s=-0.5 * planned.plan.round_s, uplink_s=0.0, downlink_s=1e-9, compute_s=0.1)
    text = summary(config, planned, worse, np.empty(0))
    assert "longer (50.0%): exact finds a worse plan there" in text
    assert "of uplink for all: no change" in text
    assert "-" not in "".join(line for line in text.splitlines() if "shorter" in line)


def test_starts_are_written_and_summed_up(here, capsys):
    assert run("--method=alternating", "--starts=proportional,random") == 0
    assert json.loads((here / "plan.json").read_text())["starts"] == "proportional,random"
    assert "alternating from proportional,random, session barrier" in capsys.readouterr().out
    assert run("--method=alternating", "--recall") == 0
    assert json.loads((here / "plan.json").read_text())["recall"] is True
    assert "alternating with recall, session barrier" in capsys.readouterr().out


def test_of_many_clients_the_table_has_those_that_hold_the_round_up(here, capsys):
    assert run("--fleet=random", "--clients=30", "--cohort_size=30", "--server_flops=1e10") == 0
    out = capsys.readouterr().out
    assert "the 10 of 30 clients that hold the round up most; the .csv file has all" in out
    rows = json.loads((here / "plan.json").read_text())["clients"]
    shown = out.partition("help\n")[2].partition("\n\n")[0].splitlines()
    most = sorted(rows, key=lambda row: -row["pull_percent"])
    assert len(shown) == 10
    assert shown[0].split()[0] == most[0]["client"]
    assert sum(row["pull_percent"] for row in rows) == pytest.approx(100)
    assert all(row["share_percent"] == pytest.approx(row["share_flops"] / 1e8) for row in rows)


def test_names_in_the_picture_do_not_overlap(here, monkeypatch):
    drawn = []
    monkeypatch.setattr(plan_plot, "Figure", lambda **options: drawn.append(Figure(**options)) or drawn[-1])
    rows = [f"a-very-long-name-of-a-client-{k},{1e8 + 1e9 * k},1e7,2e7,1e9,{64 + 9 * k}\n" for k in range(40)]
    (here / "fleet.csv").write_text(FLEET.partition("\n")[0] + "\n" + "".join(rows))
    assert run("--server_flops=1e11", "--plot", "--cohort_size=40") == 0
    for axes in drawn[0].axes[:2]:
        boxes = [label.get_window_extent() for label in axes.get_xticklabels()]
        assert boxes
        assert not any(one.overlaps(other) for one, other in itertools.pairwise(boxes))
        assert max(box.height for box in boxes) < 200
    assert len(drawn[0].axes[0].get_xticks()) == 40


def test_a_plan_says_what_changed_since_an_earlier_one(here, capsys):
    assert run("--server_flops=1e7", "--output=old.json") == 0
    old = json.loads((here / "old.json").read_text())
    (here / "fleet.csv").write_text(FLEET.replace("cam-3", "new-3"))
    capsys.readouterr()
    assert run("--server_flops=1e11", "--compare_with=old.json") == 0
    out, new = capsys.readouterr().out, json.loads((here / "plan.json").read_text())
    said = dict(line.split(maxsplit=1) for line in out.splitlines() if len(line.split(maxsplit=1)) == 2)
    assert said["since"].startswith(f"old.json: round {old['round_s']:.5g} s, now {new['round_s']:.5g} s (-")
    assert said["setting"] == "server_flops: 10000000.0, now 100000000000.0"
    assert (said["new"], said["gone"]) == ("new-3", "cam-3")
    pairs = [(was, now) for was, now in zip(old["clients"], new["clients"], strict=True)][:2]
    moved = [(was, now) for was, now in pairs if was["cut"] != now["cut"]]
    assert moved  # else this proves little
    assert said["cuts"]
    assert f"cuts        {len(moved)} of 2 clients that both plans have cut elsewhere now" in out
    table = out.partition("share, FLOP/s")[2].splitlines()[1:]
    for (was, now), row in zip(moved, table, strict=False):
        assert row.startswith(was["client"])
        cells = row.removeprefix(was["client"]).split()
        assert cells[:4] == [f"{was['cut']}", f"{now['cut']}", was["unit"], now["unit"]]
        assert cells[6:] == [f"{was['client_s']:.4g}", f"{now['client_s']:.4g}"]


def test_the_fleet_is_written_and_plans_alike(here, capsys):
    flags = ["--server_flops=1e10", "--output=p.json"]
    assert run("--fleet=random", "--clients=4", "--write_fleet=mine.csv", *flags) == 0
    random = json.loads((here / "p.json").read_text())
    assert "p.csv, mine.csv" in capsys.readouterr().out
    assert run("--fleet=mine.csv", *flags) == 0
    written = json.loads((here / "p.json").read_text())
    assert (written["round_s"], written["clients"]) == (random["round_s"], random["clients"])


@pytest.mark.slow
def test_trips_and_a_broadcast_are_planned_and_told(here):
    assert run("--server_flops=1e10", "--rtt_s=0.1", "--broadcast_bps=1M") == 0
    written = json.loads((here / "plan.json").read_text())
    assert (written["rtt_s"], written["broadcast_bps"]) == (0.1, 1e6)
    assert any("at 1e+06 bit/s" in line for line in written["assumptions"])
    assert any("half of its client's round-trip time" in line for line in written["assumptions"])
    config = Config(model="efficientnetv2-tiny", fleet="fleet.csv", server_flops=1e10)
    terms = parts.read_terms(config)[2]
    for k, client in enumerate(written["clients"]):
        bits, steps = terms.model_bits[client["cut"]], terms.steps[k]
        assert client["model_down_s"] == pytest.approx(0.05 + bits / 1e6, rel=1e-12)
        assert client["model_up_s"] == pytest.approx(0.05 + bits / 1e7, rel=1e-12)
        crossing = terms.samples[k] * terms.down_bits[client["cut"]] / 2e7
        splits = client["cut"] < 8
        assert client["gradient_down_s"] == pytest.approx(splits * 0.05 * steps + crossing, rel=1e-12)


def test_the_example_fleet_can_be_planned(here):
    assert run("--fleet=example", "--write_fleet=mine.csv") == 0
    assert len(json.loads((here / "plan.json").read_text())["clients"]) == 10
    assert (here / "mine.csv").read_text().startswith("client,flops,uplink_bps,downlink_bps,memory_bytes,")


@pytest.mark.parametrize("kept", [True, False])
def test_compiled_programs_are_kept_unless_they_should_not_be(here, monkeypatch, kept):
    enabled = []
    monkeypatch.setattr(compilation_cache, "enable", lambda: enabled.append(True))
    assert run("--method=no_split", f"--compilation_cache={str(kept).lower()}") == 0
    assert enabled == [True] * kept


def test_a_server_nobody_needs(here, capsys):
    assert run("--target_round_s=1e6", "--plot") == 0
    for name in ("plan.json", "plan.csv", "plan.png"):  # the second run replaces its own files
        plan.check_outputs([here / "plan.json", here / name], "random")
    assert json.loads((here / "plan.json").read_text())["server_flops"] == 0
    out = capsys.readouterr().out
    assert "all clients can train alone" in out
    assert "a full server" not in out


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.csv", "my,results\n"),
        ("p.png", "\x89PNG of mine"),
        ("p.json", '{"name": "package"}'),
        ("p.json", json.dumps(dataclasses.asdict(Config()))),  # the settings of a run
    ],
)
def test_a_file_of_the_users_own_beside_the_output_stays(name, content, here, capsys):
    (here / name).write_text(content)
    assert run("--output=p.json", "--plot") == 2
    assert f"--output=p.json: would replace {name}, which sfl_jax did not write" in capsys.readouterr().err
    assert (here / name).read_text() == content
    assert sorted(path.name for path in here.iterdir()) == sorted(["fleet.csv", name])


BAD_FLAGS = [
    ("--output=fleet.csv/p.json", "--output=fleet.csv/p.json: cannot be written"),
    ("--output=fleet.json", "fleet.csv is the fleet file"),
    ("--output=plan.csv", "must end in .json"),
    ("--output=folder.json", "is a directory"),
    ("--server_flops=0", "--server_flops=0.0: must be a finite number, above 0"),
    ("--fleet=missing.csv", "--fleet=missing.csv: no such file"),
    ("--method=best", "--method=best: must be one of"),
    ("--samples_per_client=7", "--samples_per_client=7: needs --fleet=random; --fleet=fleet.csv has"),
    ("--min_cut=99", "--min_cut=99: must be at most"),
    ("--write_fleet=fleet.csv", "--write_fleet=fleet.csv: is there already"),
    ("--write_fleet=plan.csv", "--write_fleet=plan.csv: is there already, or will be the plan"),
    ("--write_fleet=fleet.txt", "must end in .csv"),
    ("--compare_with=none.json", "--compare_with=none.json: No such file or directory; give the path"),
    ("--compare_with=fleet.csv", "--compare_with=fleet.csv: must be a plan.json; it is no JSON"),
    ("--broadcast_bps=6M --band=airtime", "--broadcast_bps=6e+06: needs --band=fixed, not airtime"),
    ("--broadcast_bps=6M --scheme=sl", "--broadcast_bps=6e+06: needs another scheme than sl"),
    ("--broadcast_bps=6M --servers=fleet.csv", "--broadcast_bps=6000000.0: leave it out with --servers"),
    ("--rtt_s=-1", "--rtt_s=-1.0: must be a finite number, at least 0"),
    ("--rtt_s=0.1 --fleet=trips.csv", "--rtt_s=0.1: --fleet=trips.csv has the column rtt_s; leave one out"),
    ("--starts=random", "--starts=random: needs --method=alternating"),
    ("--cohort_size=4", "cohort_size"),
    ("--eval_every=3", "eval_every"),
    ("plan.json", "'plan.json' is not a flag"),
]
BAD_ROWS = [
    ("cam-1,1,1,1,1,1", "fleet.csv:5: column client"),
    ("cam-4,-1,1,1,1,1", "fleet.csv:5: client cam-4: column flops"),
    ("cam-4,1,0,1,1,1", "fleet.csv:5: client cam-4: column uplink_bps"),
    ("cam-4,1,1,nan,1,1", "fleet.csv:5: client cam-4: column downlink_bps"),
    ("cam-4,1,1,1,1,", "fleet.csv:5: client cam-4: column samples"),
    ("cam-4,1,1,1,1,1,1", "fleet.csv:5"),
    ("cam-4,1e9,1e6,1e6,10,5", "client cam-4: every cut needs"),
]


@pytest.mark.parametrize(("flag", "row", "words"), [
    *((flag, "", words) for flag, words in BAD_FLAGS), *(("--seed=1", row, words) for row, words in BAD_ROWS)
])  # fmt: skip
def test_bad_input_writes_one_line_and_nothing_else(here, capsys, flag, row, words):
    (here / "folder.json").mkdir()
    (here / "fleet.csv").write_text(FLEET + row)
    head, *rows = FLEET.strip().splitlines()
    (here / "trips.csv").write_text("\n".join([f"{head},rtt_s", *(f"{each},0.1" for each in rows)]))
    assert run(*flag.split()) == 2
    out, err = capsys.readouterr()
    *_, said = err.splitlines()  # before it, at most the line that announces the plan
    assert (out, err.count("error: "), said[:7]) == ("", 1, "error: ")
    assert words in said
    assert sorted(os.listdir(here)) == ["fleet.csv", "folder.json", "trips.csv"]
    assert (here / "fleet.csv").read_text() == FLEET + row


@pytest.mark.slow
def test_as_a_program(here):
    command = [sys.executable, "-m", "launch.plan", "--model=efficientnetv2-tiny", "--clients=5"]
    done = subprocess.run(
        [*command, f"--output={here / 'plan.json'}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, *more = done.stderr.splitlines()
    assert first == "5 clients, efficientnetv2-tiny at 32x32, server 2e+10 FLOP/s"
    assert any(line.startswith("counting the work of efficientnetv2-tiny") for line in more)
    assert not {*done.stdout.splitlines()} & {first, *more}
    assert len(json.loads((here / "plan.json").read_text())["clients"]) == 5


def test_a_full_disk_is_a_line_and_leaves_nothing(here, small_disk, capsys):
    fill(small_disk / "filler")
    assert run(f"--output={small_disk / 'p.json'}", "--plot") == 2
    *_, said = capsys.readouterr().err.splitlines()
    assert said.startswith("error: [Errno 28] No space left on device: ")
    assert f"{small_disk}/p." in said
    assert os.listdir(small_disk) == ["filler"]
