"""How a plan's round goes when its clients are slower than planned, or are not there.

The server's own seconds stay those of the plan, whatever befalls the clients.
"""

import numpy as np
from jaxtyping import Bool, Float64

from sfl_jax.optim.bandwidth import BandPlan
from sfl_jax.optim.clocks import CLOCKS, round_seconds
from sfl_jax.optim.costs import Terms
from sfl_jax.optim.plan import Plan
from sfl_jax.optim.serving import ends_s, sessions


def at_bands(terms: Terms, plan: Plan | BandPlan) -> Terms:
    """The terms at a plan's parts of the band, where it shares the band out."""
    if not isinstance(plan, BandPlan):
        return terms
    return terms._replace(
        uplink_bps=terms.uplink_bps * plan.uplink_hz, downlink_bps=terms.downlink_bps * plan.downlink_hz
    )


def slower(terms: Terms, slowdown: Float64[np.ndarray, " K"]) -> Terms:
    """The terms of clients that compute, send and receive so many times as slowly."""
    return terms._replace(
        flops=terms.flops / slowdown,
        uplink_bps=terms.uplink_bps / slowdown,
        downlink_bps=terms.downlink_bps / slowdown,
    )


def session_ends_s(
    terms: Terms,
    plan: Plan | BandPlan,
    server_flops: float,
    barrier: str = "session",
    here: Bool[np.ndarray, " K"] | None = None,
    gate_s: float = np.inf,
) -> Float64[np.ndarray, " K"]:
    """When each session ends under a plan's cuts and shares and these terms; inf of whoever is not here.

    gate_s: under the staged barrier, when the server begins without those whose smashed data have not come.
    It begins earlier once all have; without a gate it waits for those that are here, and for nobody else.
    In turn, by handover and in lockstep there is no gate, and every session ends with the round.
    """
    here = np.ones(len(plan.cuts), bool) if here is None else here
    columns = terms.columns(plan.cuts, plan.codecs)
    if barrier == "staged":
        parts = terms.seconds(columns, np.full(len(columns), server_flops))
        arrived = here & (parts.before_server <= gate_s)
        waits = not arrived.all() and np.isfinite(gate_s)
        begins_s = gate_s if waits else parts.before_server[arrived].max(initial=0)
        return np.where(arrived, begins_s + parts.server[arrived].sum() + parts.after_server, np.inf)
    if barrier in CLOCKS:
        return np.where(here, round_seconds(terms, columns, server_flops, barrier, here), np.inf)
    if np.isnan(plan.shares).any():
        return np.where(here, ends_s(sessions(terms, server_flops, columns), here), np.inf)
    whole = np.sum(at_bands(terms, plan).seconds(columns, plan.shares), axis=0)
    return np.where(here, whole, np.inf)
