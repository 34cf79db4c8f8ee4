"""servers.csv, one line per server, and links.csv, one line per link between a client and a server."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float64, Shaped

from sfl_jax.errors import BadInput
from sfl_jax.fleet.clients import Fleet
from sfl_jax.fleet.rows import known_name, name_in, number, read_rows

_SERVER_COLUMNS, _SERVER_REQUIRED = ("server", "flops", "memory_bytes"), ("server", "flops")
_LINK_COLUMNS = ("client", "server", "uplink_bps", "downlink_bps")
_NAMES = ("client", "server")


@dataclass(frozen=True, eq=False)
class ServerList:
    """E servers, and their links to K clients.

    Attributes:
      server: names, unique.
      flops: FLOP/s of the server.
      memory_bytes: its memory for copies of its half; inf where it is not limited.
      uplink_bps, downlink_bps: bit/s of each client to and from each server; 0 where there is no link.
    """

    server: Shaped[np.ndarray, " E"]
    flops: Float64[np.ndarray, " E"]
    memory_bytes: Float64[np.ndarray, " E"]
    uplink_bps: Float64[np.ndarray, "K E"]
    downlink_bps: Float64[np.ndarray, "K E"]

    def __len__(self) -> int:
        return len(self.server)


def read_servers(
    path: str | os.PathLike[str], fleet: Fleet, links: str | os.PathLike[str] | None = None
) -> ServerList:
    """The servers of a CSV file, with the links of a fleet's clients to them.

    The columns are `server`, `flops` and perhaps `memory_bytes`; an empty cell there is no limit. Without a
    file of links each client has the rates of the fleet to every server. Such a file has the columns
    `client`, `server`, `uplink_bps` and `downlink_bps`, and a line for each link. A client and a server
    without a line have no link.

    Raises:
      BadInput: no such file, or a wrong format:
        `path:LINE: client NAME: column NAME: 'cell': must be …`.
    """
    path = Path(os.path.expanduser(path))
    names: dict[str, int] = {}
    flops, memory_bytes, empty = [], [], "no servers; must have one line for each"
    for row in read_rows(path, _SERVER_COLUMNS, _SERVER_REQUIRED, empty):
        name = name_in(row, "server")
        if name in names:
            raise row.error("server", f"is also on line {names[name]}")
        names[name] = row.line
        flops.append(number(row, "flops"))
        is_limited = bool(row.cells.get("memory_bytes"))
        memory_bytes.append(number(row, "memory_bytes", more=", or empty") if is_limited else np.inf)
    shape = len(fleet), len(names)
    rates = [np.repeat(rate[:, None], shape[1], axis=1) for rate in (fleet.uplink_bps, fleet.downlink_bps)]
    if links is not None:
        rates = _read_links(Path(os.path.expanduser(links)), fleet.client.tolist(), list(names), path)
    return ServerList(np.array(list(names)), np.array(flops), np.array(memory_bytes), *rates)


def _read_links(
    path: Path, clients: Sequence[str], servers: Sequence[str], servers_path: Path
) -> list[np.ndarray]:
    """Rates (K, E) up and down of a file of links, 0 where it has none."""
    clients_at, servers_at = ({name: at for at, name in enumerate(names)} for names in (clients, servers))
    rates = [np.zeros((len(clients), len(servers))) for _ in range(2)]
    line_of: dict[tuple[int, int], int] = {}
    for row in read_rows(path, _LINK_COLUMNS, _LINK_COLUMNS, "no links; must have one line for each"):
        pair = (
            known_name(row, "client", clients_at, "the fleet"),
            known_name(row, "server", servers_at, str(servers_path)),
        )
        if pair in line_of:
            both = f"client {clients[pair[0]]} and server {servers[pair[1]]}"
            raise BadInput(f"{row.place}: {both} are also on line {line_of[pair]}")
        line_of[pair] = row.line
        for rate, name in zip(rates, _LINK_COLUMNS[2:], strict=True):
            rate[pair] = number(row, name)
    alone = ~rates[0].any(axis=1)
    if alone.any():
        raise BadInput(
            f"{path}: client {clients[int(np.argmax(alone))]} has no line; must have a link to a server"
        )
    return rates
