"""The table of a plan's clients on the terminal: cut, share, seconds by term, and what would help."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int, Shaped

from sfl_jax import optim, planning
from sfl_jax.commands.words import shortened
from sfl_jax.planning import Planned, SeveralPlanned

LISTED, FIRST = 20, 10  # the most clients of which all are listed; of more, only the first
MOST_NAME = 24  # letters of a name that are shown
# What a term is called in the head of the table, in two lines.
_TERMS = {
    "model_down": ("model", "down"), "client_forward": ("for-", "ward"), "smashed_up": ("smashed", "up"),
    "server": ("", "server"), "gradient_down": ("gradient", "down"), "client_backward": ("back-", "ward"),
    "model_up": ("model", "up"),
}  # fmt: skip
_LEGEND = (
    "pull: what the round gains, in percent of what the client saves\n"
    "would help: what of the client, 10 % faster, saves most, and how much if nothing else holds the round up"
)


class _Clients(NamedTuple):
    """What the table tells of K clients. server: the name of each client's server; None if there is one."""

    name: Shaped[np.ndarray, " K"]
    cut: Int[np.ndarray, " K"]
    units: Sequence[str]
    share_percent: Float64[np.ndarray, " K"]
    seconds: optim.Seconds
    total_s: Float64[np.ndarray, " K"]
    pull: Float64[np.ndarray, " K"]
    server: Shaped[np.ndarray, " K"] | None = None


def clients_table(planned: Planned) -> str:
    """A row for each client, or for those that hold the round up most, in columns with units."""
    plan = planned.plan
    return _table(_Clients(
        planned.fleet.client, plan.cuts, planned.profile.names, planning.share_percent(planned),
        planning.seconds(planned), plan.client_s, planning.pulls(planned),
    ))  # fmt: skip


def several_clients_table(planned: SeveralPlanned) -> str:
    """The same for several servers, with a column for each client's server."""
    plan = planned.plan
    return _table(_Clients(
        planned.fleet.client, plan.cuts, planned.profile.names, planning.several_share_percent(planned),
        planning.several_seconds(planned), plan.client_s, planning.several_pulls(planned),
        planned.servers.server[plan.servers],
    ))  # fmt: skip


def _table(clients: _Clients) -> str:
    pull, total_s = clients.pull, clients.total_s
    count = len(pull)
    shown = np.arange(count)
    if count > LISTED:
        # Of many clients only some can be last in the order, so the others need not be sorted.
        order = np.lexsort((total_s, pull)) if count <= 1 << 16 else np.argsort(pull, kind="stable")
        shown = order[::-1][:FIRST]
    shown = shown.tolist()
    help_, parts = planning.help_of(clients.seconds, pull), clients.seconds._asdict()
    units, server = ["images", *clients.units], clients.server
    columns = [
        ["", "", "client", *(shortened(clients.name[k], MOST_NAME) for k in shown)],
        *(
            [["", "", "server", *(shortened(server[k], MOST_NAME) for k in shown)]]
            if server is not None
            else []
        ),
        ["", "", "cut", *(f"{clients.cut[k]}" for k in shown)],
        ["", "after", "unit", *(shortened(units[clients.cut[k]], MOST_NAME) for k in shown)],
        ["", "share", "%", *(_number(clients.share_percent[k]) for k in shown)],
        *([*head, "s", *(_number(parts[term][k]) for k in shown)] for term, head in _TERMS.items()),
        ["", "total", "s", *(f"{total_s[k]:.4g}" for k in shown)],
        ["", "pull", "%", *(_number(100 * pull[k]) for k in shown)],
        ["", "would", "help", *(_help(help_, k) for k in shown)],
    ]
    left = {at for at, column in enumerate(columns) if column[2] in ("client", "server", "unit", "help")}
    widths = [max(map(len, column)) for column in columns]
    lines = [
        "  ".join(
            cell.ljust(width) if at in left else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in zip(*columns, strict=True)
    ]
    some = f"the {FIRST} of {count} clients that hold the round up most; the .csv file has all\n"
    return (some if count > LISTED else "") + "\n".join(lines) + f"\n\n{_LEGEND}"


def _number(value: float) -> str:
    """Three digits; a dash where there is nothing."""
    return "-" if not value > 0 else f"{value:.3g}" if value < 1e4 else f"{value:.0f}"


def _help(help_, client: int) -> str:
    resource = help_.resource[client]
    return f"{resource} -{help_.gain_s[client]:.2g} s" if resource else "-"
