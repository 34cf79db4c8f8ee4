"""Who of a cohort comes back in time, and how long the round lasts that waits for them."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64

from sfl_jax import fleet
from sfl_jax.config import Config


class Delays(NamedTuple):
    """What befalls the clients of a round, whatever its plan: drawn from (seed, round, client)."""

    stays: Bool[np.ndarray, " K"]
    slowdown: Float64[np.ndarray, " K"]


class Turnout(NamedTuple):
    """came: whose work counts. round_s: how long the round lasts."""

    came: Bool[np.ndarray, " K"]
    round_s: float


def delays(config: Config, round: int, ids: np.ndarray) -> Delays:
    """Clients drop out with --drop_probability, and are slower than planned by --jitter on average."""
    stays = fleet.availability(config.seed, round, ids, config.drop_probability)
    return Delays(stays, fleet.slowdowns(config.seed, round, ids, config.jitter))


def turnout(
    client_s: Float64[np.ndarray, " K"],
    round_s: float,
    delays: Delays,
    deadline_factor: float,
    present: Bool[np.ndarray, " K"] | None = None,
) -> Turnout:
    """Who came, of a plan of these seconds. Clients that are not `present` are not in the plan: nobody waits
    for them.

    With a deadline, deadline_factor times the plan's round_s, the later ones are left out, and the server
    waits until then for whoever is missing. Without one (0) it learns of a drop-out at once and waits for the
    slowest of the others, or, if all dropped out, for as long as was planned.
    """
    finish_s = client_s * delays.slowdown + (round_s - client_s.max(initial=0))  # what the barrier adds stays
    present = np.ones(len(client_s), bool) if present is None else present
    came = delays.stays & present
    if deadline_factor:
        deadline_s = deadline_factor * round_s
        came = came & (finish_s <= deadline_s)
        if not came[present].all():
            return Turnout(came, deadline_s)
    return Turnout(came, float(finish_s[came].max(initial=0)) if came.any() else round_s)
