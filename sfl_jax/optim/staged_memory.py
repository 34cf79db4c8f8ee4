"""The staged barrier where the server's memory is limited: branch and bound on the times of both barriers.

A box is an interval of times before the server and one of times after it. The columns within its latest times
make a knapsack (`knapsack.py`): the least server work that fits the memory. So no round in the box is shorter
than its earliest times and what the relaxation of that knapsack needs. The box with the least such bound is
halved, until no box can hold a shorter round. If that takes too many boxes, the plan's gap says what is left.
"""

import heapq
import itertools
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sfl_jax.optim import staged
from sfl_jax.optim.clocks import solve_clock
from sfl_jax.optim.costs import Floats, Terms
from sfl_jax.optim.knapsack import Columns, least_need, relaxed
from sfl_jax.optim.memory import check_fits, check_memory
from sfl_jax.optim.plan import Plan
from sfl_jax.optim.shares import SLACK, rounding

_TOLERANCE = 1e-9  # relative: boxes that could shorten the round by less are not halved
_ELEMENTS = 1 << 25  # of (client, column) that the search may look at: some seconds
_LEAST_BOXES = 30


def solve_staged_memory(
    terms: Terms, server_flops: float, server_memory_bytes: float, present: ArrayLike | None = None
) -> Plan:
    """Cuts that end a staged round soonest among those whose server halves fit the memory, and a bound.

    Infeasible names the present (K,) clients that no cut serves; BadInput says how many bytes are missing.
    """
    check_memory(server_memory_bytes)
    clients, count = terms.shape
    here = np.ones(clients, bool) if present is None else np.asarray(present, bool)
    plain = solve_clock(terms, server_flops, "exact", "staged", None, here)
    if terms.server_bytes[plain.cuts][here].sum() <= server_memory_bytes:
        return _in_cuts(terms, plain)
    check_fits(terms, server_flops, server_memory_bytes, here)
    table = staged.Stages(*(part[here] for part in staged.stages(terms, server_flops)))
    search = _Search(table, terms.server_bytes, server_memory_bytes)
    bound_s = max(search.run(), plain.bound_s)
    columns = np.full(clients, count - 1, np.int32)
    columns[here] = search.columns
    client_s = np.zeros(clients)
    client_s[here] = np.sum(search.at(search.columns), axis=0) * (1 + SLACK)
    round_s = search.round_s * (1 + 2 * rounding(clients))
    looked = plain.iterations + search.looked
    plan = Plan(columns, plain.shares, client_s, float(round_s), float(bound_s), looked)
    return _in_cuts(terms, plan)


def _in_cuts(terms: Terms, plan: Plan) -> Plan:
    cuts, codecs = terms.chosen(plan.cuts)
    return plan._replace(cuts=cuts, codecs=codecs)


class _Box(NamedTuple):
    """Places among the times of both barriers, first and last; `near` is where its knapsack may begin."""

    first: tuple[int, int]
    last: tuple[int, int]
    near: tuple[Columns, Columns] | None


class _Search:
    def __init__(self, table: staged.Stages, sizes: Floats, memory_bytes: float):
        self.table, self.sizes, self.memory_bytes = table, sizes, memory_bytes
        self.rows, self.looked = np.arange(len(table.before_s)), 0
        self.columns, self.round_s = self.rows, np.inf
        self.times = tuple(_times(part) for part in (table.before_s, table.after_s))

    def at(self, columns) -> staged.Stages:
        return staged.Stages(*(part[self.rows, columns] for part in self.table))

    def run(self) -> float:
        """Halves boxes until the best columns are the best, or enough was looked at; the proven bound."""
        count, size = itertools.count(), self.table.before_s.size
        boxes: list[tuple[float, int, _Box]] = []
        whole = _Box((0, 0), (len(self.times[0]) - 1, len(self.times[1]) - 1), None)
        pending = [whole]
        while True:
            for box in pending:
                bound_s, near = self.bound(box)
                heapq.heappush(boxes, (bound_s, next(count), box._replace(near=near)))
            least_s, _, box = heapq.heappop(boxes)
            is_done = least_s >= self.round_s * (1 - _TOLERANCE) or box.first == box.last
            if is_done or self.looked >= max(_ELEMENTS // size, _LEAST_BOXES):
                return min(least_s, self.round_s) * (1 - 4 * rounding(len(self.rows)))
            pending = self.halves(box)

    def halves(self, box: _Box) -> list[_Box]:
        """The box cut in two at the middle of its longer side."""
        sides = [times[last] - times[first] for times, first, last in zip(self.times, *box[:2], strict=True)]
        side = int(np.argmax(sides))
        times, first, last = self.times[side], box.first[side], box.last[side]
        middle = int(np.searchsorted(times, 0.5 * (times[first] + times[last]), side="right")) - 1
        middle = min(max(middle, first), last - 1)

        def other(ends, place):
            return (place, ends[1]) if side == 0 else (ends[0], place)

        return [box._replace(last=other(box.last, middle)), box._replace(first=other(box.first, middle + 1))]

    def bound(self, box: _Box):
        """What no round in the box is shorter than, and the ends of its knapsack's edge."""
        self.looked += 1
        from_s, to_s = ([times[at] for times, at in zip(self.times, ends, strict=True)] for ends in box[:2])
        within = (self.table.before_s <= to_s[0]) & (self.table.after_s <= to_s[1])
        needs = np.where(within, self.table.serving_s, np.inf)
        error, room = rounding(len(needs)), max(self.round_s - sum(from_s), 0.0)
        found = relaxed(needs, self.sizes, self.memory_bytes, room, error, near=box.near, settle=True)
        if found.is_too_much:
            return np.inf, None
        self.offer(found.inside)
        if box.first == box.last:
            best = least_need(needs, self.sizes, self.memory_bytes, room, error, found.price)
            if best.columns is not None:
                self.offer(best.columns)
            if not best.gave_up:
                return np.inf, None
        cost = (needs + found.price * self.sizes).min(axis=1).sum()
        near = (found.inside, found.outside) if found.price > 0 else None
        return float(sum(from_s) + max(cost - found.price * self.memory_bytes, 0.0)), near

    def offer(self, columns) -> None:
        """Keeps columns that fit the memory, if they are the best so far."""
        if self.sizes[columns].sum() <= self.memory_bytes:
            round_s = float(staged.round_seconds(self.at(columns)))
            if round_s < self.round_s:
                self.columns, self.round_s = columns, round_s


def _times(seconds: Floats) -> NDArray[np.float64]:
    """The times that a barrier can have, sorted: no earlier than the earliest at which all can be there."""
    times = np.unique(seconds[np.isfinite(seconds)])
    return times[times >= seconds.min(axis=1).max()]
