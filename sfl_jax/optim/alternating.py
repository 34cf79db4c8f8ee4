"""The paper's alternation, on the exact table instead of fitted curves.

Given shares each client takes its best cut; given cuts the shares are solved again; repeat until the
round no longer shortens. Each half is optimal, the pair need not be: a client whose share falls to 0
can only train alone, and never comes back.
"""

import jax.numpy as jnp
from jax import lax

from sfl_jax.optim.shares import optimal_shares


def alternating(costs, server_flops, present, *, limit: int = 100):
    """Cuts (K,) int32 where the alternation from equal shares comes to rest, and its iterations ()."""

    def improves(state):
        _, _, round_s, before_s, steps = state
        return (round_s < before_s) & (steps < limit)

    def alternate(state):
        cuts, shares, round_s, _, steps = state
        new_cuts = cuts_for(costs, shares)
        new_shares, new_round_s = shares_for(costs, new_cuts, server_flops, present)
        better = new_round_s < round_s
        kept = jnp.where(better, new_cuts, cuts), jnp.where(better, new_shares, shares)
        return *kept, jnp.minimum(new_round_s, round_s), round_s, steps + 1

    equal = jnp.where(present, server_flops / jnp.maximum(jnp.sum(present), 1), 0.0)
    cuts = cuts_for(costs, equal)
    shares, round_s = shares_for(costs, cuts, server_flops, present)
    cuts, _, _, _, steps = lax.while_loop(improves, alternate, (cuts, shares, round_s, jnp.inf, 1))
    return cuts, steps


def cuts_for(costs, shares):
    """Each client's fastest allowed cut under its share (K,) FLOP/s; cut L where none is allowed."""
    clients, count = costs.shape
    best, cuts = jnp.full(clients, jnp.inf), jnp.full(clients, count - 1, jnp.int32)
    for cut in range(count):
        fixed_s, per_weight, allowed = costs.column(cut)
        work = costs.weight * per_weight
        ends = jnp.where(allowed, fixed_s + jnp.where(work > 0, work / shares, 0.0), jnp.inf)
        best, cuts = jnp.minimum(best, ends), jnp.where(ends < best, jnp.int32(cut), cuts)
    return cuts


def shares_for(costs, cuts, server_flops, present):
    """Optimal shares (K,) of fixed cuts and the round's seconds ()."""
    fixed_s, server_flop, _ = costs.at(cuts)
    shares, _, round_s = optimal_shares(fixed_s, server_flop, server_flops, present)
    return shares, round_s
