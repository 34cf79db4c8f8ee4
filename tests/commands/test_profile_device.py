"""The command that times a network's units on this machine, and plans with what it wrote."""

import json

import pytest

from sfl_jax import models
from sfl_jax.commands import plan, profile_device
from sfl_jax.fleet import read_device

FLEET = """client,device,slowdown,uplink_bps,downlink_bps,memory_bytes,samples
pi,pi.json,1,1e7,2e7,1e9,64
slow,pi.json,30,1e7,2e7,1e9,64
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fleet.csv").write_text(FLEET)
    return tmp_path


@pytest.mark.slow
def test_what_was_measured_is_what_a_plan_counts(here, capsys):
    flags = ["--model=mlp", "--batch_size=8"]
    assert profile_device.main([*flags, "--repetitions=3", "--device_file=pi.json"]) == 0
    device = read_device("pi.json")
    assert len(device.units) == len(models.create("mlp", 10, 1))
    assert (device.network, device.batch_size) == ("mlp at 32x32x1, 10 classes", 8)
    out = capsys.readouterr().out
    assert "forward, s" in out
    assert f"{device.forward_s.sum() + device.backward_s.sum():.4g}" in out.splitlines()[-2]
    assert plan.main([*flags, "--fleet=fleet.csv", "--server_flops=1e9"]) == 0
    pi, slow = json.loads((here / "plan.json").read_text())["clients"]
    for client, factor in ((pi, 1), (slow, 30)):
        measured = 8 * factor * device.forward_s[: client["cut"]].sum()
        assert client["client_forward_s"] == pytest.approx(measured, rel=1e-12)
    assert any("device file" in line for line in json.loads((here / "plan.json").read_text())["assumptions"])


def test_the_median_of_repetitions_is_taken_without_the_first_calls():
    ticks = iter(range(10_000))
    seconds = models.unit_seconds(models.create("mlp", 10, 1), (8, 8, 1), 2, 3, clock=lambda: next(ticks))
    assert [unit.forward_s for unit in seconds] == [1] * len(seconds)  # one tick between two looks
    assert next(ticks) == len(seconds) * 2 * 2 * 3 * 2  # forms, directions, repetitions, looks


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--device_file=fleet.csv", "--device_file=fleet.csv: must end in .json"),
        (
            "--device_file=mine.json",
            "--device_file=mine.json: would replace mine.json, which sfl_jax did not",
        ),
        ("--repetitions=0", "--repetitions=0: must be an integer, at least 1"),
        ("--fleet=fleet.csv", "fleet"),
    ],
)
def test_bad_flags_are_one_line(here, capsys, flag, words):
    (here / "mine.json").write_text('{"my": "own"}')
    assert profile_device.main(["--model=mlp", flag]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert words in err
    assert (here / "mine.json").read_text() == '{"my": "own"}'


@pytest.mark.parametrize("word", ["--help", "--helpfull"])
def test_help(capsys, word):
    assert profile_device.main([word]) == 0
    out = capsys.readouterr().out
    assert "--device_file=device.json" in out
    assert "--server_flops" not in out
