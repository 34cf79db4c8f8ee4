"""The command that compares a network in two parts with the whole."""

import csv

import pytest

from sfl_jax.commands import certify
from sfl_jax.federated import protocol

FLAGS = ["--model=mlp", "--image_size=8", "--batch_size=2"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_it_writes_a_row_for_each_cut_and_says_that_all_are_equal(capsys):
    assert certify.main(FLAGS) == 0
    with open("certificate.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["after_unit"] for line in lines] == ["", "hidden1", "hidden2", "classifier"]
    assert all(float(line["difference"]) < 1e-10 for line in lines)
    assert "equal       at all 4 cuts" in capsys.readouterr().out


def test_a_cut_that_changes_numbers_is_named_and_ends_with_1(capsys, monkeypatch):
    down = protocol.Session.down
    monkeypatch.setattr(protocol.Session, "down", lambda self, gradient: down(self, 2 * gradient))
    assert certify.main(FLAGS) == certify.FAILED
    assert "NOT EQUAL   at cut 1, 2, 3: more than 1e-10 of a step" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--certificate=table.txt", "--certificate=table.txt: must end in .csv"),
        ("--certificate=mine.csv", "--certificate=mine.csv: would replace mine.csv, which sfl_jax did not"),
        ("--tail_units=3", "--tail_units=3: must be below 3, the units of mlp"),
        ("--rounds=3", "rounds"),
    ],
)
def test_bad_flags_are_one_line(here, capsys, flag, words):
    (here / "mine.csv").write_text("my,own")
    assert certify.main([*FLAGS, flag]) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("error: ")
    assert words in err
    assert (here / "mine.csv").read_text() == "my,own"
