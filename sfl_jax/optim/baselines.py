"""Simple methods to compare with: no split, one cut for all, random cuts, equal shares, greedy steps.

Arguments of a method: costs (Costs or Terms), server_flops () FLOP/s, present (K,) bool, and `Options`.
"""

import jax
import jax.numpy as jnp
from jax import lax

from sfl_jax.optim.alternating import cuts_for
from sfl_jax.optim.plan import Chosen
from sfl_jax.optim.shares import end_s
from sfl_jax.optim.table import FEW, least, sweep, table


def no_split(costs, server_flops, present, options):
    """Cut L for every client: plain federated learning."""
    return Chosen(_whole(costs))


def common_cut(costs, server_flops, present, options):
    """The same cut for all clients, the best one with optimal shares; L if no cut serves all."""
    clients, count = costs.shape

    def of_all(cut):
        fixed_s, work, allowed = costs.at(jnp.full(clients, cut))
        return jnp.where(jnp.all(allowed | ~present), _round_s(fixed_s, work, server_flops, present), jnp.inf)

    rounds_s = lax.map(of_all, jnp.arange(count, dtype=jnp.int32))
    # argmin of infinities would be cut 0, which min_cut may forbid.
    best = jnp.where(jnp.any(rounds_s < jnp.inf), jnp.argmin(rounds_s), count - 1)
    return Chosen(jnp.full(clients, best, jnp.int32))


def random_cut(costs, server_flops, present, options):
    """A random cut for each client, uniform over the cuts it can use."""
    (clients, count), swept = costs.shape, table(costs)

    def usable(column):
        _, per_weight, allowed = column
        return allowed & ((server_flops > 0) | (per_weight <= 0))

    number = sweep(swept, count, lambda _, column, n: n + usable(column), jnp.zeros(clients, jnp.int32), FEW)
    chosen = jax.random.randint(options.key, (clients,), 0, jnp.maximum(number, 1), jnp.int32)

    def pick(cut, column, state):
        cuts, seen = state
        here = usable(column)
        return jnp.where(here & (seen == chosen), cut, cuts), seen + here

    return Chosen(sweep(swept, count, pick, (_whole(costs), jnp.zeros(clients, jnp.int32)), FEW)[0])


def equal_shares(costs, server_flops, present, options):
    """Each client's best cut under an equal share of the server."""
    share = server_flops / jnp.maximum(jnp.sum(present), 1)
    return Chosen(cuts_for(costs, table(costs), jnp.full(costs.shape[0], share)), has_equal_shares=True)


def greedy(costs, server_flops, present, options):
    """One client at a time: the client that holds the round up takes the cut that shortens the round most.

    Starts from each client's cut with the least server work. Shares are solved again in each step. The client
    that ends last holds the round up; among clients that share the server, the one with the largest share. If
    others end equally late, it is enough that this client ends earlier. Stops when this client cannot help.
    A step costs O(C K), and there are up to 4 K steps: use it for small fleets.
    """
    clients, count = costs.shape
    everywhere = jnp.arange(count, dtype=jnp.int32)

    def improves(state):
        _, _, helped, steps = state
        return helped & (steps < 4 * clients)

    def improve(state):
        cuts, now_s, _, steps = state
        fixed_s, work, _ = costs.at(cuts)
        waits = present & (work <= 0) & (fixed_s >= now_s)
        takes = jnp.where(present & (work > 0), work / (now_s - fixed_s), -jnp.inf)
        who = jnp.argmax(jnp.where(waits, jnp.inf, takes))
        its_s, its_work, allowed = _row(costs, who, everywhere)

        def with_its(new_s, new_work):
            ends = _ends_s(fixed_s.at[who].set(new_s), work.at[who].set(new_work), server_flops, present)
            return jnp.max(jnp.stack(ends)), jnp.where(new_work > 0, ends[0], new_s)

        rounds_s, its_ends_s = jax.vmap(with_its)(its_s, its_work)
        rounds_s = jnp.where(allowed & (its_ends_s < now_s), rounds_s, jnp.inf)
        least_s = jnp.min(rounds_s)
        best = jnp.argmin(jnp.where(rounds_s <= least_s, its_ends_s, jnp.inf)).astype(jnp.int32)
        helps = least_s <= now_s
        return jnp.where(helps, cuts.at[who].set(best), cuts), jnp.minimum(least_s, now_s), helps, steps + 1

    def least_work(_, column):
        fixed_s, per_weight, allowed = column
        return jnp.where(allowed & (fixed_s < jnp.inf), per_weight, jnp.inf)

    cuts = least(table(costs), costs.shape, least_work, FEW)[1]
    fixed_s, work, _ = costs.at(cuts)
    first = cuts, _round_s(fixed_s, work, server_flops, present), jnp.asarray(True), jnp.int32(0)
    cuts, _, _, steps = lax.while_loop(improves, improve, first)
    return Chosen(cuts, steps)


def _whole(costs):
    """Cut L for every client."""
    return jnp.full(costs.shape[0], costs.shape[1] - 1, jnp.int32)


def _round_s(fixed_s, work, server_flops, present):
    """The round of fixed cuts with optimal shares, not rounded to the safe side: enough for a comparison."""
    return jnp.max(jnp.stack(_ends_s(fixed_s, work, server_flops, present)))


def _ends_s(fixed_s, work, server_flops, present):
    """When the clients that share the server end (-inf if none), and the last other client (0 if none)."""
    work = jnp.where(present, work, 0.0)
    idle_s = jnp.max(jnp.where(present & (work <= 0), fixed_s, 0.0))
    return end_s(fixed_s, work, server_flops), idle_s


def _row(costs, client, cuts):
    """One client at all cuts: fixed_s, server_flop, allowed; (C,) each."""
    one = costs.take(client[None])
    return jax.vmap(lambda cut: tuple(part[0] for part in one.at(cut[None])))(cuts)
