"""Digests of arrays."""

import hashlib
from collections.abc import Iterable, Mapping

import numpy as np


def digest(arrays: Iterable[np.ndarray]) -> str:
    """SHA-256 of the arrays' types, shapes and contents."""
    total = hashlib.sha256()
    for array in arrays:
        total.update(f"{array.dtype}{array.shape}".encode())
        total.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return total.hexdigest()


def digest_of_columns(columns: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of a table: its columns and their names."""
    named = ((np.frombuffer(name.encode(), np.uint8), np.asarray(rows)) for name, rows in columns.items())
    return digest(array for pair in named for array in pair)
