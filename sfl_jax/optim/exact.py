"""The optimum over all cuts and shares, and its proof.

need(T) is the sum over clients of the least share with which a client ends by T, with any of its cuts.
need(T) never rises with T, and T can be met if and only if need(T) <= F. So the optimum is where need crosses
F. The largest T that is known not to be met is a lower bound for every method.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sfl_jax.optim.shares import SLACK, end_s, rounding
from sfl_jax.optim.table import FEW, MANY, Needed, least, sweep, table

_PASSES = 200
_SAMPLE, _HALVINGS = 1 << 12, 12


class Optimum(NamedTuple):
    """The cuts (K,) int32 that end soonest, the proven bound () s, and the number of passes over cuts ()."""

    cuts: jax.Array
    bound_s: jax.Array
    iterations: jax.Array


class _Search(NamedTuple):
    low_s: jax.Array  # cannot be met
    low_need: jax.Array
    met_s: jax.Array  # the least time tried that can be met
    met_need: jax.Array
    high_s: jax.Array  # the round of the best cuts so far with their best shares
    cuts: jax.Array
    guess_s: jax.Array
    closing: jax.Array  # whether the guess is just below high_s, to close the bracket
    hopeful: jax.Array  # whether no such guess has failed
    side: jax.Array  # guesses in a row on one side; positive if they could not be met
    slow: jax.Array  # guesses in a row that did not halve the bracket
    passes: jax.Array


def exact(costs, server_flops, present, block: int | None = None, needed: Needed | None = None) -> Optimum:
    """Optimal cuts and the proven bound.

    costs: Costs or Terms.  server_flops: () FLOP/s.  present: (K,) bool.  block: see `sweep`.
    needed: for Terms, the cuts to try (of `needed_cuts`); None tries all.

    A pass at a guess T either proves that T cannot be met or gives cuts that meet it. `end_s` gives the best
    round of these cuts. If they are optimal, a guess just below that round closes the bracket. This takes two
    or three passes if clients share the server. If many clients could equally well train alone, each pass
    moves only a few of them off the server. A bracketed secant on log need is then faster.

    The bound holds despite rounding. Seconds off the server are exact to a few units in the last place of T,
    shares to a few of their own. A share grows by at least e, relative, when T shrinks by e. So if need is
    too large at T in float64, with SLACK on T and `rounding` on the sum, it is too large at T (1 - 8
    rounding).
    """
    clients, count = costs.shape
    swept = table(costs, needed)
    error = rounding(clients)
    tolerance = 1e-12 + clients * 1e-13
    least_s = jnp.max(jnp.where(present, _ends_alone(swept, costs, server_flops), 0.0))

    def wide(at: _Search):
        open_ = at.high_s - at.low_s > tolerance * at.high_s
        return (open_ & (at.passes < _PASSES)) | (at.passes == 0)

    def step(at: _Search) -> _Search:
        cuts = _best_cuts(swept, costs.shape, at.guess_s, block)
        need, frozen_s, shared = _tried(costs, cuts, at.guess_s, server_flops, present)
        met = need <= server_flops * (1 - error)
        low_s, low_need = _either(met, (at.low_s, at.low_need), (at.guess_s, need))
        met_s, met_need = _either(met, (at.guess_s, need), (at.met_s, at.met_need))
        high_s = jnp.minimum(jnp.minimum(at.high_s, met_s), frozen_s)
        kept = jnp.where((high_s < at.high_s) | (at.passes == 0), cuts, at.cuts)
        side = jnp.where(met, jnp.minimum(at.side, 0) - 1, jnp.maximum(at.side, 0) + 1)
        slow = jnp.where(high_s - low_s > 0.5 * (at.high_s - at.low_s), at.slow + 1, 0)
        hopeful = at.hopeful & ~(at.closing & met)

        below_s = high_s * (1 - 0.6 * tolerance)
        width_s, middle_s = high_s - low_s, 0.5 * (low_s + high_s)
        # Illinois rule: an end of the bracket that stays counts less each time, else the secant creeps.
        low, high = jnp.log(low_need / server_flops), jnp.log(met_need / server_flops)
        low, high = low * 2.0 ** jnp.minimum(side + 1, 0), high * 2.0 ** -jnp.maximum(side - 1, 0)
        secant_s = jnp.minimum(low_s + (met_s - low_s) * (low / (low - high)), below_s)
        secant_s = jnp.clip(secant_s, low_s + 0.02 * width_s, high_s - 0.02 * width_s)
        close = ~met & (width_s < 1e-3 * (met_s - low_s)) & jnp.isfinite(met_s)
        closing = shared & (hopeful | close) & (slow < 3)
        guess_s = jnp.where(closing, below_s, jnp.where(slow < 3, secant_s, middle_s))
        inside = (guess_s > low_s) & (guess_s < high_s)
        return _Search(
            low_s, low_need, met_s, met_need, high_s, kept, jnp.where(inside, guess_s, middle_s),
            closing & inside, hopeful | close, side, jnp.where(slow < 3, slow, 0), at.passes + 1,
        )  # fmt: skip

    start = _Search(
        low_s=least_s,
        low_need=clients * server_flops,  # an upper bound: no client needs more than the server at least_s
        met_s=jnp.asarray(jnp.inf),
        met_need=jnp.zeros(()),
        high_s=jnp.asarray(jnp.inf),
        cuts=jnp.full(clients, count - 1, jnp.int32),
        guess_s=jnp.maximum(_sampled_s(costs, server_flops, present), least_s * (1 + 0.25 * tolerance)),
        closing=jnp.asarray(False),
        hopeful=jnp.asarray(True),
        side=jnp.int32(0),
        slow=jnp.int32(0),
        passes=jnp.int32(0),
    )
    end = lax.while_loop(wide, step, start)
    cuts = jnp.where(present, end.cuts, jnp.int32(count - 1))
    return Optimum(cuts, end.low_s * (1 - 8 * error), end.passes)


def _tried(costs, cuts, time_s, server_flops, present):
    """For cuts chosen to end by time_s: the FLOP/s they need, their round (s) with the best shares, and
    whether clients on the server end last."""
    fixed_s, work, allowed = lax.optimization_barrier(costs.at(cuts))
    busy = present & (work > 0)
    work = jnp.where(busy, work, 0.0)
    in_time = jnp.all(~present | (allowed & (fixed_s <= time_s)))
    left_s = jnp.where(busy, (time_s - fixed_s) + SLACK * time_s, 1.0)
    need = jnp.where(in_time, jnp.sum(work / left_s), jnp.inf)
    idle_s = jnp.max(jnp.where(present & ~busy, fixed_s, -jnp.inf))
    busy_s = end_s(fixed_s, work, server_flops, start_s=time_s)
    return need, jnp.where(in_time, jnp.maximum(busy_s, idle_s), jnp.inf), busy_s >= idle_s


def _either(first, these, those):
    return [jnp.where(first, this, that) for this, that in zip(these, those, strict=True)]


def _sampled_s(costs, server_flops, present):
    """The first guess (s): by bisection, about the optimum of a sample of clients with a server scaled to it.
    0 unless there are very many clients."""
    clients, count = costs.shape
    if clients < MANY:
        return jnp.zeros(())
    few, here = costs.take(slice(None, None, clients // _SAMPLE)), present[:: clients // _SAMPLE]
    flops = server_flops * jnp.sum(here) / jnp.maximum(jnp.sum(present), 1)
    everywhere = jnp.arange(count)[:, None] + jnp.zeros(len(here), jnp.int32)
    fixed_s, work, allowed = jax.vmap(few.at)(everywhere)
    fixed_s = jnp.where(allowed & here, fixed_s, jnp.where(here, jnp.inf, 0.0))
    work = jnp.where(here, work, 0.0)

    def latest_s(share):
        waits_s = jnp.where(work > 0, work / share, 0.0)
        return jnp.max(jnp.min(fixed_s + waits_s, axis=0))

    def halve(_, bracket):
        low_s, high_s = bracket
        middle_s = jnp.sqrt(low_s * high_s)
        left_s = jnp.maximum(middle_s - fixed_s, 0.0)
        shares = jnp.where(work > 0, work / left_s, jnp.where(fixed_s <= middle_s, 0.0, jnp.inf))
        met = jnp.sum(jnp.min(shares, axis=0)) <= flops
        return jnp.where(met, low_s, middle_s), jnp.where(met, middle_s, high_s)

    bracket = latest_s(flops), latest_s(flops / jnp.maximum(jnp.sum(here), 1))
    found_s = lax.fori_loop(0, _HALVINGS, halve, bracket)[1]
    return jnp.where(jnp.isfinite(found_s), found_s, 0.0)


def _ends_alone(swept, costs, server_flops):
    """Each client's end (K,) s with the whole server: a lower bound on any round; inf if it has no cut."""

    def end(_, column):
        fixed_s, per_weight, allowed = column
        work = costs.weight * per_weight
        return jnp.where(allowed, fixed_s + jnp.where(work > 0, work / server_flops, 0.0), jnp.inf)

    return least(swept, costs.shape, end, FEW)[0]


def _best_cuts(swept, shape, time_s, block):
    """Each client's cut that needs the least share to end by time_s; (K,) int32, L if none can.

    The share is weight * v / (T - a) with v the work per weight. So the cut with the largest (T - a) / v
    wins; a cut without work wins over all. Only the cuts leave the sweep: it is then one fused loop over
    clients.
    """
    clients, count = shape
    # The first barrier stops XLA from making the K x C values that do not depend on T ahead of the loop. The
    # second stops XLA from repeating the sweep wherever a cut is used.
    swept, time_s = lax.optimization_barrier((swept, time_s))

    def step(cut, column, best):
        most, cuts = best
        fixed_s, per_weight, allowed = column
        some = per_weight > 0
        per_work = jnp.where(some, 1 / jnp.where(some, per_weight, 1.0), 0.0)
        slack = (time_s - fixed_s) * per_work + jnp.where(some, 0.0, jnp.inf)
        this = jnp.where(allowed & (fixed_s <= time_s), slack, -1.0)
        better = this > most
        return jnp.where(better, this, most), jnp.where(better, cut, cuts)

    start = jnp.full(clients, -1.0), jnp.full(clients, count - 1, jnp.int32)
    return lax.optimization_barrier(sweep(swept, count, step, start, block)[1])
