"""What each kind of plan has: clients in the terminal, what changed since a plan, its fleet, a picture."""

import csv
import io
import itertools
import json

import pytest
from matplotlib import image
from matplotlib.figure import Figure

from sfl_jax.commands import plan, plan_plot

FLEET = """client,flops,uplink_bps,downlink_bps,memory_bytes,samples,cycles_per_s,kappa,transmit_w
cam-1,1e8,1e7,2e7,1e9,64,1e9,1e-27,0.2
"cam, 2",2e8,1e7,2e7,1e9,100,1e9,1e-27,0.2
cam-3,1e9,1e7,2e7,1e9,40,1e9,2e-27,0.1
"""
SERVERS = "server,flops\nnear,1e9\nfar,5e9\n"
RATES = "round,client,uplink_bps\n" + "".join(
    f'{n},"{client}",{(1 + n) * 4e6}\n' for n in range(4) for client in ("cam-1", "cam, 2", "cam-3")
)
KINDS = {
    "servers": (["--servers=servers.csv"], ["servers: none, now servers.csv"]),
    "traces": (
        ["--traces=rates.csv", "--quantile=0.5"],
        ["traces: none, now rates.csv", "quantile: none, now 0.5"],
    ),
    "interval": (["--interval=0.5,1"], ["interval: none, now 0.5,1"]),
    "frontier": (
        ["--frontier=bytes", "--round_s=90"],
        ["frontier: none, now bytes", "round_at_most_s: none, now 90.0"],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    """A plain plan of the same fleet, with a large server and a fourth client."""
    folder = tmp_path_factory.mktemp("old")
    (folder / "fleet.csv").write_text(f"{FLEET}away,1e9,1e7,2e7,1e9,40,1e9,2e-27,0.1\n")
    assert run(f"--output={folder}/old.json", f"--fleet={folder}/fleet.csv", "--server_flops=1e11") == 0
    return folder / "old.json"


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text in (("fleet.csv", FLEET), ("servers.csv", SERVERS), ("rates.csv", RATES)):
        (tmp_path / name).write_text(text)
    return tmp_path


def run(*argv):
    return plan.main(["--model=efficientnetv2-tiny", "--fleet=fleet.csv", "--output=p.json", *argv])


@pytest.mark.parametrize(
    "kind",
    ["servers", "traces", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("interval", "frontier"))],
)
def test_every_kind_tells_clients_changes_and_the_fleet(here, old, capsys, kind):
    flags, settings = KINDS[kind]
    if kind != "servers":
        flags = [*flags, "--server_flops=1e9"]
        settings = ["server_flops: 100000000000.0, now 1000000000.0", *settings]
    capsys.readouterr()
    assert run(*flags, "--min_cut=2", f"--compare_with={old}", "--write_fleet=mine.csv", "--plot") == 0
    out, was, now = (
        capsys.readouterr().out,
        *(json.loads(path.read_text()) for path in (old, here / "p.json")),
    )
    assert f"since       {old}: round {was['round_s']:.5g} s, now {now['round_s']:.5g} s (+" in out
    said = [line.removeprefix("setting     ") for line in out.splitlines() if line.startswith("setting ")]
    assert sorted(said) == sorted([*settings, "min_cut: 1, now 2"])
    assert "\ngone        away\n" in out
    before = {client["client"]: client["cut"] for client in was["clients"]}
    moved = sum(client["cut"] != before[client["client"]] for client in now["clients"])
    assert moved
    assert f"cuts        {moved} of 3 clients that both plans have cut elsewhere now" in out
    # The row of each client says its cut, seconds and pull, as plan.csv does.
    rows = list(csv.DictReader(io.StringIO((here / "p.csv").read_text())))
    assert sum(float(row["pull_percent"]) for row in rows) == pytest.approx(100)
    _, table = out.split("would\n", 1)
    for row in rows:
        (line,) = [line for line in table.splitlines()[:5] if line.startswith(row["client"])]
        cells = line.removeprefix(row["client"]).split()
        if kind == "servers":
            assert cells.pop(0) == row["server"]
        assert cells[0] == row["cut"]
        share, total, pull = cells[2], cells[10], cells[11]
        for cell, column in ((share, "share_percent"), (total, "client_s"), (pull, "pull_percent")):
            assert float(cell.replace("-", "0")) == pytest.approx(float(row[column]), rel=6e-3)
    # The written fleet has the same plan, and nothing changed.
    assert image.imread(here / "p.png").shape[0] > 100
    assert run(*flags, "--min_cut=2", "--fleet=mine.csv", "--compare_with=p.json", "--output=again.json") == 0
    out, again = capsys.readouterr().out, json.loads((here / "again.json").read_text())
    assert again["clients"] == now["clients"]
    assert f"since       p.json: round {now['round_s']:.5g} s, now {now['round_s']:.5g} s (+0.0%)" in out
    assert "setting " not in out
    assert "cuts        0 of 3 clients" in out


def test_a_plain_plan_after_one_of_servers_says_that_there_is_one_server(here, capsys):
    assert run("--servers=servers.csv", "--output=several.json") == 0
    assert run("--compare_with=several.json") == 0
    assert "setting     servers: servers.csv, now none" in capsys.readouterr().out


def test_the_picture_of_several_servers(here, monkeypatch):
    drawn = []
    monkeypatch.setattr(plan_plot, "Figure", lambda **options: drawn.append(Figure(**options)) or drawn[-1])
    rows = [f"a-very-long-name-of-a-client-{k},{1e8 + 1e7 * k},1e7,2e7,1e9,{64 + 9 * k}\n" for k in range(40)]
    (here / "fleet.csv").write_text(
        "client,flops,uplink_bps,downlink_bps,memory_bytes,samples\n" + "".join(rows)
    )
    (here / "servers.csv").write_text(
        "server,flops\n" + "".join(f"a-server-with-a-long-name-{e},{e + 1}e9\n" for e in range(3))
    )
    assert run("--servers=servers.csv", "--plot") == 0
    clients, cuts, servers = drawn[0].axes
    for axes in clients, cuts, servers:
        boxes = [label.get_window_extent() for label in axes.get_xticklabels()]
        assert boxes
        assert not any(one.overlaps(other) for one, other in itertools.pairwise(boxes))
    planned = list(csv.DictReader(io.StringIO((here / "p.csv").read_text())))
    names = [f"a-server-with-a-long-name-{e}" for e in range(3)]
    served = [
        sum(row["server"] == name and float(row["share_flops"]) > 0 for row in planned) for name in names
    ]
    assert [bar.get_height() for bar in servers.patches] == served
    # The bars stand server by server, and each is as high as its client's seconds.
    order = sorted(
        planned,
        key=lambda row: (
            float(row["share_flops"]) == 0,
            float(row["share_flops"]) > 0 and names.index(row["server"]),
            -float(row["server_s"]),
            -float(row["client_s"]),
        ),
    )
    tops = [
        max(bar.get_y() + bar.get_height() for bar in bars) for bars in zip(*clients.containers, strict=True)
    ]
    assert tops == pytest.approx([float(row["client_s"]) for row in order])
    (line,) = (each for each in clients.lines if each.get_label() == "round")
    assert max(float(row["client_s"]) for row in planned) == pytest.approx(line.get_ydata()[0])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"round_s": "soon"}, "its round_s is 'soon'"),
        ({"round_s": None}, "its round_s is None"),
        ({"round_s": 10**309}, f"its round_s is 1{'0' * 39}"),
        ({"clients": []}, "it has no clients"),
        ({"clients": [{"client": "a"}]}, "it lacks 'cut'"),
        ({"clients": {"a": 1}}, "it lacks "),
    ],
    ids=lambda value: str(value)[:20],
)
def test_an_earlier_plan_that_is_none_is_one_line(here, capsys, change, words):
    client = {"client": "a", "cut": 1, "unit": "stem", "share_flops": 1.0, "client_s": 2.0}
    (here / "odd.json").write_text(json.dumps({"round_s": 1.0, "clients": [client]} | change))
    assert run("--compare_with=odd.json") == 2
    (said,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error"))
    assert said.startswith("error: --compare_with=odd.json: must be a plan.json; ")
    assert words in said
