"""The optimum over all cuts and shares, and the proof.

need(T), the sum over clients of the least share that lets them end by T with any of their cuts, never
rises with T, and T can be met if and only if need(T) <= F. So the optimum is where need crosses F,
and the last T that cannot be met bounds every method from below.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from sfl_jax.optim.shares import SLACK, Demand, least_time, rounding


class Ends(NamedTuple):
    """Least ends over a client's cuts; (K,) seconds each, inf where there is no cut for it."""

    idle_s: jax.Array  # with nothing on the server
    alone_s: jax.Array  # with the whole server
    equal_s: jax.Array  # with an equal share of it


class Optimum(NamedTuple):
    """The cuts (K,) int32 that end soonest, the proven bound () and the passes it took ()."""

    cuts: jax.Array
    bound_s: jax.Array
    iterations: jax.Array


def exact(costs, server_flops, present) -> Optimum:
    """Optimal cuts and the proven bound; costs or terms, server_flops () FLOP/s, present (K,) bool."""
    clients = costs.shape[0]
    ends = least_ends(costs, server_flops, present)

    def demand(time_s):
        rate, slope, _ = best_cuts(costs, time_s)
        idle = ends.idle_s <= time_s
        served = present & ~idle
        shares = jnp.where(served, costs.weight / jnp.where(served, rate, 1.0), 0.0)
        steep = jnp.where(served, shares * slope / jnp.where(served & (rate > 0), rate, 1.0), 0.0)
        last_s = jnp.max(jnp.where(present & idle, ends.idle_s, -jnp.inf))
        return Demand(jnp.sum(shares), jnp.sum(steep), last_s)

    low_s = jnp.max(jnp.where(present, ends.alone_s, 0.0))
    high_s = jnp.max(jnp.where(present, ends.equal_s, 0.0)) * (1 + SLACK)
    bracket = least_time(demand, low_s, high_s, server_flops, clients=clients)
    _, _, cuts = best_cuts(costs, bracket.high_s)
    idle_cuts = _idle_cuts(costs)
    cuts = jnp.where(ends.idle_s <= bracket.high_s, idle_cuts, cuts)
    bound_s = bracket.low_s * (1 - 8 * rounding(clients))
    return Optimum(
        jnp.where(present, cuts, costs.shape[1] - 1).astype(jnp.int32), bound_s, bracket.iterations
    )


def least_ends(costs, server_flops, present) -> Ends:
    """The three least ends of every client over its allowed cuts."""
    clients, count = costs.shape
    share = server_flops * (1 - 4 * rounding(clients)) / jnp.maximum(jnp.sum(present), 1)
    none = jnp.full(clients, jnp.inf)
    idle, alone, equal = none, none, none
    for cut in range(count):
        fixed_s, per_weight, allowed = costs.column(cut)
        work = costs.weight * per_weight
        least = jnp.where(allowed, fixed_s, jnp.inf)
        idle = jnp.minimum(idle, jnp.where(work > 0, jnp.inf, least))
        alone = jnp.minimum(alone, least + jnp.where(work > 0, work / server_flops, 0.0))
        equal = jnp.minimum(equal, least + jnp.where(work > 0, work / share, 0.0))
    return Ends(idle, alone, equal)


def best_cuts(costs, time_s):
    """For every client the cut with work on the server that needs the least share to end by time_s.

    Returns (K,) each: rate = max over cuts of (T - a) / v, where the share is weight / rate and v the
    work per weight (0: no such cut can do it); its derivative 1 / v; the cut.
    """
    clients, count = costs.shape
    rate, slope = jnp.zeros(clients), jnp.zeros(clients)
    cuts = jnp.full(clients, count - 1, jnp.int32)
    for cut in range(count):
        fixed_s, per_weight, allowed = costs.column(cut)
        inverse = jnp.where(per_weight > 0, 1 / jnp.where(per_weight > 0, per_weight, 1.0), 0.0)
        this = jnp.where(allowed, (time_s - fixed_s) * inverse, 0.0)
        better = this > rate
        rate, slope = jnp.where(better, this, rate), jnp.where(better, inverse, slope)
        cuts = jnp.where(better, jnp.int32(cut), cuts)
    return rate, slope, cuts


def _idle_cuts(costs):
    """The fastest cut of every client that leaves nothing to the server; (K,) int32."""
    clients, count = costs.shape
    best, cuts = jnp.full(clients, jnp.inf), jnp.full(clients, count - 1, jnp.int32)
    for cut in range(count):
        fixed_s, per_weight, allowed = costs.column(cut)
        better = allowed & (per_weight <= 0) & (fixed_s < best)
        best, cuts = jnp.where(better, fixed_s, best), jnp.where(better, jnp.int32(cut), cuts)
    return cuts
