"""From a fleet and a network to a plan, who holds its round up, and what would shorten it."""

import dataclasses
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float64, Int64, Shaped

from sfl_jax import fleet as fleets
from sfl_jax import models, optim
from sfl_jax.config import Config
from sfl_jax.errors import BadInput

MORE_SERVER_FLOPS, MORE_UPLINK = 1e12, 1.1
# Ends, and sums of shares, that differ by less than this are equal to whoever reads them.
TOGETHER = 1e-6
_NAMED = 3  # clients that an error names


class Planned(NamedTuple):
    """A plan with what it was made from. The server of `config` is the plan's, also where it was sought."""

    config: Config
    profile: models.Profile
    fleet: fleets.Fleet
    terms: optim.Terms
    plan: optim.Plan


def make_plan(config: Config) -> Planned:
    """The plan for the fleet, the network and the server of `config`.

    With a target_round_s, the plan of the smallest server that meets it.

    Raises BadInput for a fleet file that is wrong or lacks samples, a min_cut beyond the chain, a method that
    cannot do what is asked, and where some client cannot be served at all.
    """
    fleet = read_fleet(config)
    chain = models.create(config.model, config.num_classes, config.image_channels)
    if config.min_cut > len(chain):
        raise BadInput(
            f"--min_cut={config.min_cut}: must be at most {len(chain)}, the units of {config.model}"
        )
    profile = models.profile(chain, (config.image_size, config.image_size, config.image_channels))
    terms = optim.terms(profile, fleet, work(config))  # pyright: ignore[reportArgumentType] has samples
    if config.target_round_s:
        config = dataclasses.replace(config, server_flops=smallest_server(config, fleet, terms))
    return Planned(config, profile, fleet, terms, solve(config, fleet, terms))


def read_fleet(config: Config) -> fleets.Fleet:
    """The fleet file of `config`, or its random fleet."""
    if config.fleet == "random":
        fleet = fleets.random_fleet(config.clients, seed=config.seed)
        return fleet.with_samples(np.full(config.clients, config.samples_per_client))
    fleet = fleets.read_fleet(config.fleet)
    if fleet.samples is None:
        raise BadInput(f"{config.fleet}: column samples: missing; a plan needs the samples of each client")
    return fleet


def work(config: Config) -> optim.Work:
    """What each client does in a round, as its costs need it."""
    slots = 2 if config.optimizer == "adam" else int(config.momentum > 0)
    return optim.Work(config.local_epochs, config.batch_size, min_cut=config.min_cut, optimizer_slots=slots)


def solve(config: Config, fleet: fleets.Fleet, terms: optim.Terms, round: int = 0) -> optim.Plan:
    """The plan of `config` for a round; BadInput names, as the fleet does, who cannot be served."""
    random = config.method == "random_cut"
    key = jax.random.fold_in(jax.random.key(config.seed), round) if random else None
    try:
        return optim.solve(terms, config.server_flops, config.method, config.barrier, key)
    except optim.Infeasible as error:
        raise BadInput(_named(error, fleet)) from error


def smallest_server(config: Config, fleet: fleets.Fleet, terms: optim.Terms) -> float:
    """FLOP/s of the smallest server for the target_round_s of `config`; 0 if nobody needs one."""
    try:
        return optim.smallest_server(terms, config.target_round_s).server_flops
    except optim.Infeasible as error:
        raise BadInput(f"--target_round_s={config.target_round_s:g}: {_named(error, fleet)}") from error


def _named(error: optim.Infeasible, fleet: fleets.Fleet) -> str:
    """What the error says, with the clients' names instead of their places in the fleet."""
    named = zip(fleet.client[list(error.clients)], error.reasons, strict=True)
    reasons = [f"client {client}: {reason}" for client, reason in named]
    more = f"; and {len(reasons) - _NAMED} more" if len(reasons) > _NAMED else ""
    return f"no plan serves every client: {'; '.join(reasons[:_NAMED])}{more}"


class Gains(NamedTuple):
    """Seconds by which the round would be shorter, planned anew."""

    server_s: float  # with 1 TFLOP/s more of server
    uplink_s: float  # with 10 % more uplink for every client


def gains(planned: Planned) -> Gains:
    """What more server and more uplink would bring."""
    config, _, fleet, terms, plan = planned
    richer = dataclasses.replace(config, server_flops=config.server_flops + MORE_SERVER_FLOPS)
    faster = terms._replace(uplink_bps=terms.uplink_bps * MORE_UPLINK)
    after = solve(richer, fleet, terms).round_s, solve(config, fleet, faster).round_s
    return Gains(*(plan.round_s - round_s for round_s in after))


class Binding(NamedTuple):
    """The clients that hold the round up, those with the most pull first.

    A second less off the server for client i makes the round `pull[i]` seconds shorter, cuts being kept.
    """

    server_is_full: bool
    clients: Int64[np.ndarray, " N"]
    pull: Float64[np.ndarray, " N"]


def binding(planned: Planned) -> Binding:
    """Who holds the round up.

    Staged: the slowest client up to the server, and the slowest after it. Under the session barrier: a client
    that needs no server and ends last holds it up alone. Else everybody whom a full server serves ends
    together, and the multipliers of `optim.sensitivity` are the pulls. Where the method leaves some of the
    server idle, those with the largest share hold it up.
    """
    plan = planned.plan
    if planned.config.barrier == "staged":
        parts = seconds(planned)
        before_s = parts.model_down + parts.client_forward + parts.smashed_up
        after_s = parts.gradient_down + parts.client_backward + parts.model_up
        slowest = np.unique([np.argmax(before_s), np.argmax(after_s)])
        return Binding(False, slowest, np.ones(len(slowest)))
    late = plan.client_s >= plan.round_s * (1 - TOGETHER)
    alone = late & (plan.shares == 0)
    full = bool(plan.shares.sum() >= planned.config.server_flops * (1 - TOGETHER))
    if alone.any():
        weight = alone.astype(float)
    elif full:
        weight = optim.sensitivity(planned.terms, plan).per_client_s
    else:
        weight = (late & (plan.shares >= plan.shares.max() * (1 - TOGETHER))).astype(float)
    order = np.argsort(-weight, kind="stable")[: np.count_nonzero(weight)]
    return Binding(full and not alone.any(), order, weight[order] / weight.sum())


def seconds(planned: Planned) -> optim.Seconds:
    """Each client's seconds by term; (K,) each. Staged, the whole server serves one after the other."""
    shares = np.where(np.isnan(planned.plan.shares), planned.config.server_flops, planned.plan.shares)
    return planned.terms.seconds(planned.plan.cuts, shares)


def table(planned: Planned) -> dict[str, Shaped[np.ndarray, " K"]]:
    """What is known of each client: client, cut, unit, share_flops, <term>_s …, client_s.

    `unit` is the last unit that the client holds, "" at cut 0; `share_flops` is NaN under the staged barrier.
    """
    last_units = np.array(["", *planned.profile.names])
    return {
        "client": planned.fleet.client,
        "cut": planned.plan.cuts,
        "unit": last_units[planned.plan.cuts],
        "share_flops": planned.plan.shares,
        **{f"{name}_s": values for name, values in seconds(planned)._asdict().items()},
        "client_s": planned.plan.client_s,
    }
