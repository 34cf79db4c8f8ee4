"""The staged barrier: all clients wait for each other before and after the server's work.

A round is max(before) + sum(server work) / F + max(after). Before: model down, forward, smashed data up. Then
the server works at full speed, one client after the other. After: gradient down, backward, model up.

The optimum is found by enumerating the times t and u of the two barriers (the idea of Wei & Chen 2026). Given
both, each client takes the cut with the least server work among those within t and u. f(t), the minimum over
u of u + work(t, u) / F, never rises with t. So in an interval between two tried values of t, no round is
shorter than the first t inside it plus f at its upper end. Intervals where this is no better are skipped, the
others are halved.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sfl_jax.errors import BadInput
from sfl_jax.optim.costs import Floats, Seconds, Terms
from sfl_jax.optim.maxima import Least
from sfl_jax.optim.shares import rounding

_TOLERANCE = 1e-9
_BATCH_ELEMENTS = 1 << 21


class Stages(NamedTuple):
    """Seconds before the server's work, on the whole server, and after it; (K, C) each, inf if forbidden."""

    before_s: Floats
    serving_s: Floats
    after_s: Floats


def stages(terms: Terms, server_flops: float) -> Stages:
    """The stages of all (client, column) pairs."""
    return tabled(terms, server_flops, stages_at)


def stages_at(terms: Terms, columns: NDArray[np.integer], server_flops: float) -> Stages:
    """The stages of each client at its own column (K,), (K,) each."""
    if terms.tail is not None:
        raise BadInput("barrier=staged: has no second visit to the server; must be session with tail_units")
    seconds = at_full_speed(terms, columns, server_flops)
    return Stages(seconds.before_server, seconds.server, seconds.after_server)


def at_full_speed(terms: Terms, columns: NDArray[np.integer], server_flops: float) -> Seconds:
    """Each client's seconds at its own column (K,) with the whole server to itself."""
    return terms.seconds(columns, np.full(terms.shape[0], server_flops))


def tabled(terms: Terms, server_flops: float, seconds_at: Callable[..., Any]) -> Any:
    """The result of `seconds_at` for all columns, as tables (K, C) with inf where a column is forbidden."""
    clients, count = terms.shape
    tables = []
    for column in range(count):
        columns = np.full(clients, column)
        parts = seconds_at(terms, columns, server_flops)
        allowed = terms.at(columns)[2] & np.isfinite(parts.serving_s)
        tables.append(type(parts)(*(np.where(allowed, part, np.inf) for part in parts)))
    return type(tables[0])(*(np.stack(parts, axis=1) for parts in zip(*tables, strict=True)))


def round_seconds(chosen: Stages) -> float:
    """The staged round in seconds, from each client's stages at one column; (K,) each."""
    return chosen.before_s.max() + chosen.serving_s.sum() + chosen.after_s.max()


def optimum(costs: Stages) -> Least:
    """The columns with the shortest staged round, and the bound."""
    columns, bound_s, tried = optimal_cuts(costs)
    mine = Stages(*(part[np.arange(len(columns)), columns] for part in costs))
    return Least(columns, round_seconds(mine), bound_s, tried)


def optimal_cuts(costs: Stages) -> tuple[NDArray[np.int64], float, int]:
    """The cuts (K,) with the shortest staged round, a proven lower bound (s), and how many t were tried."""
    costs = _worth_trying(costs)
    order = _Order(costs)
    times = np.unique(costs.before_s[np.isfinite(costs.before_s)])
    times = times[times >= costs.before_s.min(axis=1).max()]
    # f(t) and the u that attains it; NaN where t was not tried.
    rest_s, after_s = np.full(len(times), np.nan), np.full(len(times), np.nan)
    batch = max(1, _BATCH_ELEMENTS // costs.before_s.size)
    todo, tried, best_s, skipped_s = np.unique([0, len(times) - 1]), 0, np.inf, np.inf
    intervals = np.array([[0, len(times) - 1]])
    while len(todo):
        for some in np.array_split(todo, -(-len(todo) // batch)):
            rest_s[some], after_s[some] = order.least_rest(times[some])
        tried += len(todo)
        best_s = np.nanmin(times + rest_s)
        first, last = intervals[intervals[:, 1] - intervals[:, 0] > 1].T
        floor_s = times[first + 1] + rest_s[last]
        skip = floor_s >= best_s * (1 - _TOLERANCE)
        skipped_s = min(skipped_s, floor_s[skip].min(initial=np.inf))
        first, last = first[~skip], last[~skip]
        todo = (first + last) // 2
        intervals = np.concatenate([np.stack([first, todo], 1), np.stack([todo, last], 1)])
    best = int(np.nanargmin(times + rest_s))
    cuts = order.cuts(times[best], after_s[best])
    bound_s = min(best_s, skipped_s) * (1 - 4 * rounding(len(costs.before_s))) - order.error_s
    return cuts, max(bound_s, 0.0), tried


def _worth_trying(costs: Stages) -> Stages:
    """The table without cuts that alone last longer than some round: the shortest round has none of them.

    The values left are at most about the round's size, which keeps the rounding error of the bound small.
    """
    whole_s = costs.before_s + costs.serving_s + costs.after_s
    quickest = whole_s.argmin(axis=1)
    some = Stages(*(part[np.arange(len(quickest)), quickest] for part in costs))
    worth = whole_s <= round_seconds(some) * (1 + 4 * rounding(len(quickest)))
    return Stages(*(np.where(worth, part, np.inf) for part in costs))


class _Order:
    """The table sorted by the time after the server: within each client, and all together."""

    def __init__(self, costs: Stages):
        self.costs = costs
        within = np.argsort(costs.after_s, axis=1, kind="stable")
        self.before_s, self.serving_s, self.after_s = (
            np.take_along_axis(part, within, axis=1) for part in costs
        )
        self.events = np.argsort(self.after_s, axis=None, kind="stable")
        self.event_s = self.after_s.ravel()[self.events]
        # Sums of drops cancel: their error grows with the largest sum, not with the result.
        finite = np.where(np.isfinite(self.serving_s), self.serving_s, 0.0)
        self.error_s = finite.max(axis=1).sum() * finite.size * 2.0**-51

    def least_rest(self, before_s) -> tuple[Floats, Floats]:
        """f(t) in seconds, and the u that attains it, for times t (B,) of the first barrier; inf if none."""
        within = self.before_s <= before_s[:, None, None]
        least = np.minimum.accumulate(np.where(within, self.serving_s, np.inf), axis=2)
        servable = np.isfinite(least)
        kept = np.where(servable, least, 0.0)
        drops = np.diff(kept, axis=2, prepend=0.0)
        serving_s = np.cumsum(drops.reshape(len(before_s), -1)[:, self.events], axis=1)
        # The sum is a round's only once every client has a cut.
        first = np.where(servable, self.after_s, np.inf).min(axis=2).max(axis=1)
        # Of several events at one time only the last has the sum of all.
        last_of_tie = np.append(self.event_s[1:] > self.event_s[:-1], True)
        open_ = (self.event_s >= first[:, None]) & last_of_tie & np.isfinite(self.event_s)
        total = np.where(open_, self.event_s + serving_s, np.inf)
        best = total.argmin(axis=1)
        return np.take_along_axis(total, best[:, None], axis=1)[:, 0], self.event_s[best]

    def cuts(self, before_s: float, after_s: float) -> NDArray[np.int64]:
        """Each client's cut with the least server work within both barriers."""
        within = (self.costs.before_s <= before_s) & (self.costs.after_s <= after_s)
        return np.where(within, self.costs.serving_s, np.inf).argmin(axis=1)
