"""Inverse questions: the smallest server for a wanted round, and what a slightly larger server would gain."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from sfl_jax.errors import BadInput
from sfl_jax.optim.costs import Costs, Cuts, Floats, Terms
from sfl_jax.optim.infeasible import why_infeasible
from sfl_jax.optim.needed import needed_cuts
from sfl_jax.optim.plan import Infeasible, Plan
from sfl_jax.optim.shares import SLACK, rounding


class Server(NamedTuple):
    """A server with which all clients end in time, and a lower bound on any such server."""

    server_flops: float  # FLOP/s, enough in exact arithmetic
    bound_flops: float  # FLOP/s, nothing below is enough
    cuts: Cuts  # (K,)
    shares: Floats  # (K,) FLOP/s, sum at most server_flops
    codecs: Cuts  # (K,) index among the codec names


def smallest_server(costs: Costs | Terms, round_s: float, present: ArrayLike | None = None) -> Server:
    """The least server with which all sessions end by round_s seconds: each client takes its least share.

    present: (K,) bool.  Infeasible names the clients that end later with any server, and their least time.
    """
    clients, count = costs.shape
    if not 0 <= round_s < np.inf:
        raise BadInput(f"round_s={round_s}: give a finite number of seconds, 0 or more")
    here = np.ones(clients, bool) if present is None else np.asarray(present, bool)
    shares, cuts = np.full(clients, np.inf), np.full(clients, count - 1, np.int32)
    soonest_s = np.full(clients, np.inf)
    for cut in needed_cuts(costs) if isinstance(costs, Terms) else range(count):
        fixed_s, work, allowed = costs.at(np.full(clients, cut))
        soonest_s = np.where(allowed, np.minimum(soonest_s, fixed_s), soonest_s)
        left_s = round_s - fixed_s
        needed = np.divide(work, left_s, out=np.full(clients, np.inf), where=left_s > 0)
        needed[(work == 0) & (left_s >= 0)] = 0.0
        better = allowed & (needed < shares)
        shares[better], cuts[better] = needed[better], cut
    if (here & np.isinf(soonest_s)).any():
        raise why_infeasible(costs, np.inf, here)
    late = tuple(int(client) for client in np.flatnonzero(here & np.isinf(shares)))
    if late:
        least = (f"needs more than {soonest_s[client]:.6g} s with any server" for client in late)
        raise Infeasible(late, tuple(least))
    shares, cuts = np.where(here, shares, 0.0), np.where(here, cuts, np.int32(count - 1))
    total = float(shares.sum())
    # Rounded up, so that w / s is at most the rest of the round in exact arithmetic.
    error = rounding(clients)
    cuts, codecs = costs.chosen(cuts) if isinstance(costs, Terms) else (cuts, np.zeros_like(cuts))
    return Server(total * (1 + 2 * error), total * (1 - error), cuts, shares * (1 + SLACK), codecs)


class Sensitivity(NamedTuple):
    """How much the round would shorten, to first order with the cuts kept: the KKT multipliers."""

    per_server_flops: float  # seconds per added FLOP/s; 0 if a client that uses no server ends last
    per_client_s: Floats  # (K,) seconds per second saved off the server; they sum to 1


def sensitivity(costs: Costs | Terms, plan: Plan) -> Sensitivity:
    """The multipliers of a session plan with optimal shares.

    From sum w / (T - a) = F: dT/dF = -1 / sum(s^2 / w) and dT/da = (s^2 / w) / sum(s^2 / w). If clients that
    use no server end last, the round depends on them alone; each gets an equal part.
    """
    busy = plan.shares > 0
    last = ~busy & (plan.client_s > 0) & (plan.client_s >= plan.round_s * (1 - 1e-12))
    if last.any() or not busy.any():
        return Sensitivity(0.0, last / max(last.sum(), 1))
    columns = costs.columns(plan.cuts, plan.codecs) if isinstance(costs, Terms) else plan.cuts
    _, work, _ = costs.at(columns)
    steep = np.divide(plan.shares**2, work, out=np.zeros(len(work)), where=busy)
    return Sensitivity(float(1 / steep.sum()), steep / steep.sum())
