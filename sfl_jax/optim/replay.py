"""The round of a given plan when clients are slower than planned or absent.

The server's own seconds stay as planned.
"""

import numpy as np
from jaxtyping import Bool, Float64

from sfl_jax.optim.bandwidth import BandPlan
from sfl_jax.optim.clocks import CLOCKS, round_seconds
from sfl_jax.optim.costs import Terms
from sfl_jax.optim.plan import Plan
from sfl_jax.optim.serving import ends_s, sessions


def at_bands(terms: Terms, plan: Plan | BandPlan) -> Terms:
    """The terms at the rates of a plan's bands; unchanged if the plan has none."""
    if not isinstance(plan, BandPlan):
        return terms
    return terms._replace(
        uplink_bps=terms.uplink_bps * plan.uplink_hz, downlink_bps=terms.downlink_bps * plan.downlink_hz
    )


def slower(terms: Terms, slowdown: Float64[np.ndarray, " K"]) -> Terms:
    """The terms of clients that compute, send and receive `slowdown` times as slowly."""
    latency, devices, broadcast = terms.latency, terms.devices, terms.broadcast_bps
    return terms._replace(
        flops=terms.flops / slowdown,
        uplink_bps=terms.uplink_bps / slowdown,
        downlink_bps=terms.downlink_bps / slowdown,
        latency=latency and latency._replace(rtt_s=latency.rtt_s * slowdown),
        devices=devices and devices._replace(slowdown=devices.slowdown * slowdown),
        broadcast_bps=None if broadcast is None else broadcast / slowdown,
    )


def session_ends_s(
    terms: Terms,
    plan: Plan | BandPlan,
    server_flops: float,
    barrier: str = "session",
    here: Bool[np.ndarray, " K"] | None = None,
    gate_s: float = np.inf,
) -> Float64[np.ndarray, " K"]:
    """Each session's end (s) under a plan's cuts and shares and these terms; inf for clients not in `here`.

    gate_s: for the staged barrier, the time when the server starts without clients whose smashed data have
    not come. It starts earlier once all have come. Without a gate it waits for all clients in `here`.
    in_turn, handover and lockstep have no gate: every session ends with the round.
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
