"""The samples of every local step of a round."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, Int32

from sfl_jax.errors import BadInput

_MOST_STEPS = 2**31 - 1
_PURPOSE = 1  # separates these random streams from others of the same seed


def session_steps(
    parts: Sequence[Int[np.ndarray, " _"]], local_epochs: int, batch_size: int
) -> Int32[np.ndarray, " K"]:
    """Local steps of each client's session: epochs × ⌊D/B⌋, or epochs if D < B.

    BadInput if a number does not fit in int32.
    """
    sizes = np.fromiter((len(part) for part in parts), np.int64, len(parts))
    steps = local_epochs * np.maximum(sizes // batch_size, 1)
    if steps.max(initial=0) > _MOST_STEPS:
        raise BadInput(
            f"local_epochs={local_epochs}: makes {steps.max()} local steps; must be at most {_MOST_STEPS}"
        )
    return steps.astype(np.int32)


def max_steps(parts: Sequence[Int[np.ndarray, " _"]], local_epochs: int, batch_size: int) -> int:
    """The steps of the longest session."""
    return int(session_steps(parts, local_epochs, batch_size).max())


def batches(
    parts: Sequence[Int[np.ndarray, " _"]],
    ids: Sequence[int] | Int[np.ndarray, " K"],
    *,
    seed: int,
    round: int,
    local_epochs: int,
    batch_size: int,
    steps_max: int,
) -> tuple[Int32[np.ndarray, "K S B"], Int32[np.ndarray, " K"]]:
    """Sample indices of every local step of the clients `ids`.

    Every epoch is a new permutation of the client's samples, drawn from (seed, round, client id, epoch)
    alone. ⌊D/B⌋ whole batches of it are used. A client with D < B samples repeats its permutation to fill one
    batch.

    Args:
      parts: the samples of every client of the fleet, from `partition`.
      ids: the K clients.
      steps_max: S, at least the steps of the longest session; see `max_steps`.

    Returns:
      indices (K, S, B) int32, 0 where a client has fewer than S steps; and steps (K,) int32.

    Raises:
      ValueError: steps_max is too small.
    """
    steps = session_steps([parts[client] for client in ids], local_epochs, batch_size)
    if len(steps) and steps.max() > steps_max:
        raise ValueError(f"steps_max={steps_max}: a session has {steps.max()} steps")
    indices = np.zeros((len(steps), steps_max, batch_size), np.int32)
    for row, client, used in zip(indices, ids, steps, strict=True):
        for epoch, out in enumerate(row[:used].reshape(local_epochs, -1)):
            out[:] = np.resize(_permutation(parts[client], seed, round, int(client), epoch), out.size)
    return indices, steps


def _permutation(part: np.ndarray, seed: int, round: int, client: int, epoch: int) -> np.ndarray:
    # A counter-based generator: each (round, client, epoch) has its own place in the seed's stream.
    counter = np.array([0, round, client, epoch], np.uint64)
    key = np.array([seed, _PURPOSE], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter)).permutation(part)
