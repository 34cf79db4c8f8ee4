"""One column for each client: the least need in all, within a limit on bytes.

needs (K, C) are what the columns take of one budget, sizes are bytes, which are whole numbers: (C,), or (K,
C) where they differ by client. This is a multiple-choice knapsack. A price p of a byte bounds it from below:
no columns within the limit need less than sum_k min_c (need + p size) - p limit. `relaxed` finds the best
price: it is the slope of the lower hull of (bytes, need) at the limit, and the two ends of that edge are
columns that differ by little. `least_need` then searches the gap that whole columns leave. Only columns whose
regret, what they cost above the client's cheapest at that price, fits the gap can be part of an answer, so
few clients have a choice left.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sfl_jax.optim.costs import Floats

MOST_STATES = 1_000_000  # that `least_need` keeps in all before it gives up
_MOST_STEPS = 200  # along the hull
_FLAT = 1 - 1e-13  # a hull's edge that nothing is below by more, relative

Columns = NDArray[np.intp]


class Relaxed(NamedTuple):
    """What the best price of a byte says of columns within a limit and a room.

    is_too_much: proven that none within the limit need no more than the room; the others are then not final.
    inside, outside: the ends of the hull's edge (K,), within the limit and beyond it; equal where the limit
      does not matter. part: how much of `inside` a mixture of the two that fills the limit has.
    """

    is_too_much: bool
    price: float  # inf where bytes alone are too many
    inside: Columns
    outside: Columns
    part: float
    passes: int


def relaxed(
    needs: Floats,
    sizes: Floats,
    limit: float,
    room: float,
    error: float,
    *,
    near: tuple[Columns, Columns] | None = None,
    settle: bool = False,
) -> Relaxed:
    """The relaxation at the best price of a byte, or at one that is enough to tell.

    error: what sums of needs can be off by, relative.  near: columns within the limit and beyond it to start
    from, say the ends of the edge for needs that are nearly these.  settle: find the best price, even where
    the mixture is known to fit the room.
    """
    rows, sizes = np.arange(len(needs)), np.broadcast_to(sizes, needs.shape)

    def loads(columns):
        return needs[rows, columns].sum(), sizes[rows, columns].sum()

    inside, outside = near or (_smallest(needs, sizes), needs.argmin(axis=1))
    (need_in, bytes_in), (need_out, bytes_out) = loads(inside), loads(outside)
    if near and not np.isfinite(need_in + need_out):
        return relaxed(needs, sizes, limit, room, error, settle=settle)
    if not near:
        if not np.isfinite(need_out) or need_out * (1 - error) > room:
            return Relaxed(True, 0.0, inside, outside, 0.0, 2)
        if bytes_in > limit:
            return Relaxed(True, np.inf, inside, outside, 1.0, 2)
        if bytes_out <= limit:
            return Relaxed(False, 0.0, outside, outside, 1.0, 2)
    price, part, passes = 0.0, 0.0, 2
    for passes in range(3, _MOST_STEPS):
        price = max((need_in - need_out) / (bytes_out - bytes_in), 0.0)
        part = (bytes_out - limit) / (bytes_out - bytes_in)
        if not settle and part * need_in + (1 - part) * need_out <= room:
            return Relaxed(False, price, inside, outside, part, passes)
        columns = (needs + price * sizes).argmin(axis=1)
        need, taken = loads(columns)
        value = need + price * taken
        if value * (1 - error) > room + price * limit:
            return Relaxed(True, price, inside, outside, part, passes)
        if value >= (need_in + price * bytes_in) * _FLAT:
            break
        if taken > limit:
            outside, need_out, bytes_out = columns, need, taken
        else:
            inside, need_in, bytes_in = columns, need, taken
    return Relaxed(False, price, inside, outside, part, passes)


def _smallest(needs: Floats, sizes: Floats) -> Columns:
    """The columns with the fewest bytes, of these the least need."""
    taken = np.where(np.isfinite(needs), sizes, np.inf)
    return np.where(taken == taken.min(axis=1, keepdims=True), needs, np.inf).argmin(axis=1)


class Searched(NamedTuple):
    """columns (K,) with the least need within limit and room; None where there are none, or it gave up."""

    columns: Columns | None
    gave_up: bool = False


def least_need(
    needs: Floats, sizes: Floats, limit: float, room: float, error: float, price: float
) -> Searched:
    """The columns with the least need among all within the limit and the room, by dynamic programming.

    price: of a byte; any will do, and the best is quickest. Client by client, sums of (bytes, need) are kept
    that no other undercuts in both and that the cheapest choices of the rest do not take over the limit, the
    room, or both together at the price.
    """
    rows, sizes = np.arange(len(needs)), np.broadcast_to(sizes, needs.shape)
    cost = needs + price * sizes
    regret = cost - cost.min(axis=1, keepdims=True)
    slack = room + price * limit - cost.min(axis=1).sum() * (1 - error)
    kept = regret <= slack
    if not kept.any(axis=1).all():
        return Searched(None)
    only = kept.sum(axis=1) == 1
    columns = np.where(kept, cost, np.inf).argmin(axis=1)
    need, taken = needs[rows, columns][only].sum(), sizes[rows, columns][only].sum()
    if taken > limit or need * (1 - error) > room:
        return Searched(None)
    # Clients with the closest choices come last: the sums are then many for a few clients only.
    closest = np.where(kept & (regret > 0), regret, np.inf).min(axis=1)
    open_to = np.flatnonzero(~only)
    open_to = open_to[np.argsort(-closest[open_to], kind="stable")]
    states = _States(np.array([need]), np.array([taken]), np.zeros(1))
    least = (
        np.where(kept, needs, np.inf).min(axis=1)[open_to],
        np.where(kept, sizes, np.inf).min(axis=1)[open_to],
    )
    rest_need, rest_bytes = (part[::-1].cumsum()[::-1] for part in least)
    came, looked = [], 0
    for place, client in enumerate(open_to):
        options = np.flatnonzero(kept[client])
        later_need, later_bytes = (np.append(rest[place + 1 :], 0.0)[0] for rest in (rest_need, rest_bytes))
        grown = states.plus(needs[client, options], sizes[client, options], regret[client, options])
        fits = (grown.taken + later_bytes <= limit) & (grown.regret <= slack)
        fits &= (grown.need + later_need) * (1 - error) <= room
        chosen = grown.undercut_by_none(np.flatnonzero(fits))
        if not len(chosen):
            return Searched(None)
        looked += len(chosen)
        if looked > MOST_STATES:
            return Searched(None, gave_up=True)
        states = grown.take(chosen)
        came.append((chosen // len(options), options[chosen % len(options)]))
    state = int(states.need.argmin())
    for client, (before, option) in zip(open_to[::-1], came[::-1], strict=True):
        columns[client], state = option[state], before[state]
    return Searched(columns)


class _States(NamedTuple):
    """Sums over the clients so far; (S,) each."""

    need: Floats
    taken: Floats
    regret: Floats

    def plus(self, need, taken, regret) -> "_States":
        """Every state with every option of another client, state by state."""
        return _States(*((a[:, None] + b).ravel() for a, b in zip(self, (need, taken, regret), strict=True)))

    def take(self, places) -> "_States":
        return _States(*(part[places] for part in self))

    def undercut_by_none(self, places) -> NDArray[np.intp]:
        """Those of some states that no other of them undercuts in bytes and need; one of equals."""
        order = places[np.lexsort((self.need[places], self.taken[places]))]
        need = self.need[order]
        before = np.minimum.accumulate(np.append(np.inf, need[:-1])) if len(need) else need
        return order[need < before]
