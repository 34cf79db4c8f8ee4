"""Measured rounds: a CSV file with the seconds of clients, in total or by term."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

from sfl_jax.errors import BadInput
from sfl_jax.fleet.rows import Row, integer, known_name, number, read_rows

REQUIRED = ("round", "client", "cut")
# The columns of a plan.csv, so that predicted and measured files look alike.
TERMS = (
    "model_down",
    "client_forward",
    "smashed_up",
    "server",
    "gradient_down",
    "client_backward",
    "model_up",
)
TOTAL, SHARE = "client_s", "share_flops"
_SECONDS = (*(f"{name}_s" for name in TERMS), TOTAL)
_OPTIONAL = (*_SECONDS, SHARE)


class MeasuredRounds(NamedTuple):
    """Rows of a file of measured rounds; (R,) each. NaN where a cell is empty.

    client: index among the clients of the fleet. seconds: of each term. total_s: of whole sessions.
    share_flops: the client's share of the server, FLOP/s. line: in the file.
    """

    round: Int64[np.ndarray, " R"]
    client: Int64[np.ndarray, " R"]
    cut: Int64[np.ndarray, " R"]
    seconds: dict[str, Float64[np.ndarray, " R"]]
    total_s: Float64[np.ndarray, " R"]
    share_flops: Float64[np.ndarray, " R"]
    line: Int64[np.ndarray, " R"]


def read_measured(path: str | os.PathLike[str], clients: Sequence[str], units: int) -> MeasuredRounds:
    """The measured rounds of a CSV file with a header.

    Needed columns: round, client and cut, and client_s or a term such as client_forward_s. Terms have the
    names of plan.csv; `share_flops` is the share in FLOP/s that the client had. Cells of these may be empty.
    A client has one row in a round.

    clients: the names of the fleet. units: of the network, which is the largest cut.

    Raises:
      BadInput: no such file, or not of this form; the line names file, line, column and rule.
    """
    path, index = Path(os.path.expanduser(path)), {str(name): place for place, name in enumerate(clients)}
    found, empty = [], "no rows; must have one for each client and round"
    line_of: dict[tuple[int, int], int] = {}
    for row in read_rows(path, (*REQUIRED, *_OPTIONAL), REQUIRED, empty):
        if not found and not row.cells.keys() & (set(_SECONDS) - {"server_s"}):
            raise BadInput(
                f"{path}:1: no seconds of clients; must have {TOTAL}, or a term such as client_forward_s"
            )
        round_, client, *rest = _cells(row, index, units)
        if (first := line_of.setdefault((round_, client), row.line)) != row.line:
            raise BadInput(
                f"{row.place}: client {row.cells['client']} in round {round_} is also on line {first}"
            )
        found.append((round_, client, *rest, row.line))
    round_, client, cut, numbers, line = zip(*found, strict=True)
    columns = dict(zip(_OPTIONAL, np.array(numbers, np.float64).T, strict=True))
    rounds, clients_at, cuts, lines = (np.array(part, np.int64) for part in (round_, client, cut, line))
    seconds = {name: columns[f"{name}_s"] for name in TERMS}
    return MeasuredRounds(rounds, clients_at, cuts, seconds, columns[TOTAL], columns[SHARE], lines)


def _cells(row: Row, index: dict[str, int], units: int):
    client = known_name(row, "client", index, "the fleet")
    round_, cut = (
        integer(row, column, 0, most, f"an integer, 0 to {most}")
        for column, most in (("round", 2**31 - 1), ("cut", units))
    )
    numbers = [
        number(row, name, zero=name not in (TOTAL, SHARE), more=", or empty")
        if row.cells.get(name)
        else np.nan
        for name in _OPTIONAL
    ]
    return round_, client, cut, numbers
