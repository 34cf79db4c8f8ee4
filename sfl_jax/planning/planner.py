"""Plans the rounds of a fleet: the cut of each client and its share of the server."""

import dataclasses
from collections.abc import Iterable
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Int64

from sfl_jax import fleet as fleets
from sfl_jax import optim
from sfl_jax.errors import BadInput
from sfl_jax.registry import BANDS, LINKS, METHODS

# Folded into the seed's key, each for a purpose: no index of a unit, which the network folds into it.
PLAN, TRAINING = 2**32 - 1, 2**32 - 2
_NAMED = 3  # clients that an error names


@dataclasses.dataclass(frozen=True)
class Planner:
    """How the rounds of a fleet are planned.

    Attributes:
      method: a name of `METHODS`.
      server_flops: compute of the server in FLOP/s; 0 for none.
      min_cut: units that every client keeps to itself; 0 lets its images leave it.
      barrier: "session", every client goes through its round by itself, or "staged", all wait for each other
        before and after the server works.
      starts, recall, rounding: of alternating and regression, see `optim.solve`.
      links: "fixed", the rates of the fleet; "shannon", rates by distance; "fading", rates by distance that
        change every round.
      coherence_s: how long a fade lasts, see `fleet.Links`.
      band: how clients share bandwidth: "fixed", equal parts; "pooled", best parts of one band; "separate",
        best parts of an uplink and of a downlink band.
      seed: of what is random in plans and links.

    Raises:
      BadInput: a value outside of its range, or two that exclude each other.
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
        if self.method == WORK_CONSERVING and self.barrier != "session":
            raise BadInput(f"method={WORK_CONSERVING}: needs barrier=session, not {self.barrier}")
        if self.band != "fixed" and (self.method, self.barrier) != ("exact", "session"):
            raise BadInput(f"band={self.band}: needs method=exact and barrier=session")

    @property
    def links_vary(self) -> bool:
        """Whether the rates of clients change from round to round."""
        return self.links == "fading"


WORK_CONSERVING = "work_conserving"


def check_links(planner: Planner, fleet: fleets.Fleet) -> None:
    """Refuses links by distance where the fleet has no distances."""
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

    Where links vary it refuses whom not even the best links could serve: the others have a round in which
    they can be served, see `serve`. cohorts: (round, indices of its clients).
    """
    best = {"uplink_bps": np.full(len(fleet), np.inf), "downlink_bps": np.full(len(fleet), np.inf)}
    terms = terms._replace(**best) if planner.links_vary else linked(planner, fleet, terms)
    usable = optim.servable(terms, planner.server_flops)
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
    """The terms with the links of a round; ids: each client's index where `fleet` is a part of the whole.

    Of a pooled band all parts are of one width, that of the wider link, whichever way they are used.
    """
    if planner.links == "fixed":
        return terms
    links = fleets.Links(rayleigh=planner.links == "fading", coherence_s=planner.coherence_s)
    if planner.band == "pooled":
        wider = max(links.uplink_hz, links.downlink_hz)
        links = dataclasses.replace(links, uplink_hz=wider, downlink_hz=wider)
    rates = fleets.fading_rates(fleet, links, planner.seed, round, ids, float(terms.model_bits[-1]))
    return terms._replace(uplink_bps=rates.uplink_bps, downlink_bps=rates.downlink_bps)


class Served(NamedTuple):
    """A round's plan, who is in it (K,), and for each of the others a line with its name and the reason."""

    plan: optim.Plan | optim.BandPlan
    present: Bool[np.ndarray, " K"]
    left_out: tuple[str, ...]


def serve(planner: Planner, fleet: fleets.Fleet, terms: optim.Terms, round: int) -> Served:
    """The plan of a round of training. Where links vary from round to round, it leaves out the clients that
    no plan serves with the links of this one. BadInput names them where links do not vary.
    """
    present, left_out = np.ones(len(fleet), bool), []
    while True:
        try:
            return Served(_solve(planner, terms, round, present), present, tuple(left_out))
        except optim.Infeasible as error:
            if not planner.links_vary or not error.clients:
                raise BadInput(_named(error, fleet)) from error
            present[list(error.clients)] = False
            left_out += _reasons(error, fleet)
        except BadInput:  # each of them can be served, but not all together
            greedy = present & ~optim.servable(terms, planner.server_flops).any(axis=1)
            if not planner.links_vary or not greedy.any():
                raise
            present &= ~greedy
            reason = "its energy budget needs more than an equal part of the uplink band"
            left_out += [f"client {client}: {reason}" for client in fleet.client[greedy]]


def solve(
    planner: Planner, fleet: fleets.Fleet, terms: optim.Terms, round: int = 0
) -> optim.Plan | optim.BandPlan:
    """The plan of a round; BadInput names, as the fleet does, who cannot be served.

    Where the band is shared, parts of it are in units of an equal part, at which the terms' rates hold.
    """
    try:
        return _solve(planner, terms, round)
    except optim.Infeasible as error:
        raise BadInput(_named(error, fleet)) from error


def _solve(planner, terms, round, present=None):
    if planner.band != "fixed":
        equal = float(len(terms.samples))
        band = equal if planner.band == "pooled" else (equal, equal)
        return optim.solve_bandwidth(terms, planner.server_flops, band, reference_hz=1.0, present=present)
    if planner.method == WORK_CONSERVING:
        return METHODS[WORK_CONSERVING](terms, planner.server_flops, present)
    return optim.solve(
        terms, planner.server_flops, planner.method, planner.barrier, round_key(planner.seed, round), present,
        starts=planner.starts, recall=planner.recall, rounding=planner.rounding,
    )  # fmt: skip


def round_key(seed: int, round: int, purpose: int = PLAN) -> jax.Array:
    """The key from which all that is random in a round's plan, or in its training, is drawn."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), purpose), round)


def smallest_server(fleet: fleets.Fleet, terms: optim.Terms, target_round_s: float) -> float:
    """FLOP/s of the smallest server whose round takes at most `target_round_s`; 0 if nobody needs one."""
    try:
        return optim.smallest_server(terms, target_round_s).server_flops
    except optim.Infeasible as error:
        raise BadInput(f"target_round_s={target_round_s:g}: {_named(error, fleet)}") from error


def _named(error: optim.Infeasible, fleet: fleets.Fleet) -> str:
    """What the error says, with the clients' names instead of their places in the fleet."""
    reasons = _reasons(error, fleet)
    more = f"; and {len(reasons) - _NAMED} more" if len(reasons) > _NAMED else ""
    return f"no plan serves every client: {'; '.join(reasons[:_NAMED])}{more}"


def _reasons(error, fleet):
    named = zip(fleet.client[list(error.clients)], error.reasons, strict=True)
    return [f"client {client}: {reason}" for client, reason in named]
