"""The server's compute shared among clients whose cuts are fixed, and the root finder behind every method.

Client k with a seconds off the server and w FLOP on it ends by T if it is given w / (T - a). The
least T whose shares fit the server is the KKT point of the share problem: everybody who needs the
server ends at T, unless an all-local client ends later still.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

# Every float64 operation here is off by at most 2**-53, relative; a formula holds fewer than 2**5 of them.
SLACK = 2.0**-46


class Demand(NamedTuple):
    """What ending by T takes of the server: the sum of shares, how fast it falls, the last all-local end."""

    flops: jax.Array  # () inf where somebody cannot end by T
    slope: jax.Array  # () -d flops / dT, FLOP/s per s
    idle_s: jax.Array  # () largest time of a client that needs no server, -inf if none


class Bracket(NamedTuple):
    """`high_s` can be met and `low_s` cannot, unless nothing can."""

    low_s: jax.Array
    high_s: jax.Array
    iterations: jax.Array


def rounding(clients: int) -> float:
    """Relative error of a float64 sum over clients, whatever its order, and of the share formula."""
    return clients * 2.0**-52 + SLACK


def least_time(
    demand: Callable[[jax.Array], Demand], low_s, high_s, server_flops, *, clients: int, limit: int = 200
) -> Bracket:
    """Close the bracket [low_s, high_s] around the least T with demand(T).flops <= server_flops.

    With the cuts frozen, 1 / demand is concave and nearly straight, so Newton's step on it is nearly
    exact from either side; each step goes a little too far so that both ends close in. demand(T)
    jumps where a client becomes all-local: a step that does not halve the bracket is followed by bisection.
    """
    error = rounding(clients)
    tolerance = 4 * error + 1e-12
    budget = server_flops * (1 - error)

    def wide(state):
        low, high, _, steps = state
        return (high - low > tolerance * high) & (steps < limit)

    def step(state):
        low, high, guess, steps = state
        now = demand(guess)
        fits = now.flops <= budget
        new_low, new_high = jnp.where(fits, low, guess), jnp.where(fits, guess, high)
        newton = guess + now.flops * (now.flops / server_flops - 1) / now.slope
        target = jnp.where(fits, jnp.maximum(newton, now.idle_s), newton)
        over = 1e-3 * jnp.abs(target - guess) + 0.4 * tolerance * jnp.abs(target)
        below, above = target - over, target + over
        following = jnp.where(fits & (below > new_low), below, above)
        middle = 0.5 * (new_low + new_high)
        halved = new_high - new_low <= 0.5 * (high - low)
        good = halved & (following > new_low) & (following < new_high)
        return new_low, new_high, jnp.where(good, following, middle), steps + 1

    low_s, high_s = jnp.asarray(low_s), jnp.asarray(high_s)
    # The ends themselves first: the optimum lies on one of them more often than not.
    low_fits = demand(low_s).flops <= budget
    start = jnp.where(low_fits, low_s, high_s)
    low, high, _, steps = lax.while_loop(wide, step, (low_s, start, 0.5 * (low_s + start), 1))
    return Bracket(low, high, steps)


def optimal_shares(fixed_s, server_flop, server_flops, present):
    """Shares (K,) that let fixed cuts end soonest, each client's end (K,) and the round's, all sound.

    fixed_s (K,) s, server_flop (K,) FLOP, server_flops () FLOP/s, present (K,) bool. The exact sum of
    the shares is at most server_flops and a + w / s at most the returned times; inf if that cannot be.
    """
    clients = fixed_s.shape[0]
    needs = present & (server_flop > 0)
    idle_s = jnp.max(jnp.where(present & ~needs, fixed_s, -jnp.inf))
    served = jnp.where(needs, fixed_s, 0.0)
    work = jnp.where(needs, server_flop, 0.0)

    def shares_for(time_s):
        left = time_s - served
        return jnp.where(needs, jnp.where(left > 0, work / left, jnp.inf), 0.0), left

    def demand(time_s):
        shares, left = shares_for(time_s)
        steep = jnp.where(needs, shares / left, 0.0)
        late = idle_s > time_s
        return Demand(jnp.where(late, jnp.inf, jnp.sum(shares)), jnp.sum(steep), idle_s)

    def alone(fraction):
        ends = jnp.where(needs, served + work / (server_flops * fraction), 0.0)
        return jnp.maximum(jnp.max(ends), idle_s)

    some = jnp.any(present)
    low_s = jnp.where(some, alone(1.0), 0.0)
    equal = (1 - 4 * rounding(clients)) / jnp.maximum(jnp.sum(needs), 1)
    high_s = jnp.where(some, alone(equal) * (1 + SLACK), 0.0)
    bracket = least_time(demand, low_s, high_s, server_flops, clients=clients)
    return finish(shares_for(bracket.high_s)[0], fixed_s, server_flop, server_flops, present)


def finish(shares, fixed_s, server_flop, server_flops, present):
    """Shares (K,) trimmed to the server, each client's end (K,) and the round's (), rounded to the safe side."""
    fits = server_flops * (1 - rounding(shares.shape[0]))
    total = jnp.sum(shares)
    shares = jnp.where(total > fits, shares * (fits / total), shares)
    serving_s = jnp.where(server_flop > 0, server_flop / shares, 0.0)
    ends = jnp.where(present, (fixed_s + serving_s) * (1 + SLACK), 0.0)
    return jnp.where(present & (server_flop > 0), shares, 0.0), ends, jnp.max(ends, initial=0.0)
