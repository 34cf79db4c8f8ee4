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
from sfl_jax.optim.table import sweep, table

_PASSES = 200


class Ends(NamedTuple):
    """Least ends over a client's cuts; (K,) seconds each, inf where there is no cut for it."""

    idle_s: jax.Array  # with nothing on the server
    idle_cut: jax.Array  # int32, the cut of that
    alone_s: jax.Array  # with the whole server
    equal_s: jax.Array  # with an equal share of it


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
    """
    clients, count = costs.shape
    error = rounding(clients)
    tolerance = 4 * error + 1e-12
    room = server_flops * (1 - error)
    swept = table(costs)
    ends = _least_ends(swept, costs.weight, costs.shape, server_flops, present)
    low_s = jnp.max(jnp.where(present, ends.alone_s, 0.0))
    high_s = jnp.max(jnp.where(present, ends.equal_s, 0.0)) * (1 + SLACK)

    def wide(at: _Search):
        open_ = at.high_s - at.low_s > tolerance * at.high_s
        return (open_ & (at.passes < _PASSES)) | (at.passes == 0)

    def step(at: _Search) -> _Search:
        guess_s = at.guess_s
        rate, inverse, cuts = _best_cuts(swept, costs.shape, guess_s)
        idle = ends.idle_s <= guess_s
        busy = present & ~idle
        work = jnp.where(busy, costs.weight / jnp.where(busy, inverse, 1.0), 0.0)
        left = jnp.where(busy, rate / jnp.where(busy, inverse, 1.0), 1.0)
        need = jnp.sum(work / left)
        idle_s = jnp.max(jnp.where(present & idle, ends.idle_s, -jnp.inf))
        busy_s = end_s(guess_s - left, work, server_flops, start_s=guess_s)
        frozen_s = jnp.maximum(busy_s, idle_s)
        frozen_need = jnp.where(busy_s >= idle_s, server_flops, jnp.sum(work / (left + (frozen_s - guess_s))))

        fits = need <= room
        low_s, low_need = jnp.where(fits, at.low_s, guess_s), jnp.where(fits, at.low_need, need)
        high_s, high_need = jnp.where(fits, guess_s, at.high_s), jnp.where(fits, need, at.high_need)
        better = frozen_s < high_s
        high_s, high_need = jnp.where(better, frozen_s, high_s), jnp.where(better, frozen_need, high_need)
        kept = jnp.where(fits | better | (at.passes == 0), jnp.where(idle, ends.idle_cut, cuts), at.cuts)
        slow = jnp.where(high_s - low_s > 0.5 * (at.high_s - at.low_s), at.slow + 1, 0)
        middle_s = 0.5 * (low_s + high_s)
        below_s = high_s * (1 - 0.6 * tolerance)
        chord_s = _chord(low_s, 1 / low_need, high_s, 1 / high_need, 1 / server_flops, slow)
        following = jnp.where(busy_s >= idle_s, below_s, chord_s)
        good = (following > low_s) & (following < high_s) & (slow < 2)
        following = jnp.where(good, following, middle_s)
        return _Search(low_s, low_need, high_s, high_need, kept, following, slow, at.passes + 1)

    start = _Search(
        low_s, clients * server_flops, high_s, 0.0 * low_s, ends.idle_cut, low_s, jnp.int32(0), jnp.int32(0)
    )
    end = lax.while_loop(wide, step, start)
    cuts = jnp.where(present, end.cuts, jnp.int32(count - 1))
    return Optimum(cuts, end.low_s * (1 - 8 * error), end.passes)


def _chord(low_s, low, high_s, high, goal, slow):
    """Where the chord of a rising function meets the goal, kept off the ends; further after a poor step."""
    part = jnp.clip((goal - low) / (high - low), 0.01, 0.99)
    part = jnp.where(slow == 1, jnp.where(part < 0.5, 2 * part, 2 * part - 1), part)
    return low_s + (high_s - low_s) * part


def _least_ends(swept, weight, shape, server_flops, present) -> Ends:
    """The least ends of every client over its allowed cuts."""
    clients, count = shape
    share = server_flops * (1 - 4 * rounding(clients)) / jnp.maximum(jnp.sum(present), 1)

    def step(cut, column, ends):
        fixed_s, per_weight, allowed = column
        work = weight * per_weight
        least_s = jnp.where(allowed, fixed_s, jnp.inf)
        idle_s = jnp.where(work > 0, jnp.inf, least_s)
        return Ends(
            jnp.minimum(ends.idle_s, idle_s),
            jnp.where(idle_s < ends.idle_s, cut, ends.idle_cut),
            jnp.minimum(ends.alone_s, least_s + jnp.where(work > 0, work / server_flops, 0.0)),
            jnp.minimum(ends.equal_s, least_s + jnp.where(work > 0, work / share, 0.0)),
        )

    none = jnp.full(clients, jnp.inf)
    return sweep(swept, count, step, Ends(none, jnp.full(clients, count - 1, jnp.int32), none, none))


def _best_cuts(swept, shape, time_s):
    """For every client the cut with work on the server that needs the least share to end by time_s.

    Returns (K,) each: rate = max over cuts of (T - a) / v, where the share is weight / rate and v the
    work per weight (0: no such cut can do it); 1 / v of that cut; the cut, int32.
    """
    clients, count = shape

    def step(cut, column, best):
        rate, inverse, cuts = best
        fixed_s, per_weight, allowed = column
        per_work = jnp.where(per_weight > 0, 1 / jnp.where(per_weight > 0, per_weight, 1.0), 0.0)
        this = jnp.where(allowed, (time_s - fixed_s) * per_work, 0.0)
        better = this > rate
        return (
            jnp.where(better, this, rate),
            jnp.where(better, per_work, inverse),
            jnp.where(better, cut, cuts),
        )

    none = jnp.zeros(clients)
    return sweep(swept, count, step, (none, none, jnp.full(clients, count - 1, jnp.int32)))
