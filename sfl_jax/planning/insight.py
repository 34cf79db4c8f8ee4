"""What a plan tells: which clients hold the round up, what would shorten it, and each client's seconds."""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64, Shaped

from sfl_jax import fleet as fleets
from sfl_jax import models, optim
from sfl_jax.plan_rules import WORK_CONSERVING
from sfl_jax.planning.planner import ONE_MEDIUM, Planner, linked, serve, solve

MORE = 1.1
MOST_CLIENTS = 20_000  # for the bound of any schedule
COHORTS = 100  # rounds whose cohorts are planned beside the whole fleet
# Rates below these are likely in another unit, such as Mbit/s or GFLOP/s.
SLOWEST = {"flops": (1e6, "FLOP/s", "GFLOP/s"), "uplink_bps": (1e4, "bit/s", "Mbit/s"),
           "downlink_bps": (1e4, "bit/s", "Mbit/s")}  # fmt: skip
LONGEST_TRIP_S = 5.0  # round-trip times above this are likely in milliseconds
# Ends and sums of shares that differ by less than this, relative, count as equal.
TOGETHER = 1e-6


class Planned(NamedTuple):
    """A plan and what it was made from. `terms` have the links of round 0, at equal parts of the band."""

    planner: Planner
    profile: models.Profile
    fleet: fleets.Fleet
    terms: optim.Terms
    plan: optim.Plan | optim.BandPlan


def any_schedule_bound_s(planned: Planned) -> float | None:
    """A lower bound (s) on the round for any schedule of the server; None if unknown or slow to compute."""
    planner = planned.planner
    if (planner.barrier, planner.band) != ("session", "fixed") or not planner.server_flops:
        return None
    if len(planned.fleet) > MOST_CLIENTS:
        return None
    return optim.any_schedule_bound_s(planned.terms, planner.server_flops)


class Gains(NamedTuple):
    """Seconds by which a new plan would shorten the round if one thing were 10 % faster."""

    server_s: float  # the server
    uplink_s: float  # every client's uplink
    downlink_s: float
    compute_s: float  # every client's own compute


def gains(planned: Planned) -> Gains:
    """What 10 % more of each resource gains. A faster server gains nothing if all-local clients end last."""
    planner, _, fleet, terms, plan = planned
    richer = dataclasses.replace(planner, server_flops=planner.server_flops * MORE)
    faster = (terms.faster(**{name: MORE}) for name in ("uplink", "downlink", "compute"))
    plans = [
        solve(richer, fleet, terms) if planner.server_flops else plan,
        *(solve(planner, fleet, each) for each in faster),
    ]
    return Gains(*(plan.round_s - after.round_s for after in plans))


def memory_gain_s(planned: Planned) -> float:
    """Seconds by which the round would be shorter with 10 % more memory of the server."""
    planner = planned.planner
    roomier = dataclasses.replace(planner, server_memory_bytes=planner.server_memory_bytes * MORE)
    return planned.plan.round_s - solve(roomier, planned.fleet, planned.terms).round_s


def server_bytes(planned: Planned) -> Float64[np.ndarray, " K"]:
    """The memory that each client's half takes on the server while it trains; 0 of whoever trains alone."""
    return planned.terms.server_bytes[planned.terms.columns(planned.plan.cuts, planned.plan.codecs)]


def cohort_rounds_s(
    planned: Planned, cohort_size: int, seed: int = 0, rounds: int = COHORTS
) -> Float64[np.ndarray, " R"]:
    """The seconds (R,) of the first rounds of a training, each planned for the cohort that training draws.

    Empty if a cohort is the whole fleet: that round is the plan's.
    """
    planner, fleet = planned.planner, planned.fleet
    if cohort_size >= len(fleet):
        return np.empty(0)
    rounds_s = []
    for round in range(rounds):
        ids = fleets.cohort(seed, round, len(fleet), cohort_size)
        own = fleet.take(ids)
        terms = linked(planner, own, planned.terms.take(ids), round, ids)
        rounds_s.append(serve(planner, own, terms, round).plan.round_s)
    return np.array(rounds_s)


class Floor(NamedTuple):
    """The seconds that one client needs with any server: no server makes the round shorter than `least_s`."""

    least_s: float
    resource: str  # uplink, downlink or compute: the one that takes most of least_s
    resource_s: float


def floor(planned: Planned, client: int) -> Floor:
    """The least seconds of one client (an index in the fleet), at its best cut with an unlimited server."""
    one = planned.terms.take([client])
    costs = one.costs()
    cut = np.argmin(np.where(costs.allowed[0], costs.fixed_s[0], np.inf))
    own = one.seconds([cut], [np.inf])
    by_resource = {
        "uplink": own.smashed_up + own.model_up,
        "downlink": own.model_down + own.gradient_down,
        "compute": own.client_forward + own.client_backward,
    }
    most = max(by_resource, key=lambda name: by_resource[name][0])
    return Floor(float(costs.fixed_s[0, cut]), most, float(by_resource[most][0]))


def doubts(fleet: fleets.Fleet) -> list[str]:
    """A sentence for each column of a fleet with values that look as if they had another unit."""
    found = []
    if fleet.rtt_s is not None and (least_s := float(fleet.rtt_s.min(initial=np.inf))) >= LONGEST_TRIP_S:
        found.append(f"rtt_s is {least_s:.4g} s at least; are the numbers in milliseconds?")
    return [*found, *rate_doubts({name: getattr(fleet, name) for name in SLOWEST}, fleet.client)]


def rate_doubts(
    rates: Mapping[str, Float64[np.ndarray, " K"]], names: Shaped[np.ndarray, " K"], of: str = "client"
) -> list[str]:
    """A sentence for each of these rates that looks as if it had another unit.

    rates: by column, of each client or server (`of`). names: of these. A rate that is not known is inf.
    """
    found = []
    for name, values in rates.items():
        least, unit, likely = SLOWEST[name]
        small = values < least
        if small.all():
            most = float(values.max(initial=0))
            found.append(f"{name} is {most:.4g} {unit} at most; are the numbers in {likely}?")
        elif small.any():
            at = int(np.argmin(values))
            found.append(
                f"{name} of {of} {names[at]} is {values[at]:.4g} {unit}, and of"
                f" {np.count_nonzero(small)} of {len(names)} {of}s below {least:.0e}; is it in {likely}?"
            )
    return found


class Binding(NamedTuple):
    """The clients that hold the round up, those with the largest pull first.

    If clients[i] saves a second off the server, the round is `pull[i]` seconds shorter, with the cuts kept.
    """

    together: bool  # whether they end together because the shared resource is used up
    clients: Int64[np.ndarray, " N"]
    pull: Float64[np.ndarray, " N"]


def binding(planned: Planned) -> Binding:
    """The clients that hold the round up.

    - Staged barrier: the slowest client before the server and the slowest after it.
    - Session barrier, full server: the clients on the server end together. The pulls are the multipliers of
      `optim.sensitivity`.
    - Session barrier, server partly idle: clients that use no server and end last; if there are none, those
      with the largest share.
    - Work-conserving server: the clients that end last.
    - Shared band: all clients end together. A pull is proportional to a client's part of the band over its
      airtime.
    """
    plan = planned.plan
    if isinstance(plan, optim.BandPlan):
        parts = seconds(planned._replace(terms=planned.terms._replace(latency=None)))
        airtime_s = parts.smashed_up + parts.model_up
        if planned.planner.band in ONE_MEDIUM:
            airtime_s = airtime_s + parts.model_down + parts.gradient_down
        weight = np.divide(plan.uplink_hz, airtime_s, out=np.zeros(len(airtime_s)), where=airtime_s > 0)
        order = np.argsort(-weight, kind="stable")[: np.count_nonzero(weight)]
        return Binding(True, order, weight[order] / weight.sum())
    if planned.planner.barrier == "staged":
        parts = seconds(planned)
        slowest = np.unique([np.argmax(parts.before_server), np.argmax(parts.after_server)])
        return Binding(False, slowest, np.ones(len(slowest)))
    late = plan.client_s >= plan.round_s * (1 - TOGETHER)
    if planned.planner.method == WORK_CONSERVING:
        last = np.flatnonzero(late)
        return Binding(False, last, np.full(len(last), 1 / len(last)))
    alone = late & (plan.shares == 0)
    given, flops = plan.shares.sum(), planned.planner.server_flops
    full = bool(flops > 0 and given >= flops * (1 - TOGETHER))
    if alone.any() and not full:
        weight = alone.astype(float)
    elif full:
        weight = optim.sensitivity(planned.terms, plan).per_client_s
    else:
        weight = (late & (plan.shares >= plan.shares.max() * (1 - TOGETHER))).astype(float)
    order = np.argsort(-weight, kind="stable")[: np.count_nonzero(weight)]
    return Binding(full, order, weight[order] / weight.sum())


def pulls(planned: Planned) -> Float64[np.ndarray, " K"]:
    """The pull of each client: what the round gains of a second that the client saves; see `Binding`."""
    who, pull = binding(planned), np.zeros(len(planned.fleet))
    pull[who.clients] = who.pull
    return pull


class Help(NamedTuple):
    """What of each client, 10 % faster, would shorten the round most, to first order with the cuts kept."""

    resource: Shaped[np.ndarray, " K"]  # uplink, downlink or compute; "" where nothing would
    gain_s: Float64[np.ndarray, " K"]


def helps(planned: Planned) -> Help:
    """What would help each client that holds the round up."""
    return help_of(seconds(planned), pulls(planned))


def help_of(parts: optim.Seconds, pull: Float64[np.ndarray, " K"]) -> Help:
    """What would help clients with these seconds (K,) and pulls."""
    by_resource = {
        "uplink": parts.smashed_up + parts.model_up,
        "downlink": parts.model_down + parts.gradient_down,
        "compute": parts.client_forward + parts.client_backward,
    }
    saved_s = np.stack([*by_resource.values()]) * (1 - 1 / MORE)
    gain_s = pull * saved_s.max(axis=0)
    return Help(np.where(gain_s > 0, np.array([*by_resource])[saved_s.argmax(axis=0)], ""), gain_s)


def seconds(planned: Planned) -> optim.Seconds:
    """Each client's seconds by term; (K,) each. Under the staged barrier the server works at full speed.

    With a work-conserving server, the server's seconds include the waiting.
    """
    plan = planned.plan
    terms = optim.at_bands(planned.terms, plan)
    shares = np.where(np.isnan(plan.shares), planned.planner.server_flops, plan.shares)
    parts = terms.seconds(terms.columns(plan.cuts, plan.codecs), shares)
    if planned.planner.method == WORK_CONSERVING:
        others = parts.before_server + parts.after_server
        parts = parts._replace(server=np.where(parts.server > 0, plan.client_s - others, 0.0))
    return parts


def table(planned: Planned) -> dict[str, Shaped[np.ndarray, " K"]]:
    """One row per client: client, cut, unit, share_flops, share_percent, <term>_s …, client_s, pull_percent.

    `unit` is the last unit that the client holds, "" at cut 0. `share_flops` is in FLOP/s; both shares are
    NaN under the staged barrier. `pull_percent` says what the round gains, in percent of what the client
    saves. With a limited memory of the server also server_bytes. With a shared band also uplink_part and
    downlink_part, where 1 is an equal part.
    """
    plan, last_units = planned.plan, np.array(["", *planned.profile.names])
    banded = isinstance(plan, optim.BandPlan)
    return {
        "client": planned.fleet.client,
        "cut": plan.cuts,
        "unit": last_units[plan.cuts],
        "share_flops": plan.shares,
        "share_percent": share_percent(planned),
        **({"server_bytes": server_bytes(planned)} if planned.planner.server_memory_bytes else {}),
        **({"uplink_part": plan.uplink_hz, "downlink_part": plan.downlink_hz} if banded else {}),
        **{f"{name}_s": values for name, values in seconds(planned)._asdict().items()},
        "client_s": plan.client_s,
        "pull_percent": 100 * pulls(planned),
    }


def share_percent(planned: Planned) -> Float64[np.ndarray, " K"]:
    """Each client's share in percent of the server; NaN where clients have none, or without a server."""
    flops = planned.planner.server_flops
    return 100 * planned.plan.shares / flops if flops else np.full(len(planned.fleet), np.nan)
