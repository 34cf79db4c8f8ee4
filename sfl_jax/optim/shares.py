"""Shares the server's compute among clients whose cuts are fixed.

Client k with a seconds off the server and w FLOP on it ends by T if its share is w / (T - a). The least T
whose shares fit the server is the KKT point of the share problem: every client that uses the server ends at
T, unless a client that uses none ends later.
"""

import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

# Keeps times above the seconds off the server: else tiny work would get 0 s on the server.
_ABOVE = 1 + 2.0**-51
# A float64 operation has a relative error of at most 2**-53, and no formula here chains 2**6 of them.
SLACK = 2.0**-46
_STEPS = 100


def rounding(clients: int) -> float:
    """The largest relative error of a float64 sum, in any order, of the shares of `clients` clients."""
    return clients * 2.0**-52 + SLACK


def end_s(fixed_s, work, server_flops, start_s: ArrayLike = 0.0):
    """The least T () s with sum of work / (T - fixed_s) <= server_flops over clients with work; -inf if none.

    fixed_s: (K,) s.  work: (K,) FLOP.  server_flops: () FLOP/s.  start_s: () s, the first guess.
    1 / sum is concave in T, so Newton's steps on it come from the left and never pass the root.
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
    """Shares (K,) FLOP/s with which fixed cuts end soonest, each client's end (K,) s and the round () s.

    fixed_s: (K,) s.  server_flop: (K,) FLOP.  server_flops: () FLOP/s.  present: (K,) bool. In exact
    arithmetic the shares sum to at most server_flops, and a + w / s is at most the end returned. Ends are not
    finite if a client needs a server and server_flops is 0.
    """
    work = jnp.where(present, server_flop, 0.0)
    idle_s = jnp.max(jnp.where(present & (work <= 0), fixed_s, 0.0), initial=0.0)
    time_s = jnp.maximum(end_s(fixed_s, work, server_flops), idle_s)
    return shares_by(time_s, fixed_s, server_flop, server_flops, present)


def shares_by(time_s, fixed_s, server_flop, server_flops, present):
    """Returns as `optimal_shares`, with the shares to end by time_s () s, or later only by rounding."""
    busy = present & (server_flop > 0)
    error = rounding(fixed_s.shape[0])
    room = server_flops * (1 - error)

    def by(time_s):
        return jnp.where(busy, server_flop / jnp.where(busy, time_s * _ABOVE - fixed_s, 1.0), 0.0)

    # A time longer by e cuts every share by at least e. Scaling the shares instead would hurt small shares.
    shares = by(time_s)
    shares = jnp.where(jnp.sum(shares) > room, by(time_s * (1 + 2 * error)), shares)
    total = jnp.sum(shares)
    shares = jnp.where(total > room, shares * (room / total), shares)
    serving_s = jnp.where(busy, server_flop / jnp.where(busy, shares, 1.0), 0.0)
    ends = jnp.where(present, (fixed_s + serving_s) * (1 + SLACK), 0.0)
    return shares, ends, jnp.max(ends, initial=0.0)
