"""Finds, decodes and caches image classification sets that TensorFlow Datasets (TFDS) prepared."""

import difflib
import os
import re
import shlex
import sys
from pathlib import Path

import numpy as np

from sfl_jax import paths
from sfl_jax.datasets.arrays import load_folder, load_npz
from sfl_jax.datasets.cache import contents, read_cache, write_cache
from sfl_jax.datasets.dataset import ARRAYS, Dataset
from sfl_jax.datasets.decoding import decode
from sfl_jax.datasets.rows import checked, checksums
from sfl_jax.errors import BadInput

_EMBEDDED = Path(__file__).parent / "data" / "mnist" / "3.0.1"
_NAME = re.compile(r"(?P<name>\w+)(/(?P<config>\w[\w.+-]*))?(:(?P<version>\d+\.\d+\.\d+))?", re.ASCII)
_PATHS = "/", "./", "../", "~"  # how the path of a folder starts
# Well-known sets, with which a misspelt name is compared.
_KNOWN = (
    "mnist", "fashion_mnist", "kmnist", "emnist", "cifar10", "cifar100", "svhn_cropped", "imagenette",
    "tf_flowers", "eurosat", "food101", "stl10",
)  # fmt: skip
_VERSION = re.compile(r"\d+\.\d+\.\d+", re.ASCII)
_CACHED = {
    "train_images": ("uint8", 4),
    "train_labels": ("int32", 1),
    "test_images": ("uint8", 4),
    "test_labels": ("int32", 1),
    "num_classes": ("int64", 0),
    "digest": ("uint8", 1),
    "train_checksums": ("uint32", 1),
    "notes": ("uint8", 1),
}


def load(
    name: str,
    data_dir: str | os.PathLike[str] | None = None,
    in_file: bool = False,
    label_key: str = "",
) -> Dataset:
    """The dataset `name`: a TFDS name, the path of a .npz file (see `load_npz`), or of a folder of pictures.

    A TFDS name is `set`, `set/config`, `set:1.2.3` or `set/config:1.2.3`. For folders see `load_folder`.
    `mnist` without `data_dir` is the copy in this package. Other sets are in `data_dir` (default: TFDS's own,
    `$TFDS_DATA_DIR` or `~/tensorflow_datasets`). TFDS must have prepared them as array_record with a split
    `train` and a split `test` or `validation`. `validation` is also used if the labels of `test` are hidden
    (-1). If there are several class labels, `label_key` names the one to learn; the default is `label`.

    Decoded sets are kept in the user's cache directory. With `in_file` the training images stay in that file
    and are read when used; without a cache they are in memory.

    Raises:
      BadInput: the set is missing, unreadable, damaged, needs TensorFlow to read, is not for image
        classification or has images of several sizes; or a Python module is missing.
    """
    own = _own(name)
    if own and label_key:
        raise BadInput(f"label_key={label_key}: only for TFDS sets; dataset={name} has one label per sample")
    if own:
        return load_npz(own) if name.endswith(".npz") else load_folder(own)
    if name == "mnist" and data_dir is None:
        directory, remedy = _EMBEDDED, "install sfl_jax again"
    else:
        root = _root(name, data_dir)
        directory = _find(name, root, f"prepare it: {_preparing(name, root)}")
        remedy = f"remove {directory} and prepare it again: {_preparing(name, root)}"
    try:
        key = contents(directory)
    except OSError as error:
        raise _unreadable(name, directory, error) from error
    kept = _from_cache(name, directory, key, in_file, label_key)
    if kept is None:
        dataset = Dataset(**decode(name, directory, remedy, label_key)._asdict(), name=name)
        write_cache(directory, key, _kept(dataset), label_key)
        kept = (_from_cache(name, directory, key, in_file, label_key) if in_file else None) or dataset
    return kept


def _preparing(name: str, root: Path) -> str:
    """The command that prepares a set. Only it needs TensorFlow; `tfds build` would also need Apache Beam."""
    python = Path(sys.executable)
    python = shlex.quote(str(python.relative_to(Path.cwd()) if python.is_relative_to(Path.cwd()) else python))
    pins = "-c constraints.txt " if Path("constraints.txt").is_file() else ""
    install = f"{python} -m pip install {pins}tensorflow"
    python = f"TFDS_DATA_DIR={shlex.quote(str(root))} {python}"
    call = f"tfds.builder('{name}', file_format='array_record').download_and_prepare()"
    return f'{install} && {python} -c "import tensorflow_datasets as tfds; {call}"'


def _own(name: str) -> Path | None:
    """The .npz file or folder of pictures that `name` means; None if it is the name of a TFDS set."""
    is_file = name.endswith(".npz")
    if not (is_file or name.startswith(_PATHS)):
        return None
    try:
        path = Path(name).expanduser()
        return path if is_file or path.is_dir() else None
    except OSError as error:
        raise _unreadable(name, Path(name), error) from error
    except RuntimeError as error:
        raise BadInput(f"dataset={name}: this home directory is not known") from error


def _find(name: str, root: Path, remedy: str) -> Path:
    """The prepared directory root/set[/config]/version; the newest version if none is asked for."""
    asked = _NAME.fullmatch(name)
    if name.startswith(_PATHS):
        raise BadInput(f"dataset={name}: no such folder; give a folder of pictures, or a .npz file")
    if asked is None:
        raise BadInput(
            f"dataset={name!r}: must be a TFDS name, such as cifar10, set/config or set:1.2.3, a .npz file, "
            "or a folder of pictures"
        )
    parent = root / asked["name"] / (asked["config"] or "")
    found = {path.parent for path in parent.glob(f"{asked['version'] or '*'}/features.json")}
    found = [path for path in found if _VERSION.fullmatch(path.name)]
    if found:
        return max(found, key=lambda path: [int(number) for number in path.name.split(".")])
    for place in (root, root / asked["name"], parent):
        try:
            os.listdir(place)
        except (FileNotFoundError, NotADirectoryError):
            break
        except OSError as error:
            raise _unreadable(name, place, error) from error
    configs = sorted({path.parts[-3] for path in parent.glob("*/*/features.json")})
    if configs and not asked["config"]:
        raise BadInput(
            f"dataset={name}: {parent} holds configs; choose one of {asked['name']}/{{{','.join(configs)}}}"
        )
    here = f"; write ./{name} for the folder of pictures here" if Path(name).is_dir() else ""
    others = sorted({path.relative_to(root).parts[0] for path in root.glob("*/*/features.json")})
    there = f" ({root} has {', '.join(others[:9])})" if others else ""
    if next(root.glob("*/features.json"), None):
        raise BadInput(f"dataset={name}: {root} is a set itself; give the directory above, {root.parent}")
    meant = difflib.get_close_matches(asked["name"], _KNOWN, 1, 0.8)
    if meant and asked["name"] not in _KNOWN:
        raise BadInput(f"dataset={name}: not found in {parent}{there}; did you mean {meant[0]}?{here}")
    raise BadInput(f"dataset={name}: not found in {parent}{there}; {remedy}{here}")


def _root(name: str, data_dir: str | os.PathLike[str] | None) -> Path:
    """The directory of prepared TFDS sets."""
    place = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    paths.check_path("data_dir", str(place))
    try:
        return Path(place).expanduser()
    except RuntimeError as error:
        raise BadInput(
            f"dataset={name}: no home directory here; set data_dir to the directory of TFDS"
        ) from error


def _unreadable(name: str, place: Path, error: OSError) -> BadInput:
    return BadInput(f"dataset={name}: {error.filename or place} cannot be read ({error.strerror})")


def _kept(dataset: Dataset) -> dict[str, np.ndarray]:
    """The arrays that the cache keeps."""
    return {
        **{key: np.asarray(getattr(dataset, key)) for key in (*ARRAYS, "num_classes")},
        "digest": np.frombuffer(bytes.fromhex(dataset.digest), np.uint8),
        "train_checksums": checksums(dataset.train_images),
        "notes": np.frombuffer("\n".join(dataset.notes).encode(), np.uint8),
    }


def _from_cache(name: str, directory: Path, key: str, in_file: bool, label_key: str) -> Dataset | None:
    kept = read_cache(directory, key, ["train_images"] if in_file else (), label_key)
    if kept is None or {array: (a.dtype.name, a.ndim) for array, a in kept.items()} != _CACHED:
        return None
    pairs = [(f"{split}_images", f"{split}_labels") for split in ("train", "test")]
    if any(len(kept[a]) != len(kept[b]) for a, b in [*pairs, ("train_labels", "train_checksums")]):
        return None
    images, labels, test_images, test_labels = (kept[array] for array in ARRAYS)
    if isinstance(images, np.memmap):
        images = checked(images, kept["train_checksums"])
    classes, same = int(kept["num_classes"]), kept["digest"].tobytes().hex()
    notes = tuple(kept["notes"].tobytes().decode().splitlines())
    try:
        return Dataset(images, labels, test_images, test_labels, classes, name, same, notes)
    except BadInput:
        return None
