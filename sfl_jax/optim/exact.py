"""The optimum over all cuts and shares, and the proof.

need(T), the sum over clients of the least share that lets them end by T with any of their cuts, never
rises with T, and T can be met if and only if need(T) <= F. So the optimum is where need crosses F,
and the last T that cannot be met bounds every method from below.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sfl_jax.optim.shares import SLACK, end_s, rounding
from sfl_jax.optim.table import least, sweep, table

_PASSES = 200


class Optimum(NamedTuple):
    """The cuts (K,) int32 that end soonest, the proven bound () and the passes over all cuts it took ()."""

    cuts: jax.Array
    bound_s: jax.Array
    iterations: jax.Array


class _Search(NamedTuple):
    low_s: jax.Array  # nobody can promise this
    low_need: jax.Array
    high_s: jax.Array  # these cuts can
    high_need: jax.Array
    cuts: jax.Array
    guess_s: jax.Array
    slow: jax.Array  # steps since the bracket last halved
    passes: jax.Array


def exact(costs, server_flops, present) -> Optimum:
    """Optimal cuts and the proven bound; costs or terms, server_flops () FLOP/s, present (K,) bool.

    One pass at a guess T either proves that T cannot be met or gives cuts that meet it. Frozen, these
    cuts have a closed-form best end, and the next guess is just below it: either that cannot be met,
    and the search is over, or better cuts come out. Where an all-local client ends last there are
    many small jumps ahead: then the chord of 1 / need leads, and after two poor steps bisection.

    The bound survives rounding: seconds off the server are computed to a few units in the last place of
    T, shares to a few of their own, and a share grows by e at least when T shrinks by e. So what is too
    much at T in float64, with SLACK on T and `rounding` on the sum, is too much at T (1 - 8 rounding).
    """
    clients, count = costs.shape
    swept = table(costs)
    error = rounding(clients)
    tolerance = 4 * error + 1e-12
    room = server_flops * (1 - error)
    least_s = jnp.max(jnp.where(present, _ends_alone(swept, costs, server_flops), 0.0))

    def wide(at: _Search):
        open_ = at.high_s - at.low_s > tolerance * at.high_s
        return (open_ & (at.passes < _PASSES)) | (at.passes == 0)

    def step(at: _Search) -> _Search:
        guess_s = at.guess_s
        cuts = _best_cuts(swept, costs.shape, guess_s)
        fixed_s, work, allowed = lax.optimization_barrier(costs.at(cuts))
        busy = present & (work > 0)
        work = jnp.where(busy, work, 0.0)
        left_s = jnp.where(busy, (guess_s - fixed_s) + SLACK * guess_s, 1.0)
        in_time = jnp.all(~present | (allowed & (fixed_s <= guess_s)))
        need = jnp.where(in_time, jnp.sum(work / left_s), jnp.inf)
        idle_s = jnp.max(jnp.where(present & ~busy, fixed_s, -jnp.inf))
        busy_s = end_s(fixed_s, work, server_flops, start_s=guess_s)
        frozen_s = jnp.where(in_time, jnp.maximum(busy_s, idle_s), jnp.inf)
        server_binds = busy_s >= idle_s
        frozen_left_s = jnp.where(busy, frozen_s - fixed_s, 1.0)
        frozen_need = jnp.where(server_binds, server_flops, jnp.sum(work / frozen_left_s))

        fits = need <= room
        low_s, low_need = jnp.where(fits, at.low_s, guess_s), jnp.where(fits, at.low_need, need)
        high_s, high_need = jnp.where(fits, guess_s, at.high_s), jnp.where(fits, need, at.high_need)
        better = frozen_s < high_s
        high_s, high_need = jnp.where(better, frozen_s, high_s), jnp.where(better, frozen_need, high_need)
        kept = jnp.where(fits | better | (at.passes == 0), cuts, at.cuts)
        slow = jnp.where(high_s - low_s > 0.5 * (at.high_s - at.low_s), at.slow + 1, 0)
        below_s = high_s * (1 - 0.6 * tolerance)
        chord_s = _chord(low_s, 1 / low_need, high_s, 1 / high_need, 1 / server_flops, slow)
        following = jnp.where(server_binds, below_s, chord_s)
        good = (following > low_s) & (following < high_s) & (slow < 2)
        following = jnp.where(good, following, 0.5 * (low_s + high_s))
        return _Search(low_s, low_need, high_s, high_need, kept, following, slow, at.passes + 1)

    start = _Search(
        low_s=least_s,
        low_need=clients * server_flops,
        high_s=jnp.full((), jnp.inf),
        high_need=jnp.zeros(()),
        cuts=jnp.full(clients, count - 1, jnp.int32),
        guess_s=least_s * (1 + 0.25 * tolerance),
        slow=jnp.int32(0),
        passes=jnp.int32(0),
    )
    end = lax.while_loop(wide, step, start)
    cuts = jnp.where(present, end.cuts, jnp.int32(count - 1))
    return Optimum(cuts, end.low_s * (1 - 8 * error), end.passes)


def _chord(low_s, low, high_s, high, goal, slow):
    """Where the chord of a rising function meets the goal, kept off the ends; further after a poor step."""
    part = jnp.clip((goal - low) / (high - low), 0.01, 0.99)
    part = jnp.where(slow == 1, jnp.where(part < 0.5, 2 * part, 2 * part - 1), part)
    return low_s + (high_s - low_s) * part


def _ends_alone(swept, costs, server_flops):
    """When each client would end with the whole server to itself (K,), a bound on any round; inf if never."""

    def end(_, column):
        fixed_s, per_weight, allowed = column
        work = costs.weight * per_weight
        return jnp.where(allowed, fixed_s + jnp.where(work > 0, work / server_flops, 0.0), jnp.inf)

    return least(swept, costs.shape, end)[0]


def _best_cuts(swept, shape, time_s):
    """For every client the cut that needs the least share to end by time_s; (K,) int32, L if none can.

    The share is weight * v / (T - a) with v the work per weight, so the most (T - a) / v wins, and no
    work at all before that. Only the cuts leave the sweep: it then is one fused loop over the clients.
    """
    clients, count = shape
    # The first barrier keeps what does not depend on T, all K x C of it, from being made ahead of the loop;
    # the second keeps the sweep from being repeated inside everything that uses a cut.
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
    return lax.optimization_barrier(sweep(swept, count, step, start)[1])
