"""Image classification sets, their division among clients, and the batches of a round."""

from sfl_jax.datasets.batches import batches, max_steps, session_steps
from sfl_jax.datasets.loading import Dataset, load
from sfl_jax.datasets.partition import partition

__all__ = ["Dataset", "batches", "load", "max_steps", "partition", "session_steps"]
