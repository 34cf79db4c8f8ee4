"""A server that is not cut into shares but works, at full speed, for a client that waits.

A constant share lies idle while its client computes or sends. Here each local step of a client is a job: its
smashed data arrive, the server works, the gradient goes back. The server works on the job whose client has
the longest way to go, and leaves it for one that has longer (Jackson's rule for one machine with tails). Such
a round may end before the bound of constant shares.

The bound here holds for every way in which a server can work. Who ends by T with cut l has a(l) + w(l)/F
<= T. There is no work before the first smashed data arrive, and none is of use once the last gradient must
have left. So in every round of T seconds sum_k min{w_k(l) : a_k(l) + w_k(l)/F <= T} <= F (T - first arrival -
last way home), and a T that breaks this cannot be had. Cuts are found by trying others for the client that
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

_SAFE = 1e-10  # by which times are rounded down or up: more than any sum of so many jobs is off
_HALVINGS = 50
_MOST_JOBS = 100_000  # that the search for cuts may run through, besides one round for each start


class Sessions(NamedTuple):
    """What each client's session is made of; (K,) each, seconds but for `steps`."""

    first_s: Float64[np.ndarray, " K"]  # until the first smashed data are at the server
    serving_s: Float64[np.ndarray, " K"]  # of the whole server, a step; 0 where nothing is left to it
    between_s: Float64[np.ndarray, " K"]  # from a gradient's leaving to the next step's arrival
    last_s: Float64[np.ndarray, " K"]  # from the last gradient's leaving to the end
    steps: Int[np.ndarray, " K"]

    @property
    def alone_s(self) -> np.ndarray:
        """How long each lasts with the server to itself."""
        return self.first_s + self.steps * self.serving_s + (self.steps - 1) * self.between_s + self.last_s


def sessions(terms: Terms, server_flops: float, cuts: ArrayLike) -> Sessions:
    """The sessions of each client at its own cut (or column of options) (K,), or of all at one."""
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
    """When each session ends, 0 of absent clients: event by event, the longest remaining job first."""
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
        if arrivals and arrivals[0][0] < until:  # somebody comes, who may have longer to go
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
    """A proven lower bound on the round, whatever the cuts and whenever the server works for whom.

    O(K C) a look, in NumPy; 0 where nobody is present, inf where somebody cannot be served.
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
    # Once for each client, sorted by when its cuts end: the least work of those that are in time.
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
    """Cuts for a server that works for whoever waits, and the bound of every schedule; shares are NaN.

    Starts from the cuts that are best for constant shares, and from those that are best for the bound. The
    client that ends last takes whichever cut lets the round end soonest, until none helps.
    Infeasible names the clients that cannot be served; BadInput a server of none.
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
    """Each client's cut that leaves the server least and ends by the bound if it is served at once."""
    alone = np.stack([of.alone_s for of in columns], axis=1)
    work = np.stack([of.serving_s * of.steps for of in columns], axis=1)
    in_time = allowed & (alone <= max(bound_s * (1 + 2 * _SAFE), 0.0))
    soonest = np.where(allowed, alone, np.inf).argmin(axis=1)
    return np.where(in_time.any(axis=1), np.where(in_time, work, np.inf).argmin(axis=1), soonest)


def _improved(columns, allowed, cuts, here, most_jobs):
    """(cuts, ends, rounds tried) after the last one has tried all its cuts, again and again."""
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
