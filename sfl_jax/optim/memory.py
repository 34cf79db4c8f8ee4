"""The optimum where the server's memory is limited: it holds a copy of its half for every client it serves.

At a time T a client with a seconds off the server and w FLOP on it needs the share w / (T - a), and it takes
the bytes of its column. So T can be met if and only if some columns need no more than the server has of both.
That is the knapsack of `knapsack.py`. It never gets easier as T shrinks. So a T for which the knapsack, or
its relaxation, is too much bounds every plan from below.

The search has three steps:

1. The optimum without a limit. If it fits the memory, it is the answer, at no further cost.
2. The least T of the relaxation. A mixture that meets a guess ends at a time in closed form, often well
   before it.
3. Dynamic programming over the gap from there to the best whole columns. It first proves more from below,
   until it finds better columns, and then tries just below these, until there are none.
"""

from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool
from numpy.typing import ArrayLike

from sfl_jax.errors import BadInput
from sfl_jax.optim.costs import Costs, Floats, Terms
from sfl_jax.optim.infeasible import servable
from sfl_jax.optim.knapsack import Columns, least_need, relaxed
from sfl_jax.optim.plan import Plan
from sfl_jax.optim.shares import SLACK, optimal_shares, rounding
from sfl_jax.optim.solve import solve

TOLERANCE = 1e-9  # relative: columns that could shorten the round by less are not looked for
_TRIES = 60  # of the dynamic programming
_STEPS = 100
_QUICK = 0.25


def solve_memory(
    terms: Terms, server_flops: float, server_memory_bytes: float, present: ArrayLike | None = None
) -> Plan:
    """Cuts and shares that end a round soonest where the server holds its half for every client it serves.

    Session barrier. The plan is optimal to TOLERANCE, or its gap says how far it can be from that. Infeasible
    names the present (K,) clients that no cut serves; BadInput says how many bytes are missing.
    """
    check_memory(server_memory_bytes)
    clients, count = terms.shape
    here = np.ones(clients, bool) if present is None else np.asarray(present, bool)
    plain = solve(terms, server_flops, present=here)
    columns = terms.columns(plain.cuts, plain.codecs)
    if terms.server_bytes[columns][here].sum() <= server_memory_bytes:
        return plain
    check_fits(terms, server_flops, server_memory_bytes, here)
    costs = terms.take(here).costs()
    found = best_columns(costs, terms.server_bytes, server_flops, server_memory_bytes, plain.bound_s)
    columns = np.full(clients, count - 1, np.int32)
    columns[here] = found.columns
    return planned(terms, columns, server_flops, here, found.low_s, plain.iterations + found.passes)


def check_memory(server_memory_bytes: float) -> None:
    """BadInput for a limit that is none."""
    if not 0 < server_memory_bytes < np.inf:
        raise BadInput(f"server_memory_bytes={server_memory_bytes}: give a finite number of bytes, above 0")


def check_fits(
    terms: Terms, server_flops: float, server_memory_bytes: float, present: Bool[np.ndarray, " K"]
) -> None:
    """BadInput where not even the cuts that leave the server the fewest bytes fit its memory."""
    usable = servable(terms, server_flops)[present]
    least = np.where(usable, terms.server_bytes, np.inf).min(axis=1)
    if least.sum() > server_memory_bytes:
        served, missing = np.count_nonzero(least), least.sum() - server_memory_bytes
        raise BadInput(
            f"server_memory_bytes={server_memory_bytes:g}: {served} of {present.sum()} clients cannot train"
            f" alone, and their halves on the server take {least.sum():.4g} bytes or more;"
            f" {missing:.4g} bytes are missing"
        )


def planned(terms: Terms, columns, server_flops, present, bound_s, iterations) -> Plan:
    """The plan of given columns (K,) with the shares that are best for them."""
    fixed_s, work, _ = terms.at(columns)
    cpu = jax.local_devices(backend="cpu")[0]
    with jax.enable_x64(True), jax.default_device(cpu):
        parts = jax.tree.map(np.asarray, _shares(fixed_s, work, np.float64(server_flops), present))
    shares, ends_s, round_s = parts
    cuts, codecs = terms.chosen(columns)
    return Plan(cuts, shares, ends_s, float(round_s), float(bound_s), int(iterations), codecs)


_shares = jax.jit(optimal_shares)


class Found(NamedTuple):
    """Columns (K,) within the memory, a time by which none end, and the passes over the table it took."""

    columns: Columns
    low_s: float
    passes: int


def best_columns(
    costs: Costs, sizes: Floats, server_flops: float, memory_bytes: float, low_s: float
) -> Found:
    """The columns that end soonest. Some fit the memory.

    sizes: bytes, (C,), or (K, C) where they differ by client.  low_s: a time (s) by which none end.
    """
    search = _Search(costs, sizes, server_flops, memory_bytes, low_s)
    search.relax()
    search.close()
    return Found(search.columns, search.low_s, search.passes)


class _Search:
    """What is known: no columns end by `low_s`, and `columns` end at `end_s`."""

    def __init__(self, costs, sizes, server_flops, memory_bytes, low_s):
        usable = costs.allowed & ((costs.server_flop <= 0) | (server_flops > 0))
        self.fixed_s = np.where(usable, costs.fixed_s, np.inf)
        self.work, self.sizes = costs.server_flop, np.broadcast_to(sizes, usable.shape)
        self.server_flops, self.memory_bytes, self.low_s = server_flops, memory_bytes, low_s
        self.error = 4 * rounding(len(usable))
        self.rows, self.passes = np.arange(len(usable)), 0
        with np.errstate(divide="ignore", invalid="ignore"):
            alone_s = self.fixed_s + np.where(self.work > 0, self.work / server_flops, 0.0)
        few = np.where(np.isfinite(self.fixed_s), self.sizes, np.inf)
        few = few == few.min(axis=1, keepdims=True)
        self.columns = np.where(few, alone_s, np.inf).argmin(axis=1)
        self.end_s, self.near = self.ends(self.columns), None

    @property
    def tolerance(self) -> float:
        return 1e-12 + len(self.rows) * 1e-13

    def needs(self, time_s: float) -> Floats:
        """The share of each column (K, C), rounded down; inf where it cannot end by then."""
        left_s = (time_s - self.fixed_s) + SLACK * time_s
        with np.errstate(divide="ignore", invalid="ignore"):
            needs = np.where(self.work > 0, self.work / left_s, 0.0)
        return np.where((left_s > 0) | ((left_s >= 0) & (self.work <= 0)), needs, np.inf)

    def ends(self, columns) -> float:
        """When given columns end with the best shares."""
        return mixed_end_s(self.fixed_s[self.rows, columns], self.work[self.rows, columns], self.server_flops)

    def offer(self, columns) -> None:
        """Keeps columns that fit the memory, if they end sooner than the best so far."""
        taken = self.sizes[self.rows, columns].sum()
        if taken <= self.memory_bytes and (end_s := self.ends(columns)) < self.end_s:
            self.columns, self.end_s = columns, end_s

    def relaxed(self, time_s: float, *, settle: bool = False):
        found = relaxed(
            self.needs(time_s), self.sizes, self.memory_bytes, self.server_flops, self.error, near=self.near,
            settle=settle,
        )  # fmt: skip
        self.passes += found.passes
        if found.inside is not found.outside and 0 < found.price < np.inf:
            self.near = found.inside, found.outside
        return found

    def relax(self) -> None:
        """Raises low_s to the least time of the relaxation."""
        high_s, guess_s = self.end_s, 0.5 * (self.low_s + self.end_s)
        while high_s - self.low_s > self.tolerance * high_s and self.low_s < guess_s < high_s:
            before_s = high_s - self.low_s
            found = self.relaxed(guess_s)
            if found.is_too_much:
                self.low_s = guess_s
            else:
                self.offer(found.inside)
                high_s = min(guess_s, self.mixture_end_s(found))
            # A mixture that ends much sooner than was asked may be the best: is anything just below its end?
            quick = not found.is_too_much and high_s - self.low_s < _QUICK * before_s
            guess_s = high_s * (1 - 0.6 * self.tolerance) if quick else 0.5 * (self.low_s + high_s)

    def mixture_end_s(self, found) -> float:
        """When a mixture of two choices of columns ends with the best shares."""
        both = np.stack([found.inside, found.outside])
        parts = np.array([[found.part], [1 - found.part]]) * np.ones(len(self.rows))
        parts = np.where(both[0] == both[1], [[1.0], [0.0]], parts)
        used = parts > 0
        rows = np.broadcast_to(self.rows, both.shape)[used]
        work = parts[used] * self.work[rows, both[used]]
        return mixed_end_s(self.fixed_s[rows, both[used]], work, self.server_flops)

    def close(self) -> None:
        """Goes through the gap that whole columns leave, for better ones or a better bound."""
        part = 1 / (4 * len(self.rows))
        for _ in range(_TRIES):
            if self.end_s - self.low_s <= TOLERANCE * self.end_s:
                return
            below_s = self.end_s * (1 - 0.5 * TOLERANCE)
            time_s = min(below_s, self.low_s + part * (self.end_s - self.low_s))
            relaxation = self.relaxed(time_s, settle=True)
            if relaxation.is_too_much:
                self.low_s, part = time_s, 4 * part
                continue
            before_s = self.end_s
            self.offer(relaxation.inside)
            answer = least_need(
                self.needs(time_s),
                self.sizes,
                self.memory_bytes,
                self.server_flops,
                self.error,
                relaxation.price,
            )
            self.passes += 1
            if answer.gave_up:
                return
            elif answer.columns is None:
                self.low_s, part = time_s, 4 * part
            else:
                self.offer(answer.columns)
                if self.end_s >= before_s:  # equal but for rounding
                    return
                part = 1.0


def mixed_end_s(fixed_s: Floats, work: Floats, server_flops: float) -> float:
    """The least T with sum of work / (T - fixed_s) <= server_flops and no fixed_s after it; not rounded up.

    Newton's steps on 1 / sum, which is concave in T, approach from the left; see `shares.end_s`.
    """
    idle_s = float(fixed_s.max(initial=0.0))
    fixed_s, work = fixed_s[work > 0], work[work > 0]
    if not len(work):
        return idle_s
    time_s = float((fixed_s + work / server_flops).max()) * (1 + 2.0**-51)
    for _ in range(_STEPS):
        shares = work / (time_s - fixed_s)
        total, slope = shares.sum(), (shares / (time_s - fixed_s)).sum()
        step_s = total * (total / server_flops - 1) / slope
        time_s += max(step_s, 0.0)
        if step_s <= 2 * SLACK * time_s:
            break
    return max(time_s, idle_s)
