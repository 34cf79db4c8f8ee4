"""Names and their members."""

import subprocess
import sys
from importlib import metadata

import pytest

from sfl_jax import registry
from sfl_jax.errors import BadInput

ALL = (
    registry.NETWORKS, registry.METHODS, registry.PARTITIONS, registry.OPTIMIZERS, registry.SCHEMES,
    registry.CODECS,
)  # fmt: skip


@pytest.mark.parametrize("members", ALL, ids=lambda members: members.kind)
def test_every_member_is_where_its_line_says(members):
    assert len(members) == len(members.names()) > 1
    for name in members:
        assert callable(members[name]), name


def test_an_unknown_name_is_refused_with_those_that_are_there():
    with pytest.raises(BadInput) as caught:
        registry.OPTIMIZERS["adamw"]
    assert str(caught.value) == "optimizer=adamw: must be one of sgd, adam; did you mean adam?"


def test_members_are_added_by_name_and_by_other_packages(monkeypatch):
    asked = []

    def entry_points(group):
        asked.append(group)
        return [metadata.EntryPoint("digits", "string:digits", group)]

    monkeypatch.setattr(registry.metadata, "entry_points", entry_points)
    kind = registry.Registry("letters", {"lower": "string:ascii_lowercase"})
    kind.register("own", "xyz")
    assert kind["lower"] == "abcdefghijklmnopqrstuvwxyz"
    assert asked == [], "others are looked for where a name is unknown, or all are listed"
    assert kind.names() == ("lower", "own", "digits")
    assert kind["digits"] == "0123456789"
    assert asked == ["sfl_jax.letters"]


def test_names_are_known_without_jax():
    program = (
        "import sys; from sfl_jax.commands import config; from sfl_jax import registry;"
        "print(*registry.METHODS, *registry.NETWORKS, *registry.PARTITIONS, *registry.CODECS);"
        "sys.exit('jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split()[0]) == (0, "exact")
