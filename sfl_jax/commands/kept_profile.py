"""Keeps the costs of a network from one start to the next, because tracing all units takes seconds."""

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from sfl_jax import models
from sfl_jax.federated.kept import code, surroundings
from sfl_jax.files import whole_file
from sfl_jax.models import Chain, Profile
from sfl_jax.run.saving import described


def profile(
    directory: Path | None, chain: Chain, image_shape: tuple[int, ...], stored_shape: tuple[int, ...]
) -> tuple[Profile, int | None]:
    """(`models.profile`, `models.least_normalised`) of the chain. They are looked up in `directory` first."""
    path = directory and directory / f"profile-{described(chain.units, image_shape, stored_shape)[:32]}.json"
    if path and (kept := _read(path)):
        return kept
    found = models.profile(chain, image_shape, stored_shape), models.least_normalised(chain, image_shape)
    if path:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as file:
                file.write(_written(*found))
    return found


def _read(path: Path) -> tuple[Profile, int | None] | None:
    """The content of the file. None if it is absent or damaged, or if other code or releases made it."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        head, kept = path.read_bytes().split(b"\n", 1)
        if head == _head(kept):
            fields, least = json.loads(kept)
            return Profile(**{name: _value(name, value) for name, value in fields.items()}), least
    return None


def _value(name: str, value: Any) -> Any:
    """A field of Profile. JSON has turned its tuples and arrays into lists."""
    if name == "names":
        return tuple(value)
    if name == "shapes":
        return tuple(tuple(map(tuple, arrays)) for arrays in value)
    return np.array(value, np.int64)


def _written(costs: Profile, least: int | None) -> bytes:
    fields = {
        name: value.tolist() if isinstance(value, np.ndarray) else value
        for name, value in costs._asdict().items()
    }
    kept = json.dumps([fields, least]).encode()
    return _head(kept) + b"\n" + kept


def _head(kept: bytes) -> bytes:
    return hashlib.sha256(repr((code(), surroundings())).encode() + kept).hexdigest().encode()
