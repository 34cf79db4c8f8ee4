"""Paths as users type them, in every flag that takes one, on the command line and in a flag file."""

import dataclasses
import os

import pytest

from sfl_jax import fleet, paths
from sfl_jax.commands import config as config_lib
from sfl_jax.commands import flags, workdir
from sfl_jax.commands.config import Config, fields_of
from sfl_jax.errors import BadInput
from sfl_jax.models import Chain, Variables, keras_weights
from sfl_jax.run import recording

COMMANDS = {
    "workdir": "train",
    "init_from": "train",
    "data_dir": "train",
    "fleet": "plan",
    "output": "plan",
    "availability": "train",
    "servers": "plan",
    "traces": "plan",
    "write_fleet": "plan",
    "compare_with": "plan",
    "device_file": "profile_device",
    "certificate": "certify",
}
REFUSED = [
    ("gs://bucket/x.json", "must be a path on this machine; mount remote storage, e.g. with gcsfuse"),
    ("s3://bucket/x.json", "must be a path on this machine"),
    ("file:///x.json", "must be a path on this machine"),
    ('"x.json"', "flags and flag files do not support quotes; leave them out"),
    ("'~/x.json'", "quotes"),
    ("x.json  # short", "flags and flag files do not support comments after a value; leave them out"),
    ("'x.json'  # short", "comments"),
    ("$HOME/x.json", "flags and flag files do not support variables; write the values themselves"),
    ("${HOME}/x.json", "variables"),
    ("$$/x.json", "variables"),
    ("%HOME%/x.json", "variables"),
    (
        "$(pwd)/x.json",
        "flags and flag files do not support commands inside a value; write the values themselves",
    ),
    ("`pwd`/x.json", "commands"),
    ("`pwd/x.json", "commands"),
    ('"x.json', "quotes"),
    ('x.json"', "quotes"),
    ('a"b/x.json', "quotes"),
    ("x.json'", "quotes"),
    ("a/'b c'/x.json", "quotes"),
    ("$'x.json'", "quotes"),
    ("x.json \\", "flags and flag files do not support backslashes before blanks or at the end of a line"),
    ("a\\ b.json", "backslashes"),
    ("~nobody-of-this-name/x.json", "the home directory ~ is not known here; write the full path"),
]
TAKEN = ["a b.json", "~.json", "a#b.json", "it's.json", "a:b.json", "a$.json", "a\\b.json", "5%.json"]


def parsed(name, value, flagfile):
    flag = f"--{name}={value}"
    if flagfile:
        flagfile.write_text(f"{flag}  \n")
        flag = f"--flagfile={flagfile}"
    return getattr(flags.parse([flag], COMMANDS[name]), name)


@pytest.mark.parametrize("from_file", [False, True])
@pytest.mark.parametrize("name", COMMANDS)
def test_every_path_is_taken_as_it_is_meant(name, from_file, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    flagfile = tmp_path / "f.flags" if from_file else None
    for plain in TAKEN:
        place = tmp_path / plain
        place.touch()
        for typed in (str(place), f"~/{plain}", f"  {place} "):
            assert parsed(name, typed, flagfile) == str(place)
    for typed, line in REFUSED:
        with pytest.raises(BadInput) as caught:
            parsed(name, typed, flagfile)
        assert str(caught.value).startswith(f"--{name}={typed}: ")
        assert line in str(caught.value)


def test_every_flag_that_holds_a_path_is_tried_here():
    """A new text flag must be added there or here."""
    no_paths = {"dataset", "label_key", "starts", "coordinator_address", "codec", "codec_down", "augment"}
    no_paths |= {"interval", "seeds", "learning_rates"}
    alone_refused = {"server_links", "measured"}  # they need --servers and --fleet
    fields = [f for f in dataclasses.fields(Config) if type(f.default) is str and "choices" not in f.metadata]
    assert {f.name for f in fields if f.metadata.get("path")} == COMMANDS.keys() | alone_refused
    assert {f.name for f in fields if not f.metadata.get("path")} == no_paths


def test_other_texts_are_not_written_for_a_shell_either():
    for name in ("dataset", "coordinator_address", "label_key", "method", "rounds", "momentum"):
        with pytest.raises(BadInput, match=f'^--{name}="x": flags and flag files do not support quotes'):
            flags.parse([f'--{name}="x"'], "train")


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("--rounds=3  # three", "comments after a value"),
        ("--momentum=0.9 # as always", "comments after a value"),
        ("--compilation_cache=true # fast", "comments after a value"),
        ("--compilation_cache  # fast", "comments after a value"),
        ("--nocompilation_cache # slow", "comments after a value"),
        ("--rounds 3  # three", "comments after a value"),
        ("--rounds=$ROUNDS", "variables"),
        ("--rounds=3 \\", "backslashes"),  # from a command of several lines
        ("--flagfile='x.flags'", "quotes"),
        ("--flagfile=$(pwd)/x.flags", "commands inside a value"),
        ("--flagfile=$HOME/x.flags", "variables"),
    ],
)
def test_a_line_that_was_written_for_a_shell_is_called_so(line, what, tmp_path):
    (tmp_path / "f.flags").write_text(f"{line}\n")
    for argument in (line, f"--flagfile={tmp_path}/f.flags"):
        with pytest.raises(BadInput) as caught:
            flags.parse([argument], "train")
        assert str(caught.value).startswith(f"{line}: flags and flag files do not support {what}")


def test_a_flag_file_in_a_home_directory_is_read(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "f.flags").write_text("--rounds=3\n")
    assert flags.parse(["--flagfile=~/f.flags"], "train").rounds == 3


def test_without_a_home_only_what_needs_one_is_refused(monkeypatch):
    def unknown(number):
        raise KeyError(number)

    monkeypatch.setattr("pwd.getpwuid", unknown)
    monkeypatch.delenv("HOME")
    assert paths.expand("workdir", "runs/a") == "runs/a"
    for typed in ("~", "~/runs"):
        with pytest.raises(BadInput, match=f"^workdir={typed}: the home directory ~ is not known here"):
            paths.expand("workdir", typed)


def test_a_run_is_found_in_a_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(BadInput, match=f"^--workdir={tmp_path}/run: has no run"):
        workdir.saved("~/run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    assert workdir.described("~/run")[0].workdir == f"{tmp_path}/run"
    with pytest.raises(BadInput, match=f"^{tmp_path}/run/metrics.jsonl: must hold rounds"):
        recording.logged("~/run")


def test_a_home_directory_is_found_from_python_too(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Config(workdir="~/run").workdir == f"{tmp_path}/run"
    assert dataclasses.replace(Config(), fleet="~/a.csv").fleet == f"{tmp_path}/a.csv"
    fleet.write_fleet("~/fleet.csv", fleet.random_fleet(3).with_samples([1, 2, 3]))
    assert len(fleet.read_fleet("~/fleet.csv")) == 3
    with pytest.raises(BadInput, match=f"^init_from={tmp_path}/weights.h5: no such file"):
        keras_weights.load("~/weights.h5", "efficientnetv2-b0", Chain(()), Variables((), ()))


def test_a_config_made_in_python_is_refused_too():
    with pytest.raises(BadInput, match=r"^--workdir=gs://b: must be a path on this machine"):
        config_lib.validate(Config(workdir="gs://b"))


def test_defaults_are_paths_as_they_are(monkeypatch):
    monkeypatch.setitem(os.environ, "HOME", "/elsewhere")
    for command in ("train", "plan", "compare", "report"):
        values = {field.name: field.default for field in fields_of(command)}
        assert Config.from_dict(values, command).to_dict() == Config().to_dict()
