"""The paper's alternation: best cuts for given shares, best shares for given cuts, until neither helps.

`alternating` does it on the exact table; `regression.py` on fitted curves. Each half is optimal, the
pair need not be: a client whose share falls to 0 can only train alone, and never comes back. Several
starts are the cure.
"""

from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import lax

from sfl_jax.optim.shares import optimal_shares
from sfl_jax.optim.table import FEW, least, sweep, table

Start = Literal["equal", "proportional", "random"]
STARTS: tuple[str, ...] = get_args(Start)
_STEPS = 100


class Rest(NamedTuple):
    """Where an alternation came to rest."""

    cuts: jax.Array  # (K,) int32
    shares: jax.Array  # (K,) FLOP/s
    round_s: jax.Array  # ()
    iterations: jax.Array  # () int32, of all starts together


def alternating(costs, server_flops, present, *, starts=("equal",), key=None) -> Rest:
    """The best rest over the starts: shares equal, proportional to a client's work, or random (needs key)."""
    swept = table(costs)

    def run(shares):
        return _from(costs, swept, shares, server_flops, present)

    shares = jnp.stack(list(_starts(costs, swept, server_flops, present, starts, key)))
    rests = lax.map(run, shares)
    best = jnp.argmin(rests.round_s)
    return Rest(rests.cuts[best], rests.shares[best], rests.round_s[best], jnp.sum(rests.iterations))


def cuts_for(costs, swept, shares):
    """Each client's fastest allowed cut under its share (K,) FLOP/s; (K,) int32, L where none is allowed."""

    swept, shares = lax.optimization_barrier((swept, shares))  # as in exact.py

    def end_s(_, column):
        fixed_s, per_weight, allowed = column
        work = costs.weight * per_weight
        return jnp.where(allowed, fixed_s + jnp.where(work > 0, work / shares, 0.0), jnp.inf)

    return lax.optimization_barrier(least(swept, costs.shape, end_s)[1])


def shares_for(costs, cuts, server_flops, present):
    """Optimal shares (K,) of fixed cuts and the round's seconds ()."""
    fixed_s, server_flop, _ = costs.at(cuts)
    shares, _, round_s = optimal_shares(fixed_s, server_flop, server_flops, present)
    return shares, round_s


def _from(costs, swept, shares, server_flops, present) -> Rest:
    def improves(state):
        rest, before_s = state
        return (rest.iterations == 0) | ((rest.round_s < before_s) & (rest.iterations < _STEPS))

    def alternate(state):
        rest, _ = state
        cuts = cuts_for(costs, swept, rest.shares)
        shares, round_s = shares_for(costs, cuts, server_flops, present)
        better = (round_s < rest.round_s) | (rest.iterations == 0)
        cuts, shares, best_s = (
            jnp.where(better, new, old) for new, old in zip((cuts, shares, round_s), rest[:3], strict=True)
        )
        return Rest(cuts, shares, best_s, rest.iterations + 1), rest.round_s

    clients, count = costs.shape
    start = Rest(jnp.full(clients, count - 1, jnp.int32), shares, jnp.asarray(jnp.inf), jnp.int32(0))
    return lax.while_loop(improves, alternate, (start, jnp.asarray(jnp.inf)))[0]


def _starts(costs, swept, server_flops, present, starts, key):
    clients, count = costs.shape
    for index, start in enumerate(starts):
        if start == "equal":
            weights = jnp.ones(clients)
        elif start == "proportional":
            weights = costs.weight * sweep(swept, count, _add_work, jnp.zeros(clients), FEW)
        else:
            weights = jax.random.exponential(jax.random.fold_in(key, index), (clients,), float)
        weights = jnp.where(present, weights, 0.0)
        yield server_flops * weights / jnp.maximum(jnp.sum(weights), jnp.finfo(float).tiny)


def _add_work(_, column, total):
    _, per_weight, allowed = column
    return total + jnp.where(allowed, per_weight, 0.0)
