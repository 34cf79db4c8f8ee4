"""Data sets of images or other samples, their division among clients, and the batches of a round."""

from sfl_jax.datasets.arrays import as_stored, check_splits, from_arrays
from sfl_jax.datasets.batches import batches, max_steps, session_steps
from sfl_jax.datasets.dataset import Dataset
from sfl_jax.datasets.loading import load
from sfl_jax.datasets.partition import partition

__all__ = [
    "Dataset",
    "as_stored",
    "batches",
    "check_splits",
    "from_arrays",
    "load",
    "max_steps",
    "partition",
    "session_steps",
]
