"""The server's compute shared among clients whose cuts are fixed.

Client k with a seconds off the server and w FLOP on it ends by T if it is given w / (T - a). The
least T whose shares fit the server is the KKT point of the share problem: everybody who needs the
server ends at T, unless an all-local client ends later still.
"""

import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

# Times are kept this far above the seconds off the server, or tiny work would leave 0 s for it.
_ABOVE = 1 + 2.0**-51
# A float64 operation is off by at most 2**-53, relative, and no formula here chains 2**6 of them.
SLACK = 2.0**-46
_STEPS = 100


def rounding(clients: int) -> float:
    """What a float64 sum over clients, in any order, of shares computed here can be off by, relative."""
    return clients * 2.0**-52 + SLACK


def end_s(fixed_s, work, server_flops, start_s: ArrayLike = 0.0):
    """The least T () with sum of work / (T - fixed_s) <= server_flops, over clients with work; -inf if none.

    fixed_s (K,) s, work (K,) FLOP, start_s () where to look first. 1 / sum is concave in T, so
    Newton's steps on it approach from the left and never pass the root.
    """
    busy = work > 0
    least_s = jnp.max(jnp.where(busy, fixed_s + work / server_flops, -jnp.inf)) * _ABOVE

    def newton(time_s):
        left = jnp.where(busy, time_s - fixed_s, 1.0)
        shares = work / left
        total, slope = jnp.sum(shares), jnp.sum(shares / left)
        step_s = jnp.where(slope > 0, total * (total / server_flops - 1) / slope, 0.0)
        return jnp.maximum(time_s + step_s, least_s)

    def moves(state):
        time_s, before_s, steps = state
        return (jnp.abs(time_s - before_s) > 2 * SLACK * time_s) & (steps < _STEPS)

    def step(state):
        time_s, _, steps = state
        return newton(time_s), time_s, steps + 1

    found_s = lax.while_loop(moves, step, (jnp.maximum(start_s, least_s), jnp.inf, 0))[0]
    return jnp.where(jnp.any(busy), found_s, -jnp.inf)


def optimal_shares(fixed_s, server_flop, server_flops, present):
    """Shares (K,) that let fixed cuts end soonest, each client's end (K,) and the round's ().

    fixed_s (K,) s, server_flop (K,) FLOP, server_flops () FLOP/s, present (K,) bool. Sound in exact
    arithmetic: the shares sum to at most server_flops, and a + w / s is at most the times given; these
    are not finite where somebody needs a server that is not there.
    """
    work = jnp.where(present, server_flop, 0.0)
    idle_s = jnp.max(jnp.where(present & (work <= 0), fixed_s, 0.0), initial=0.0)
    time_s = jnp.maximum(end_s(fixed_s, work, server_flops), idle_s)
    return shares_by(time_s, fixed_s, server_flop, server_flops, present)


def shares_by(time_s, fixed_s, server_flop, server_flops, present):
    """Shares (K,) to end by time_s, or as little later as rounding asks; ends (K,) and the round's ()."""
    busy = present & (server_flop > 0)
    error = rounding(fixed_s.shape[0])
    room = server_flops * (1 - error)

    def by(time_s):
        return jnp.where(busy, server_flop / jnp.where(busy, time_s * _ABOVE - fixed_s, 1.0), 0.0)

    # A time longer by e cuts every share by e at least; to scale the shares instead would hurt small ones.
    shares = by(time_s)
    shares = jnp.where(jnp.sum(shares) > room, by(time_s * (1 + 2 * error)), shares)
    total = jnp.sum(shares)
    shares = jnp.where(total > room, shares * (room / total), shares)
    serving_s = jnp.where(busy, server_flop / jnp.where(busy, shares, 1.0), 0.0)
    ends = jnp.where(present, (fixed_s + serving_s) * (1 + SLACK), 0.0)
    return shares, ends, jnp.max(ends, initial=0.0)
