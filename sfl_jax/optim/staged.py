"""The staged barrier: all clients wait for each other before and after the server's work.

A round is max(before) + sum(server work) / F + max(after): model down, forward and smashed data up; the
server's work at full speed, one client after the other; gradient down, backward and model up. The
optimum is found by enumerating the two barriers' times t and u (the idea of Wei & Chen 2026): given
both, each client takes the cut with the least server work among those within them.

f(t) = min over u of u + work(t, u) / F never rises with t, so between two values of t that have been
tried no round is shorter than the first t after the one plus f of the other: intervals where even that
is no better are skipped, the others halved.
"""

from typing import NamedTuple

import jax
import numpy as np
from numpy.typing import NDArray

from sfl_jax.optim.costs import Floats, Terms
from sfl_jax.optim.infeasible import most_open_cut, why_infeasible
from sfl_jax.optim.plan import Plan
from sfl_jax.optim.shares import SLACK, rounding

STAGED_METHODS = ("exact", "common_cut", "random_cut", "no_split")
_TOLERANCE = 1e-9
_BATCH_ELEMENTS = 1 << 21


class Stages(NamedTuple):
    """(K, C) each: seconds before the server's work, of the whole server, and after; inf if forbidden."""

    before_s: Floats
    serving_s: Floats
    after_s: Floats


def stages(terms: Terms, server_flops: float) -> Stages:
    """What every (client, cut) pair spends at each stage of a staged round."""
    clients, count = terms.shape
    columns = []
    for cut in range(count):
        cuts = np.full(clients, cut)
        seconds = terms.seconds(cuts, np.full(clients, server_flops))
        allowed = terms.at(cuts)[2] & np.isfinite(seconds.server)
        parts = seconds.before_server, seconds.server, seconds.after_server
        columns.append([np.where(allowed, part, np.inf) for part in parts])
    return Stages(*(np.stack(parts, axis=1) for parts in zip(*columns, strict=True)))


def solve_staged(terms: Terms, server_flops: float, method: str, key, present) -> Plan:
    """A plan under the staged barrier; shares are NaN, for the server works for one client at a time."""
    clients, count = terms.shape
    all_stages = stages(terms, server_flops)
    open_to = np.isfinite(all_stages.before_s)
    if (present & ~open_to.any(axis=1)).any():
        raise why_infeasible(terms, server_flops, present)
    cuts = np.full(clients, count - 1, np.int32)
    bound_s, tried = 0.0, 0
    if present.any():
        here = Stages(*(part[present] for part in all_stages))
        best, bound_s, tried = optimal_cuts(here)
        if method == "exact":
            cuts[present] = best
        elif method == "common_cut":
            cuts[present] = _common_cut(here)
        elif method == "random_cut":
            cuts = _random_cut(open_to, key)
    cuts = np.where(present, cuts, np.int32(count - 1)).astype(np.int32)
    rows = np.arange(clients)
    if (present & ~open_to[rows, cuts]).any():
        cut = count - 1 if method == "no_split" else most_open_cut(terms, server_flops, present)
        raise why_infeasible(terms, server_flops, present, cut)
    mine = Stages(*(np.where(present, part[rows, cuts], 0.0) for part in all_stages))
    # Every sum rounded up.
    up = 1 + 2 * rounding(clients)
    return Plan(
        cuts=cuts,
        shares=np.full(clients, np.nan),
        client_s=(mine.before_s + mine.serving_s + mine.after_s) * (1 + SLACK),
        round_s=float(round_seconds(mine)) * up if present.any() else 0.0,
        bound_s=float(bound_s),
        iterations=tried,
    )


def round_seconds(chosen: Stages) -> float:
    """The staged round of one cut per client, (K,) each."""
    return chosen.before_s.max() + chosen.serving_s.sum() + chosen.after_s.max()


def optimal_cuts(costs: Stages) -> tuple[NDArray[np.int64], float, int]:
    """The cuts (K,) with the shortest staged round, a proven lower bound (s), and the barrier times tried."""
    costs = _worth_trying(costs)
    order = _Order(costs)
    times = np.unique(costs.before_s[np.isfinite(costs.before_s)])
    times = times[times >= costs.before_s.min(axis=1).max()]
    # f and the u that attains it, where tried.
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
    """The table without cuts that last longer, alone, than some round does: no shortest round has them.

    What is left is of the round's own size, and so is the rounding that the bound must allow for.
    """
    whole_s = costs.before_s + costs.serving_s + costs.after_s
    quickest = whole_s.argmin(axis=1)
    some = Stages(*(part[np.arange(len(quickest)), quickest] for part in costs))
    worth = whole_s <= round_seconds(some) * (1 + 4 * rounding(len(quickest)))
    return Stages(*(np.where(worth, part, np.inf) for part in costs))


class _Order:
    """The table sorted by time after the server, each client's row and all together."""

    def __init__(self, costs: Stages):
        self.costs = costs
        within = np.argsort(costs.after_s, axis=1, kind="stable")
        self.before_s, self.serving_s, self.after_s = (
            np.take_along_axis(part, within, axis=1) for part in costs
        )
        self.events = np.argsort(self.after_s, axis=None, kind="stable")
        self.event_s = self.after_s.ravel()[self.events]
        # Sums of drops cancel: their error grows with the largest sum, not with what is left.
        finite = np.where(np.isfinite(self.serving_s), self.serving_s, 0.0)
        self.error_s = finite.max(axis=1).sum() * finite.size * 2.0**-51

    def least_rest(self, before_s) -> tuple[Floats, Floats]:
        """Per time t (B,) of the first barrier the least u + serving seconds and that u; inf if none."""
        within = self.before_s <= before_s[:, None, None]
        least = np.minimum.accumulate(np.where(within, self.serving_s, np.inf), axis=2)
        servable = np.isfinite(least)
        kept = np.where(servable, least, 0.0)
        drops = np.diff(kept, axis=2, prepend=0.0)
        serving_s = np.cumsum(drops.reshape(len(before_s), -1)[:, self.events], axis=1)
        # Before everybody has a cut the sum is not a round's.
        first = np.where(servable, self.after_s, np.inf).min(axis=2).max(axis=1)
        # Clients that share an event's time must all have had theirs.
        last_of_tie = np.append(self.event_s[1:] > self.event_s[:-1], True)
        open_ = (self.event_s >= first[:, None]) & last_of_tie & np.isfinite(self.event_s)
        total = np.where(open_, self.event_s + serving_s, np.inf)
        best = total.argmin(axis=1)
        return np.take_along_axis(total, best[:, None], axis=1)[:, 0], self.event_s[best]

    def cuts(self, before_s: float, after_s: float) -> NDArray[np.int64]:
        """Each client's cut with the least server work within both barriers."""
        within = (self.costs.before_s <= before_s) & (self.costs.after_s <= after_s)
        return np.where(within, self.costs.serving_s, np.inf).argmin(axis=1)


def _common_cut(costs: Stages) -> int:
    rounds_s = costs.before_s.max(axis=0) + costs.serving_s.sum(axis=0) + costs.after_s.max(axis=0)
    return int(rounds_s.argmin()) if np.isfinite(rounds_s).any() else len(rounds_s) - 1


def _random_cut(open_to, key) -> NDArray[np.int64]:
    draws = np.asarray(jax.random.uniform(key, (len(open_to),)))
    chosen = np.minimum((draws * open_to.sum(axis=1)).astype(int), open_to.sum(axis=1) - 1)
    return (np.cumsum(open_to, axis=1) == chosen[:, None] + 1).argmax(axis=1)
