"""Your own data: arrays, a .npz file of arrays, or folders of images."""

import os
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sfl_jax.datasets.dataset import MOST_AXES, Dataset, check, is_float
from sfl_jax.datasets.pictures import Unusable, picture, without_warnings
from sfl_jax.errors import BadInput

TEST_SHARE = 0.1  # part of the samples that is held out if there are no test samples
_SEED = 0
# Common names of arrays, those of Keras first: training images and labels, then test images and labels.
_NAMES = (
    ("x_train", "y_train", "x_test", "y_test"),
    ("train_images", "train_labels", "test_images", "test_labels"),
    ("images", "labels", "test_images", "test_labels"),
    ("x", "y", "x_test", "y_test"),
)
# NumPy's errors for files that are missing, damaged, pickled, encrypted or in an unknown compression.
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
      x_train, x_test: samples of any shape (N, ...). uint8 are pixels, which a run scales to -1..1; with
        shape (N, H, W) they are grey images and get a channel axis. Floats, also bfloat16, are not scaled.
        Other integers are tokens (N, T) or, if signed, (N, T, F), and become int32.
      y_train, y_test: labels (N,), integers from 0.
      num_classes: the number of classes; None: the largest label + 1.
      splits: the indices of each client's training samples.
      test_share: without x_test, the part of the samples that is held out for tests; 0: no tests.

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
            raise BadInput("splits: needs x_test and y_test, or test_share=0, since splits index x_train")
        images, labels, test_images, test_labels, notes = held_out_of(images, labels, test_share)
    return Dataset(
        images, labels.astype(np.int32), test_images, test_labels.astype(np.int32), classes, name,
        notes=notes, splits=check_splits("splits", () if splits is None else splits, len(labels)),
    )  # fmt: skip


def load_npz(path: Path) -> Dataset:
    """The arrays of a .npz file: x_train, y_train and, if present, x_test, y_test; or other common names."""
    place = f"dataset={path}"
    try:
        loaded = np.load(path, allow_pickle=False)
        if not isinstance(loaded, np.lib.npyio.NpzFile):
            raise ValueError("a single array, as np.save writes")
        with loaded as file:
            there = file.files
            names = next((each for each in _NAMES if {*each[:2]} <= {*there}), ())
            given = [file[name] if name in there else None for name in names]
    except FileNotFoundError as error:
        raise BadInput(f"{place}: no such file") from error
    except _UNREADABLE as error:
        raise BadInput(f"{place}: cannot be read as a .npz file of numbers ({_line(error)})") from error
    if not given:
        raise BadInput(f"{place}: has the arrays {', '.join(there)}; needs x_train and y_train, the labels")
    try:
        return from_arrays(*given, name=str(path))
    except BadInput as error:
        raise BadInput(f"{place}: {error}") from error


def load_folder(path: Path) -> Dataset:
    """Pictures in folders: path/train/CLASS/*.png and path/test/CLASS/*.png, or only path/CLASS/*.png.

    BadInput names a file or folder that cannot be used.
    """
    try:
        return _of_folder(path)
    except OSError as error:
        place = error.filename or path
        raise BadInput(
            f"dataset={path}: {place} cannot be read ({error.strerror or _line(error)})"
        ) from error


def _of_folder(path):
    place, children = f"dataset={path}", _folders(path, path)
    tested = next((children[name] for name in ("test", "validation", "val") if name in children), None)
    trained = children.get("train", path)
    if trained == path and tested is not None:
        raise BadInput(f"{place}: has a folder {tested.name} but no folder train")
    classes = sorted(_folders(path, trained))
    if not classes:
        raise BadInput(f"{place}: needs a folder of pictures for each class, and has none")
    if tested is not None and (unknown := sorted(_folders(path, tested).keys() - {*classes})):
        raise BadInput(f"{place}: {tested.name} has the class {unknown[0]}; {trained.name} must have it too")
    given = [*_read(path, trained, classes), *(_read(path, tested, classes) if tested else ())]
    data = from_arrays(*given, num_classes=len(classes), name=str(path))
    shown = f"{', '.join(classes[:5])}{', …' if len(classes) > 5 else ''}"
    object.__setattr__(data, "notes", (*data.notes, f"{len(classes)} classes: {shown}"))
    return data


def _inside(root, folder):
    """The content of a folder without hidden files. BadInput for a broken link."""
    inside = sorted(one for one in folder.iterdir() if not one.name.startswith("."))
    for one in inside:
        if one.is_symlink() and not one.exists():
            raise BadInput(
                f"dataset={root}: {one.relative_to(root)} is a link to {os.readlink(one)}, which is missing"
            )
    return inside


def _folders(root, folder):
    """The folders in a folder, by name."""
    return {one.name: one for one in _inside(root, folder) if one.is_dir()}


def _read(root, folder, classes):
    """(pictures, labels) of the folders of classes, in the order of their names."""
    found: list[np.ndarray] = []
    labels: list[int] = []
    endings = ", ".join(sorted(_PICTURES))
    there = _folders(root, folder)
    for label, name in enumerate(classes):
        if name not in there:
            continue  # test samples need not have every class
        files = [one for one in _inside(root, there[name]) if one.suffix.lower() in _PICTURES]
        if not files:
            where = there[name].relative_to(root)
            raise BadInput(
                f"dataset={root}: no pictures in {where}; add some ({endings}) or remove the folder"
            )
        for file in files:
            found.append(_pixels(root, file))
            if found[-1].shape != found[0].shape:
                shapes = f"shape {found[-1].shape}, but others have {found[0].shape}"
                raise BadInput(
                    f"dataset={root}: {file.relative_to(root)}: {shapes}; make copies with one shape"
                )
            labels.append(label)
    if not found:
        raise BadInput(f"dataset={root}: no pictures in {folder.name}; add some ({endings})")
    return np.stack(found), np.array(labels, np.int32)


def _pixels(root, file):
    """The pixels of a file. Pillow raises many kinds of errors for a damaged picture."""
    try:
        with without_warnings():
            return picture(file.read_bytes(), None)
    except MemoryError:
        raise
    except Exception as error:
        said = _line(error)
        if not isinstance(error, Unusable):
            reason = "Pillow does not know its format" if "cannot identify" in said else said
            said = f"cannot be read as a picture ({reason}); repair or remove it"
        raise BadInput(f"dataset={root}: {file.relative_to(root)}: {said}") from error


def _array(argument, given) -> np.ndarray:
    """The argument as a NumPy array. BadInput for ragged lists, and tensors with gradients or on a device."""
    try:
        return np.asarray(given)
    except (ValueError, TypeError, RuntimeError) as error:
        raise BadInput(f"{argument}: NumPy cannot convert it to an array ({_line(error)})") from error


def _samples(argument, given):
    array = _taken(_array(argument, given))
    if array.dtype == np.uint8 and array.ndim == 3:
        array = array[..., None]
    if array.ndim < 2:
        raise BadInput(f"{argument}: of shape {array.shape}; must be (N, ...), one row per sample")
    if array.dtype == np.dtype("V2"):
        raise BadInput(f"{argument}: of {array.dtype}; NumPy files lose bfloat16: save it as float32")
    if is_float(array.dtype) and not np.isfinite(array).all():
        raise BadInput(f"{argument}: has numbers that are not finite")
    return array


def _taken(array: np.ndarray) -> np.ndarray:
    """Tokens as int32, everything else unchanged. `check` refuses other integers later."""
    most_axes = {"i": MOST_AXES, "u": 2}.get(array.dtype.kind, 0)  # unsigned integers with more are pictures
    if array.dtype == np.uint8 or array.ndim > most_axes:
        return array
    limits = np.iinfo(np.int32)
    fits = not array.size or (array.min() >= limits.min and array.max() <= limits.max)
    return array.astype(np.int32, copy=False) if fits else array


def as_stored(argument: str, given: Any, stored: np.ndarray) -> np.ndarray:
    """Samples (N, ...) converted as `from_arrays` does, for a network that learnt from `stored` samples.

    BadInput if their type or shape differs.
    """
    array, shape = _taken(_array(argument, given)), stored.shape[1:]
    if array.dtype == np.uint8 and (*array.shape[1:], 1) == shape:
        array = array[..., None]
    if array.shape[1:] != shape or not len(array):
        raise BadInput(f"{argument}: of shape {array.shape}; must be (N, {', '.join(map(str, shape))})")
    if array.dtype != stored.dtype:
        raise BadInput(f"{argument}: of {array.dtype}; must be {stored.dtype}")
    return array


def _labels(argument, given):
    array = _array(argument, given)
    if array.ndim == 2 and array.shape[1] == 1:  # Keras' CIFAR labels
        array = array[:, 0]
    if array.ndim == 2:
        raise BadInput(
            f"{argument}: of shape {array.shape}; must be (N,), one class number per sample: give one "
            f"column, such as {argument}[:, 0], or {argument}.argmax(1) if a row has a 1 at its class"
        )
    if array.ndim != 1:
        raise BadInput(f"{argument}: of shape {array.shape}; must be (N,), one class number per sample")
    if not np.issubdtype(array.dtype, np.integer):
        raise BadInput(f"{argument}: of {array.dtype}; must be integers from 0")
    return array


def held_out_of(images: Any, labels: Any, share: float) -> tuple[Any, Any, Any, Any, tuple[str, ...]]:
    """(images, labels, test images, test labels, notes). Holds out the same part `share` every time."""
    if not 0 <= share < 1:
        raise BadInput(f"test_share={share}: must be at least 0 and below 1")
    order = np.random.default_rng(_SEED).permutation(len(labels))
    count = min(round(share * len(labels)), len(labels) - 1)
    tested, kept = np.sort(order[:count]), np.sort(order[count:])
    note = (f"no samples to test on: {count} of {len(labels)} are held out",) if count else ()
    return images[kept], labels[kept], images[tested], labels[tested], note


def check_splits(argument: str, splits: Sequence[Any] | np.ndarray, samples: int) -> tuple[np.ndarray, ...]:
    """The indices of each client's samples as arrays. BadInput for shared samples or wrong indices."""
    owned = np.zeros(samples, bool)
    indices = tuple(_array(f"{argument}[{client}]", split) for client, split in enumerate(splits))
    for client, own in enumerate(indices):
        where = f"{argument}[{client}]"
        if own.ndim != 1 or not len(own) or not np.issubdtype(own.dtype, np.integer):
            raise BadInput(f"{where}: must be integers (n,), the indices of at least one sample")
        if own.min() < 0 or own.max() >= samples:
            raise BadInput(f"{where}: indices {own.min()} to {own.max()}; must be 0 to {samples - 1}")
        if owned[own].any() or len(np.unique(own)) < len(own):
            raise BadInput(f"{where}: has a sample twice, or a sample of another client")
        owned[own] = True
    return indices


def _line(error) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
