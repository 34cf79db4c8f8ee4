"""Weights files as Keras writes them, read without Keras: which layers there are, and their arrays.

Three formats: `.weights.h5` and the `.keras` archive that holds one (Keras 3), and the older `.h5`, of a
whole model or of its weights alone. They are told apart by what they hold, not by their names. Nothing is
unpickled and no code in a file is run; arrays are read when they are asked for. Some damage keeps the HDF5
library in a loop for ever, or crashes it, so a process of its own reads a file first.
"""

import contextlib
import io
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import h5py

from sfl_jax.errors import BadInput

ARCHIVED = "model.weights.h5"  # in a .keras archive
PATIENCE_S, BYTES_PER_S = 60.0, 10e6  # with the process that reads first
READ_ALL = """
import io, sys, zipfile
import h5py
path, archived = sys.argv[1:]
source = io.BytesIO(zipfile.ZipFile(path).read(archived)) if zipfile.is_zipfile(path) else path
def read(_, thing):
    dict(thing.attrs)
    if isinstance(thing, h5py.Dataset):
        thing[()]
with h5py.File(source, "r") as file:
    read("", file)
    file.visititems(read)
"""


class Stored(NamedTuple):
    """The layers of a file.

    arrays: by layer, in Keras' order of a layer's variables; layers without variables have none.
    by_class: whether layers go by class and number ("conv2d_3", as in .weights.h5) or by their own names.
    whole_model: whether all layers are listed, so that one which is absent was not in the model.
    """

    arrays: Mapping[str, Sequence[Any]]
    by_class: bool
    whole_model: bool


@contextlib.contextmanager
def opened(path: str) -> Iterator[Stored]:
    """What the file at `path` holds, while the block lasts. BadInput where it cannot be read."""
    if not Path(path).is_file():
        raise BadInput(f"--init_from={path}: no such file")
    _try_to_read(path)
    try:
        with h5py.File(_hdf5(path), "r") as file:
            yield _stored(file, path)
    except BadInput:
        raise
    except Exception as error:  # a damaged file can fail in any way
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise BadInput(f"--init_from={path}: not a weights file that Keras wrote ({reason})") from error


def _try_to_read(path):
    """BadInput where that does not end, or ends the process; what Python raises is met again later."""
    patience_s = PATIENCE_S + os.path.getsize(path) / BYTES_PER_S
    command = [sys.executable, "-I", "-c", READ_ALL, path, ARCHIVED]
    try:
        code = subprocess.run(command, capture_output=True, timeout=patience_s, check=False).returncode
    except subprocess.TimeoutExpired:
        raise BadInput(f"--init_from={path}: damaged: reading it does not end") from None
    if code < 0:
        raise BadInput(f"--init_from={path}: damaged: reading it crashes")


def _hdf5(path):
    if not zipfile.is_zipfile(path):
        return path
    with zipfile.ZipFile(path) as archive:
        return io.BytesIO(archive.read(ARCHIVED))


def _stored(file: Any, path: str) -> Stored:
    if "layers" in file:
        layers = {
            name: [group["vars"][str(number)] for number in range(len(group["vars"]))]
            for name, group in file["layers"].items()
            if "vars" in group
        }
        return Stored(layers, by_class=True, whole_model=True)
    group = file.get("model_weights", file)
    if "layer_names" not in group.attrs:
        raise BadInput(f"--init_from={path}: an HDF5 file without layers; give one that Keras wrote")
    layers = {}
    for name in map(_text, group.attrs["layer_names"]):
        layers[name] = [group[name][_text(key)] for key in group[name].attrs["weight_names"]]
    return Stored(layers, by_class=False, whole_model="model_config" in file.attrs)


def _text(name):
    return name.decode() if isinstance(name, bytes) else str(name)
