"""The table of a plan's clients on the terminal: cut, share, seconds by term, and what would help."""

import numpy as np

from sfl_jax.planning import Planned, helps, pulls, seconds, share_percent

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


def clients_table(planned: Planned) -> str:
    """A row for each client, or for those that hold the round up most, in columns with units."""
    pull, plan = pulls(planned), planned.plan
    count = len(planned.fleet)
    shown = np.arange(count)
    if count > LISTED:
        # Of many clients only some can be last in the order, so the others need not be sorted.
        order = np.lexsort((plan.client_s, pull)) if count <= 1 << 16 else np.argsort(pull, kind="stable")
        shown = order[::-1][:FIRST]
    shown = shown.tolist()
    help_, parts, share = helps(planned), seconds(planned)._asdict(), share_percent(planned)
    units = ["images", *planned.profile.names]
    columns = [
        ["", "", "client", *(_short(planned.fleet.client[k]) for k in shown)],
        ["", "", "cut", *(f"{plan.cuts[k]}" for k in shown)],
        ["", "after", "unit", *(_short(units[plan.cuts[k]]) for k in shown)],
        ["", "share", "%", *(_number(share[k]) for k in shown)],
        *([*head, "s", *(_number(parts[term][k]) for k in shown)] for term, head in _TERMS.items()),
        ["", "total", "s", *(f"{plan.client_s[k]:.4g}" for k in shown)],
        ["", "pull", "%", *(_number(100 * pull[k]) for k in shown)],
        ["", "would", "help", *(_help(help_, k) for k in shown)],
    ]
    left = {0, 2, len(columns) - 1}
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


def _short(name: str) -> str:
    return name if len(name) <= MOST_NAME else f"{name[: MOST_NAME - 1]}…"


def _number(value: float) -> str:
    """Three digits; a dash where there is nothing."""
    return "-" if not value > 0 else f"{value:.3g}" if value < 1e4 else f"{value:.0f}"


def _help(help_, client: int) -> str:
    resource = help_.resource[client]
    return f"{resource} -{help_.gain_s[client]:.2g} s" if resource else "-"
