"""The columns with the least sum of maxima over steps, by branch and bound on linear programs.

`maxima.py` searches the same with bounds that cost little and say little once there are many maxima. Here
each kind of seconds is a chain of maxima U_1 >= U_2 >= ... over clients with at least so many steps: U_g
counts for the steps that end the clients of level g. A client at level g takes only columns below U_g.

A box is a floor and a ceiling for every U. Its linear program lets a client mix its columns. Multipliers
y >= 0 of the rows "seconds of client k <= U of its level" come from HiGHS. Any such y, right or wrong, gives
a bound: each client's least own cost plus y x seconds, and each U at its floor or its ceiling, by the sign of
what y leaves of its cost. So the bound is proven here, with its rounding, and not by HiGHS. A column that
would lift the bound above the best round is dropped. The box with the least bound is halved.
"""

import heapq
import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy.optimize import linprog

from sfl_jax.optim.costs import Floats
from sfl_jax.optim.maxima import TOLERANCE, Least
from sfl_jax.optim.shares import rounding

LARGEST = 1 << 15  # (client, column, kind) entries of the first program; more take too long
_ENTRIES = 1 << 22  # of all programs together: some seconds
_ABOVE = 1 + 2.0**-50
_FEWER = 0.8  # a box is solved again if fewer than this part of its columns are left
_LOOSER = 1.0, 1.05, 1.2  # factors on the U of a program within which clients choose


class Chain(NamedTuple):
    """One kind of seconds: a step's, of each client and column. Level g counts `steps[g]` times.

    Raising a level never lowers the number of steps: the maximum at g is over clients of level g and above.
    """

    seconds: Floats  # (K, C), inf where the column is forbidden
    level: NDArray[np.integer]  # (K,)
    steps: Floats  # (G,)


def least(
    chains: list[Chain],
    alone_s: Floats,
    start: Least,
    round_s: Callable[[NDArray[np.integer]], float],
) -> Least:
    """The columns with the shortest round; the arguments are those of `maxima.least`.

    start: what another search found. The result has its columns or better ones, and its bound or a higher
    one.
    """
    search = _Search(chains, alone_s, start, round_s)
    bound_s = search.run()
    return Least(search.best, search.best_s, max(bound_s, start.bound_s), start.looked + search.looked)


class _Box(NamedTuple):
    bound_s: float
    open_: NDArray[np.bool_]  # (K, C)
    floors: list[Floats]  # (G,) of each chain
    ceilings: list[Floats]
    values: list[Floats]  # the U of its program
    columns: NDArray[np.integer]  # (K,) those of which the program takes most


class _Solved(NamedTuple):
    bound_s: float
    more_s: Floats  # (K, C) what a column adds to the bound
    values: list[Floats]
    columns: NDArray[np.integer]


class _Search:
    def __init__(self, chains, alone_s, start, round_s):
        self.allowed, self.round_s = np.isfinite(alone_s), round_s
        self.alone_s = np.where(self.allowed, alone_s, 0.0)
        self.chains = [one._replace(seconds=np.where(self.allowed, one.seconds, 0.0)) for one in chains]
        self.best, self.best_s = start.columns, start.round_s
        self.rows, self.looked, self.entries = np.arange(len(alone_s)), 0, 0

    @property
    def enough_s(self) -> float:
        return self.best_s * (1 - TOLERANCE)

    def offer(self, columns) -> None:
        its_s = self.round_s(columns)
        if its_s < self.best_s:
            self.best, self.best_s = columns, its_s

    def run(self) -> float:
        """Searches, and returns a bound."""
        floors = [np.zeros(len(one.steps)) for one in self.chains]
        ceilings = [np.full(len(one.steps), np.inf) for one in self.chains]
        count, boxes = itertools.count(), []

        def add(box, least_s):
            if box is not None:
                heapq.heappush(boxes, (max(box.bound_s, least_s), next(count), box))

        add(self.narrowed(self.allowed, floors, ceilings), 0.0)
        while boxes and boxes[0][0] < self.enough_s and self.entries < _ENTRIES:
            halves = self.halves(boxes[0][2])
            if halves is None:
                break
            bound_s, _, box = heapq.heappop(boxes)
            for limits in halves:
                add(self.narrowed(box.open_, *limits), bound_s)
        return min(self.enough_s, boxes[0][0] if boxes else np.inf)

    def narrowed(self, open_, floors, ceilings) -> _Box | None:
        """The narrowed box; None if it holds no round shorter than the best."""
        while True:
            for one, limits in zip(self.chains, ceilings, strict=True):
                open_ = open_ & (one.seconds <= (limits[one.level] * _ABOVE)[:, None])
            if not open_.any(axis=1).all():
                return None
            lowest = self.maxima([np.where(open_, one.seconds, np.inf).min(axis=1) for one in self.chains])
            highest = self.maxima([np.where(open_, one.seconds, 0.0).max(axis=1) for one in self.chains])
            floors = [_from_top(np.maximum(a, b)) for a, b in zip(floors, lowest, strict=True)]
            ceilings = [
                np.minimum.accumulate(np.minimum(a, b)) for a, b in zip(ceilings, highest, strict=True)
            ]
            if any((a > b * _ABOVE).any() for a, b in zip(floors, ceilings, strict=True)):
                return None
            ceilings = [np.maximum(a, b) for a, b in zip(floors, ceilings, strict=True)]
            before = open_.sum()
            solved = self.solved(open_, floors, ceilings)
            open_ = open_ & (solved.bound_s + solved.more_s < self.enough_s)
            if solved.bound_s >= self.enough_s or not open_.any(axis=1).all():
                return None
            if open_.sum() > _FEWER * before:
                return _Box(solved.bound_s, open_, floors, ceilings, solved.values, solved.columns)

    def maxima(self, of_clients) -> list[Floats]:
        """Each chain's maxima (G,) of seconds (K,)."""
        found = []
        for one, seconds in zip(self.chains, of_clients, strict=True):
            values = np.zeros(len(one.steps))
            np.maximum.at(values, one.level, seconds)
            found.append(_from_top(values))
        return found

    def solved(self, open_, floors, ceilings) -> _Solved:
        """The program of a box, and the bound of its multipliers. Offers columns near its solution."""
        who, what = np.nonzero(open_)
        costs, program, floors, ceilings = self.program(who, what, floors, ceilings)
        self.looked, self.entries = self.looked + 1, self.entries + program.nnz
        size, count = len(who), sum(len(self.rows) + len(one.steps) - 1 for one in self.chains)
        one_each = sp.csr_matrix((np.ones(size), (who, np.arange(size))), (len(self.rows), len(costs)))
        bounds = np.stack([np.append(np.zeros(size), floors), np.append(np.full(size, np.inf), ceilings)], 1)
        found = linprog(
            costs, program, np.zeros(count), one_each, np.ones(len(self.rows)), bounds, "highs-ds"
        )
        y, x = np.zeros(count), np.append(np.zeros(size), ceilings)
        if found.status == 0:
            y, x = np.maximum(-found.ineqlin.marginals, 0.0), found.x
        left = costs + program.T @ y
        spent_s = np.full(open_.shape, np.inf)
        spent_s[open_] = left[:size]
        own_s, of_u = spent_s.min(axis=1), left[size:]
        # Sums of the clients' terms have one sign. What is left of the cost of a U is a difference.
        terms = np.where(of_u > 0, of_u * floors, of_u * ceilings)
        doubt_s = own_s.sum() + ((costs + abs(program).T @ y)[size:] * ceilings).sum()
        bound_s = float(own_s.sum() + terms.sum() - 8 * rounding(open_.size) * doubt_s)
        ends = np.cumsum([len(one.steps) for one in self.chains])[:-1]
        values = np.split(x[size:], ends)
        shares = np.zeros(open_.shape)
        shares[open_] = x[:size]
        columns = np.where(open_, shares, -1.0).argmax(axis=1)
        self.offer(columns)
        self.offer(spent_s.argmin(axis=1))
        for factor in _LOOSER:
            self.offer(self.cheapest_below(open_, values, factor))
        return _Solved(bound_s, spent_s - own_s[:, None], values, columns)

    def program(self, who, what, floors, ceilings):
        """(costs, rows of which none may be above 0, floors and ceilings of all U).

        Variables: a share for each open column, then the U. Rows: seconds less U for each client, and U_g+1
        less U_g.
        """
        size, clients = len(who), len(self.rows)
        costs, rows, columns, values = [self.alone_s[who, what]], [], [], []
        first, row = size, 0
        for one in self.chains:
            levels = len(one.steps)
            below = np.arange(levels - 1)
            rows += [row + who, row + self.rows, *2 * [row + clients + below]]
            columns += [np.arange(size), first + one.level, first + below + 1, first + below]
            values += [
                one.seconds[who, what],
                np.full(clients, -1.0),
                np.ones(levels - 1),
                -np.ones(levels - 1),
            ]
            costs.append(one.steps)
            row, first = row + clients + levels - 1, first + levels
        values, rows, columns, costs = map(np.concatenate, (values, rows, columns, costs))
        program = sp.csr_matrix((values, (rows, columns)), (row, first))
        return costs, program, np.concatenate(floors), np.concatenate(ceilings)

    def cheapest_below(self, open_, values, factor):
        """Each client's open column with the least own cost below `factor` times the U of its levels."""
        below = open_.copy()
        for one, limits in zip(self.chains, values, strict=True):
            below &= one.seconds <= (factor * _ABOVE * limits[one.level])[:, None]
        below = np.where(below.any(axis=1)[:, None], below, open_)
        return np.where(below, self.alone_s, np.inf).argmin(axis=1)

    def halves(self, box: _Box):
        """Limits of two boxes; None if the box is too small. Splits the U that most falls short of what the
        program's columns need.
        """
        needed = self.maxima([one.seconds[self.rows, box.columns] for one in self.chains])
        short = [
            one.steps * (need - value)
            for one, need, value in zip(self.chains, needed, box.values, strict=True)
        ]
        chain, level = _largest(short)
        middle = 0.5 * (needed[chain][level] + box.values[chain][level])
        if not box.floors[chain][level] <= middle < box.ceilings[chain][level]:
            widths = [
                one.steps * (high - low)
                for one, high, low in zip(self.chains, box.ceilings, box.floors, strict=True)
            ]
            chain, level = _largest(widths)
            if widths[chain][level] <= 0.1 * TOLERANCE * self.best_s:
                return None
            middle = 0.5 * (box.floors[chain][level] + box.ceilings[chain][level])
        floors, ceilings = ([one.copy() for one in of] for of in (box.floors, box.ceilings))
        ceilings[chain][level], floors[chain][level] = middle, np.nextafter(middle, np.inf)
        return (box.floors, ceilings), (floors, box.ceilings)


def _from_top(values: Floats) -> Floats:
    """The maxima from each level upwards."""
    return np.maximum.accumulate(values[::-1])[::-1]


def _largest(of_chains) -> tuple[int, int]:
    """(chain, level) of the largest number."""
    chain = int(np.argmax([one.max() for one in of_chains]))
    return chain, int(of_chains[chain].argmax())
