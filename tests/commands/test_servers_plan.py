import csv
import io
import json

import numpy as np
import pytest

from sfl_jax.commands import plan, train
from sfl_jax.commands.program import program

FLEET = """client,flops,uplink_bps,downlink_bps,memory_bytes,samples
cam-1,1e8,1e7,2e7,1e9,64
"cam, 2",2e8,1e7,2e7,1e9,100
cam-3,1e9,1e7,2e7,1e9,40
"""
SERVERS = "server,flops,memory_bytes\nnear,1e9,\nfar,5e9,1.2e7\n"
LINKS = "client,server,uplink_bps,downlink_bps\n" + "".join(
    f"{client},{server},{up},{up}\n"
    for client in ("cam-1", '"cam, 2"', "cam-3")
    for server, up in (("near", "2e7"), ("far", "1e7"))
    if (client, server) != ("cam-3", "near")
)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text in (("fleet.csv", FLEET), ("servers.csv", SERVERS), ("links.csv", LINKS)):
        (tmp_path / name).write_text(text)
    return tmp_path


def run(*argv):
    flags = ["--model=efficientnetv2-tiny", "--fleet=fleet.csv", "--servers=servers.csv", "--output=p.json"]
    return plan.main([*flags, *argv])


def test_the_plan_tells_servers_shares_and_the_gap(here, capsys):
    assert run("--server_links=links.csv") == 0
    written, out = json.loads((here / "p.json").read_text()), capsys.readouterr().out
    rows = list(csv.DictReader(io.StringIO((here / "p.csv").read_text())))
    assert [row["client"] for row in rows] == ["cam-1", "cam, 2", "cam-3"]
    assert rows[2]["server"] == "far"
    assert 0 < written["bound_s"] <= written["round_s"] <= written["bound_s"] * (1 + 1e-6)
    for server in written["of_servers"]:
        mine = [row for row in rows if row["server"] == server["server"]]
        given = sum(float(row["share_flops"]) for row in mine)
        assert given == pytest.approx(server["share_flops"])
        assert given <= server["flops"]
        assert sum(float(row["server_bytes"]) for row in mine) <= (server["memory_bytes"] or np.inf)
        assert f"server      {server['server']}: {server['flops']:.4g} FLOP/s, " in out
        assert f"of server {server['server']}: " in out
    for row in rows:
        terms = [float(value) for name, value in row.items() if name.endswith("_s") and name != "client_s"]
        assert sum(terms) == pytest.approx(float(row["client_s"]), rel=1e-9)
    assert max(float(row["client_s"]) for row in rows) == pytest.approx(written["round_s"])
    assert "proven for all assignments, cuts and constant shares; this plan is optimal to" in out
    assert "one alone   " in out
    assert any("one server for the whole round" in line for line in written["assumptions"])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--servers=none.csv"], "--servers=none.csv: no such file; give the path of a CSV file"),
        (["--server_links=none.csv"], "--server_links=none.csv: no such file"),
        (["--servers=", "--server_links=links.csv"], "--server_links=links.csv: needs --servers"),
        (
            ["--servers=links.csv"],
            "--servers: links.csv:1: columns 'client', 'uplink_bps', 'downlink_bps'",
        ),
        (
            ["--server_links=servers.csv"],
            "--server_links: servers.csv:1: columns 'flops', 'memory_bytes': must be one of client",
        ),
        (["--server_flops=1G"], "--server_flops=1000000000.0: leave it out with --servers, whose file has"),
        (["--server_memory_bytes=1G"], "--server_memory_bytes=1000000000.0: leave it out with --servers"),
        (["--method=greedy"], "--method=greedy: leave it out with --servers"),
        (["--barrier=staged"], "--barrier=staged: leave it out with --servers"),
        (["--band=pooled"], "--band=pooled: leave it out with --servers"),
        (["--links=shannon"], "--links=shannon: leave it out with --servers"),
        (["--scheme=psl"], "--scheme=psl: leave it out with --servers"),
        (["--target_round_s=3"], "--target_round_s=3.0: leave it out with --servers"),
        (["--report"], "--report=True: leave it out with --servers, of which there is no page"),
        (["--traces=fleet.csv"], "--traces=fleet.csv: leave it out with --servers"),
        (["--frontier=bytes"], "--frontier=bytes: leave it out with --servers"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_what_several_servers_exclude_is_one_line(here, capsys, flags, words):
    assert run(*flags) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert words in error
    assert not (here / "p.json").exists()


def test_training_has_one_server(here, capsys):
    assert train.main(["--servers=servers.csv", "--workdir=w"]) == 2
    words = f"error: --servers=servers.csv: training has one server; {program('plan')} plans several"
    assert capsys.readouterr().err.strip() == words
