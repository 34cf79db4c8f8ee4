"""Images that stay in their file; each is read when it is used."""

import zlib
from typing import Any

import numpy as np
from jaxtyping import UInt8, UInt32

from sfl_jax.errors import BadInput


# Newer NumPy's types make `__module__` a constant, which a subclass cannot have.
class CheckedRows(np.memmap):  # pyright: ignore[reportIncompatibleVariableOverride]
    """A mapped array, indexed along its first axis. Reads only the indexed rows and compares their checksums;
    BadInput if one differs.
    """

    checksums: UInt32[np.ndarray, " N"]

    def __getitem__(self, rows: Any) -> np.ndarray:
        found = np.asarray(self)[rows]
        if not np.array_equal(checksums(found.reshape(-1, *self.shape[1:])), np.ravel(self.checksums[rows])):
            raise BadInput(f"{self.filename}: the dataset in this file is damaged; remove the file")
        return found


def checked(mapped: np.memmap, own: UInt32[np.ndarray, " N"]) -> CheckedRows:
    """`mapped` with the checksums of its rows."""
    rows = mapped.view(CheckedRows)
    rows.checksums = own
    return rows


def checksums(images: UInt8[np.ndarray, "N *row"]) -> UInt32[np.ndarray, " N"]:
    """The CRC-32 of every row."""
    return np.fromiter((zlib.crc32(np.ascontiguousarray(row).data) for row in images), np.uint32, len(images))
