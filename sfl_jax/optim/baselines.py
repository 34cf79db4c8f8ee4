"""What one would do without an optimiser: no split, one cut for all, any cut, equal shares.

Each returns cuts (K,) int32; only equal_shares fixes the shares too.
"""

import jax
import jax.numpy as jnp
from jax import lax

from sfl_jax.optim.alternating import cuts_for, shares_for


def no_split(costs):
    """Cut L for everybody: federated learning as it is."""
    return jnp.full(costs.shape[0], costs.shape[1] - 1, jnp.int32)


def common_cut(costs, server_flops, present):
    """The one cut that is best for all, with optimal shares; L where no cut is allowed to all."""
    clients, count = costs.shape

    def round_s(cut):
        cuts = jnp.full(clients, cut)
        everybody = jnp.all(costs.at(cuts)[2] | ~present)
        return jnp.where(everybody, shares_for(costs, cuts, server_flops, present)[1], jnp.inf)

    rounds_s = lax.map(round_s, jnp.arange(count, dtype=jnp.int32))
    # argmin of infinities would be cut 0, which min_cut may forbid.
    best = jnp.where(jnp.any(rounds_s < jnp.inf), jnp.argmin(rounds_s), count - 1)
    return jnp.full(clients, best, jnp.int32)


def random_cut(costs, server_flops, key):
    """For each client any of the cuts it can do, all equally likely."""
    clients, count = costs.shape

    def usable(cut):
        _, per_weight, allowed = costs.column(cut)
        return allowed & ((server_flops > 0) | (per_weight <= 0))

    number = sum(usable(cut).astype(jnp.int32) for cut in range(count))
    chosen = jax.random.randint(key, (clients,), 0, jnp.maximum(number, 1))
    cuts, seen = jnp.full(clients, count - 1, jnp.int32), jnp.zeros(clients, jnp.int32)
    for cut in range(count):
        here = usable(cut)
        cuts = jnp.where(here & (seen == chosen), jnp.int32(cut), cuts)
        seen = seen + here
    return cuts


def equal_shares(costs, server_flops, present):
    """Each client's best cut under an equal share of the server."""
    return cuts_for(costs, jnp.full(costs.shape[0], server_flops / jnp.maximum(jnp.sum(present), 1)))
