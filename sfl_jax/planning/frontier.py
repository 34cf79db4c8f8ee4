"""Plans that weigh a round's time against the energy of the clients, or the bytes on their links."""

import dataclasses
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

from sfl_jax import fleet as fleets
from sfl_jax import models, optim
from sfl_jax.errors import BadInput
from sfl_jax.planning.insight import Planned
from sfl_jax.planning.planner import Planner, solve

ENERGY, BYTES = "energy", "bytes"
_POWERS = ("cycles_per_s", "kappa", "transmit_w")
_ABOVE = 1 + 1e-9  # a time by which the shortest round surely ends


class FrontierPlanned(NamedTuple):
    """A plan and the frontier that it is on.

    planned: the plan, as the shortest round of its cuts.  amounts: (K,) J or bytes of each client in it.
    bound: no plan that ends by `limit_s` takes less in all.  shortest_s: the shortest round of any plan.
    """

    planned: Planned
    amounts: Float64[np.ndarray, " K"]
    bound: float
    limit_s: float
    shortest_s: float
    frontier: optim.Frontier


def plan_frontier(
    planner: Planner,
    profile: models.Profile,
    fleet: fleets.Fleet,
    terms: optim.Terms,
    of: str,
    round_s: float = 0.0,
    budget: float = 0.0,
) -> FrontierPlanned:
    """The frontier of time against `of`, ENERGY or BYTES, and one plan on it.

    round_s: the plan takes least of those that end by then; 0: by the shortest round. budget: the plan is the
    shortest that takes at most this in all; 0: any. BadInput for a time or a budget that no plan meets.
    """
    terms = with_energy(terms, fleet) if of == ENERGY else terms
    plain = solve(planner, fleet, terms)
    assert isinstance(plain, optim.Plan)
    costs, flops = terms.costs(), planner.server_flops
    amounts = optim.joules(terms) if of == ENERGY else optim.sent_bytes(terms)
    limit_s = round_s or plain.round_s * _ABOVE
    shortest_s, bound_s = plain.round_s, plain.bound_s
    if budget:
        found = optim.shortest_within(costs, amounts, flops, budget, plain.bound_s)
        columns, bound_s = found.columns, found.bound_s
        own = optim.planned(terms, columns, flops, np.ones(len(fleet), bool), bound_s, plain.iterations)
        limit_s = own.round_s * _ABOVE
    best = optim.least_amount(costs, amounts, flops, limit_s)
    if best is None:
        raise BadInput(f"round_s={round_s:g}: no round is shorter than {shortest_s:.6g} s")
    columns = best.columns.astype(np.int32)
    here = np.ones(len(fleet), bool)
    plan = optim.planned(terms, columns, flops, here, bound_s, plain.iterations)
    whole = Planned(planner, profile, fleet, terms, plan)
    curve = optim.frontier(costs, amounts, flops, plain.round_s * _ABOVE)
    own = amounts[np.arange(len(fleet)), columns]
    return FrontierPlanned(whole, own, best.bound, limit_s, shortest_s, curve)


def with_energy(terms: optim.Terms, fleet: fleets.Fleet) -> optim.Terms:
    """The terms with the clients' powers, and without a budget where the fleet has none."""
    if terms.energy is not None:
        return terms
    missing = [name for name in _POWERS if getattr(fleet, name) is None]
    if missing:
        raise BadInput(f"the fleet has no column {', '.join(missing)}; its energy is not known")
    whole = dataclasses.replace(fleet, energy_j=np.full(len(fleet), np.inf))
    return terms._replace(energy=optim.energy(whole))  # pyright: ignore[reportArgumentType] has samples
