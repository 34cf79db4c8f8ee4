"""rates.csv: the compute and the links of each client in past rounds, one line per client and round."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float64, Shaped

from sfl_jax.errors import BadInput
from sfl_jax.fleet.clients import Fleet
from sfl_jax.fleet.rows import known_name, name_in, number, read_rows

RATES = ("flops", "uplink_bps", "downlink_bps")
_REQUIRED = ("round", "client")
_COLUMNS = (*_REQUIRED, *RATES)
_MOST_ROUNDS = 100_000


@dataclass(frozen=True, eq=False)
class Traces:
    """The rates of K clients in N rounds.

    Attributes:
      round: the names of the rounds, as in the file.
      flops, uplink_bps, downlink_bps: FLOP/s and bit/s of each client in each round.
    """

    round: Shaped[np.ndarray, " N"]
    flops: Float64[np.ndarray, "N K"]
    uplink_bps: Float64[np.ndarray, "N K"]
    downlink_bps: Float64[np.ndarray, "N K"]

    def __len__(self) -> int:
        return len(self.round)


def read_traces(path: str | os.PathLike[str], fleet: Fleet) -> Traces:
    """The rates of a fleet's clients in the rounds of a CSV file, in the order of the file.

    The columns are `round` and `client`, and one or more of `flops`, `uplink_bps` and `downlink_bps`. A rate
    without a column, or with an empty cell, is that of the fleet. Every client has a line for every round.

    Raises:
      BadInput: no such file, or a wrong format:
        `path:LINE: client NAME: column NAME: 'cell': must be …`.
    """
    path = Path(os.path.expanduser(path))
    clients = fleet.client.tolist()
    clients_at = {name: at for at, name in enumerate(clients)}
    rounds: dict[str, list[np.ndarray]] = {}
    line_of: dict[tuple[str, int], int] = {}
    empty = "no rounds; must have a line for each client and round"
    usual = [np.asarray(getattr(fleet, name), np.float64) for name in RATES]
    for row in read_rows(path, _COLUMNS, _REQUIRED, empty):
        if not set(RATES) & set(row.cells):
            raise BadInput(f"{path}:1: must have a column of {', '.join(RATES)}")
        client, name = known_name(row, "client", clients_at, "the fleet"), name_in(row, "round")
        if (name, client) in line_of:
            raise BadInput(
                f"{row.place}: client {clients[client]} in round {name} is also on line"
                f" {line_of[name, client]}"
            )
        if name not in rounds and len(rounds) == _MOST_ROUNDS:
            raise row.error("round", f"must be one of at most {_MOST_ROUNDS} rounds")
        line_of[name, client] = row.line
        rates = rounds.setdefault(name, [part.copy() for part in usual])
        for part, column in zip(rates, RATES, strict=True):
            if row.cells.get(column):
                part[client] = number(row, column, more=", or empty")
    for name in rounds:
        for client, of in enumerate(clients):
            if (name, client) not in line_of:
                raise BadInput(f"{path}: client {of} has no line in round {name}; must have one in each")
    return Traces(np.array(list(rounds)), *map(np.stack, zip(*rounds.values(), strict=True)))
