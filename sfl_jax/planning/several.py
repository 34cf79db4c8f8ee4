"""Plans of a fleet that several servers serve, and what they tell."""

import dataclasses
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Shaped

from sfl_jax import fleet as fleets
from sfl_jax import models, optim
from sfl_jax.errors import BadInput
from sfl_jax.planning.insight import MORE, TOGETHER, Binding, Planned, binding
from sfl_jax.planning.planner import Planner, named


class SeveralPlanned(NamedTuple):
    """A plan of several servers, and what it was made from. `terms` have the links that the plan uses."""

    profile: models.Profile
    fleet: fleets.Fleet
    servers: fleets.ServerList
    terms: optim.Terms
    plan: optim.ServersPlan


def plan_servers(
    profile: models.Profile, fleet: fleets.Fleet, terms: optim.Terms, servers: fleets.ServerList
) -> SeveralPlanned:
    """Servers, cuts and shares of a round. BadInput names the clients that no server serves."""
    own = _of_optim(servers)
    plan = _solved(fleet, terms, own)
    return SeveralPlanned(profile, fleet, servers, own.terms(terms, plan.servers), plan)


def server_gains_s(planned: SeveralPlanned, terms: optim.Terms) -> Float64[np.ndarray, " E"]:
    """Seconds by which the round would be shorter if one server had 10 % more compute, for each server.

    A plan that is not proven optimal may differ from the next by chance, so none is less than 0.
    """
    gains = []
    for e in range(len(planned.servers)):
        faster = planned.servers.flops * np.where(np.arange(len(planned.servers)) == e, MORE, 1.0)
        richer = dataclasses.replace(planned.servers, flops=faster)
        gains.append(planned.plan.round_s - _solved(planned.fleet, terms, _of_optim(richer)).round_s)
    return np.maximum(np.array(gains), 0.0)


def best_alone(planned: SeveralPlanned, terms: optim.Terms) -> tuple[int, float] | None:
    """The server that alone would give the shortest round, and that round; None where none can serve all."""
    rounds_s = []
    for e in range(len(planned.servers)):
        one = optim.Servers(*(part[..., e : e + 1] for part in _of_optim(planned.servers)))
        try:
            rounds_s.append(optim.solve_servers(terms, one).round_s)
        except BadInput:
            rounds_s.append(np.inf)
    best = int(np.argmin(rounds_s))
    return (best, float(rounds_s[best])) if np.isfinite(rounds_s[best]) else None


def several_seconds(planned: SeveralPlanned) -> optim.Seconds:
    """Each client's seconds by term; (K,) each."""
    plan = planned.plan
    return planned.terms.seconds(planned.terms.columns(plan.cuts, plan.codecs), plan.shares)


def several_share_percent(planned: SeveralPlanned) -> Float64[np.ndarray, " K"]:
    """Each client's share in percent of its server."""
    return 100 * planned.plan.shares / planned.servers.flops[planned.plan.servers]


def several_binding(planned: SeveralPlanned) -> dict[int, Binding]:
    """The clients that hold the round up, for each server on which the round ends; see `Binding`.

    The pulls of a server are those of its own plan, with its clients kept. Where the round ends on several
    servers at once, it is only shorter if all of them end earlier. Each pull is then divided by their number,
    so that all pulls still add up to 1: if all clients save a second, the round is a second shorter.
    """
    found = {}
    for e in np.unique(planned.plan.servers).tolist():
        own = np.flatnonzero(planned.plan.servers == e)
        one = _of_server(planned, e, own)
        if one.plan.round_s >= planned.plan.round_s * (1 - TOGETHER):
            who = binding(one)
            found[e] = who._replace(clients=own[who.clients])
    return {e: who._replace(pull=who.pull / len(found)) for e, who in found.items()}


def several_pulls(planned: SeveralPlanned) -> Float64[np.ndarray, " K"]:
    """The pull of each client: what the round gains of a second that the client saves; see
    `several_binding`.
    """
    pull = np.zeros(len(planned.fleet))
    for who in several_binding(planned).values():
        pull[who.clients] = who.pull
    return pull


def _of_server(planned: SeveralPlanned, server: int, clients) -> Planned:
    """The plan of one server for its clients, without a bound."""
    plan = planned.plan
    ends_s = plan.client_s[clients]
    own = optim.Plan(
        plan.cuts[clients], plan.shares[clients], ends_s, float(ends_s.max()), 0.0, 0, plan.codecs[clients]
    )
    planner = Planner(server_flops=float(planned.servers.flops[server]))
    return Planned(planner, planned.profile, planned.fleet.take(clients), planned.terms.take(clients), own)


def several_bytes(planned: SeveralPlanned) -> Float64[np.ndarray, " K"]:
    """The memory that each client's half takes on its server."""
    return planned.terms.server_bytes[planned.terms.columns(planned.plan.cuts, planned.plan.codecs)]


def several_table(planned: SeveralPlanned) -> dict[str, Shaped[np.ndarray, " K"]]:
    """One row per client: client, cut, unit, share_flops, share_percent, server, server_bytes, <term>_s …,
    client_s, pull_percent.

    `unit` is the last unit that the client holds, "" at cut 0. A client that trains alone has the server over
    which the model comes and goes.
    """
    plan, last_units = planned.plan, np.array(["", *planned.profile.names])
    return {
        "client": planned.fleet.client,
        "cut": plan.cuts,
        "unit": last_units[plan.cuts],
        "share_flops": plan.shares,
        "share_percent": several_share_percent(planned),
        "server": planned.servers.server[plan.servers],
        "server_bytes": several_bytes(planned),
        **{f"{name}_s": values for name, values in several_seconds(planned)._asdict().items()},
        "client_s": plan.client_s,
        "pull_percent": 100 * several_pulls(planned),
    }


def _of_optim(servers: fleets.ServerList) -> optim.Servers:
    return optim.Servers(servers.flops, servers.memory_bytes, servers.uplink_bps, servers.downlink_bps)


def _solved(fleet, terms, servers) -> optim.ServersPlan:
    try:
        return optim.solve_servers(terms, servers)
    except optim.Infeasible as error:
        raise BadInput(named(error, fleet)) from error
