"""Reading of image classification sets prepared by TensorFlow Datasets (TFDS), without TensorFlow."""

import io
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32, UInt8

from sfl_jax.datasets.cache import read_cache, write_cache
from sfl_jax.datasets.rows import checked, checksums
from sfl_jax.digests import digest
from sfl_jax.errors import BadInput

_EMBEDDED = Path(__file__).parent / "data" / "mnist" / "3.0.1"
_NAME = re.compile(r"(?P<name>\w+)(/(?P<config>\w[\w.+-]*))?(:(?P<version>\d+\.\d+\.\d+))?", re.ASCII)
_VERSION = re.compile(r"\d+\.\d+\.\d+", re.ASCII)
_CACHED = {
    "train_images": ("uint8", 4),
    "train_labels": ("int32", 1),
    "test_images": ("uint8", 4),
    "test_labels": ("int32", 1),
    "num_classes": ("int64", 0),
    "digest": ("uint8", 1),
    "train_checksums": ("uint32", 1),
}
_ARRAYS = "train_images", "train_labels", "test_images", "test_labels"
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
# Threads pay once decompression, which runs outside Python's lock, outweighs the Python around it.
_BYTES_WORTH_A_THREAD = 4096
_CHUNK = 4096  # records


@dataclass(frozen=True)
class Dataset:
    """Images and labels in memory; images for training may stay in a file, of which `CheckedRows` are read.

    Attributes:
      train_images, test_images: (N, H, W, C) uint8, of one size within and across both splits.
      train_labels, test_labels: (N,) int32 in [0, num_classes).
      num_classes: number of classes.
      name: as asked for.
      digest: of all four arrays, see `digests`; computed where it is not given.
    """

    train_images: UInt8[np.ndarray, "N H W C"]
    train_labels: Int32[np.ndarray, " N"]
    test_images: UInt8[np.ndarray, "M H W C"]
    test_labels: Int32[np.ndarray, " M"]
    num_classes: int
    name: str
    digest: str = ""

    def __post_init__(self) -> None:
        if not self.digest:
            object.__setattr__(self, "digest", digest(getattr(self, name) for name in _ARRAYS))


def load(name: str, data_dir: str | os.PathLike[str] | None = None, in_file: bool = False) -> Dataset:
    """The dataset `name`: `set`, `set/config`, `set:1.2.3` or `set/config:1.2.3`.

    `mnist` without `data_dir` is the copy inside this package. Anything else is looked for in `data_dir`
    (default: TFDS's own, `$TFDS_DATA_DIR` or `~/tensorflow_datasets`), where TFDS must have prepared it as
    array_record with a split `train` and a split `test` or `validation`.

    What was decoded once is kept in the user's cache directory. With `in_file`, images for training stay
    there, and each is read when it is asked for; where there is no cache they are in memory after all.

    Raises:
      BadInput: not there, damaged, in a format that needs TensorFlow, no image classification set, or images
        of several sizes.
    """
    if name == "mnist" and data_dir is None:
        directory, remedy = _EMBEDDED, "install sfl_jax again"
    else:
        root = Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
        command = f"(TensorFlow needed): tfds build {name} --data_dir={root} --file_format=array_record"
        directory = _find(name, root, f"prepare it {command}")
        remedy = f"prepare it again {command} --overwrite"
    kept = _from_cache(name, directory, in_file)
    if kept is None:
        dataset = _decode(name, directory, remedy)
        arrays = {key: np.asarray(getattr(dataset, key)) for key in (*_ARRAYS, "num_classes")}
        arrays["digest"] = np.frombuffer(bytes.fromhex(dataset.digest), np.uint8)
        arrays["train_checksums"] = checksums(dataset.train_images)
        write_cache(directory, arrays)
        kept = (_from_cache(name, directory, in_file) if in_file else None) or dataset
    return kept


def _find(name: str, root: Path, remedy: str) -> Path:
    """The prepared directory root/set[/config]/version; the newest version if none is asked for."""
    asked = _NAME.fullmatch(name)
    if asked is None:
        raise BadInput(f"--dataset={name!r}: must be a TFDS name, such as cifar10, set/config or set:1.2.3")
    parent = root / asked["name"] / (asked["config"] or "")
    found = {path.parent for path in parent.glob(f"{asked['version'] or '*'}/features.json")}
    found = [path for path in found if _VERSION.fullmatch(path.name)]
    if found:
        return max(found, key=lambda path: [int(number) for number in path.name.split(".")])
    configs = sorted({path.parts[-3] for path in parent.glob("*/*/features.json")})
    if configs and not asked["config"]:
        raise BadInput(
            f"--dataset={name}: {parent} holds configs; choose one of {asked['name']}/{{{','.join(configs)}}}"
        )
    raise BadInput(f"--dataset={name}: not found in {parent}; {remedy}")


def _from_cache(name: str, directory: Path, in_file: bool) -> Dataset | None:
    kept = read_cache(directory, ["train_images"] if in_file else ())
    if kept is None or {key: (a.dtype.name, a.ndim) for key, a in kept.items()} != _CACHED:
        return None
    pairs = [(f"{split}_images", f"{split}_labels") for split in ("train", "test")]
    if any(len(kept[a]) != len(kept[b]) for a, b in [*pairs, ("train_labels", "train_checksums")]):
        return None
    images, labels, test_images, test_labels = (kept[key] for key in _ARRAYS)
    if isinstance(images, np.memmap):
        images = checked(images, kept["train_checksums"])
    same = kept["digest"].tobytes().hex()
    return Dataset(images, labels, test_images, test_labels, int(kept["num_classes"]), name, same)


def _decode(name: str, directory: Path, remedy: str) -> Dataset:
    import tensorflow_datasets as tfds  # a second of import that a cached dataset does not need

    place = f"--dataset={name}: {directory}"
    try:
        builder: Any = tfds.builder_from_directory(directory)
        examples = {split: info.num_examples for split, info in builder.info.splits.items()}
        formats = sorted(file_format.value for file_format in builder.info.available_file_formats())
        features = dict(builder.info.features.items())
    except Exception as error:
        raise BadInput(f"{place} is damaged ({_reason(error)}); {remedy}") from error
    if "array_record" not in formats:
        raise BadInput(f"{place} is {'/'.join(formats)}, which only TensorFlow can read; {remedy}")
    test = "test" if examples.get("test") else "validation"
    if not examples.get("train") or not examples.get(test):
        raise BadInput(f"{place} has the splits {sorted(examples)}; needs train, and test or validation")
    images = [key for key, feature in features.items() if isinstance(feature, tfds.features.Image)]
    labels = [key for key, feature in features.items() if isinstance(feature, tfds.features.ClassLabel)]
    if len(images) != 1 or len(labels) != 1 or features[images[0]].np_dtype != np.uint8:
        raise BadInput(
            f"{place} has the features {sorted(features)}; needs one uint8 image and one class label"
        )

    num_classes, channels = features[labels[0]].num_classes, features[images[0]].shape[-1]
    splits = []
    for split in ("train", test):
        try:
            source = builder.as_data_source(split, decoders={images[0]: tfds.decode.SkipDecoding()})
            splits += _read(source, images[0], labels[0], channels)
        except _UnequalSizes as error:
            raise BadInput(
                f"{place}: images of {error}; prepare a copy in which all have one size"
            ) from error
        except Exception as error:
            raise BadInput(f"{place}: split {split} is damaged ({_reason(error)}); {remedy}") from error
        if splits[-1].min() < 0 or splits[-1].max() >= num_classes:
            raise BadInput(
                f"{place}: split {split} has labels outside 0..{num_classes - 1}; needs every label"
            )
    if splits[0].shape[1:] != splits[2].shape[1:]:
        sizes = f"{splits[0].shape[1:]} and {splits[2].shape[1:]}"
        raise BadInput(f"{place}: images of {sizes}; prepare a copy in which all have one size")
    return Dataset(*splits, num_classes=num_classes, name=name)


def _read(source: Any, image: str, label: str, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Pictures (N, H, W, C) and labels (N,) of a split; what is still compressed is held in small chunks."""
    count = len(source)
    first = source[0][image]
    shape = _picture(first, channels).shape
    pictures, labels = np.empty((count, *shape), np.uint8), np.empty(count, np.int32)
    with ThreadPoolExecutor() as pool:
        each = pool.map if len(first) >= _BYTES_WORTH_A_THREAD else map
        for start in range(0, count, _CHUNK):
            records = source.__getitems__(range(start, min(start + _CHUNK, count)))
            labels[start : start + len(records)] = [record[label] for record in records]
            decoded = each(_picture, [record[image] for record in records], [channels] * len(records))
            for i, picture in enumerate(decoded, start):
                if picture.shape != shape:
                    raise _UnequalSizes(f"{shape} and {picture.shape}")
                pictures[i] = picture
    return pictures, labels


def _picture(encoded: bytes, channels: int) -> np.ndarray:
    from PIL import Image

    with Image.open(io.BytesIO(encoded)) as image:
        array = np.asarray(image if image.mode == _MODES[channels] else image.convert(_MODES[channels]))
    return array.reshape(*array.shape[:2], channels)


class _UnequalSizes(ValueError):
    """Two images differ in size; the message is both shapes."""


def _reason(error: Exception) -> str:
    """One line of an error that may have many or none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
