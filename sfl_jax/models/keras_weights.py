"""Weights of keras.applications.efficientnet_v2 into a chain and back. Keras itself is not needed.

With the same variables and scaled images, Keras and a chain compute the same. These differ:

- input scaling: Keras scales inside the model (`include_preprocessing`), a chain takes scaled images.
  `Imported.scaling` says which scaling the weights expect;
- stochastic depth: Keras spreads its rates over the number of blocks before depth scaling, so the last blocks
  of B1, B2 and B3 drop more than 0.2 (B3's drops 0.295). A chain counts all blocks, as Google's release does;
- dropout before the classifier: 0.2 for every variant in Keras, the published rates in a chain;
- activation: Keras' classifier ends in a softmax unless `classifier_activation=None`; a chain gives logits.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import h5py
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from sfl_jax.errors import BadInput
from sfl_jax.models.chain import Chain, Variables
from sfl_jax.models.keras_files import CLASSIFIER, Stored, opened, within


class InputScaling(NamedTuple):
    """How pixels 0..255 are scaled for a stem: pixel / divisor + offset, one number or one per channel."""

    divisor: tuple[float, ...]
    offset: tuple[float, ...]


SIGNED = InputScaling((127.5,), (-1.0,))  # Keras' models without preprocessing expect [-1, 1]
CENTRED = InputScaling((128.0,), (-1.0,))  # Keras' S, M, L, and every model of grey images
IMAGENET = InputScaling(  # mean and standard deviation of ImageNet: Keras' B0 to B3 of colour images
    (0.229 * 255, 0.224 * 255, 0.225 * 255), (-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225)
)


class Imported(NamedTuple):
    """A chain's variables, and the scaling of images that they expect.

    classes: classes of the source's classifier, None if it has none. A chain with as many takes the
    classifier.
    """

    variables: Variables
    scaling: InputScaling
    classes: int | None


class _Place(NamedTuple):
    """Where a variable is in Keras and in a chain."""

    layer: str  # Keras' name of the layer
    group: str  # its class and number: the address in a .weights.h5
    position: int  # among the layer's variables
    name: str
    shape: tuple[int, ...]
    unit: int
    path: tuple[str, ...]


# The layers of a unit: name in a chain, name in Keras, class in Keras; in the order of the network.
_LAYERS = (
    ("conv", "conv", "conv2d"),
    ("bn", "bn", "batch_normalization"),
    ("expand_conv", "expand_conv", "conv2d"),
    ("expand_bn", "expand_bn", "batch_normalization"),
    ("depthwise_conv", "dwconv2", "depthwise_conv2d"),
    ("depthwise_bn", "bn", "batch_normalization"),
    ("squeeze_excite/reduce", "se_reduce", "conv2d"),
    ("squeeze_excite/expand", "se_expand", "conv2d"),
    ("project_conv", "project_conv", "conv2d"),
    ("project_bn", "project_bn", "batch_normalization"),
    ("dense", "predictions", "dense"),
)
_PREFIXES = {"stem": "stem_", "head": "top_", "classifier": ""}  # for other units: the unit's name and _
_POSITIONS = {  # a layer's variables in Keras' order, with their names there
    "batch_normalization": {
        "scale": "gamma", "bias": "beta", "mean": "moving_mean", "var": "moving_variance",
    },
    "conv2d": {"kernel": "kernel", "bias": "bias"},
    "depthwise_conv2d": {"depthwise_kernel": "depthwise_kernel"},
    "dense": {"dense_kernel": "kernel", "bias": "bias"},
}  # fmt: skip
_VARIANCE = "moving_variance"


def load(source: Any, model: str, chain: Chain, variables: Variables) -> Imported:
    """The variables of a Keras EfficientNetV2, in the layout and the dtypes of `variables`.

    Args:
      source: the path of a .weights.h5, .h5 or .keras file, or a live Keras model. If the network is one of
        the layers of a model, as in Sequential([EfficientNetV2B0, Dropout, Dense]), that layer is taken.
      model: the variant, a key of `models.VARIANTS`.
      chain: a chain of that variant.
      variables: new variables. Their classifier is kept if the source has none, or one with other classes.

    A chain with one channel takes weights for three, as if the grey image were in all three channels. This is
    exact if all channels have the same scaling. With IMAGENET it is exact inside the image; at the border,
    padding with each channel's mean differs from padding with grey 128.

    BadInput names the first variable that is missing, has another shape, is not finite, or is left over.
    """
    source = os.path.expanduser(source) if isinstance(source, str | os.PathLike) else source
    where = f"init_from={source}" if isinstance(source, str) else "the Keras model"
    places = _places(chain, variables)
    with _layers_of(source, where) as stored:
        layers = _by_name(stored, places)
        scaling = _scaling(stored, model)
        classifier = [place for place in places if place.layer == CLASSIFIER]
        classes = _classes(layers.get(CLASSIFIER, ()))
        if _other_classes(layers.get(CLASSIFIER, ()), classifier):
            places = [place for place in places if place not in classifier]
            layers.pop(CLASSIFIER, None)
        if _stem_shapes(layers, places) == (3, 1):
            scaling = _grey(layers, scaling)
        values = [_value(layers, place, where, model) for place in places]
        _refuse_rest(layers, places, where, model)
    units = _by_path(chain, variables)
    for place, value in zip(places, values, strict=True):
        fresh = units[place.unit][place.path]
        units[place.unit][place.path] = jnp.asarray(value.reshape(fresh.shape), fresh.dtype)
    trees: list[Any] = [unflatten_dict(unit) for unit in units]
    params, batch_stats = ([tree.get(part, {}) for tree in trees] for part in ("params", "batch_stats"))
    return Imported(Variables(tuple(params), tuple(batch_stats)), scaling, classes)


def save(path: str, chain: Chain, variables: Variables, scaling: InputScaling = SIGNED) -> None:
    """Writes a .weights.h5 that the same Keras model loads, and that `load` reads again.

    With `scaling` SIGNED, make the Keras model with `include_preprocessing=False`; it takes images in [-1,
    1]. With the others it scales pixels itself. Keras needs a `path` that ends in .weights.h5.
    """
    inside = {IMAGENET: ("rescaling", "normalization"), CENTRED: ("rescaling",), SIGNED: ()}[scaling]
    with h5py.File(os.path.expanduser(path), "w") as file:
        for name in inside:
            file.create_group(f"layers/{name}/vars").attrs["name"] = name
        for place, value in zip(*to_keras(chain, variables), strict=True):
            group = file.require_group(f"layers/{place.group}/vars")
            group.attrs["name"] = place.layer
            group[str(place.position)] = value


def to_keras(chain: Chain, variables: Variables) -> tuple[list[_Place], list[np.ndarray]]:
    """Every variable of a chain in Keras' shape, with its place there, in the order of the network."""
    places = _places(chain, variables)
    units = _by_path(chain, variables)
    return places, [np.asarray(units[place.unit][place.path]).reshape(place.shape) for place in places]


def published_scaling(model: str) -> InputScaling:
    """The scaling that a variant's ImageNet weights were trained with, as Google published them."""
    return IMAGENET if model.removeprefix("efficientnetv2-").startswith("b") else CENTRED


def _by_path(chain, variables) -> list[dict[Any, Any]]:
    """The variables of each unit by path: ("params" or "batch_stats", names of layers, name)."""
    return [flatten_dict(chain.unit_variables(variables, index)) for index in range(len(chain))]


def _places(chain, variables) -> list[_Place]:
    places, numbers = [], {}
    for index, (unit, leaves) in enumerate(zip(chain.units, _by_path(chain, variables), strict=True)):
        prefix = _PREFIXES.get(unit.name, f"{unit.name}_")
        for ours, keras, kind in _LAYERS:
            paths = {path[-1]: path for path in leaves if "/".join(path[1:-1]) == ours}
            if not paths:
                continue
            number = numbers[kind] = numbers.get(kind, -1) + 1
            group = f"{kind}_{number}" if number else kind
            names = [(leaf, name) for leaf, name in _POSITIONS[kind].items() if leaf in paths]
            for position, (leaf, name) in enumerate(names):
                shape = _keras_shape(leaf, kind, leaves[paths[leaf]].shape)
                places.append(_Place(prefix + keras, group, position, name, shape, index, paths[leaf]))
    return places


def _keras_shape(leaf, kind, shape):
    """Keras' shape of a variable. It differs only by axes of length 1, so a reshape converts."""
    if leaf == "depthwise_kernel":
        return (*shape[:2], shape[3], 1)
    return (1, 1, *shape) if kind == "conv2d" and len(shape) == 2 else shape


@contextlib.contextmanager
def _layers_of(source: Any, where: str) -> Iterator[Stored]:
    if isinstance(source, str):
        with opened(source) as stored:
            yield stored
    else:
        yield _of_model(source, where)


def _of_model(model, where):
    arrays = {layer.name: [np.asarray(weight) for weight in layer.weights] for layer in model.layers}
    models = [layer for layer in model.layers if hasattr(layer, "layers")]
    own = {name: values for name, values in arrays.items() if name not in {inner.name for inner in models}}
    inside = [_of_model(inner, where) for inner in models]
    return within(Stored(own, by_class=False, whole_model=True), inside, where)


def _by_name(stored, places) -> dict[str, list[Any]]:
    names = {place.group: place.layer for place in places} if stored.by_class else {}
    return {names.get(name, name): list(arrays) for name, arrays in stored.arrays.items() if arrays}


def _scaling(stored, model):
    """The scaling, by the layers that scale the input. A file with only weights may omit these layers."""
    if any(name.startswith("normalization") for name in stored.arrays):
        return IMAGENET
    if any(name.startswith("rescaling") for name in stored.arrays):
        return CENTRED
    return SIGNED if stored.whole_model else published_scaling(model)


def _classes(arrays):
    """The classes of a classifier; None if there is none, or if it is not a dense layer."""
    return arrays[0].shape[1] if arrays and len(arrays[0].shape) == 2 else None


def _other_classes(arrays, places):
    """Whether a classifier is absent, or differs only in the number of classes."""
    if not arrays:
        return True
    kernel, ours = arrays[0].shape, places[0].shape
    return len(kernel) == 2 and kernel[0] == ours[0] and kernel[1] != ours[1]


def _stem_shapes(layers, places):
    """Channels of the images: (the source's, the chain's)."""
    stored, ours = layers.get("stem_conv", ()), places[0].shape
    return (stored[0].shape[2] if stored and stored[0].ndim == 4 else None, ours[2])


def _grey(layers, scaling):
    """Changes the stem in `layers` to grey images and returns their scaling.

    With grey g, kernels W_c and g / d_c + o_c in channel c, sum_c W_c (g / d_c + o_c) is linear in g. The
    slope gives the kernel. The constant, less the part from the new scaling's offset, moves batch norm's
    mean.
    """
    target = scaling if len(set(zip(*scaling, strict=True))) == 1 else CENTRED
    divisor, offset = target.divisor[0], target.offset[0]
    divisors, offsets = (np.broadcast_to(row, 3)[:, None] for row in scaling)
    kernel = np.asarray(layers["stem_conv"][0], np.float64)
    constant = (kernel * (offsets - offset * divisor / divisors)).sum((0, 1, 2))
    layers["stem_conv"][0] = (kernel * (divisor / divisors)).sum(2, keepdims=True)
    layers["stem_bn"][2] = np.asarray(layers["stem_bn"][2], np.float64) - constant
    return target


def _value(layers, place, where, model):
    arrays = layers.get(place.layer, ())
    variable = f"{place.layer}/{place.name}"
    if len(arrays) <= place.position:
        raise BadInput(f"{where}: holds no {variable}; {model} needs it")
    array = arrays[place.position]
    if array.shape != place.shape:
        raise BadInput(f"{where}: {variable} has shape {array.shape}; {model} needs {place.shape}")
    if array.dtype.kind != "f":
        raise BadInput(f"{where}: {variable} holds {array.dtype}; it must hold floats")
    value = np.asarray(array)
    with np.errstate(over="ignore"):  # a float64 may be too large for float32
        finite = np.isfinite(value.astype(np.float32)).all()
    if not finite:
        raise BadInput(f"{where}: {variable} holds numbers that are not finite")
    if place.name == _VARIANCE and (value < 0).any():
        raise BadInput(f"{where}: {variable} holds negative numbers")
    return value


def _refuse_rest(layers: Mapping[str, Sequence[Any]], places, where, model):
    used = {}
    for place in places:
        used[place.layer] = place.position + 1
    for name, arrays in layers.items():
        if len(arrays) > used.get(name, 0):
            raise BadInput(f"{where}: {name} holds {len(arrays)} variables; {model} has {used.get(name, 0)}")
