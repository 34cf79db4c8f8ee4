"""Random numbers that depend on (seed, purpose, round, client), not on the order of execution."""

from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """What a number is drawn for. Each purpose has its own stream; 1 is the order of a client's samples."""

    FLEET = 2
    COHORT = 3
    FADING = 4
    AVAILABILITY = 5
    SLOWDOWN = 6
    ORDER = 7
    INTERVAL = 8


def generator(seed: int, purpose: Purpose, round: int, number: int = 0) -> np.random.Generator:
    """The stream of (seed, purpose, round, number), which set key and counter of a Philox generator."""
    key, counter = np.array([seed, purpose], np.uint64), np.array([0, round, number, 0], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def uniforms(seed: int, purpose: Purpose, round: int, shape: tuple[int, int], number: int = 0) -> np.ndarray:
    """Numbers in [0, 1), one row per client. Row i does not depend on the number of rows."""
    return generator(seed, purpose, round, number).random(shape)
