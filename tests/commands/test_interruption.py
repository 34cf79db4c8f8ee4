"""Ctrl-C and SIGTERM at every point of a command: the line, the exit code, and what is left."""

import os
import signal
import subprocess
import sys
import threading
import time
from unittest import mock

import pytest

from sfl_jax import run
from sfl_jax.commands import interruption, parts, train, workdir
from sfl_jax.commands.config import Config
from sfl_jax.commands.interruption import Stop
from sfl_jax.commands.screen import Screen
from sfl_jax.federated import processes

INT, TERM = signal.SIGINT, signal.SIGTERM


def heard(capfd, stop, *numbers):
    """(exit code or None, line) for each signal."""
    return [(stop.hear(number), capfd.readouterr().err.strip()) for number in numbers]


def test_where_nothing_is_lost_the_first_signal_is_the_end(capfd):
    stop = Stop()
    assert heard(capfd, stop, INT) == [(130, "stopped")]
    stop.may_end("compiling")
    assert heard(capfd, stop, TERM) == [(130, "stopped while compiling; nothing was trained yet")]
    stop.keep("round 3 of 9 is saved")
    stop.may_end("compiling")
    assert heard(capfd, stop, INT) == [(75, "stopped while compiling; round 3 of 9 is saved")]


def test_a_round_is_saved_first_and_only_a_second_ctrl_c_is_the_end(capfd):
    asked = (None, "stopping after this round; press Ctrl-C again to stop now")
    for first in (INT, TERM):
        stop = Stop()
        stop.must_end_well("this round")
        assert not stop.asked
        assert heard(capfd, stop, first, TERM, INT) == [asked, asked, (130, "stopped")]
        assert stop.asked


def test_no_process_of_several_ends_before_the_others(capfd):
    stop = Stop()
    stop.keep("round 3 of 9 is saved")
    stop.wait_for_others()
    stop.may_end("compiling")
    assert heard(capfd, stop, TERM) == [(None, "stopping after compiling; press Ctrl-C again to stop now")]


NATIVE = """
import hashlib, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from sfl_jax.commands.interruption import interruption
from sfl_jax.files import whole_file
with interruption() as stop, whole_file(sys.argv[1]) as file:
    stop.must_end_well("this round")
    print("printed", end="")
    print("ready", file=sys.stderr, flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
"""


def test_native_code_is_ended_too_and_leaves_nothing(tmp_path):
    """The native code runs for many minutes, in which no Python handler runs."""
    command = [sys.executable, "-c", NATIVE, tmp_path / "file"]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    process = subprocess.Popen(
        command, env=buffered, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr.readline() == "ready\n"
        while not list(tmp_path.iterdir()):
            time.sleep(0.01)
        for _ in range(2):
            process.send_signal(INT)
            assert process.stderr.readline() == "\n"
            assert process.stderr.readline().startswith("stop")
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, out) == (130, "printed")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def ends(monkeypatch):
    """The exit codes with which this process would have ended."""
    codes = []
    monkeypatch.setattr(interruption, "end", codes.append)
    return codes


def interrupted_in(monkeypatch, name):
    """Ctrl-C comes within `build` or `compile`, and the run does not return from there."""
    come, hear = threading.Event(), Stop.hear

    def hear_and_note(self, number):
        try:
            return hear(self, number)
        finally:
            come.set()

    def interrupt(*_):
        os.kill(os.getpid(), INT)
        assert come.wait(60)
        raise InterruptedError

    monkeypatch.setattr(Stop, "hear", hear_and_note)
    if name == "build":
        monkeypatch.setattr(parts, name, interrupt)
    else:
        monkeypatch.setattr(run.Run.of(None), name, interrupt)


@pytest.mark.parametrize(
    ("function", "round", "others", "code", "line"),
    [
        ("build", None, False, 130, "stopped while reading the data and planning; nothing was trained yet"),
        ("compile", None, False, 130, "stopped while measuring and compiling; nothing was trained yet"),
        ("compile", 3, False, 75, "stopped while measuring and compiling; round 3 of 100 is saved; run the"),
        ("compile", 3, True, None, "stopping after measuring and compiling; press Ctrl-C again to stop now"),
    ],
)
def test_before_the_first_round_a_run_ends_at_once(
    function, round, others, code, line, monkeypatch, tmp_path, capfd, ends
):
    for name in ("build", "inputs", "settled"):
        monkeypatch.setattr(parts, name, mock.Mock(return_value=mock.Mock(notes=[])))
    monkeypatch.setattr(run, "Run", mock.Mock())
    monkeypatch.setattr(workdir, "check_inputs", mock.Mock())
    progress = round and mock.Mock(round=round, wall_s=0.0, compile_s=0.0)
    monkeypatch.setattr(workdir, "reached", mock.Mock(return_value=progress))
    monkeypatch.setattr(processes, "is_alone", lambda: not others)
    monkeypatch.setattr(processes, "agree", mock.Mock())
    interrupted_in(monkeypatch, function)
    assert train.main([f"--workdir={tmp_path}"]) == 2  # as it would not
    while len(ends) < (code is not None):
        time.sleep(0.001)
    assert ends == [code] * (code is not None)
    assert f"\n{line}" in capfd.readouterr().err


def test_the_rounds_are_not_ended_by_the_first_signal(monkeypatch, tmp_path, capfd):
    said = []
    for name in ("build", "inputs", "network"):
        monkeypatch.setattr(parts, name, mock.Mock(return_value=mock.Mock(notes=[])))
    monkeypatch.setattr(parts, "with_execution", lambda config, _: config)
    monkeypatch.setattr(run, "Run", mock.Mock())
    monkeypatch.setattr(run.recording, "Recorder", mock.Mock())
    for name in ("environment", "how"):
        monkeypatch.setattr(train, name, lambda *_: "")
    monkeypatch.setattr(train, "_rounds", lambda *given: said.extend(heard(capfd, given[4], INT)) or 0)
    assert train.main([f"--workdir={tmp_path}"]) == 0
    assert said[0][0] is None
    assert said[0][1].endswith("stopping after this round, which is saved; press Ctrl-C again to stop now")


def test_a_run_stops_where_any_process_was_asked_to(monkeypatch, capsys):
    monkeypatch.setattr(processes, "any_of", lambda here: True)
    another_round = map(pytest.fail, ["a round was begun"])
    own, recorder = mock.Mock(round=3, rounds=lambda *_: another_round), mock.Mock(saved_round=3)
    assert train._rounds(Config(rounds=9), own, recorder, None, Stop(), Screen()) == 75
    recorder.save.assert_called_once_with(own.state, wait=True)
    assert "interrupted, round 3 of 9 is saved" in capsys.readouterr().err


def test_handlers_are_as_before_afterwards(ends):
    before = [signal.getsignal(number) for number in (INT, TERM)]
    with interruption.interruption():
        with interruption.interruption() as inner:
            inner.must_end_well("this")
            os.kill(os.getpid(), TERM)
            while not inner.asked:
                time.sleep(0.001)
        assert ends == []
        os.kill(os.getpid(), TERM)
        while not ends:
            time.sleep(0.001)
    assert ends == [130]
    assert [signal.getsignal(number) for number in (INT, TERM)] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_an_interactive_session_outlives_its_command(monkeypatch, ends):
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)

    def command():
        with interruption.interruption():
            os.kill(os.getpid(), INT)
            while not ends:
                time.sleep(0.001)

    with pytest.raises(KeyboardInterrupt):
        command()
