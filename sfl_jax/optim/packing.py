"""Whole options of all clients that fit several budgets together, by going through what the prices leave.

The idea is that of `knapsack.least_need`, with more budgets. An option's regret is what it costs above the
client's cheapest at the prices. Only options whose regret fits what the budgets leave can be part of an
answer. Client by client, sums of every budget are kept that can still fit. Where there are two budgets, sums
that others undercut in both are dropped.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sfl_jax.optim.assignment import Choice, Options
from sfl_jax.optim.costs import Floats

MOST_STATES = 500_000  # that are made in all before it gives up


class Packed(NamedTuple):
    """A choice (K,) that fits; None where there is none, or it gave up."""

    choice: Choice | None
    gave_up: bool = False


def packed(options: Options, prices: Floats, error: float) -> Packed:
    """Options of all clients that fit every budget of 1, if there are some.

    prices: (2 E,); any will do, and the best are quickest.  error: what sums can be off by, relative.
    """
    costs, rows = options.costs(prices), np.arange(len(options.share))
    regret = costs - costs.min(axis=1, keepdims=True)
    slack = prices.sum() - costs.min(axis=1).sum() * (1 - error)
    kept = regret <= slack
    if not kept.any(axis=1).all():
        return Packed(None)
    # Clients with the closest choices come last: the sums are then many for a few clients only.
    closest = np.where(kept & (regret > 0), regret, np.inf).min(axis=1)
    is_open = kept.sum(axis=1) > 1
    order = np.flatnonzero(is_open)[np.argsort(-closest[is_open], kind="stable")]
    choice = costs.argmin(axis=1)
    start = options.usage(rows[~is_open], choice[~is_open]).sum(axis=0)[None]
    states = _States(start, np.zeros(1))
    ways = [_Ways.of(options, client, kept[client], regret[client]) for client in order.tolist()]
    rest = _rest([way.usage.min(axis=0) for way in ways], start.shape[1])
    came, made = [], 0
    for place, way in enumerate(ways):
        made += len(states.regret) * len(way.places)
        if made > MOST_STATES:
            return Packed(None, gave_up=True)
        grown = states.plus(way)
        fits = (grown.regret <= slack) & ((grown.loads + rest[place + 1]).max(axis=1) * (1 - error) <= 1)
        chosen = grown.undercut_by_none(np.flatnonzero(fits))
        if not len(chosen):
            return Packed(None)
        states = grown.take(chosen)
        came.append((chosen // len(way.places), way.places[chosen % len(way.places)]))
    state = int(states.loads.max(axis=1).argmin())
    if states.loads[state].max() * (1 - error) > 1:
        return Packed(None)
    for client, (before, place) in zip(order[::-1], came[::-1], strict=True):
        choice[client], state = place[state], before[state]
    return Packed(choice)


def _rest(least: list[Floats], budgets: int) -> Floats:
    """What the clients from each place on take at least (N + 1, 2 E)."""
    nothing = np.zeros((1, budgets))
    return np.append(np.cumsum(least[::-1], axis=0)[::-1], nothing, axis=0) if least else nothing


class _Ways(NamedTuple):
    """The options that one client has left: their places, what they take (N, 2 E), and their regret (N,)."""

    places: NDArray[np.intp]
    usage: Floats
    regret: Floats

    @classmethod
    def of(cls, options: Options, client: int, kept, regret) -> "_Ways":
        places = np.flatnonzero(kept)
        return cls(places, options.usage(np.full(len(places), client), places), regret[places])


class _States(NamedTuple):
    """Sums over the clients so far: of every budget (S, 2 E), and of regret (S,)."""

    loads: Floats
    regret: Floats

    def plus(self, way: _Ways) -> "_States":
        """Every state with every option of another client, state by state."""
        loads = (self.loads[:, None] + way.usage).reshape(-1, self.loads.shape[1])
        return _States(loads, (self.regret[:, None] + way.regret).ravel())

    def take(self, places) -> "_States":
        return _States(self.loads[places], self.regret[places])

    def undercut_by_none(self, places) -> NDArray[np.intp]:
        """Of sums of two budgets, those that no other undercuts in both, one of equals; of more, all."""
        used = np.flatnonzero(self.loads.any(axis=0))
        if len(used) != 2 or not len(places):
            return places
        first, second = self.loads[places][:, used].T
        order = np.lexsort((second, first))
        second = second[order]
        return places[order[second < np.minimum.accumulate(np.append(np.inf, second[:-1]))]]
