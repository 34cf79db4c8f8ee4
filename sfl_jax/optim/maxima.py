"""The cuts with the least sum of maxima: a branch and bound on the maxima's values.

Of every client one column is chosen. A round is the sum of what the chosen columns cost each by itself
(`alone_s`) and of some maxima over the clients, each of weight x seconds. Given a ceiling on every maximum, each
client takes the column that costs least alone among those below the ceilings. That is exact, so what is
searched are the ceilings.

A box is a floor and a ceiling for every maximum. No round in a box is shorter than its floors plus what the
columns below its ceilings cost alone at least. The best box is narrowed by what is known, then halved. Within
a box a column is dropped if even with it alone, all others at their least, the round is no shorter than the
best one known.
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
_ELEMENTS = 1 << 28  # of (client, column) that the search may look at: some seconds
_PASSES = 3  # that narrow a box
_ABOVE = 1 + 2.0**-50  # a ceiling divided by a weight may be rounded down


class Maximum(NamedTuple):
    """Maxima of the same seconds (K, C), one for each row of weights (G, K): max over k of weight x seconds."""

    seconds: Floats  # inf where the column is forbidden
    weights: Floats


class Least(NamedTuple):
    """The best columns found (K,), their round, the proven bound (s each), and the boxes looked at."""

    columns: NDArray[np.int64]
    round_s: float
    bound_s: float
    looked: int


class _Box(NamedTuple):
    floors: Floats  # (I,)
    ceilings: Floats  # (I,)
    bound_s: float
    cheapest: NDArray[np.int64]  # (K,) the columns that cost least alone
    open: NDArray[np.bool_]  # (K, C)


def least(
    maxima: list[Maximum],
    alone_s: Floats,
    starts: list[NDArray[np.int64]],
    round_s: Callable[[NDArray[np.int64]], float],
) -> Least:
    """The columns with the shortest round.

    alone_s: (K, C), inf where the column is forbidden; every client has one that is not.  starts: columns (K,)
    to begin with, at least one.  round_s: a round of columns (K,), no less than the sum of maxima; where it is
    that sum, the result is optimal to TOLERANCE unless the search runs out of looks: the bound says so.
    """
    search = _Search(maxima, alone_s, round_s)
    for columns in starts:
        search.offer(columns)
    return search.run()


class _Search:
    def __init__(self, maxima, alone_s, round_s):
        self.maxima, self.alone_s, self.round_s = maxima, alone_s, round_s
        self.best_s, self.best = np.inf, None
        self.columns = np.broadcast_to(np.arange(alone_s.shape[1]), alone_s.shape)
        ends = np.cumsum([len(of.weights) for of in maxima])
        self.slices = [slice(end - len(of.weights), end) for end, of in zip(ends, maxima, strict=True)]
        self.rows = np.arange(len(alone_s))

    def offer(self, columns) -> None:
        """Keeps a choice (K,) if it is the best so far."""
        its_s = self.round_s(columns)
        if its_s < self.best_s:
            self.best_s, self.best = its_s, columns

    @property
    def enough_s(self) -> float:
        return self.best_s * (1 - TOLERANCE)

    def run(self) -> Least:
        clients = len(self.alone_s)
        finite = np.isfinite(self.alone_s)
        tops = [
            (of.weights * np.where(finite, of.seconds, 0.0).max(axis=1)).max(axis=1) for of in self.maxima
        ]
        ceilings = np.concatenate(tops)
        count, looked, budget = itertools.count(), 1, _ELEMENTS
        boxes = []
        root = self.narrowed(np.zeros(len(ceilings)), ceilings)
        if root is not None:
            self.compact(root.open)
            root = self.narrowed(root.floors, root.ceilings)
        if root is not None:
            boxes = [(root.bound_s, next(count), root)]
        while boxes and boxes[0][0] < self.enough_s and budget > 0:
            for floors, ceilings in self.halves(heapq.heappop(boxes)[2]):
                box = self.narrowed(floors, ceilings)
                looked, budget = looked + 1, budget - self.alone_s.size
                if box is not None:
                    heapq.heappush(boxes, (box.bound_s, next(count), box._replace(open=None)))
        bound_s = min(self.enough_s, boxes[0][0] if boxes else np.inf) * (1 - 4 * rounding(clients))
        return Least(self.best, self.best_s, max(bound_s, 0.0), looked)

    def narrowed(self, floors, ceilings) -> _Box | None:
        """The box without what cannot be better than the best choice known; None where nothing is left."""
        open_ = np.isfinite(self.alone_s)
        for of, part in zip(self.maxima, self.slices, strict=True):
            limits = self.limits(of, ceilings[part])
            open_ &= of.seconds <= limits[:, None]
        floors, ceilings = floors.copy(), ceilings.copy()
        for _ in range(_PASSES):
            alone_s = np.where(open_, self.alone_s, np.inf)
            cheapest = alone_s.argmin(axis=1)
            least_s = alone_s[self.rows, cheapest]
            total_s = least_s.sum()
            if not np.isfinite(total_s):
                return None
            for of, part in zip(self.maxima, self.slices, strict=True):
                lowest = np.where(open_, of.seconds, np.inf).min(axis=1)
                floors[part] = np.maximum(floors[part], (of.weights * lowest).max(axis=1))
            bound_s = floors.sum() + total_s
            self.offer(self.columns[self.rows, cheapest])
            if bound_s >= self.enough_s:
                return None
            # What a column adds at least, to what all others cost at their least.
            more_s = alone_s - least_s[:, None]
            for of, part in zip(self.maxima, self.slices, strict=True):
                for weights, floor in zip(of.weights, floors[part], strict=True):
                    more_s = more_s + np.maximum(weights[:, None] * of.seconds - floor, 0.0)
            left = open_ & (bound_s + more_s < self.enough_s)
            if left.sum() == open_.sum():
                break
            open_ = left
        for of, part in zip(self.maxima, self.slices, strict=True):
            highest = np.where(open_, of.seconds, 0.0).max(axis=1)
            ceilings[part] = np.minimum(ceilings[part], (of.weights * highest).max(axis=1))
        ceilings = np.maximum(ceilings, floors)
        return _Box(floors, ceilings, float(bound_s), cheapest, open_)

    @staticmethod
    def limits(of, ceilings):
        with np.errstate(divide="ignore", invalid="ignore"):
            limits = np.where(of.weights > 0, ceilings[:, None] / of.weights, np.inf)
        return limits.min(axis=0) * _ABOVE

    def compact(self, open_) -> None:
        width = int(open_.sum(axis=1).max())
        order = np.argsort(~open_, axis=1, kind="stable")[:, :width]

        def take(x):
            return np.take_along_axis(x, order, axis=1)

        self.alone_s = np.where(take(open_), take(self.alone_s), np.inf)
        self.columns = take(self.columns)
        self.maxima = [of._replace(seconds=take(of.seconds)) for of in self.maxima]

    def halves(self, box):
        values = np.concatenate(
            [(of.weights * of.seconds[self.rows, box.cheapest]).max(axis=1) for of in self.maxima]
        )
        values = np.minimum(values, box.ceilings)
        widest = int((values - box.floors).argmax())
        floor, ceiling = box.floors[widest], values[widest]
        middle = 0.5 * (floor + ceiling)
        low, high = box.ceilings.copy(), box.floors.copy()
        low[widest] = middle
        high[widest] = np.nextafter(middle, np.inf)
        return (box.floors, low), (high, box.ceilings)
