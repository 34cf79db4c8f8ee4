"""What a network costs is the same from the disk as traced, and never that of another network or code."""

import json

import jax
import numpy as np
import pytest

from sfl_jax import models
from sfl_jax.commands import kept_profile

CHAIN, SHAPE = models.create("mlp"), (8, 8, 1)


def equal(one, other):
    same = jax.tree.map(np.array_equal, one, other)
    return one.shapes == other.shapes and one.names == other.names and jax.tree.all(same)


@pytest.fixture
def traced(monkeypatch):
    """The networks that were traced."""
    seen, trace = [], models.profile
    monkeypatch.setattr(models, "profile", lambda *given: seen.append(given) or trace(*given))
    return seen


def test_it_is_traced_once_and_the_same_afterwards(tmp_path, traced):
    first, least = kept_profile.profile(tmp_path, CHAIN, SHAPE, SHAPE)
    again, same = kept_profile.profile(tmp_path, CHAIN, SHAPE, SHAPE)
    assert len(traced) == 1
    assert equal(first, again)
    assert [type(x) for x in first] == [type(x) for x in again]
    assert least == same
    kept_profile.profile(None, CHAIN, SHAPE, SHAPE)
    assert len(traced) == 2


def test_it_is_of_its_network_its_sizes_and_its_code(tmp_path, traced, monkeypatch):
    kept_profile.profile(tmp_path, CHAIN, SHAPE, SHAPE)
    smashed = kept_profile.profile(tmp_path, CHAIN, SHAPE, (9, 9, 1))[0].smashed
    assert smashed[0] == 81
    kept_profile.profile(tmp_path, CHAIN, (9, 9, 1), SHAPE)
    kept_profile.profile(tmp_path, models.create("mlp", 11), SHAPE, SHAPE)
    assert len(traced) == 4
    monkeypatch.setattr(kept_profile, "code", lambda: "other code")
    kept_profile.profile(tmp_path, CHAIN, SHAPE, SHAPE)
    assert len(traced) == 5


@pytest.mark.parametrize("harm", ["cut off", "other numbers", "empty", "a directory"])
def test_what_is_damaged_is_traced_again(tmp_path, traced, harm):
    first, _ = kept_profile.profile(tmp_path, CHAIN, SHAPE, SHAPE)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    if harm == "a directory":
        file.unlink()
        file.mkdir()
    else:
        digest, kept = whole.split(b"\n")
        fields, least = json.loads(kept)
        fields["parameters"][0] += 1
        other = digest + b"\n" + json.dumps([fields, least]).encode()
        file.write_bytes({"cut off": whole[:-9], "other numbers": other, "empty": b""}[harm])
    again, _ = kept_profile.profile(tmp_path, CHAIN, SHAPE, SHAPE)
    assert len(traced) == 2
    assert equal(first, again)
