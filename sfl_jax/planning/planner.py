"""Plans the rounds of a fleet: the cut of each client and its share of the server."""

import dataclasses
from collections.abc import Iterable
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Int64

from sfl_jax import fleet as fleets
from sfl_jax import optim, plan_rules
from sfl_jax.errors import BadInput
from sfl_jax.plan_rules import WORK_CONSERVING
from sfl_jax.planning import within_memory
from sfl_jax.registry import BANDS, LINKS, METHODS

# Folded into the seed's key, one per purpose. The network folds in unit indices, which are smaller.
PLAN, TRAINING = 2**32 - 1, 2**32 - 2
_NAMED = 3  # how many clients an error names


@dataclasses.dataclass(frozen=True)
class Planner:
    """How the rounds of a fleet are planned.

    Attributes:
      method: a name of `METHODS`.
      server_flops: compute of the server in FLOP/s; 0 for no server.
      min_cut: units that every client keeps; 0 lets its images leave the client.
      barrier: "session": no client waits for another within a round; "staged": all wait for each other before
        and after the server works. Also a name of `optim.CLOCKS`.
      starts, recall, rounding: for alternating and regression, see `optim.solve`.
      links: "fixed", the rates of the fleet; "shannon", rates by distance; "fading", rates by distance that
        change every round.
      coherence_s: how long a fade lasts, see `fleet.Links`.
      band: how clients share bandwidth: "fixed", equal parts; "pooled", best parts of one band; "separate",
        best parts of an uplink and of a downlink band; "airtime", best parts of the time of one half-duplex
        medium, where a client has its rates while nobody else sends.
      seed: for random plans and links.
      max_cut: the largest cut of any client; None is the number of units.
      server_memory_bytes: the server's memory for copies of its half, one per client; 0 for no limit.
      broadcast_bps: bit/s at which the server sends the model once to all clients; 0 sends it to each at its
        own rate. Units are sent in order, so a client starts as soon as its half has come.

    Raises:
      BadInput: a value outside its range, or two values that exclude each other.
    """

    method: str = "exact"
    server_flops: float = 2e10
    min_cut: int = 1
    barrier: str = "session"
    starts: tuple[str, ...] = ("equal",)
    recall: bool = False
    rounding: str = "need"
    links: str = "fixed"
    coherence_s: float = 0.0
    band: str = "fixed"
    seed: int = 0
    max_cut: int | None = None
    server_memory_bytes: float = 0.0
    broadcast_bps: float = 0.0

    def __post_init__(self) -> None:
        for name, allowed in (
            ("method", METHODS), ("barrier", ("session", *optim.CLOCKS)), ("rounding", optim.ROUNDINGS),
            ("links", LINKS), ("band", BANDS),
        ):  # fmt: skip
            if getattr(self, name) not in allowed:
                raise BadInput(f"{name}={getattr(self, name)}: must be one of {', '.join(allowed)}")
        if not 0 <= self.server_flops < np.inf:
            raise BadInput(f"server_flops={self.server_flops}: must be a finite number, at least 0")
        if self.min_cut < 0:
            raise BadInput(f"min_cut={self.min_cut}: must be at least 0")
        if not 0 <= self.broadcast_bps < np.inf:
            raise BadInput(f"broadcast_bps={self.broadcast_bps}: must be a finite number, at least 0")
        within_memory.check_bytes(self)
        plan_rules.check(self, self.max_cut)
        if self.broadcast_bps and self.barrier == "handover":
            raise BadInput(
                f"broadcast_bps={self.broadcast_bps:g}: with barrier=handover a client gets the model after"
                " the client before it"
            )
        within_memory.check_barrier(self)

    @property
    def links_vary(self) -> bool:
        """Whether the rates of clients change from round to round."""
        return self.links == "fading"


ONE_MEDIUM = ("pooled", "airtime")  # bands that serve both directions


def check_links(planner: Planner, fleet: fleets.Fleet) -> None:
    """Refuses links by distance if the fleet has no distances or powers, and airtime with limited energy."""
    if planner.band == "airtime" and fleet.energy_j is not None:
        raise BadInput("band=airtime: cannot be planned with energy budgets (the fleet's column energy_j)")
    for name in ("distance_m", "transmit_w"):
        if planner.links != "fixed" and getattr(fleet, name) is None:
            raise BadInput(f"links={planner.links}: the fleet has no column {name}")


def check_rounds(
    planner: Planner,
    fleet: fleets.Fleet,
    terms: optim.Terms,
    cohorts: Iterable[tuple[int, Int64[np.ndarray, " K"]]],
) -> None:
    """Refuses, before anything compiles, a round whose cohort no plan can serve.

    cohorts: (round, indices of its clients (K,)). If links vary, it refuses only clients that no links could
    serve; for the others see `serve`.
    """
    best = {"uplink_bps": np.full(len(fleet), np.inf), "downlink_bps": np.full(len(fleet), np.inf)}
    terms = terms._replace(**best) if planner.links_vary else linked(planner, fleet, terms)
    usable = optim.servable(terms, planner.server_flops)
    if within_memory.limits(planner):
        cohorts = list(cohorts)
        within_memory.check_cohorts(planner, terms, usable, cohorts)
    usable = usable[:, -1:] if planner.method == "no_split" else usable
    together = planner.method == "common_cut"
    if usable.all(axis=0).any() if together else usable.any(axis=1).all():
        return
    for round, ids in cohorts:
        if not (usable[ids].all(axis=0).any() if together else usable[ids].any(axis=1).all()):
            try:
                solve(planner, fleet.take(ids), terms.take(ids), round)
            except BadInput as error:
                raise BadInput(f"round {round + 1}: {error}") from error


def linked(
    planner: Planner,
    fleet: fleets.Fleet,
    terms: optim.Terms,
    round: int = 0,
    ids: Int64[np.ndarray, " K"] | None = None,
) -> optim.Terms:
    """The terms with the links of a round.

    ids: (K,) index of each client in the whole fleet, if `fleet` is a part of it. With a pooled band both
    directions have the bandwidth of the wider link. With `airtime` the rates are those at an equal part of
    the time of the K clients. A broadcast gives every client the same rate for the model.
    """
    if planner.broadcast_bps:
        terms = terms._replace(broadcast_bps=np.full(len(terms.samples), planner.broadcast_bps))
    if planner.links != "fixed":
        terms = _by_distance(planner, fleet, terms, round, ids)
    if planner.band == "airtime":
        terms = terms.faster(uplink=1 / len(terms.samples), downlink=1 / len(terms.samples))
    return terms


def _by_distance(planner, fleet, terms, round, ids) -> optim.Terms:
    links = fleets.Links(rayleigh=planner.links == "fading", coherence_s=planner.coherence_s)
    if planner.band == "pooled":
        wider = max(links.uplink_hz, links.downlink_hz)
        links = dataclasses.replace(links, uplink_hz=wider, downlink_hz=wider)
    rates = fleets.fading_rates(fleet, links, planner.seed, round, ids, float(terms.model_bits[-1]))
    return terms._replace(uplink_bps=rates.uplink_bps, downlink_bps=rates.downlink_bps)


class Served(NamedTuple):
    """A round's plan, which clients are in it (K,), and a line with name and reason for each other client."""

    plan: optim.Plan | optim.BandPlan
    present: Bool[np.ndarray, " K"]
    left_out: tuple[str, ...]


def serve(
    planner: Planner,
    fleet: fleets.Fleet,
    terms: optim.Terms,
    round: int,
    available: Bool[np.ndarray, " K"] | None = None,
) -> Served:
    """The plan of a round of training.

    If links vary, it leaves out the clients that no plan serves with this round's links. If links do not
    vary, BadInput names these clients. It leaves out clients that are not `available` without a line.
    """
    present, left_out = np.ones(len(fleet), bool) if available is None else available.copy(), []
    while True:
        try:
            return Served(_solve(planner, terms, round, present), present, tuple(left_out))
        except optim.Infeasible as error:
            if not planner.links_vary or not error.clients:
                raise BadInput(named(error, fleet)) from error
            present[list(error.clients)] = False
            left_out += _reasons(error, fleet)
        except BadInput:  # each client can be served, but not all together
            greedy = present & ~optim.servable(terms, planner.server_flops).any(axis=1)
            if not planner.links_vary or not greedy.any():
                raise
            present &= ~greedy
            reason = "its energy budget needs more than an equal part of the uplink band"
            left_out += [f"client {client}: {reason}" for client in fleet.client[greedy]]


def solve(
    planner: Planner, fleet: fleets.Fleet, terms: optim.Terms, round: int = 0
) -> optim.Plan | optim.BandPlan:
    """The plan of a round. BadInput gives the fleet's names of the clients that cannot be served.

    With a shared band, its parts are in units of an equal part, at which the terms' rates hold.
    """
    try:
        return _solve(planner, terms, round)
    except optim.Infeasible as error:
        raise BadInput(named(error, fleet)) from error


def _solve(planner, terms, round, present=None):
    if within_memory.limits(planner):
        return within_memory.solve(planner, terms, present)
    if planner.band != "fixed":
        equal = float(len(terms.samples))
        band = equal if planner.band in ONE_MEDIUM else (equal, equal)
        return optim.solve_bandwidth(terms, planner.server_flops, band, reference_hz=1.0, present=present)
    if planner.method == WORK_CONSERVING:
        return METHODS[WORK_CONSERVING](terms, planner.server_flops, present)
    return optim.solve(
        terms, planner.server_flops, planner.method, planner.barrier, round_key(planner.seed, round), present,
        starts=planner.starts, recall=planner.recall, rounding=planner.rounding,
    )  # fmt: skip


def round_key(seed: int, round: int, purpose: int = PLAN) -> jax.Array:
    """The JAX random key of a round, for its plan or for its training (`purpose`)."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), purpose), round)


def smallest_server(fleet: fleets.Fleet, terms: optim.Terms, target_round_s: float) -> float:
    """FLOP/s of the smallest server whose round takes at most `target_round_s`; 0 if no client needs one."""
    try:
        return optim.smallest_server(terms, target_round_s).server_flops
    except optim.Infeasible as error:
        raise BadInput(f"target_round_s={target_round_s:g}: {named(error, fleet)}") from error


def named(error: optim.Infeasible, fleet: fleets.Fleet) -> str:
    """The error's text with the clients' names instead of their indices."""
    reasons = _reasons(error, fleet)
    more = f"; and {len(reasons) - _NAMED} more" if len(reasons) > _NAMED else ""
    return f"no plan serves every client: {'; '.join(reasons[:_NAMED])}{more}"


def _reasons(error, fleet):
    pairs = zip(fleet.client[list(error.clients)], error.reasons, strict=True)
    return [f"client {client}: {reason}" for client, reason in pairs]
