"""Faults of clients in a round: some drop out, some are slow, some are too late."""

import dataclasses
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64

from sfl_jax.errors import BadInput
from sfl_jax.fleet.rounds import availability, slowdowns


@dataclasses.dataclass(frozen=True)
class Faults:
    """How often clients fail. By default they never fail.

    Attributes:
      drop_probability: probability that a client of the cohort drops out, in each round.
      jitter: how much slower than planned clients are on average; 0.1 is 10 %.
      deadline_factor: a round ends after this many times its planned seconds, without the clients that are
        late. 0 waits for all clients.

    Raises:
      BadInput: a number outside of its range.
    """

    drop_probability: float = 0.0
    jitter: float = 0.0
    deadline_factor: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.drop_probability <= 1:
            raise BadInput(f"drop_probability={self.drop_probability}: must be 0 to 1")
        if not 0 <= self.jitter <= 1e6:
            raise BadInput(f"jitter={self.jitter}: must be 0 to 1e6")
        if self.deadline_factor != 0 and not 1 <= self.deadline_factor < np.inf:
            raise BadInput(f"deadline_factor={self.deadline_factor:g}: must be 0, or at least 1")

    def delays(self, seed: int, round: int, ids: np.ndarray) -> "Delays":
        """The delays of the clients `ids` (K,) in a round, drawn from (seed, round, client) alone."""
        stays = availability(seed, round, ids, self.drop_probability)
        return Delays(stays, slowdowns(seed, round, ids, self.jitter))


class Delays(NamedTuple):
    """What happens to the clients of a round, under any plan.

    stays: whether a client stays. slowdown: how many times the planned seconds it takes.
    """

    stays: Bool[np.ndarray, " K"]
    slowdown: Float64[np.ndarray, " K"]
