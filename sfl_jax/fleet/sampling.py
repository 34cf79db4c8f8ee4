"""Which clients are asked in a round: drawn from those available, uniformly or by their samples."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int64

from sfl_jax.digests import digest
from sfl_jax.errors import BadInput
from sfl_jax.fleet.draws import Purpose, generator
from sfl_jax.fleet.rounds import cohort
from sfl_jax.fleet.rows import Row, integer, known_name, read_rows
from sfl_jax.registry import SAMPLINGS

COLUMNS = ("client", "from_round", "until_round")
_FOREVER = 2**31 - 1


class Availability(NamedTuple):
    """The rounds in which clients are available, from a trace. A client without a row always is.

    clients: the clients of the fleet. client, from_round, until_round: one row for each span of rounds,
    counted from 1, both ends included; `client` is an index of the fleet.
    """

    clients: int
    client: Int64[np.ndarray, " R"]
    from_round: Int64[np.ndarray, " R"]
    until_round: Int64[np.ndarray, " R"]

    def available(self, round: int) -> Bool[np.ndarray, " N"]:
        """Which clients are available in a round, counted from 0."""
        is_there = np.ones(self.clients, bool)
        is_there[self.client] = False
        spans = (self.from_round <= round + 1) & (round + 1 <= self.until_round)
        is_there[self.client[spans]] = True
        return is_there


@dataclasses.dataclass(frozen=True, eq=False)
class Sampling:
    """How the clients of a round are drawn, without replacement.

    Attributes:
      by: "uniform": each client with the same probability; the mean of the round is weighted by samples.
        "size": each with a probability proportional to its samples; all clients of the round weigh the same.
      availability: the rounds in which clients are available; None: always. A round with fewer clients than
        asked goes on without the others.

    Raises:
      BadInput: another way to draw.
    """

    by: str = "uniform"
    availability: Availability | None = None

    def __post_init__(self):
        if self.by not in SAMPLINGS:
            raise BadInput(f"sampling={self.by}: must be one of {', '.join(SAMPLINGS)}")

    def cohort(
        self, seed: int, round: int, samples: Sequence[int] | Int64[np.ndarray, " N"], size: int
    ) -> tuple[Int64[np.ndarray, " K"], Bool[np.ndarray, " K"]]:
        """(the clients asked in a round, sorted; which of them are available), drawn from (seed, round)
        alone.

        samples: of each client of the fleet. size: clients asked; BadInput unless 1 to N. Where fewer are
        available, the rest of the places go to clients that are not.
        """
        clients = len(samples)
        if self.by == "uniform" and self.availability is None:
            return cohort(seed, round, clients, size), np.ones(size, bool)
        if not 1 <= size <= clients:
            raise BadInput(f"cohort_size={size}: must be 1 to {clients}, the number of clients")
        is_there = np.ones(clients, bool)
        if self.availability is not None:
            is_there = self.availability.available(round)
        keys = self._keys(seed, round, np.asarray(samples, np.float64))
        ids = np.sort(np.lexsort((keys, ~is_there))[:size])
        return ids, is_there[ids]

    @property
    def digest(self) -> str:
        """SHA-256 of the trace."""
        return digest(() if self.availability is None else self.availability[1:])

    def weights(self, samples: Int64[np.ndarray, " K"]) -> Float64[np.ndarray, " K"]:
        """How much each client of the cohort weighs in the mean of its round."""
        return np.asarray(samples if self.by == "uniform" else np.ones(len(samples)), np.float64)

    def _keys(self, seed, round, samples):
        """The smallest keys win: Exp(1) draws over weights are draws without replacement (Efraimidis and
        Spirakis 2006).
        """
        draws = generator(seed, Purpose.COHORT, round).standard_exponential(len(samples))
        return draws / samples if self.by == "size" else draws


def read_availability(path: str | os.PathLike[str], clients: Sequence[str]) -> Availability:
    """The trace of a CSV file with the columns client, from_round and until_round.

    clients: the names of the fleet. Rounds are counted from 1; both ends are included; an empty until_round
    stands for the end of the run.

    Raises:
      BadInput: no such file, or not of this form; the line names file, line, column and rule.
    """
    path, index = Path(os.path.expanduser(path)), {str(name): place for place, name in enumerate(clients)}
    empty = "no rows; must have one for each span of rounds"
    spans = [_span(row, index) for row in read_rows(path, COLUMNS, COLUMNS, empty)]
    client, first, last = np.array(spans, np.int64).T
    return Availability(len(index), client, first, last)


def _span(row: Row, index: dict[str, int]) -> tuple[int, int, int]:
    client = known_name(row, "client", index, "the fleet")
    first = _round(row, "from_round", 1)
    last = _round(row, "until_round", first) if row.cells["until_round"] else _FOREVER
    return client, first, last


def _round(row: Row, column: str, least: int) -> int:
    return integer(row, column, least, _FOREVER, f"an integer, at least {least}")
