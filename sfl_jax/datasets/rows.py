"""Images that stay in their file, of which each is read when it is asked for."""

import zlib
from typing import Any

import numpy as np
from jaxtyping import UInt8, UInt32

from sfl_jax.errors import BadInput


# Types of newer NumPy give `__module__` a constant, which a subclass cannot have.
class CheckedRows(np.memmap):  # pyright: ignore[reportIncompatibleVariableOverride]
    """A mapped array that is indexed along its first axis. Only those rows are read and held against
    their checksums; BadInput where one differs.
    """

    checksums: UInt32[np.ndarray, " N"]

    def __getitem__(self, rows: Any) -> np.ndarray:
        found = np.asarray(self)[rows]
        if not np.array_equal(checksums(found.reshape(-1, *self.shape[1:])), np.ravel(self.checksums[rows])):
            raise BadInput(f"{self.filename}: what it keeps of the dataset is damaged; remove it")
        return found


def checked(mapped: np.memmap, own: UInt32[np.ndarray, " N"]) -> CheckedRows:
    """`mapped`, whose rows have these checksums."""
    rows = mapped.view(CheckedRows)
    rows.checksums = own
    return rows


def checksums(images: UInt8[np.ndarray, "N *row"]) -> UInt32[np.ndarray, " N"]:
    """CRC-32 of every row."""
    return np.fromiter((zlib.crc32(np.ascontiguousarray(row).data) for row in images), np.uint32, len(images))
