"""What a run sent, computed and held under each method, and what it took to an accuracy, as rows of words."""

import bisect
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from sfl_jax.commands import words
from sfl_jax.run.clocks import Clock
from sfl_jax.run.ledger import DOWN, UP, sent_bytes, totals

LADDER = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995)  # round accuracies
_KINDS = {
    "model_down_bytes": "models", "gradient_down_bytes": "gradients",
    "model_up_bytes": "models", "smashed_up_bytes": "smashed data", "labels_up_bytes": "labels",
}  # fmt: skip

Row = tuple[str, ...]


def run_rows(clock: Clock) -> list[Row]:
    """The totals of a run under one method: a name, an amount, and what it consists of."""
    whole = totals(clock.ledger)

    def kinds(names):
        return ", ".join(f"{_KINDS[name]} {words.amount(whole[name], 'B')}" for name in names)

    return [
        ("sent by clients", words.amount(whole["up_bytes"], "B"), kinds(UP)),
        ("sent by the server", words.amount(whole["down_bytes"], "B"), kinds(DOWN)),
        ("computed by clients", words.amount(whole["client_flop"], "FLOP"), ""),
        ("computed by the server", words.amount(whole["server_flop"], "FLOP"), ""),
        ("most memory of a client", words.amount(whole["client_peak_bytes"], "B"), ""),
        ("most memory of the server", words.amount(whole["server_peak_bytes"], "B"), ""),
    ]


def method_rows(clocks: Mapping[str, Clock]) -> list[Row]:
    """The totals of every method below a row of titles."""
    shown = {
        "up_bytes": ("up", "B"), "down_bytes": ("down", "B"),
        "client_flop": ("clients compute", "FLOP"), "server_flop": ("server computes", "FLOP"),
        "client_peak_bytes": ("a client holds", "B"), "server_peak_bytes": ("server holds", "B"),
    }  # fmt: skip
    rows: list[Row] = [("all rounds together", *(title for title, _ in shown.values()))]
    for name, clock in clocks.items():
        whole = totals(clock.ledger)
        rows.append((name, *(words.amount(whole[field], unit) for field, (_, unit) in shown.items())))
    return rows


def accuracy_rows(clocks: Mapping[str, Clock], accuracies: Sequence[float | None]) -> list[Row]:
    """The simulated time and the bytes to the `targets`, by method, below a row of titles.

    If no target was reached, one row with dashes says so for all methods.
    """
    aims = targets(accuracies)
    reached = [first_round(accuracies, target) for target in aims]
    titles = "time and bytes to", *(f"{100 * target:g} % accuracy" for target in aims)
    if all(index is None for index in reached):
        return [titles, ("not reached", *(words.NONE for _ in aims))]
    return [titles, *((name, *_spent(clock, reached)) for name, clock in clocks.items())]


def targets(accuracies: Iterable[float | None]) -> Sequence[float]:
    """The three highest accuracies of the ladder that were reached; its lowest three if fewer were."""
    best = max((part for part in accuracies if part is not None), default=0.0)
    return LADDER[max(0, bisect.bisect_right(LADDER, best) - 3) :][:3]


def _spent(clock, reached):
    sent = np.cumsum(sent_bytes(clock.ledger))
    for index in reached:
        if index is None:
            yield words.NONE
        else:
            yield f"{words.clock(clock.seconds[index])}, {words.amount(float(sent[index]), 'B')}"


def first_round(accuracies: Sequence[float | None], target: float) -> int | None:
    """The place of the first round whose test accuracy is at least the target; None where there is none."""
    reached = (index for index, part in enumerate(accuracies) if part is not None and part >= target)
    return next(reached, None)


def text(rows: Sequence[Row]) -> str:
    """Rows as lines: the first cell flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = [[f"{row[0]:<{widths[0]}}", *map(str.rjust, row[1:], widths[1:])] for row in rows]
    return "\n".join(f"  {'  '.join(row)}".rstrip() for row in cells)
