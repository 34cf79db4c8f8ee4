"""The paper's alternation: best cuts for given shares, then best shares for given cuts, until neither helps.

`alternating` runs on the exact table, `regression.py` runs it on fitted curves. Each half-step is optimal,
but the result need not be: a client whose share falls to 0 can only train alone and never comes back. Other
start shares may avoid this.

With `recall` the result is the optimum: a client that trains alone and ends last chooses its next cut as if
the unused part of the server were its own. Proof. At rest, all clients that share the server end with the
round. None of them could do so with a smaller share, or it would have taken that cut. A client that ends last
alone would need more than the unused part. So a shorter round needs more than the server has (`exact.py`:
need(T) > F).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sfl_jax.optim.plan import Chosen
from sfl_jax.optim.shares import SLACK, optimal_shares, rounding
from sfl_jax.optim.table import FEW, least, sweep, table

_STEPS = 100
_LAST = 1 - 1e-12  # fraction of the round: a client that ends earlier does not hold it up


class Rest(NamedTuple):
    """The cuts and shares at which an alternation stops."""

    cuts: jax.Array  # (K,) int32
    shares: jax.Array  # (K,) FLOP/s
    round_s: jax.Array  # ()
    iterations: jax.Array  # () int32, summed over the starts


class _Step(NamedTuple):
    rest: Rest
    offers: jax.Array  # (K,) FLOP/s for which the next cuts are chosen
    alone: jax.Array  # () int, how many clients train alone and end last
    moved: jax.Array  # () bool, whether the last step helped


def alternating(costs, server_flops, present, *, starts=("equal",), key=None, recall=False) -> Rest:
    """The best result over the starts.

    costs: Costs or Terms.  server_flops: () FLOP/s.  present: (K,) bool.
    starts: first shares: "equal", "proportional" to a client's work, or "random" (needs key).
    recall: call back clients that train alone and end last. A step calls back one client, or several equal
    ones. A step costs O(C K), and recall needs up to K more steps: use it for small fleets.
    """
    swept = table(costs)

    def run(shares):
        return _from(costs, swept, shares, server_flops, present, recall)

    shares = jnp.stack(list(_starts(costs, swept, server_flops, present, starts, key)))
    rests = lax.map(run, shares)
    best = jnp.argmin(rests.round_s)
    return Rest(rests.cuts[best], rests.shares[best], rests.round_s[best], jnp.sum(rests.iterations))


def method(costs, server_flops, present, options):
    """Cuts by `alternating` on the exact table."""
    starts = {"starts": options.starts, "key": options.key, "recall": options.recall}
    rest = alternating(costs, server_flops, present, **starts)
    return Chosen(rest.cuts, rest.iterations)


def cuts_for(costs, swept, shares):
    """Each client's fastest allowed cut under its share (K,) FLOP/s; (K,) int32, L where none is allowed."""

    swept, shares = lax.optimization_barrier((swept, shares))  # exact.py says why

    def end_s(_, column):
        fixed_s, per_weight, allowed = column
        work = costs.weight * per_weight
        return jnp.where(allowed, fixed_s + jnp.where(work > 0, work / shares, 0.0), jnp.inf)

    return lax.optimization_barrier(least(swept, costs.shape, end_s)[1])


def shares_for(costs, cuts, server_flops, present):
    """Optimal shares (K,) FLOP/s for fixed cuts, each client's end (K,) s and the round () s."""
    fixed_s, server_flop, _ = costs.at(cuts)
    return optimal_shares(fixed_s, server_flop, server_flops, present)


def _from(costs, swept, shares, server_flops, present, recall) -> Rest:
    clients, count = costs.shape
    most = _STEPS + clients * recall

    def moves(step):
        return step.moved & (step.rest.iterations < most)

    def alternate(step):
        rest = step.rest
        cuts = cuts_for(costs, swept, step.offers)
        shares, ends_s, round_s = shares_for(costs, cuts, server_flops, present)
        last = present & (shares <= 0) & (ends_s >= round_s * _LAST)
        alone = jnp.sum(last)
        moved = round_s < rest.round_s
        offers = shares
        if recall:
            # At an equal round, a step also helps if fewer clients end last alone, or more server is unused.
            less = (alone < step.alone) | ((alone == step.alone) & (jnp.sum(shares) < jnp.sum(rest.shares)))
            moved |= (round_s == rest.round_s) & less
            left = jnp.maximum(server_flops * (1 - rounding(clients)) - jnp.sum(shares), 0.0)
            # Rounded up: else a client that ends equally late alone might leave as another comes back.
            offers = jnp.where(last, left / jnp.maximum(alone, 1), shares * (1 + 8 * SLACK))
        better = moved | (rest.iterations == 0)
        cuts, shares, round_s = (
            jnp.where(better, new, old) for new, old in zip((cuts, shares, round_s), rest[:3], strict=True)
        )
        return _Step(Rest(cuts, shares, round_s, rest.iterations + 1), offers, alone, moved)

    nothing = Rest(jnp.full(clients, count - 1, jnp.int32), shares, jnp.asarray(jnp.inf), jnp.int32(0))
    start = _Step(nothing, shares, jnp.zeros((), int), jnp.asarray(True))
    return lax.while_loop(moves, alternate, start).rest


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
