"""launch.report: the page of a run, finished or not."""

import contextlib
import dataclasses
import html.parser
import itertools
import json
import re
import shutil
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
from commands import small_world

from sfl_jax import fleet
from sfl_jax.commands import compare, parts, report, report_page, train, words
from sfl_jax.commands import workdir as workdirs
from sfl_jax.commands.config import Config
from sfl_jax.commands.program import program
from sfl_jax.errors import BadInput
from sfl_jax.planning import Planner, comparison
from sfl_jax.run import clocks as run_clocks
from sfl_jax.run import recording
from sfl_jax.run.ledger import UP, Ledger, columns

RUN = ["--rounds=3", "--eval_every=2", "--seed=7"]


class Page(html.parser.HTMLParser):
    """The page's text by kind of element, and what it would load from elsewhere."""

    def __init__(self, text):
        super().__init__()
        self.open, self.texts, self.loads = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.loads += [
            value
            for name, value in attrs
            if name in ("src", "href", "xlink:href") and not value.startswith("#")
        ]

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data.strip()))

    def of(self, tag):
        return [text for one, text in self.texts if one == tag and text]

    def rows(self):
        return dict(itertools.pairwise(self.of("td")))

    def tiles(self):
        """The number and the remark of each of the largest numbers, by name."""
        return dict(zip(self.of("span"), zip(self.of("b"), self.of("small"), strict=True), strict=True))

    def methods(self):
        """The methods whose clocks are shown."""
        rows = self.of("td")
        return {name for name in (*comparison.methods("session"), "exact") if name in rows}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The workdir of a finished run."""
    workdir = tmp_path_factory.mktemp("run")
    fleet.write_fleet(workdir / "fleet.csv", fleet.random_fleet(small_world.CLIENTS, seed=7))
    with small_world.world():
        assert small_world.run(workdir, *RUN, f"--fleet={workdir / 'fleet.csv'}") == 0
    return workdir


def made(workdir, capsys):
    """(the page that launch.report writes, what it prints)"""
    with small_world.world():
        code = report.main([f"--workdir={workdir}"])
    said = capsys.readouterr()
    assert code == 0
    assert said.err.splitlines()[0] == f"reading the run in {workdir}"
    return Page((workdir / "report.html").read_text()), said.out


def test_training_leaves_a_page_and_the_command_adds_every_method(run, capsys):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    first = Page((run / "report.html").read_text())
    page, out = made(run, capsys)
    for one in (first, page):
        assert one.loads == []
        tiles, own_s = one.tiles(), words.clock(lines[-1]["simulated_s"])
        assert tiles["Test accuracy"][0] == words.percent(lines[-1]["test_accuracy"])
        assert f"{own_s} instead of " in (tiles.get("Time saved") or tiles["Time lost"])[1]
        assert tiles["Proven gap"][0] == "optimal"
        assert f"exact: {own_s}\\nthis plan" in "".join(one.of("script"))
        up = sum(line[name] for line in lines for name in UP)
        assert one.rows()["sent by clients"] == words.amount(up, "B") != words.NONE
        assert one.rows()["seed"] == "7"
        assert "--rounds=3" in "".join(one.of("code"))
        titles = one.of("h3")
        for title in (
            "Accuracy by simulated time", "Accuracy by round", "Accuracy by bytes",
            "A round's seconds by term", "Who held rounds up", "Cuts over rounds",
            "Shares of the server", "Where wall time went",
        ):  # fmt: skip
            assert title in titles, title
    assert first.methods() == {"exact", "no_split", "common_cut"}
    assert page.methods() == {*comparison.methods("session"), "exact"}
    assert f"written: {run / 'report.html'}" in out
    assert re.search(r"no_split +\d", out)


def test_the_clock_of_the_run_is_as_it_logged_it(monkeypatch):
    """A recomputed clock may differ by rounding, which would show two numbers for one run."""
    logged_s = [1.0, 2.0]
    made_again = {"exact": np.array(logged_s) * (1 + report.SAME / 2), "no_split": np.array([3.0, 6.0])}
    made_again = {name: run_clocks.Clock(seconds, {}) for name, seconds in made_again.items()}
    monkeypatch.setattr(run_clocks, "clocks", lambda *_: made_again)
    own, lines = mock.Mock(planner=Planner()), [SimpleNamespace(simulated_s=s) for s in logged_s]
    found = report.clocks("run", own, lines, ())
    assert list(found) == ["exact", "no_split"]
    assert found["exact"].seconds.tolist() == logged_s


def test_the_page_fits_phones_and_the_dark(run, capsys):
    """Tables scroll by themselves. Every colour of a picture is a variable, which the dark changes."""
    made(run, capsys)
    text = (run / "report.html").read_text()
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    assert text.count('<div class="wide">\n<table') == text.count("<table") > 0
    style, body = text[text.index("<style>") : text.index("</style>")], text[text.index("<main>") :]
    assert "color-scheme: light dark" in style
    assert "@media (prefers-color-scheme: dark) { :root {" in style
    assert re.findall(r"(?:fill|stroke): #\w+", body) == []
    assert "var(--blue)" in body


def test_of_a_run_that_counted_nothing_the_page_has_dashes(run):
    lines = [line._replace(**dict.fromkeys(Ledger._fields)) for line in recording.logged(str(run))]
    clocks = run_clocks.own_clock(Planner(), lines)
    page = Page(report_page.report(workdirs.described(str(run))[0], {}, lines, clocks))
    for name in ("sent by clients", "computed by the server", "most memory of a client"):
        assert page.rows()[name] == words.NONE
    assert page.tiles()["Bytes sent"][0] == words.NONE
    assert "not known of this run" in page.of("p")


def test_of_an_older_run_the_page_lacks_what_was_not_measured(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path, dirs_exist_ok=True)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    known = [{k: v for k, v in line.items() if not k.endswith("_wall_s")} for line in lines]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in known))
    page, _ = made(tmp_path, capsys)
    assert "Cuts over rounds" in page.of("h3")
    assert "Where wall time went" not in page.of("h3")


def test_names_are_text_and_not_markup(run, tmp_path, capsys):
    described = json.loads((run / "config.json").read_text())
    described["environment"]["devices"] = ["<script>alert(1)</script>"]
    (tmp_path / "config.json").write_text(json.dumps(described))
    (tmp_path / "metrics.jsonl").write_bytes((run / "metrics.jsonl").read_bytes())
    page, _ = made(tmp_path, capsys)
    assert any("<script>alert(1)</script>" in text for text in page.of("td"))
    assert not any(text.startswith("alert") for text in page.of("script"))


def test_of_a_run_under_way_whole_lines_count(run, tmp_path, capsys):
    (tmp_path / "config.json").write_bytes((run / "config.json").read_bytes())
    log = (run / "metrics.jsonl").read_bytes()
    (tmp_path / "metrics.jsonl").write_bytes(log[: log.index(b"\n") + 30])
    page, _ = made(tmp_path, capsys)
    assert page.of("p")[0].startswith("1 of 3 rounds, each of 4 of 48 clients; scheme sfl, planned by exact")
    assert page.tiles()["Test accuracy"] == (words.NONE, "no round was evaluated yet")


@contextlib.contextmanager
def changed(run, name):
    """In this block, an input of the run, a record of it, or its planner differs."""
    before = {
        path: path.read_bytes() for path in (run / "fleet.csv", run / "metrics.jsonl", run / "config.json")
    }
    with contextlib.ExitStack() as stack:
        stack.enter_context(small_world.world([3] if name == "dataset" else ()))
        if name == "fleet":
            clients = fleet.random_fleet(small_world.CLIENTS, seed=7)
            fleet.write_fleet(run / "fleet.csv", dataclasses.replace(clients, flops=clients.flops / 100))
        if name == "gone":
            (run / "fleet.csv").unlink()
        if name == "settings":  # as after --allow_config_change
            text = (run / "config.json").read_text()
            (run / "config.json").write_text(
                text.replace('"server_flops": 1e10', '"server_flops": 1e5').replace(
                    '"server_flops": 10000000000.0', '"server_flops": 1e5'
                )
            )
        yield
    for path, content in before.items():
        path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("fleet", r"--fleet=.*fleet.csv \(has other contents now\): not the inputs of the run in"),
        ("dataset", r"--dataset=mnist \(has other contents now\): not the inputs of the run in"),
        ("gone", r"--fleet=.*fleet.csv: no such file"),
        ("settings", r"--workdir=.*: its rounds were planned with other settings or inputs, or"),
    ],
)  # fmt: skip
def test_of_other_inputs_no_clock_is_made_but_that_of_the_run_is_shown(name, reason, run, capsys):
    with changed(run, name):
        code = report.main([f"--workdir={run}"])
        page, said = Page((run / "report.html").read_text()), capsys.readouterr()
    assert code == 0, said.err
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert page.tiles()["Simulated time"][0] == words.clock(last["simulated_s"])
    assert page.methods() == {"exact"}
    assert "A round's seconds" in page.of("h3")
    assert "Cuts over rounds" not in page.of("h3")
    note = rf"other methods' clocks are left out, and cuts and shares: .*{reason}"
    assert re.search(note, said.out)
    assert any(re.match(note, text) for tag, text in page.texts)


@pytest.mark.parametrize("round_s", [2.0, 0.0, None])
def test_rounds_of_one_length_or_of_none_are_drawn(round_s, run):
    lines = [line._replace(round_s=round_s, bound_s=round_s) for line in recording.logged(str(run))]
    clocks = {"exact": run_clocks.Clock(np.array([2.0, 4.0, 6.0]), columns(lines))}
    page = Page(report_page.report(workdirs.described(str(run))[0], {}, lines, clocks))
    assert ("round 3:  2.00 s" in "".join(page.of("script"))) == (round_s == 2.0)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("fleet", "has other contents now"), ("settings", "its rounds were planned with other")],
)
def test_other_inputs_refuse_what_is_made_of_nothing_else(name, reason, run):
    """The table of every method's clock, and the experiment with its own settings."""
    config, _ = workdirs.described(str(run))
    with changed(run, name):
        if name == "fleet":
            with pytest.raises(BadInput, match=reason):
                workdirs.saved(str(run))
        config = dataclasses.replace(workdirs.described(str(run))[0], allow_config_change=True)
        with pytest.raises(BadInput, match=reason):
            compare.compare_clocks(config)
    assert not (run / "clocks.csv").exists()


def test_where_cuts_change_the_numbers_the_accuracy_is_that_of_the_plan():
    changes = ({}, {"scheme": "psl"}, {"scheme": "sl"}, {"scheme": "sfl_v2"}, {"codec": "int8"})
    assert [parts.cuts_matter(Config(**change)) for change in changes] == [False, False, False, True, True]
    assert "depend on the cuts" in words.whose_accuracy(0.0, cuts_matter=True)


@pytest.mark.parametrize("factor", [0.0, 1.5])
def test_whose_accuracy_it_is_depends_on_who_may_be_late(factor, run, tmp_path, capsys):
    """With a deadline, other clients are in time under other methods."""
    written = json.loads((run / "config.json").read_text())
    written["deadline_factor"] = factor
    (tmp_path / "config.json").write_text(json.dumps(written))
    (tmp_path / "metrics.jsonl").write_bytes((run / "metrics.jsonl").read_bytes())
    with small_world.world():
        assert report.main([f"--workdir={tmp_path}"]) == 0
    said = capsys.readouterr().out
    config = workdirs.described(str(tmp_path))[0]
    last = recording.logged(str(tmp_path))[-1]
    closing = train.summary(config, {"exact": 1.0}, last, 1.0, 1.0, [4])
    for text in (said, (tmp_path / "report.html").read_text()):
        assert ("the accuracy is the same for all" in text) == (not factor)
    for text in (said, (tmp_path / "report.html").read_text(), closing):
        assert ("the accuracy is that of this run's plans alone" in text) == bool(factor)


def alone(config):
    """The parts of a run without rivals."""
    return dataclasses.replace(parts.build(config).parts, rivals=())


def test_a_page_of_somebody_else_stays(run, tmp_path, capsys):
    for file in ("config.json", "metrics.jsonl"):
        (tmp_path / file).write_bytes((run / file).read_bytes())
    (tmp_path / "report.html").write_text("<p>mine")
    assert report.main([f"--workdir={tmp_path}"]) == 2
    assert f"would replace {tmp_path / 'report.html'}, which sfl_jax did not write" in capsys.readouterr().err
    with small_world.world():
        config = workdirs.described(str(tmp_path))[0]
        own = alone(config)
    assert "which sfl_jax did not write" in train.report_of(config, own)
    assert (tmp_path / "report.html").read_text() == "<p>mine"


@pytest.mark.parametrize("error", [RuntimeError("no\nfonts"), KeyError("x"), MemoryError()])
def test_no_error_of_the_page_ends_a_run_that_is_done(error, run):
    with small_world.world():
        config = workdirs.described(str(run))[0]
        own = alone(config)
    with mock.patch.object(run_clocks, "clocks", side_effect=error):
        said = train.report_of(config, own)
    assert said.startswith(f"{run / 'report.html'}: cannot be written (")
    assert "\n" not in said


LINE = b'{"round": 1}\n'


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("config.json", None, "has no run; config.json cannot be read"),
        ("config.json", b"{", "config.json: is damaged"),
        ("metrics.jsonl", None, "has no rounds; metrics.jsonl cannot be read"),
        ("metrics.jsonl", b"", "must hold rounds 1, 2, ..., one a line"),
        ("metrics.jsonl", LINE, "metrics.jsonl: is damaged"),
        ("metrics.jsonl", b"[]\n", "metrics.jsonl: is damaged"),
        ("metrics.jsonl", "second", "must hold rounds 1, 2, ..., one a line"),
        ("metrics.jsonl", "words", "must hold rounds 1, 2, ..., one a line"),
    ],
)
def test_what_is_no_run_is_refused_in_one_line(run, tmp_path, capsys, name, content, reason):
    for file in ("config.json", "metrics.jsonl"):
        (tmp_path / file).write_bytes((run / file).read_bytes())
    log = (run / "metrics.jsonl").read_bytes()
    if content is None:
        (tmp_path / name).unlink()
    elif content == "second":
        (tmp_path / name).write_bytes(log[log.index(b"\n") + 1 :])
    elif content == "words":
        (tmp_path / name).write_bytes(re.sub(rb'"round_s": [^,]*', b'"round_s": "long"', log))
    else:
        (tmp_path / name).write_bytes(content)
    assert report.main([f"--workdir={tmp_path}"]) == 2
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 2)
    assert said.err.splitlines()[1].startswith("error: ")
    assert reason in said.err
    assert not (tmp_path / "report.html").exists()


def test_a_full_disk_leaves_the_run_done_and_no_page(run, tmp_path):
    """The run is finished. Its end says that the page is missing, and which command writes it."""
    for file in ("config.json", "metrics.jsonl"):
        (tmp_path / file).write_bytes((run / file).read_bytes())
    config, _ = workdirs.described(str(tmp_path))
    with small_world.world():
        own = alone(config)
    page = tmp_path / "report.html"
    with mock.patch.object(report, "whole_file", side_effect=small_world.FULL):
        said = train.report_of(config, own)
    assert said == f"{page}: cannot be written ({small_world.FULL}); {program('report')} writes it later"
    with mock.patch.object(report_page, "report", side_effect=ValueError("a library's own")):
        assert "cannot be written (a library's own); " in train.report_of(config, own)
    assert not page.exists()
    with mock.patch.object(report_page, "report", return_value="\udcff"):  # of a workdir that is not UTF-8
        train.report_of(config, own)
    assert page.read_bytes() == b"&#56575;"
    page.unlink()  # it lacks the mark of a page
    assert train.report_of(config, own).endswith(str(page))
    assert b"</html>" in page.read_bytes()
