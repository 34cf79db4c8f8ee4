"""Which clients of a cohort finish in time, and how long the round lasts."""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool

from sfl_jax import optim
from sfl_jax.fleet import Delays
from sfl_jax.planning.planner import Planner


class Turnout(NamedTuple):
    """came: (K,) the clients whose work counts. round_s: how long the round lasts."""

    came: Bool[np.ndarray, " K"]
    round_s: float


def turnout(
    planner: Planner,
    deadline_factor: float,
    terms: optim.Terms,
    plan: optim.Plan | optim.BandPlan,
    delays: Delays,
    present: Bool[np.ndarray, " K"] | None = None,
) -> Turnout:
    """The clients that come in time under a plan for these terms, and the round's seconds.

    Clients that are not `present` (K,) are not in the plan: the server does not wait for them. Delays slow
    what a client does itself; the server is as fast as planned.

    The deadline is `deadline_factor` times the plan's round. Later clients are left out, and the server waits
    until the deadline for missing ones. Under the staged barrier it begins early enough for the planned
    server work and way back, if need be without some clients. Without a deadline (0) the server learns of a
    drop-out at once and waits for the slowest of the others. If all dropped out, the round lasts as planned.
    """
    present = np.ones(len(plan.cuts), bool) if present is None else present
    deadline_s = deadline_factor * plan.round_s if deadline_factor else math.inf
    finish_s = _finish_s(planner, terms, plan, delays, present, deadline_s)
    came = delays.stays & present & (finish_s <= deadline_s)
    if math.isfinite(deadline_s) and not came[present].all():
        return Turnout(came, deadline_s)
    return Turnout(came, float(finish_s[came].max(initial=0)) if came.any() else plan.round_s)


def _finish_s(planner, terms, plan, delays, present, deadline_s):
    """When each present client is done (s); (K,)."""
    late_s = plan.round_s - plan.client_s.max(initial=0)  # added by a barrier and by rounding up
    if (delays.stays & (delays.slowdown == 1))[present].all():
        return plan.client_s + late_s
    staged, gate_s = planner.barrier == "staged", math.inf
    if staged:
        columns = terms.columns(plan.cuts, plan.codecs)
        planned = terms.seconds(columns, np.full(len(plan.cuts), planner.server_flops))
        gate_s = planned.before_server[present].max(initial=0) + (deadline_s - plan.round_s)
    terms, cuts = optim.slower(terms, delays.slowdown).take(present), plan.cuts[present]
    own = plan._replace(
        cuts=cuts, shares=plan.shares[present], codecs=plan.codecs[present[: len(plan.codecs)]]
    )
    if isinstance(own, optim.BandPlan):
        own = own._replace(uplink_hz=own.uplink_hz[present], downlink_hz=own.downlink_hz[present])
    stays = delays.stays[present]
    ends_s = optim.session_ends_s(terms, own, planner.server_flops, planner.barrier, stays, gate_s)
    finish_s = np.full(len(plan.cuts), math.inf)
    finish_s[present] = ends_s + (0 if planner.barrier in optim.CLOCKS else late_s)
    return finish_s
