"""A server without constant shares: it works at full speed for one waiting client at a time.

A constant share is idle while its client computes or sends. Here each local step of a client is a job: its
smashed data arrive, the server works, the gradient goes back. The server works on the job of the client with
the longest remaining time. It interrupts a job if a client with a longer remaining time arrives (Jackson's
rule for one machine with tails). Such a round may end before the bound of constant shares.

The bound here holds for every schedule of the server. A client that ends by T with cut l has a(l) + w(l)/F <=
T. No work is possible before the first smashed data arrive. No work helps after the last gradient must have
left. So every round of T seconds has sum_k min{w_k(l) : a_k(l) + w_k(l)/F <= T} <= F (T - first arrival -
last way home). A T that breaks this is impossible. The search for cuts tries other cuts for the client that
ends last.
"""

import heapq
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int
from numpy.typing import ArrayLike

from sfl_jax.errors import BadInput
from sfl_jax.optim.costs import Terms
from sfl_jax.optim.infeasible import why_infeasible
from sfl_jax.optim.plan import Plan
from sfl_jax.optim.solve import solve

_SAFE = 1e-10  # relative, rounds times up or down: more than the rounding error of a sum over all jobs
_HALVINGS = 50
_MOST_JOBS = 100_000  # jobs that the search for cuts may simulate, besides one round for each start


class Sessions(NamedTuple):
    """The parts of each client's session; (K,) each, in seconds except `steps`."""

    first_s: Float64[np.ndarray, " K"]  # until the first smashed data are at the server
    serving_s: Float64[np.ndarray, " K"]  # a step at the server's full speed; 0 without work on the server
    between_s: Float64[np.ndarray, " K"]  # from a gradient's departure to the next smashed data's arrival
    last_s: Float64[np.ndarray, " K"]  # from the last gradient's departure to the end
    steps: Int[np.ndarray, " K"]

    @property
    def alone_s(self) -> np.ndarray:
        """Each session's seconds with the server to itself."""
        return self.first_s + self.steps * self.serving_s + (self.steps - 1) * self.between_s + self.last_s


def sessions(terms: Terms, server_flops: float, cuts: ArrayLike) -> Sessions:
    """The session of each client at its own column (K,), or of all clients at one column."""
    cuts = np.broadcast_to(cuts, terms.shape[0])
    with np.errstate(divide="ignore", invalid="ignore"):
        whole = terms.seconds(cuts, np.full(len(cuts), server_flops))
    steps = terms.steps
    up = (whole.client_forward + whole.smashed_up) / steps
    down = (whole.gradient_down + whole.client_backward) / steps
    return Sessions(
        whole.model_down + up, whole.server / steps, down + up, down + whole.model_up, steps.astype(np.int64)
    )


def ends_s(of: Sessions, present: Bool[np.ndarray, " K"] | None = None) -> Float64[np.ndarray, " K"]:
    """Each session's end (s), 0 for absent clients. An event simulation: the longest remaining job first."""
    here = np.ones(len(of.steps), bool) if present is None else present
    ends = np.where(here, of.alone_s, 0.0)
    cycle_s = (of.serving_s + of.between_s).tolist()
    first, serving, between, last, steps = (part.tolist() for part in of)
    busy = np.flatnonzero(here & (of.serving_s > 0)).tolist()
    arrivals = [(first[k], k, 0) for k in busy]  # (time, client, step)
    heapq.heapify(arrivals)
    waiting: list[tuple[float, int, int, float]] = []  # (-remaining after this job, client, step, work left)
    now = 0.0
    while arrivals or waiting:
        if not waiting:
            now = max(now, arrivals[0][0])
        while arrivals and arrivals[0][0] <= now:
            _, k, step = heapq.heappop(arrivals)
            heapq.heappush(waiting, (-((steps[k] - 1 - step) * cycle_s[k] + last[k]), k, step, serving[k]))
        urgency, k, step, left = heapq.heappop(waiting)
        until = now + left
        if arrivals and arrivals[0][0] < until:  # the arriving job may have a longer remaining time
            heapq.heappush(waiting, (urgency, k, step, until - arrivals[0][0]))
            now = arrivals[0][0]
            continue
        now = until
        if step + 1 < steps[k]:
            heapq.heappush(arrivals, (now + between[k], k, step + 1))
        else:
            ends[k] = now + last[k]
    return ends


def any_schedule_bound_s(
    terms: Terms, server_flops: float, present: Bool[np.ndarray, " K"] | None = None
) -> float:
    """A proven lower bound (s) on the round, for any cuts and any schedule of the server.

    Bisection in NumPy, O(K C) a step. 0 if no client is present, inf if a client cannot be served.
    """
    here = np.ones(terms.shape[0], bool) if present is None else np.asarray(present, bool)
    if not here.any():
        return 0.0
    some = terms.take(here)
    alone, work, first, last = (np.empty(some.shape) for _ in range(4))
    for cut in range(some.shape[1]):
        of, allowed = sessions(some, server_flops, cut), some.at(np.full(some.shape[0], cut))[2]
        alone[:, cut] = np.where(allowed & np.isfinite(of.alone_s), of.alone_s, np.inf)
        work[:, cut] = of.steps * of.serving_s
        first[:, cut], last[:, cut] = of.first_s, of.last_s
    # For each client, with its cuts sorted by their end: the least work among the cuts up to each.
    order = np.argsort(alone, axis=1)
    alone, work = np.take_along_axis(alone, order, axis=1), np.take_along_axis(work, order, axis=1)
    least = np.minimum.accumulate(np.where(np.isfinite(alone), work, np.inf), axis=1)
    uses = np.isfinite(alone) & (work > 0)
    first, last = (
        np.take_along_axis(part, order, axis=1)[uses].min(initial=np.inf) for part in (first, last)
    )
    low = alone[:, 0].max()
    if not np.isfinite(low):
        return float(np.inf)
    around = first + last if np.isfinite(first + last) else 0.0

    def is_too_short(time_s) -> bool:
        in_time = (alone <= time_s).sum(axis=1) - 1
        needed = least[np.arange(len(least)), in_time].sum()
        return bool(needed > 0 and needed > max(time_s - around, 0.0))

    high = low + work[:, 0].sum() + around
    if not is_too_short(low):
        return float(low * (1 - _SAFE))
    for _ in range(_HALVINGS):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if is_too_short(middle) else (low, middle)
    return float(low * (1 - _SAFE))


def solve_serving(terms: Terms, server_flops: float, present: ArrayLike | None = None) -> Plan:
    """A plan for a server that works for waiting clients, with a bound over all schedules; shares are NaN.

    server_flops: the server's FLOP/s.  present: (K,) bool; absent clients cost nothing.
    The search starts from the best cuts for constant shares, and from the cuts with the least work in time
    for the bound. The client that ends last takes the cut with the shortest round, until no cut helps.
    Infeasible names the clients that cannot be served. BadInput: server_flops is not above 0 and finite.
    """
    if not 0 < server_flops < np.inf:
        raise BadInput(f"server_flops={server_flops}: it must be above 0 and finite")
    clients, count = terms.shape
    here = np.ones(clients, bool) if present is None else np.asarray(present, bool)
    bound_s = any_schedule_bound_s(terms, server_flops, here)
    if not np.isfinite(bound_s):
        raise why_infeasible(terms, server_flops, here)
    columns = [sessions(terms, server_flops, cut) for cut in range(count)]
    allowed = np.stack([terms.at(np.full(clients, cut))[2] for cut in range(count)], axis=1)
    best = solve(terms, server_flops, present=here)
    starts = terms.columns(best.cuts, best.codecs), _least_work(columns, allowed, bound_s)
    tried = [_improved(columns, allowed, start, here, _MOST_JOBS // len(starts)) for start in starts]
    cuts, ends, _ = min(tried, key=lambda each: each[1].max(initial=0.0))
    cuts, codecs = terms.chosen(np.where(here, cuts, count - 1))
    ends = ends * (1 + _SAFE)
    looks = sum(each[2] for each in tried)
    shares = np.full(clients, np.nan)
    return Plan(cuts, shares, ends, float(ends.max(initial=0.0)), bound_s, looks, codecs)


def _least_work(columns, allowed, bound_s) -> Int[np.ndarray, " K"]:
    """Each client's cut with the least server work among those that end by the bound if served at once."""
    alone = np.stack([of.alone_s for of in columns], axis=1)
    work = np.stack([of.serving_s * of.steps for of in columns], axis=1)
    in_time = allowed & (alone <= max(bound_s * (1 + 2 * _SAFE), 0.0))
    soonest = np.where(allowed, alone, np.inf).argmin(axis=1)
    return np.where(in_time.any(axis=1), np.where(in_time, work, np.inf).argmin(axis=1), soonest)


def _improved(columns, allowed, cuts, here, most_jobs):
    """(cuts, ends, rounds simulated): the client that ends last takes its best cut, again and again."""
    table = Sessions(*(np.stack(parts, axis=1) for parts in zip(*columns, strict=True)))
    rows = np.arange(len(here))
    cuts = np.array(cuts, np.int64)

    def run(cuts):
        return ends_s(Sessions(*(part[rows, cuts] for part in table)), here)

    ends, looks, jobs = run(cuts), 1, int(table.steps[here, 0].sum())
    while here.any() and (looks + allowed.shape[1]) * jobs <= most_jobs:
        last = int(ends.argmax())
        others = [cut for cut in np.flatnonzero(allowed[last]) if cut != cuts[last]]
        trials = [np.where(rows == last, cut, cuts) for cut in others]
        results = [run(trial) for trial in trials]
        looks += len(trials)
        best = min(range(len(trials)), key=lambda i: results[i].max(), default=None)
        if best is None or results[best].max() >= ends.max():
            break
        cuts, ends = trials[best], results[best]
    return cuts, ends, looks
