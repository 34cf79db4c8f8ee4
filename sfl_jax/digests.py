"""Digests of arrays."""

import hashlib
from collections.abc import Iterable

import numpy as np


def digest(arrays: Iterable[np.ndarray]) -> str:
    """SHA-256 of types, shapes and contents."""
    total = hashlib.sha256()
    for array in arrays:
        total.update(f"{array.dtype}{array.shape}".encode())
        total.update(np.ascontiguousarray(array).data)
    return total.hexdigest()
