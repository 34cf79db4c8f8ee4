"""What is shown about compiling, from notes of earlier starts."""

import dataclasses
import json
from types import SimpleNamespace

import pytest

from sfl_jax.commands import parts
from sfl_jax.commands.config import Config
from sfl_jax.federated import programs

DEVICES = [SimpleNamespace(device_kind="cpu")]
CONFIG = Config(layer_form="conv", clients_per_chunk=5, execution="vmap")


@pytest.fixture
def notes(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(
        programs, "jax", SimpleNamespace(config=SimpleNamespace(jax_compilation_cache_dir=f"{tmp_path}/kept"))
    )
    return tmp_path / "kept" / "executions.json"


def names(config):
    """The names of the network and of its program."""
    of_devices = config.clients_per_chunk, config.execution
    return f"{config.model} at {config.image_size}", f"{parts._program(config)}, {of_devices}"


def said(notes, config=CONFIG, devices=DEVICES):
    return programs.Programs(notes, devices).expected(*names(config))


def test_the_first_start_says_how_long_an_earlier_one_took(notes):
    assert said(notes) == "compiling the round (kept in ~/kept; a large network takes minutes)"
    programs.Programs(notes, DEVICES).took(*names(CONFIG), 41.6)
    assert said(notes) == "loading the compiled round"
    programs.Programs(notes, DEVICES).took(*names(CONFIG), 7.2)
    assert said(notes) == "loading the compiled round (about 7 s)"
    other = dataclasses.replace(CONFIG, batch_size=16)  # another program of the same network
    assert said(notes, other) == "compiling the round (about 42 s the first time; kept in ~/kept)"
    for config in (
        dataclasses.replace(CONFIG, model="efficientnetv2-s"),
        dataclasses.replace(CONFIG, image_size=64),
    ):
        assert "a large network takes minutes" in said(notes, config)
    assert "a large network takes minutes" in said(notes, CONFIG, DEVICES * 2)


@pytest.mark.parametrize(
    "change", [{"seed": 3}, {"rounds": 7}, {"learning_rate": 0.1}, {"workdir": "x"}, {"method": "greedy"}]
)
def test_what_is_data_to_a_program_makes_no_other(notes, change):
    programs.Programs(notes, DEVICES).took(*names(CONFIG), 41.6)
    assert said(notes, dataclasses.replace(CONFIG, **change)).startswith("loading")


@pytest.mark.parametrize(
    "change",
    [
        {"cohort_size": 9},
        {"clients_per_chunk": 2},
        {"optimizer": "sgd"},
        {"clients": 50},
        {"local_epochs": 2},
    ],
)
def test_what_a_program_is_made_of_makes_another(notes, change):
    programs.Programs(notes, DEVICES).took(*names(CONFIG), 41.6)
    assert said(notes, dataclasses.replace(CONFIG, **change)).startswith("compiling")


def test_without_a_place_nothing_is_noted():
    nowhere = programs.Programs(None, DEVICES)
    nowhere.took(*names(CONFIG), 3.0)
    assert nowhere.expected(*names(CONFIG)) == "compiling the round (not kept; a large network takes minutes)"


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"a": 1}', '{"a": {"model": 3}}', '{"a": {"compiled_s": "x"}}']
)
def test_damaged_notes_are_none(notes, content):
    notes.parent.mkdir()
    notes.with_name(programs.NAME).write_text(content)
    assert "a large network takes minutes" in said(notes)
    programs.Programs(notes, DEVICES).took(*names(CONFIG), 3.0)
    assert len(json.loads(notes.with_name(programs.NAME).read_text())) >= 1
    assert said(notes).startswith("loading")


def test_a_place_that_cannot_be_written_ends_nothing(tmp_path):
    (tmp_path / "file").touch()
    programs.Programs(tmp_path / "file" / "executions.json", DEVICES).took(*names(CONFIG), 3.0)
