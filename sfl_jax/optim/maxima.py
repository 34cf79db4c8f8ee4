"""The columns with the least sum of maxima, by branch and bound on the values of the maxima.

Each client gets one column. The round is the sum of the columns' own costs (`alone_s`) and of several maxima
over clients, each of weight x seconds. Given a ceiling on every maximum, each client takes the column below
the ceilings with the least own cost. So the search is over ceilings, not columns.

A box is a floor and a ceiling for every maximum. Its bound is the sum of its floors and of the least own
costs below its ceilings. No round in the box is shorter. The box with the least bound is narrowed, then
halved. Narrowing

- drops a column if the round with it is no shorter than the best one, even with all other clients at their
  least;
- tries all values T of one maximum, with the other maxima at their floors and ceilings. A round with T takes
  at least T plus the own costs below T. Only those T stay with which the round can be shorter than the best
  one. The least such sum is a bound.
"""

import heapq
import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sfl_jax.optim.costs import Floats
from sfl_jax.optim.shares import rounding

TOLERANCE = 1e-9  # relative: boxes that could shorten the round by less are not searched
_ELEMENTS = 1 << 26  # (client, column, maximum) entries that the search may read: some seconds
_NARROWER = 0.7  # a box is narrowed again if its width shrank to less than this fraction
_TRIED = 4  # maxima per box whose values are all tried
_ABOVE = 1 + 2.0**-50  # because a ceiling divided by a weight may be rounded down


class Maximum(NamedTuple):
    """One maximum of weight x seconds for each row of weights (G, K), all of the same seconds (K, C)."""

    seconds: Floats  # inf where the column is forbidden
    weights: Floats


class Least(NamedTuple):
    """The best columns found (K,), their round (s), the proven bound (s), and how many boxes were tried."""

    columns: NDArray[np.integer]
    round_s: float
    bound_s: float
    looked: int


def least(
    maxima: list[Maximum],
    alone_s: Floats,
    starts: list[NDArray[np.integer]],
    round_s: Callable[[NDArray[np.integer]], float],
) -> Least:
    """The columns with the shortest round.

    alone_s: (K, C) s, inf where the column is forbidden; every client has an allowed one.
    starts: one or more choices of columns (K,) to begin with.
    round_s: gives the round of columns (K,), at least the sum of own costs and maxima. If it is that sum, the
    result is optimal to TOLERANCE unless the search gave up; the bound shows which.
    """
    search = _Search(maxima, alone_s, starts[0], round_s)
    for columns in starts[1:]:
        search.offer(columns)
    return search.run()


class _Box(NamedTuple):
    floors: Floats  # (I,)
    ceilings: Floats  # (I,)
    values: Floats  # (I,) the maxima if each client takes its column with the least own cost
    bound_s: float


class _Search:
    def __init__(self, maxima, alone_s, start, round_s):
        self.alone_s, self.round_s = alone_s, round_s
        self.best, self.best_s = start, round_s(start)
        # A maximum is the index of its seconds (K, C) among the kinds, and its weights (K,).
        self.kinds = [np.where(np.isfinite(alone_s), of.seconds, 0.0) for of in maxima]
        self.maxima = [(kind, weights) for kind, of in enumerate(maxima) for weights in of.weights]
        self.rows = np.arange(len(alone_s))
        self.columns = np.broadcast_to(np.arange(alone_s.shape[1]), alone_s.shape)
        self.orders: dict[int, _Order] = {}

    @property
    def enough_s(self) -> float:
        return self.best_s * (1 - TOLERANCE)

    def offer(self, columns) -> None:
        """Keeps columns (K,) if they are the best so far."""
        its_s = self.round_s(columns)
        if its_s < self.best_s:
            self.best, self.best_s = columns, its_s

    def is_point(self, box: _Box) -> bool:
        """Whether the box is too small to halve."""
        return bool((box.ceilings - box.floors).sum() <= 0.5 * TOLERANCE * self.best_s)

    def run(self) -> Least:
        ceilings = self.largest(seconds.max(axis=1) for seconds in self.kinds)
        size, each = self.alone_s.size, len(self.maxima)
        count, looked, elements = itertools.count(), 1, size * each
        boxes: list[tuple[float, int, _Box]] = []
        root = self.narrowed(np.zeros(len(ceilings)), ceilings)
        if root is not None:
            self.compact(root[1])
            boxes = [(root[0].bound_s, next(count), root[0])]
        while boxes and boxes[0][0] < self.enough_s and elements < _ELEMENTS:
            if self.is_point(boxes[0][2]):
                break  # no bound can be better; this happens if a round is longer than its sum of maxima
            for floors, ceilings in _halves(heapq.heappop(boxes)[2]):
                left = self.narrowed(floors, ceilings)
                looked, elements = looked + 1, elements + self.alone_s.size * each
                if left is not None:
                    heapq.heappush(boxes, (left[0].bound_s, next(count), left[0]))
        bound_s = min(self.enough_s, boxes[0][0] if boxes else np.inf)
        return Least(self.best, self.best_s, bound_s * (1 - 4 * rounding(size)), looked)

    def compact(self, open_) -> None:
        """Keeps only the open columns, moved to the left."""
        order = np.argsort(~open_, axis=1, kind="stable")[:, : int(open_.sum(axis=1).max())]

        def left(table):
            return np.take_along_axis(table, order, axis=1)

        self.alone_s = np.where(left(open_), left(self.alone_s), np.inf)
        self.columns, self.kinds = left(self.columns), [left(seconds) for seconds in self.kinds]
        self.orders = {}

    def narrowed(self, floors, ceilings) -> tuple[_Box, NDArray[np.bool_]] | None:
        """The narrowed box and its open columns; None if it holds no round shorter than the best."""
        floors, ceilings, open_ = floors.copy(), ceilings.copy(), np.isfinite(self.alone_s)
        while True:
            width = (ceilings - floors).sum()
            open_ &= self.below(ceilings)
            alone_s = np.where(open_, self.alone_s, np.inf)
            cheapest = alone_s.argmin(axis=1)
            least_s = alone_s[self.rows, cheapest]
            if not np.isfinite(least_s).all():
                return None
            self.offer(self.columns[self.rows, cheapest])
            floors = np.maximum(
                floors, self.largest(np.where(open_, seconds, np.inf).min(axis=1) for seconds in self.kinds)
            )
            base_s = least_s.sum()
            if base_s + floors.sum() >= self.enough_s:
                return None
            open_ &= base_s + floors.sum() + self.more_s(alone_s, least_s, floors) < self.enough_s
            if not open_.any(axis=1).all():
                return None
            highest = self.largest(np.where(open_, seconds, 0.0).max(axis=1) for seconds in self.kinds)
            ceilings = np.maximum(np.minimum(ceilings, highest), floors)
            values = self.largest(seconds[self.rows, cheapest] for seconds in self.kinds)
            bound_s = self.try_values(open_, base_s, floors, ceilings, values)
            if bound_s >= self.enough_s:
                return None
            if (ceilings - floors).sum() >= _NARROWER * width:
                return _Box(floors, ceilings, np.clip(values, floors, ceilings), bound_s), open_

    def try_values(self, open_, base_s, floors, ceilings, values) -> float:
        """Tries all values of the maxima whose `values` are furthest above their floors. Moves floors and
        ceilings in place and returns a bound on the box."""
        bound_s, alone_s = base_s + floors.sum(), np.where(open_, self.alone_s, np.inf)
        for one in np.argsort(floors - values)[:_TRIED].tolist():
            others_s = base_s + floors.sum() - floors[one]
            tried = self.order(one).tried(
                alone_s, float(floors[one]), float(ceilings[one]), self.enough_s - others_s
            )
            kind, weights = self.maxima[one]
            within = np.where(weights[:, None] * self.kinds[kind] <= tried.value, alone_s, np.inf)
            chosen = within.argmin(axis=1)
            if np.isfinite(within[self.rows, chosen]).all():
                self.offer(self.columns[self.rows, chosen])
            bound_s = max(bound_s, others_s + tried.least_s)
            if bound_s >= self.enough_s:
                break
            floors[one], ceilings[one] = tried.low, tried.high
        return float(bound_s)

    def largest(self, of_kinds) -> Floats:
        """The maxima (I,) of seconds (K,) of each kind."""
        of_kinds = list(of_kinds)
        return np.array([(weights * of_kinds[kind]).max() for kind, weights in self.maxima])

    def below(self, ceilings):
        """Which columns (K, C) are below all ceilings."""
        limits = [np.full(len(self.rows), np.inf) for _ in self.kinds]
        for (kind, weights), ceiling in zip(self.maxima, ceilings, strict=True):
            limit = np.divide(ceiling, weights, out=np.full(len(weights), np.inf), where=weights > 0)
            limits[kind] = np.minimum(limits[kind], limit * _ABOVE)
        pairs = zip(self.kinds, limits, strict=True)
        return np.logical_and.reduce([seconds <= limit[:, None] for seconds, limit in pairs])

    def more_s(self, alone_s, least_s, floors):
        """What each column (K, C) adds to the round if all other clients are at their least."""
        more_s = alone_s - least_s[:, None]
        for (kind, weights), floor in zip(self.maxima, floors, strict=True):
            more_s += np.maximum(weights[:, None] * self.kinds[kind] - floor, 0.0)
        return more_s

    def order(self, one: int) -> "_Order":
        if one not in self.orders:
            kind, weights = self.maxima[one]
            self.orders[one] = _Order(weights[:, None] * self.kinds[kind])
        return self.orders[one]


class _Tried(NamedTuple):
    least_s: float  # the least sum
    value: float  # the T that has it
    low: float
    high: float


class _Order:
    """The columns sorted by one maximum's values (K, C): within each client, and all together."""

    def __init__(self, values):
        self.within = np.argsort(values, axis=1, kind="stable")
        in_rows = np.take_along_axis(values, self.within, axis=1).ravel()
        self.events = np.argsort(in_rows, kind="stable")
        self.values = in_rows[self.events]

    def tried(self, alone_s, floor: float, ceiling: float, limit_s: float) -> _Tried:
        """Tries every T from floor to ceiling. Its sum is T plus what T as a ceiling adds to the own costs.

        low and high are the least and the largest T whose sum is below limit_s.
        """
        first, last = np.searchsorted(self.values, [floor, ceiling], side="right")
        least_s = np.minimum.accumulate(np.take_along_axis(alone_s, self.within, axis=1), axis=1)
        rises = np.full(least_s.shape, np.inf)
        with np.errstate(invalid="ignore"):  # inf - inf where no column has come yet
            np.subtract(least_s[:, :-1], least_s[:, 1:], out=rises[:, 1:])
        rises = rises.ravel()[self.events[first:last]]
        rises[np.isnan(rises)] = 0.0
        # Summed from the top: all terms have one sign, so nothing cancels.
        more_s = np.append(np.cumsum(rises[::-1])[::-1], 0.0)
        values = np.append(floor, self.values[first:last])
        total_s = values + more_s
        best = int(total_s.argmin())
        left = values[total_s < limit_s]
        low, high = (left[0], left[-1]) if len(left) else (floor, ceiling)
        return _Tried(float(total_s[best]), float(values[best]), float(low), float(high))


def _halves(box: _Box):
    """Splits the maximum furthest above its floor, in the middle between its floor and its value."""
    one = int((box.values - box.floors).argmax())
    if box.values[one] <= box.floors[one]:
        one, box = int((box.ceilings - box.floors).argmax()), box._replace(values=box.ceilings)
    middle = 0.5 * (box.floors[one] + box.values[one])
    ceilings, floors = box.ceilings.copy(), box.floors.copy()
    ceilings[one], floors[one] = middle, np.nextafter(middle, np.inf)
    return (box.floors, ceilings), (floors, box.ceilings)
