"""Data of your own: arrays, a .npz file of arrays, and folders of images."""

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sfl_jax.datasets.dataset import Dataset, check
from sfl_jax.datasets.pictures import Unusable, picture
from sfl_jax.errors import BadInput

TEST_SHARE = 0.1  # of the samples, where nothing else says what to test on
_SEED = 0
# Names that others give their arrays, those of Keras first: images and labels to train on, then to test on.
_NAMES = (
    ("x_train", "y_train", "x_test", "y_test"),
    ("train_images", "train_labels", "test_images", "test_labels"),
    ("images", "labels", "test_images", "test_labels"),
    ("x", "y", "x_test", "y_test"),
)
# What NumPy raises for files that are missing, damaged, pickled, encrypted or compressed as it cannot read.
_UNREADABLE = OSError, ValueError, EOFError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error
_PICTURES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"}


def from_arrays(
    x_train: Any,
    y_train: Any,
    x_test: Any = None,
    y_test: Any = None,
    *,
    num_classes: int | None = None,
    splits: Sequence[Any] | np.ndarray | None = None,
    test_share: float = TEST_SHARE,
    name: str = "arrays",
) -> Dataset:
    """A data set of arrays.

    Args:
      x_train, x_test: samples of any shape (N, ...): uint8, which is scaled to -1..1, or floats, which are
        taken as they are. Images without channels (N, H, W) get one.
      y_train, y_test: labels (N,), integers from 0 on.
      num_classes: as many as the largest label says, if left out.
      splits: the indices of each client's training samples.
      test_share: where there is no x_test, the part of the samples that is drawn to test on; 0 tests nothing.

    Raises:
      BadInput: a line that names the argument, its value and the rule.
    """
    if (x_test is None) != (y_test is None):
        raise BadInput("x_test, y_test: one of them is missing")
    images, labels = _samples("x_train", x_train), _labels("y_train", y_train)
    has_tests, notes = x_test is not None, ()
    test_images = _samples("x_test", x_test) if has_tests else images[:0]
    test_labels = _labels("y_test", y_test) if has_tests else labels[:0]
    largest = max(int(part.max()) if len(part) else -1 for part in (labels, test_labels))
    classes = largest + 1 if num_classes is None else num_classes
    check("x_train, y_train", images, labels, classes)
    check("x_test, y_test", test_images, test_labels, classes, least=0)
    if not has_tests and test_share:
        if splits is not None and len(splits):
            raise BadInput("splits: need x_test and y_test, or test_share=0: their indices are of x_train")
        images, labels, test_images, test_labels, notes = held_out_of(images, labels, test_share)
    return Dataset(
        images, labels.astype(np.int32), test_images, test_labels.astype(np.int32), classes, name,
        notes=notes, splits=check_splits("splits", () if splits is None else splits, len(labels)),
    )  # fmt: skip


def load_npz(path: Path) -> Dataset:
    """The arrays of a .npz file: x_train, y_train, and x_test, y_test if they are there, or names alike."""
    place = f"dataset={path}"
    try:
        loaded = np.load(path, allow_pickle=False)
        if not isinstance(loaded, np.lib.npyio.NpzFile):
            raise ValueError("it is a single array, as of np.save")
        with loaded as file:
            there = file.files
            names = next((each for each in _NAMES if {*each[:2]} <= {*there}), ())
            given = [file[name] if name in there else None for name in names]
    except _UNREADABLE as error:
        raise BadInput(f"{place}: cannot be read as a .npz file of numbers ({_line(error)})") from error
    if not given:
        raise BadInput(f"{place}: has the arrays {', '.join(there)}; needs x_train and y_train")
    try:
        return from_arrays(*given, name=str(path))
    except BadInput as error:
        raise BadInput(f"{place}: {error}") from error


def load_folder(path: Path) -> Dataset:
    """Pictures in folders: path/train/CLASS/*.png and path/test/CLASS/*.png, or path/CLASS/*.png alone."""
    place, children = f"dataset={path}", _folders(path)
    tested = next((children[name] for name in ("test", "validation", "val") if name in children), None)
    trained = children.get("train", path)
    if trained == path and tested is not None:
        raise BadInput(f"{place}: has no folder train beside {tested.name}")
    classes = sorted(_folders(trained))
    if not classes:
        raise BadInput(f"{place}: has no folders of pictures, one for each class")
    if tested is not None and (unknown := sorted(_folders(tested).keys() - {*classes})):
        raise BadInput(
            f"{place}: {tested.name} has the class {unknown[0]}; {trained.name} has none of this name"
        )
    given = [*_read(place, trained, classes), *(_read(place, tested, classes) if tested else ())]
    data = from_arrays(*given, num_classes=len(classes), name=str(path))
    shown = f"{', '.join(classes[:5])}{', …' if len(classes) > 5 else ''}"
    object.__setattr__(data, "notes", (*data.notes, f"{len(classes)} classes: {shown}"))
    return data


def _folders(path):
    """The folders in a folder by name, without hidden ones."""
    return {one.name: one for one in path.iterdir() if one.is_dir() and not one.name.startswith(".")}


def _read(place, folder, classes):
    """(pictures, labels) of the folders of classes, in the order of their names."""
    found: list[np.ndarray] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        files = sorted(one for one in (folder / name).glob("*") if one.suffix.lower() in _PICTURES)
        for file in files:
            try:
                found.append(picture(file.read_bytes(), None))
            except (Unusable, OSError) as error:
                raise BadInput(f"{place}: {name}/{file.name}: {_line(error)}") from error
            if found[-1].shape != found[0].shape:
                shapes = f"{found[0].shape} and {found[-1].shape}"
                raise BadInput(f"{place}: pictures of {shapes}; make copies of one size and kind")
            labels.append(label)
    if not found:
        raise BadInput(f"{place}: no pictures in {folder.name}; they end in {', '.join(sorted(_PICTURES))}")
    return np.stack(found), np.array(labels, np.int32)


def _array(argument, given) -> np.ndarray:
    """The argument as NumPy takes it: not so ragged lists, or tensors with gradients or on another device."""
    try:
        return np.asarray(given)
    except (ValueError, TypeError, RuntimeError) as error:
        raise BadInput(f"{argument}: NumPy cannot take it as an array ({_line(error)})") from error


def _samples(argument, given):
    array = _array(argument, given)
    if array.ndim == 3:
        array = array[..., None]
    if array.ndim < 2:
        raise BadInput(f"{argument}: of shape {array.shape}; must be (N, ...), one row a sample")
    if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
        raise BadInput(f"{argument}: has numbers that are not finite")
    return array


def _labels(argument, given):
    array = _array(argument, given)
    if array.ndim == 2 and array.shape[1] == 1:  # as Keras has those of CIFAR
        array = array[:, 0]
    if array.ndim != 1:
        raise BadInput(f"{argument}: of shape {array.shape}; must be (N,), a class number a sample")
    if not np.issubdtype(array.dtype, np.integer):
        raise BadInput(f"{argument}: of {array.dtype}; must be integers from 0 on")
    return array


def held_out_of(images: Any, labels: Any, share: float) -> tuple[Any, Any, Any, Any, tuple[str, ...]]:
    """(images, labels, images and labels to test on, a line about it): a part is drawn, always the same."""
    if not 0 <= share < 1:
        raise BadInput(f"test_share={share}: must be at least 0 and below 1")
    order = np.random.default_rng(_SEED).permutation(len(labels))
    count = min(round(share * len(labels)), len(labels) - 1)
    tested, kept = np.sort(order[:count]), np.sort(order[count:])
    note = (f"no samples to test on: {count} of {len(labels)} are held out",) if count else ()
    return images[kept], labels[kept], images[tested], labels[tested], note


def check_splits(argument: str, splits: Sequence[Any] | np.ndarray, samples: int) -> tuple[np.ndarray, ...]:
    """The indices of each client's samples as arrays. BadInput where two share one, or there is none such."""
    owned = np.zeros(samples, bool)
    indices = tuple(_array(f"{argument}[{client}]", split) for client, split in enumerate(splits))
    for client, own in enumerate(indices):
        where = f"{argument}[{client}]"
        if own.ndim != 1 or not len(own) or not np.issubdtype(own.dtype, np.integer):
            raise BadInput(f"{where}: must be integers (n,), the indices of at least one sample")
        if own.min() < 0 or own.max() >= samples:
            raise BadInput(f"{where}: indices {own.min()} to {own.max()}; must be 0 to {samples - 1}")
        if owned[own].any() or len(np.unique(own)) < len(own):
            raise BadInput(f"{where}: has a sample twice, or one that another client has")
        owned[own] = True
    return indices


def _line(error) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
