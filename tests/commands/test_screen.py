"""What a command shows while a person waits."""

import contextlib
import io
import logging
import os
import re
import subprocess
import sys

import pytest

from sfl_jax.commands import progress
from sfl_jax.commands import screen as screens
from sfl_jax.commands.config import Config
from sfl_jax.run import metrics


class Stream(io.StringIO):
    """A stderr that is a terminal, or is not."""

    def __init__(self, is_terminal):
        super().__init__()
        self.is_terminal = is_terminal

    def isatty(self):
        return self.is_terminal


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock)
    return clock


def make(is_terminal, clock, speaks=True):
    return screens.Screen(speaks, Stream(is_terminal), clock)


def pass_s(screen, clock, seconds):
    """Lets these seconds pass, with a tick every second."""
    for _ in range(seconds):
        clock.now += 1
        screen.tick()


def shown(text):
    """What a terminal shows at the end."""
    lines = [""]
    column = 0
    for character in text:
        if character == "\n":
            lines.append("")
            column = 0
        elif character == "\r":
            column = 0
        else:
            lines[-1] = lines[-1][:column] + character + lines[-1][column + 1 :]
            column += 1
    return [line.rstrip() for line in lines]


def test_without_a_terminal_there_is_a_line_every_few_seconds(clock):
    screen = make(False, clock)
    screen("compiling (about 9 s; kept)")
    pass_s(screen, clock, 9)
    screen("planning")
    pass_s(screen, clock, 3)
    screen.settle()
    pass_s(screen, clock, 30)
    assert screen.stream.getvalue().splitlines() == [
        "compiling (about 9 s; kept)", "  4 s: compiling", "  8 s: compiling", "planning",
    ]  # fmt: skip
    assert screens.SILENT_S + screens.TICK_S <= 5, "5 s without a byte look like a program that hangs"


def test_a_terminal_counts_seconds_and_keeps_whole_lines(clock, capsys):
    screen = make(True, clock)
    screen("compiling")
    pass_s(screen, clock, 11)
    assert shown(screen.stream.getvalue()) == ["compiling", "  11 s"]
    screen.aside("warning: look")
    assert shown(screen.stream.getvalue()) == ["compiling", "warning: look", ""]
    pass_s(screen, clock, 1)
    screen.result("42")
    assert shown(screen.stream.getvalue()) == ["compiling", "warning: look", ""]
    assert capsys.readouterr().out == "42\n"


def test_one_process_of_several_speaks(clock, capsys, monkeypatch):
    silent = make(False, clock, speaks=False)
    silent("compiling")
    pass_s(silent, clock, 9)
    silent.result("42")
    assert (silent.stream.getvalue(), capsys.readouterr().out) == ("", "")
    for name in screens.RANKS:
        monkeypatch.delenv(name, raising=False)
    assert screens.is_perhaps_first(Config())
    assert [screens.is_perhaps_first(Config(num_processes=2, process_id=i)) for i in (0, 1)] == [True, False]
    for name in screens.RANKS:
        monkeypatch.setenv(name, "1")
        assert not screens.is_perhaps_first(Config()), name
        monkeypatch.setenv(name, "0")
        assert screens.is_perhaps_first(Config())


def test_a_screen_ticks_by_itself_and_shows_warnings(monkeypatch, capsys):
    monkeypatch.setattr(screens, "TICK_S", 0.001)
    monkeypatch.setattr(screens, "SILENT_S", 0.0)
    handlers = list(logging.root.handlers)
    with screens.screen("first") as screen:
        assert capsys.readouterr().err.startswith("first\n")
        logging.warning("round %d: odd", 3)
        logging.info("nothing")
        while "  0 s: first\n" not in screen_text(screen, capsys):
            pass
    assert logging.root.handlers == handlers
    capsys.readouterr()
    screen.tick()
    assert capsys.readouterr().err == "", "it is over"


def screen_text(screen, capsys, seen=None):
    screen.kept = getattr(screen, "kept", "") + capsys.readouterr().err
    return screen.kept if "warning: round 3: odd\n" in screen.kept else ""


def test_nobody_who_listens_ends_no_run(clock):
    screen = make(False, clock)
    screen.stream.close()
    screen("compiling")
    screen.tick()


def rounds(clock, seconds, tested=()):
    """Rounds 1, 2, ... with these durations; some are evaluated."""
    for number, lasts in enumerate(seconds, 1):
        clock.now += lasts
        accuracy = 0.5 + number / 100 if number in tested else None
        yield metrics.Round(
            number, 2.0 / number, accuracy, accuracy, 1.0, 1.0, 3.5 * number, clock.now, 1.0, 4, 7.25
        )


def test_rounds_without_a_terminal_are_lines_of_evaluations_and_of_every_ten_seconds(clock, capsys):
    screen = make(False, clock)
    seconds = [6, 6, 6, 1, 1, 12, 1, 1]
    done = progress.with_progress(rounds(clock, seconds, tested={4}), 0, 8, screen)
    assert [line.round for line in done] == list(range(1, 9))
    lines = capsys.readouterr().out.splitlines()
    assert [int(line.split()[1].split("/")[0]) for line in lines] == [1, 3, 4, 6, 8]
    assert lines[0] == (
        "round 1/8: loss 2.000, simulated 3.50 s, cut 7.2; 106 s in all, 6.00 s a round, 42 s left"
    )
    assert "accuracy 54.00 %" in lines[2]
    assert "accuracy" not in lines[3]
    assert "5.20 s a round" in lines[3], "the mean of 6, 6, 1, 1 and 12"
    assert lines[4].endswith("2 min in all, 4.00 s a round"), "without the first round, which may compile"
    assert screen.stream.getvalue() == "computing round 1 of 8\n"


def test_on_a_terminal_the_bar_has_every_rounds_loss_and_no_warning_crosses_it(clock, capsys):
    screen = make(True, clock)
    for line in progress.with_progress(rounds(clock, [1, 1, 1], tested={1}), 0, 3, screen):
        if line.round == 2:
            screen.aside("warning: look")
        screen.tick()  # the bar's clock moves
    text = shown(screen.stream.getvalue())
    assert "warning: look" in text
    (bar,) = (line for line in text if "3/3" in line)
    assert re.search(
        r"3/3 \|.*\| \d\d:\d\d<00:00, .*round.*, loss 0.667, accuracy 51.00 %, simulated 10.50 s, cut 7.2",
        bar,
    )
    assert capsys.readouterr().out == ""
    assert "loss 2.000" in screen.stream.getvalue()


@pytest.mark.parametrize(("columns", "has"), [(80, ""), (95, "round/s"), (120, "|")])
def test_a_narrow_terminal_shows_loss_accuracy_and_the_time_that_is_left(columns, has, clock, monkeypatch):
    """The bar and the seconds of a round are left out before anything else is cut off."""
    monkeypatch.setattr("tqdm.std._screen_shape_wrapper", lambda: lambda _: (columns, 20))
    monkeypatch.setattr(progress, "_columns", lambda stream: columns)
    screen = make(True, clock)
    for _ in progress.with_progress(rounds(clock, [1] * 60, tested={1}), 0, 60, screen):
        pass
    *_, bar = (line for line in shown(screen.stream.getvalue()) if "60/60" in line)
    assert len(bar) <= columns
    assert bar.endswith("loss 0.033, accuracy 51.00 %, simulated 210.0 s, cut 7.2")
    assert re.search(r"\d\d:\d\d<\d\d:\d\d", bar)
    assert has in bar


def test_seconds_of_the_machine_have_a_readable_unit():
    assert [progress.duration(s) for s in (5.4, 119, 180, 9000)] == ["5 s", "119 s", "3 min", "2.5 h"]


def test_a_line_of_the_bar_is_ended_before_anything_else_is_said(clock):
    """By an interruption, and by an error in a round."""

    def failing():
        yield from rounds(clock, [1])
        raise ValueError

    for source in (rounds(clock, [1, 1]), failing()):
        screen = make(True, clock)
        shown_rounds = progress.with_progress(source, 0, 3, screen)
        next(shown_rounds)
        with contextlib.suppress(ValueError):
            next(shown_rounds)
        screen.settle()
        screen.aside("error: enough")
        *_, bar, last, _ = shown(screen.stream.getvalue())
        assert "/3" in bar
        assert last == "error: enough"


FIRST_LINES = """
import sys
from sfl_jax.commands import compare, plan, report, screen, train

class Said(BaseException):
    pass

def say(self, line):
    print("jax" in sys.modules or "numpy" in sys.modules, line)
    raise Said

screen.Screen.__call__ = say
for command, *flags in (
    [train, "--rounds=7", "--model=efficientnetv2-s", "--workdir=run"], [plan, "--clients=9"],
    [compare, "--workdir=run"], [compare, "--plan_only", "--workdir=run"], [report, "--workdir=run"],
):
    try:
        command.main(flags)
    except Said:
        pass
"""


def test_every_command_speaks_before_it_loads_anything(tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", FIRST_LINES],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.splitlines() == [
        "False 100 clients, 10 a round, 7 rounds: efficientnetv2-s at 32x32 on mnist",
        "False 9 clients, efficientnetv2-b0 at 32x32, server of 20 GFLOP/s",
        "False 100 clients, 10 a round, 100 rounds: efficientnetv2-b0 at 32x32 on mnist",
        "False plans of every method, no training: 100 clients, efficientnetv2-b0 at 32x32, "
        "server of 20 GFLOP/s",
        "False reading the run in run",
    ], done.stderr


def test_the_first_line_names_a_fleet_file():
    assert screens.first_line(Config(fleet="mine.csv", rounds=1)).startswith(
        "clients of mine.csv, 10 a round, 1 round: "
    )


@pytest.mark.parametrize(
    ("settings", "server"),
    [
        ({}, "server of 20 GFLOP/s"),
        ({"target_round_s": 25.0}, "the smallest server for a round of 25 s"),
        ({"servers": "two.csv"}, "servers of two.csv"),
    ],
)
def test_a_plan_begins_with_the_server_that_it_is_for(settings, server):
    assert screens.first_line_of_plan(Config(**settings)).endswith(f", {server}")
