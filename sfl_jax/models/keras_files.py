"""Reads weights files of Keras without Keras: their layers and arrays.

There are three formats: `.weights.h5`, the `.keras` archive that contains one (both Keras 3), and the older
`.h5` with a whole model or only its weights. The content decides the format, not the name. Nothing is
unpickled and no code from a file runs. An array is read when it is used. Some damage makes the HDF5 library
loop for ever or crash, so a separate process reads a file first.
"""

import contextlib
import io
import itertools
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import h5py

from sfl_jax.errors import BadInput

CLASSIFIER = "predictions"  # Keras' name of the last layer
SCALING = ("rescaling", "normalization")  # how the names of layers that scale images begin
ARCHIVED = "model.weights.h5"  # in a .keras archive
PATIENCE_S, BYTES_PER_S = 60.0, 10e6  # how long the process that reads first may take
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

    arrays: by layer, in Keras' order of a layer's variables; a layer without variables has none.
    by_class: whether layers are named by class and number ("conv2d_3", as in .weights.h5), not by own names.
    whole_model: whether all layers are listed, so that an absent layer was not in the model.
    """

    arrays: Mapping[str, Sequence[Any]]
    by_class: bool
    whole_model: bool


@contextlib.contextmanager
def opened(path: str) -> Iterator[Stored]:
    """The content of the file at `path`, open during the block. BadInput if it cannot be read."""
    if not Path(path).is_file():
        raise BadInput(f"init_from={path}: no such file")
    _try_to_read(path)
    try:
        with h5py.File(_hdf5(path), "r") as file:
            yield _stored(file, path)
    except BadInput:
        raise
    except Exception as error:  # a damaged file can fail in any way
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise BadInput(f"init_from={path}: not a weights file that Keras wrote ({reason})") from error


def _try_to_read(path):
    """BadInput if reading does not end or crashes the process. Python errors occur again in `opened`."""
    patience_s = PATIENCE_S + os.path.getsize(path) / BYTES_PER_S
    command = [sys.executable, "-I", "-c", READ_ALL, path, ARCHIVED]
    try:
        code = subprocess.run(command, capture_output=True, timeout=patience_s, check=False).returncode
    except subprocess.TimeoutExpired:
        raise BadInput(f"init_from={path}: damaged: reading it does not end") from None
    if code < 0:
        raise BadInput(f"init_from={path}: damaged: reading it crashes")


def _hdf5(path):
    if not zipfile.is_zipfile(path):
        return path
    with zipfile.ZipFile(path) as archive:
        return io.BytesIO(archive.read(ARCHIVED))


def within(outer: Stored, models: Sequence[Stored], where: str) -> Stored:
    """The layers of a model inside a model whose own layers are `outer`; `outer` if there is none inside.

    A dense layer behind an inner model without classifier becomes its classifier. BadInput (beginning with
    `where`): several models inside, or layers around the inner model that change what it computes.
    """
    inside = [model for model in models if any(model.arrays.values())]
    if not inside:
        return outer
    inner, around = inside[0], {name: arrays for name, arrays in outer.arrays.items() if arrays}
    classifier = "dense" if inner.by_class else CLASSIFIER
    is_dense = [[len(array.shape) for array in arrays] == [2, 1] for arrays in around.values()]
    if len(inside) > 1:
        reason = f"{len(inside)} inner models"
    elif any(name.startswith(SCALING) for name in outer.arrays):
        reason = "a layer outside the inner one that scales images"
    elif around and (is_dense != [True] or inner.arrays.get(classifier)):
        reason = f"variables outside the inner one, of {', '.join(around)}"
    else:
        behind = dict(zip([classifier], around.values(), strict=False))
        return inner._replace(arrays={**inner.arrays, **behind})
    raise BadInput(f"{where}: holds a model inside a model, with {reason}; save the inner model alone")


def _stored(file: Any, path: str) -> Stored:
    where = f"init_from={path}"
    if "layers" in file:
        return _by_class(file, where)
    group = file.get("model_weights", file)
    if "layer_names" not in group.attrs:
        raise BadInput(f"{where}: an HDF5 file without layers; give one that Keras wrote")
    names = list(map(_text, group.attrs["layer_names"]))
    layers = {name: _by_layer(group[name]) for name in names}
    is_whole = "model_config" in file.attrs
    models = [
        Stored({**_listed(file, name), **layers[name]}, by_class=False, whole_model=is_whole)
        for name in names
        if len(layers[name]) > 1
    ]
    own = {name: list(itertools.chain(*layers[name].values())) for name in names if len(layers[name]) <= 1}
    return within(Stored(own, by_class=False, whole_model=is_whole), models, where)


def _by_class(group, where):
    """The layers of a model in a .weights.h5."""
    layers = {
        name: [layer["vars"][str(number)] for number in range(len(layer["vars"]))]
        for name, layer in group["layers"].items()
        if "vars" in layer
    }
    models = [_by_class(layer, where) for layer in group["layers"].values() if "layers" in layer]
    return within(Stored(layers, by_class=True, whole_model=True), models, where)


def _by_layer(group):
    """The arrays of a layer, grouped by the layer in each array's name: several groups if it is a model."""
    layers: dict[str, list[Any]] = {}
    for name in map(_text, group.attrs["weight_names"]):
        *_, layer, _ = ("", *name.split("/"))
        layers.setdefault(layer, []).append(group[name])
    return layers


def _listed(file, model):
    """{layer: no arrays} for the layers of `model` that the file's description of a whole model lists."""
    if "model_config" not in file.attrs:
        return {}
    layers = json.loads(_text(file.attrs["model_config"]))["config"]["layers"]
    (inner,) = (layer["config"] for layer in layers if layer["config"]["name"] == model)
    return {layer["config"]["name"]: [] for layer in inner["layers"]}


def _text(name):
    return name.decode() if isinstance(name, bytes) else str(name)
