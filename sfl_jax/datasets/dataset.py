"""A data set in memory: training samples and test samples."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32, Shaped

from sfl_jax.digests import digest
from sfl_jax.errors import BadInput

ARRAYS = "train_images", "train_labels", "test_images", "test_labels"
MOST_AXES = 3  # of tokens; integers with more axes are pictures with an unknown range


@dataclass(frozen=True)
class Dataset:
    """Images or other samples, and labels. Training images may stay in a file, see `CheckedRows`.

    Attributes:
      train_images, test_images: (N, ...), with one type and sample shape: uint8 pixels, floats, or int32
        tokens. Images are (N, H, W, C). There may be no test images.
      train_labels, test_labels: (N,) int32 in [0, num_classes).
      num_classes: number of classes.
      name: the name that the user gave.
      digest: of all four arrays, see `digests`; computed if it is "".
      notes: lines that say what was chosen if a set has alternatives.
      splits: the indices of each client's training samples, if the data are already divided.

    Raises:
      BadInput: arrays with other types or shapes, or labels outside the classes.
    """

    train_images: Shaped[np.ndarray, "N ..."]
    train_labels: Int32[np.ndarray, " N"]
    test_images: Shaped[np.ndarray, "M ..."]
    test_labels: Int32[np.ndarray, " M"]
    num_classes: int
    name: str
    digest: str = ""
    notes: tuple[str, ...] = ()
    splits: tuple[np.ndarray, ...] = ()

    def __post_init__(self) -> None:
        for split in ("train", "test"):
            images, labels = (getattr(self, f"{split}_{what}") for what in ("images", "labels"))
            check(f"dataset {self.name}: {split}", images, labels, self.num_classes, int(split == "train"))
        if self.train_images.shape[1:] != self.test_images.shape[1:]:
            shapes = f"{self.train_images.shape[1:]} and {self.test_images.shape[1:]}"
            raise BadInput(f"dataset {self.name}: images of {shapes}; must be of one size")
        if self.train_images.dtype != self.test_images.dtype:
            types = f"{self.train_images.dtype} and {self.test_images.dtype}"
            raise BadInput(f"dataset {self.name}: images of {types}; must be of one type")
        if not self.digest:
            object.__setattr__(self, "digest", digest(getattr(self, name) for name in ARRAYS))


def is_float(dtype: np.dtype) -> bool:
    """Whether JAX computes with this type of float. NumPy does not count bfloat16 as a float."""
    return dtype.name == "bfloat16" or (np.issubdtype(dtype, np.floating) and dtype.itemsize <= 8)


def check(place: str, images: np.ndarray, labels: np.ndarray, num_classes: int, least: int = 1) -> None:
    """Refuses images and labels with types, shapes or values that training cannot use."""
    is_tokens = images.dtype == np.int32 and images.ndim <= MOST_AXES
    if images.dtype != np.uint8 and not is_float(images.dtype) and not is_tokens:
        allowed = "must be uint8 (0 to 255), floats, or integer tokens (N, T)"
        raise BadInput(f"{place}: images of {images.dtype} {images.shape}; {allowed}")
    if images.ndim < 2 or len(images) < least:
        raise BadInput(f"{place}: images of shape {images.shape}; must be (N, ...), N at least {least}")
    if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        found = f"labels of {labels.dtype} {labels.shape}"
        raise BadInput(f"{place}: {found}; must be integers, one for each of {len(images)} images")
    if len(labels) and (labels.min() < 0 or labels.max() >= num_classes):
        raise BadInput(f"{place}: labels {labels.min()} to {labels.max()}; must be 0 to {num_classes - 1}")
