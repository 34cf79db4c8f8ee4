"""Reads images and labels of a set that TensorFlow Datasets (TFDS) prepared, without TensorFlow."""

import errno
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
from jaxtyping import Int32, UInt8

from sfl_jax.datasets.arrays import TEST_SHARE, held_out_of
from sfl_jax.datasets.pictures import Unusable, picture
from sfl_jax.errors import BadInput

# Decompression releases Python's lock. From this size on it outweighs the Python around it, and threads help.
_BYTES_WORTH_A_THREAD = 4096
_CHUNK = 4096  # records
_PACKAGES = {"tensorflow_datasets": "tensorflow-datasets", "PIL": "pillow", "google": "protobuf"}


class Decoded(NamedTuple):
    """The content of a prepared set. notes: lines that say what was chosen."""

    train_images: UInt8[np.ndarray, "N H W C"]
    train_labels: Int32[np.ndarray, " N"]
    test_images: UInt8[np.ndarray, "M H W C"]
    test_labels: Int32[np.ndarray, " M"]
    num_classes: int
    notes: tuple[str, ...]


class _Source(NamedTuple):
    """Where to read, and what to name in a refusal."""

    builder: Any
    place: str
    remedy: str
    image: str
    label: str
    channels: int | None
    num_classes: int


def decode(name: str, directory: Path, remedy: str, label_key: str = "") -> Decoded:
    """The splits `train` and `test` (or `validation`) of a set; see `load`.

    Raises:
      BadInput: the set is damaged, needs TensorFlow to read, is not for image classification, has images of
        several sizes or hidden labels; or a Python module is missing.
    """
    place = f"dataset={name}: {directory}"
    try:
        import tensorflow_datasets as tfds  # imported here: it takes a second, and the cache does not need it

        builder: Any = tfds.builder_from_directory(directory)
        examples = {split: info.num_examples for split, info in builder.info.splits.items()}
        formats = sorted(file_format.value for file_format in builder.info.available_file_formats())
        features = dict(builder.info.features.items())
    except Exception as error:
        _refuse(place, error, remedy)
    if "array_record" not in formats:
        raise BadInput(f"{place} is {'/'.join(formats)}, which only TensorFlow can read; {remedy}")
    held_out = [split for split in ("test", "validation") if examples.get(split)]
    if not examples.get("train"):
        raise BadInput(f"{place} has the splits {sorted(examples)}; needs train")
    images = [key for key, feature in features.items() if isinstance(feature, tfds.features.Image)]
    labels = sorted(key for key, f in features.items() if isinstance(f, tfds.features.ClassLabel))
    if len(images) != 1 or not labels or features[images[0]].np_dtype != np.uint8:
        raise BadInput(
            f"{place} has the features {_described(features)}; needs one uint8 image, and a class label"
        )
    label = _chosen(place, labels, label_key)
    notes = [f"labels: {label}, of {', '.join(labels)} (label_key)"] if len(labels) > 1 else []
    source = _Source(
        builder, place, remedy, images[0], label, features[images[0]].shape[-1], features[label].num_classes
    )

    images, labels = _labelled(source, ["train"], notes)
    if not held_out:
        images, labels, test_images, test_labels, said = held_out_of(images, labels, TEST_SHARE)
        notes += said
    else:
        test_images, test_labels = _labelled(source, held_out, notes)
    if images.shape[1:] != test_images.shape[1:]:
        raise _unequal(source, images.shape[1:], test_images.shape[1:])
    return Decoded(images, labels, test_images, test_labels, source.num_classes, tuple(notes))


def _chosen(place: str, labels: list[str], asked: str) -> str:
    """The class label to learn: the one asked for, the only one, or the one named "label"."""
    if asked and asked not in labels:
        raise BadInput(f"label_key={asked}: must be one of {', '.join(labels)}, the class labels of {place}")
    if not asked and len(labels) > 1 and "label" not in labels:
        raise BadInput(f"{place} has the class labels {', '.join(labels)}; choose one with label_key")
    return asked or ("label" if "label" in labels else labels[0])


def _labelled(source: _Source, splits: list[str], notes: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """The first of these splits with visible labels. Adds a line to `notes` for each with hidden ones."""
    split, *others = splits
    images, labels = _read(source, split)
    if labels.min() >= 0 and labels.max() < source.num_classes:
        return images, labels
    if labels.min() >= 0 or not others:
        classes = f"0..{source.num_classes - 1}"
        raise BadInput(f"{source.place}: split {split} has labels outside {classes}; every image needs one")
    notes.append(f"labels of split {split} are hidden; tests use {others[0]}")
    return _labelled(source, others, notes)


def _read(source: _Source, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Pictures (N, H, W, C) and labels (N,) of a split. Reads compressed pictures in small chunks."""
    import tensorflow_datasets as tfds

    try:
        encoded = {source.image: tfds.decode.SkipDecoding()}
        records = source.builder.as_data_source(split, decoders=encoded)
        count = len(records)
        labels = np.empty(count, np.int32)
        decoded = _pictures(source, records, labels)
        first = next(decoded)
        pictures = np.empty((count, *first.shape), np.uint8)
        pictures[0] = first
        for i, one in enumerate(decoded, 1):
            if one.shape != first.shape:
                raise _unequal(source, first.shape, one.shape)
            pictures[i] = one
    except BadInput:
        raise
    except Unusable as error:
        raise BadInput(f"{source.place}: split {split} has {error}") from error
    except Exception as error:
        _refuse(f"{source.place}: split {split}", error, source.remedy)
    return pictures, labels


def _pictures(source: _Source, records: Any, labels: np.ndarray) -> Iterator[np.ndarray]:
    """Yields the decoded pictures in order, and fills in their labels."""
    with ThreadPoolExecutor() as pool:
        each = pool.map if len(records[0][source.image]) >= _BYTES_WORTH_A_THREAD else map
        for start in range(0, len(records), _CHUNK):
            chunk = records.__getitems__(range(start, min(start + _CHUNK, len(records))))
            labels[start : start + len(chunk)] = [record[source.label] for record in chunk]
            encoded = [record[source.image] for record in chunk]
            yield from each(picture, encoded, [source.channels] * len(chunk))


def _unequal(source: _Source, one: tuple[int, ...], other: tuple[int, ...]) -> BadInput:
    return BadInput(f"{source.place}: images of {one} and {other}; prepare a copy with one size")


def _described(features: Mapping[str, Any]) -> str:
    kinds = {key: type(feature).__name__ for key, feature in sorted(features.items())}
    return ", ".join(
        f"{key} ({np.dtype(features[key].np_dtype).name} {kind})" if kind == "Image" else f"{key} ({kind})"
        for key, kind in kinds.items()
    )


def _refuse(place: str, error: Exception, remedy: str) -> NoReturn:
    """Raises BadInput that says whether a module is missing, the system refuses, or data are damaged."""
    if isinstance(error, MemoryError):
        raise error
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ImportError):
        cause = cause.__cause__ or cause.__context__
    if isinstance(cause, ModuleNotFoundError) and cause.name:
        module = cause.name.split(".")[0]
        package = _PACKAGES.get(module, module)
        raise BadInput(f"{place}: reading it needs the module {module}: pip install {package}") from error
    if cause is not None:
        raise BadInput(f"{place}: a module that reads it does not load ({_reason(cause)})") from error
    if isinstance(error, OSError) and error.errno not in (None, errno.ENOENT):
        raise BadInput(f"{place}: cannot be read ({_reason(error)})") from error
    raise BadInput(f"{place} is damaged ({_reason(error)}); {remedy}") from error


def _reason(error: BaseException) -> str:
    """The first line of an error, or its type if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
