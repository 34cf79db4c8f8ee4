"""From a fleet and a network to a plan, who holds its round up, and what would shorten it."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float64, Int64, Shaped

from sfl_jax import division, models, optim
from sfl_jax import fleet as fleets
from sfl_jax.config import RANDOM, Config
from sfl_jax.errors import BadInput

MORE = 1.1
MOST_CLIENTS = 20_000  # for the bound of any schedule
COHORTS = 100  # rounds whose cohorts are planned beside the whole fleet
# Slower than any client that anybody plans for: a file in Mbit/s or GFLOP/s looks like this.
SLOWEST = {"flops": (1e6, "FLOP/s", "GFLOP/s"), "uplink_bps": (1e4, "bit/s", "Mbit/s"),
           "downlink_bps": (1e4, "bit/s", "Mbit/s")}  # fmt: skip
# Ends, and sums of shares, that differ by less than this are equal to whoever reads them.
TOGETHER = 1e-6
# Folded into the seed's key, each for a purpose: no index of a unit, which the network folds into it.
PLAN, TRAINING = 2**32 - 1, 2**32 - 2
_NAMED = 3  # clients that an error names


class Planned(NamedTuple):
    """A plan with what it was made from. The server of `config` is the plan's, also where it was sought;
    the links of `terms` are those of round 0, and of equal parts of the band.
    """

    config: Config
    profile: models.Profile
    fleet: fleets.Fleet
    terms: optim.Terms
    plan: optim.Plan | optim.BandPlan


def make_plan(config: Config, file: fleets.Fleet | None = None) -> Planned:
    """The plan for the fleet, the network and the server of `config`; `file`: its fleet file if read already.

    With a target_round_s, the plan of the smallest server that meets it.

    Raises BadInput for a fleet file that is wrong or lacks samples, a min_cut beyond the chain, a method that
    cannot do what is asked, and where some client cannot be served at all.
    """
    fleet, profile, terms = read_terms(config, file)
    if len(fleet) < config.cohort_size != Config.cohort_size:
        raise BadInput(
            f"--cohort_size={config.cohort_size}: must be at most {len(fleet)}, the clients there are"
        )
    if config.target_round_s:
        config = dataclasses.replace(config, server_flops=smallest_server(config, fleet, terms))
    try:
        return Planned(config, profile, fleet, terms, solve(config, fleet, terms))
    except BadInput as error:
        raise BadInput(f"--fleet={config.fleet}: {error}") from error


def read_terms(
    config: Config, file: fleets.Fleet | None = None
) -> tuple[fleets.Fleet, models.Profile, optim.Terms]:
    """The fleet of `config`, the profile of its network, and their terms with the links of round 0."""
    fleet = read_fleet(config, file)
    chain = models.create(
        config.model, config.num_classes, config.image_channels, drop_rate_scale=config.drop_rate_scale
    )
    if config.min_cut > len(chain):
        raise BadInput(
            f"--min_cut={config.min_cut}: must be at most {len(chain)}, the units of {config.model}"
        )
    with ThreadPoolExecutor(1) as pool:
        compiled = pool.submit(_compile_plan, config, fleet, len(chain))
        stored = config.stored_size or config.image_size
        sizes = [(side, side, config.image_channels) for side in (config.image_size, stored)]
        profile = models.profile(chain, *sizes)
        compiled.result()
    terms = optim.terms(profile, fleet, work(config))  # pyright: ignore[reportArgumentType] has samples
    return fleet, profile, linked(config, fleet, terms)


def _compile_plan(config: Config, fleet: fleets.Fleet, units: int) -> None:
    """Compile the search for the optimum, on a network that costs nothing, while the real one is traced."""
    if config.barrier == "session" and config.band == "fixed":
        per_unit, per_cut = np.zeros(units, np.int64), np.zeros(units + 1, np.int64)
        free = models.Profile((), per_unit, per_unit, per_unit, per_unit, per_unit, per_cut)
        terms = optim.terms(free, fleet, work(config))  # pyright: ignore[reportArgumentType]
        optim.solve(terms, config.server_flops)


def read_fleet(config: Config, file: fleets.Fleet | None = None) -> fleets.Fleet:
    """The fleet file of `config`, read here unless it is given, or its random fleet."""
    config, file = division.settle(config, file)
    fleet = division.clients(config, file)
    if config.fleet == RANDOM:
        return fleet.with_samples(np.full(len(fleet), config.samples_per_client))
    if fleet.samples is None:
        raise BadInput(f"{config.fleet}: column samples: missing; a plan needs the samples of each client")
    check_links(config, fleet)
    return fleet


def check_links(config: Config, fleet: fleets.Fleet) -> None:
    """Refuse --links that the fleet does not tell enough for."""
    for name in ("distance_m", "transmit_w"):
        if config.links != "fixed" and getattr(fleet, name) is None:
            raise BadInput(f"--links={config.links}: {config.fleet} has no column {name}")


def check_rounds(config: Config, fleet: fleets.Fleet, terms: optim.Terms) -> None:
    """Refuse, before the first round, a later one whose cohort no plan can serve. Where links vary, whom not
    even the best could serve: the others have a round in which they can be, see `serve`.
    """
    best = {"uplink_bps": np.full(len(fleet), np.inf), "downlink_bps": np.full(len(fleet), np.inf)}
    terms = terms._replace(**best) if _links_vary(config) else linked(config, fleet, terms)
    usable = optim.servable(terms, config.server_flops)
    usable = usable[:, -1:] if config.method == "no_split" else usable
    together = config.method == "common_cut"
    if usable.all(axis=0).any() if together else usable.any(axis=1).all():
        return
    for round in range(config.rounds):
        ids = fleets.cohort(config.seed, round, config.clients, config.cohort_size)
        if not (usable[ids].all(axis=0).any() if together else usable[ids].any(axis=1).all()):
            own = fleet.take(ids)
            try:
                solve(config, own, terms.take(ids), round)
            except BadInput as error:
                raise BadInput(f"--fleet={config.fleet}: round {round + 1}: {error}") from error


def linked(
    config: Config,
    fleet: fleets.Fleet,
    terms: optim.Terms,
    round: int = 0,
    ids: Int64[np.ndarray, " K"] | None = None,
) -> optim.Terms:
    """The terms with the links of a round; ids: each client's index where `fleet` is a part of the whole.

    Of a pooled band all parts are of one width, that of the wider link, whichever way they are used.
    """
    if config.links == "fixed":
        return terms
    links = fleets.Links(rayleigh=config.links == "fading", coherence_s=config.coherence_s)
    if config.band == "pooled":
        wider = max(links.uplink_hz, links.downlink_hz)
        links = dataclasses.replace(links, uplink_hz=wider, downlink_hz=wider)
    rates = fleets.fading_rates(fleet, links, config.seed, round, ids, float(terms.model_bits[-1]))
    return terms._replace(uplink_bps=rates.uplink_bps, downlink_bps=rates.downlink_bps)


def work(config: Config) -> optim.Work:
    """What each client does in a round, as its costs need it."""
    slots = 2 if config.optimizer == "adam" else int(config.momentum > 0)
    return optim.Work(
        config.local_epochs,
        config.batch_size,
        config.bits_per_float,
        min_cut=config.min_cut,
        optimizer_slots=slots,
    )


class Served(NamedTuple):
    """A round's plan, who is in it (K,), and for each of the others a line with its name and the reason."""

    plan: optim.Plan | optim.BandPlan
    present: Bool[np.ndarray, " K"]
    left_out: tuple[str, ...]


def serve(config: Config, fleet: fleets.Fleet, terms: optim.Terms, round: int) -> Served:
    """The plan of a round of training. Where links vary from round to round, it leaves out the clients that
    no plan serves with the links of this one. BadInput names them where links do not vary.
    """
    present, left_out = np.ones(len(fleet), bool), []
    while True:
        try:
            return Served(_solve(config, terms, round, present), present, tuple(left_out))
        except optim.Infeasible as error:
            if not _links_vary(config) or not error.clients:
                raise BadInput(_named(error, fleet)) from error
            present[list(error.clients)] = False
            left_out += _reasons(error, fleet)
        except BadInput:  # each of them can be served, but not all together
            greedy = present & ~optim.servable(terms, config.server_flops).any(axis=1)
            if not _links_vary(config) or not greedy.any():
                raise
            present &= ~greedy
            reason = "its energy budget needs more than an equal part of the uplink band"
            left_out += [f"client {client}: {reason}" for client in fleet.client[greedy]]


def solve(
    config: Config, fleet: fleets.Fleet, terms: optim.Terms, round: int = 0
) -> optim.Plan | optim.BandPlan:
    """The plan of `config` for a round; BadInput names, as the fleet does, who cannot be served.

    Where the band is shared, parts of it are in units of an equal part, at which the terms' rates hold.
    """
    try:
        return _solve(config, terms, round)
    except optim.Infeasible as error:
        raise BadInput(_named(error, fleet)) from error


def _solve(config, terms, round, present=None):
    if config.band != "fixed":
        equal = float(len(terms.samples))
        band = equal if config.band == "pooled" else (equal, equal)
        return optim.solve_bandwidth(terms, config.server_flops, band, reference_hz=1.0, present=present)
    if config.method == "work_conserving":
        return optim.solve_serving(terms, config.server_flops, present)
    return optim.solve(
        terms, config.server_flops, config.method, config.barrier, round_key(config, round), present,
        starts=config.starts.split(","), recall=config.recall, rounding=config.rounding,
    )  # fmt: skip


def _links_vary(config):
    return config.links == "fading"


def round_key(config: Config, round: int, purpose: int = PLAN) -> jax.Array:
    """What is random in a round's plan, or in its training, is drawn from this, and nothing else is."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), purpose), round)


def smallest_server(config: Config, fleet: fleets.Fleet, terms: optim.Terms) -> float:
    """FLOP/s of the smallest server for the target_round_s of `config`; 0 if nobody needs one."""
    try:
        return optim.smallest_server(terms, config.target_round_s).server_flops
    except optim.Infeasible as error:
        raise BadInput(f"--target_round_s={config.target_round_s:g}: {_named(error, fleet)}") from error


def _named(error: optim.Infeasible, fleet: fleets.Fleet) -> str:
    """What the error says, with the clients' names instead of their places in the fleet."""
    reasons = _reasons(error, fleet)
    more = f"; and {len(reasons) - _NAMED} more" if len(reasons) > _NAMED else ""
    return f"no plan serves every client: {'; '.join(reasons[:_NAMED])}{more}"


def _reasons(error, fleet):
    named = zip(fleet.client[list(error.clients)], error.reasons, strict=True)
    return [f"client {client}: {reason}" for client, reason in named]


def any_schedule_bound_s(planned: Planned) -> float | None:
    """A lower bound on the round however the server works, None where it is not known or takes long."""
    config = planned.config
    if (config.barrier, config.band) != ("session", "fixed") or not config.server_flops:
        return None
    if len(planned.fleet) > MOST_CLIENTS:
        return None
    return optim.any_schedule_bound_s(planned.terms, config.server_flops)


class Gains(NamedTuple):
    """Seconds by which the round would be shorter, planned anew."""

    server_s: float  # with a server that is 10 % faster
    uplink_s: float  # with 10 % more uplink for every client
    downlink_s: float
    compute_s: float  # with 10 % more compute of every client's own


def gains(planned: Planned) -> Gains:
    """What more of each would bring: where all-local clients end last, it is no server that they lack."""
    config, _, fleet, terms, plan = planned
    richer = dataclasses.replace(config, server_flops=config.server_flops * MORE)
    faster = (
        terms._replace(**{name: getattr(terms, name) * MORE})
        for name in ("uplink_bps", "downlink_bps", "flops")
    )
    plans = [
        solve(richer, fleet, terms) if config.server_flops else plan,
        *(solve(config, fleet, each) for each in faster),
    ]
    return Gains(*(plan.round_s - after.round_s for after in plans))


def cohort_rounds_s(planned: Planned, rounds: int = COHORTS) -> Float64[np.ndarray, " R"]:
    """How long the first rounds of a training last, each of a cohort as it draws them and planned alone.

    Empty where a cohort is the whole fleet: that round is the plan's.
    """
    config, fleet = planned.config, planned.fleet
    if config.cohort_size >= len(fleet):
        return np.empty(0)
    rounds_s = []
    for round in range(rounds):
        ids = fleets.cohort(config.seed, round, len(fleet), config.cohort_size)
        own = fleet.take(ids)
        terms = linked(config, own, planned.terms.take(ids), round, ids)
        rounds_s.append(serve(config, own, terms, round).plan.round_s)
    return np.array(rounds_s)


class Floor(NamedTuple):
    """What one client needs with any server: no server makes the round shorter than `least_s`."""

    least_s: float
    resource: str  # uplink, downlink or compute: what takes most of it
    resource_s: float


def floor(planned: Planned, client: int) -> Floor:
    """The least seconds of one client (its index in the fleet), at its best cut on a server without limit."""
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
    """A sentence for each column whose values look like another unit's, for every client."""
    found = []
    for name, (least, unit, likely) in SLOWEST.items():
        most = float(getattr(fleet, name).max(initial=0))
        if most < least:
            found.append(f"{name} is {most:.4g} {unit} at most; are the numbers in {likely}?")
    return found


class Binding(NamedTuple):
    """The clients that hold the round up, those with the most pull first.

    A second less off the server for client i makes the round `pull[i]` seconds shorter, cuts being kept.
    """

    together: bool  # they end together, for what they share is used up
    clients: Int64[np.ndarray, " N"]
    pull: Float64[np.ndarray, " N"]


def binding(planned: Planned) -> Binding:
    """Who holds the round up.

    Staged: the slowest client up to the server, and the slowest after it. Under the session barrier: a client
    that needs no server and ends last holds it up alone. Else everybody whom a full server serves ends
    together, and the multipliers of `optim.sensitivity` are the pulls. Where the method leaves some of the
    server idle, those with the largest share hold it up. With a server that works for whoever waits, those
    that end last do. Where the band is shared, all end together, with pulls in proportion to a client's part
    of it over its airtime.
    """
    plan = planned.plan
    if isinstance(plan, optim.BandPlan):
        parts = seconds(planned)
        airtime_s = parts.smashed_up + parts.model_up
        if planned.config.band == "pooled":
            airtime_s = airtime_s + parts.model_down + parts.gradient_down
        weight = np.divide(plan.uplink_hz, airtime_s, out=np.zeros(len(airtime_s)), where=airtime_s > 0)
        order = np.argsort(-weight, kind="stable")[: np.count_nonzero(weight)]
        return Binding(True, order, weight[order] / weight.sum())
    if planned.config.barrier == "staged":
        parts = seconds(planned)
        slowest = np.unique([np.argmax(parts.before_server), np.argmax(parts.after_server)])
        return Binding(False, slowest, np.ones(len(slowest)))
    late = plan.client_s >= plan.round_s * (1 - TOGETHER)
    if planned.config.method == "work_conserving":
        last = np.flatnonzero(late)
        return Binding(False, last, np.full(len(last), 1 / len(last)))
    alone = late & (plan.shares == 0)
    given, flops = plan.shares.sum(), planned.config.server_flops
    full = bool(flops > 0 and given >= flops * (1 - TOGETHER))
    if alone.any() and not full:
        weight = alone.astype(float)
    elif full:
        weight = optim.sensitivity(planned.terms, plan).per_client_s
    else:
        weight = (late & (plan.shares >= plan.shares.max() * (1 - TOGETHER))).astype(float)
    order = np.argsort(-weight, kind="stable")[: np.count_nonzero(weight)]
    return Binding(full, order, weight[order] / weight.sum())


def seconds(planned: Planned) -> optim.Seconds:
    """Each client's seconds by term; (K,) each. Staged, the whole server serves one after the other.

    With a server that works for whoever waits, the server's seconds hold the waiting too.
    """
    plan = planned.plan
    terms = optim.at_bands(planned.terms, plan)
    shares = np.where(np.isnan(plan.shares), planned.config.server_flops, plan.shares)
    parts = terms.seconds(plan.cuts, shares)
    if planned.config.method == "work_conserving":
        others = parts.before_server + parts.after_server
        parts = parts._replace(server=np.where(parts.server > 0, plan.client_s - others, 0.0))
    return parts


def table(planned: Planned) -> dict[str, Shaped[np.ndarray, " K"]]:
    """What is known of each client: client, cut, unit, share_flops, <term>_s …, client_s.

    `unit` is the last unit that the client holds, "" at cut 0; `share_flops` is NaN under the staged barrier.
    Where the band is shared, uplink_part and downlink_part follow, 1 being an equal part.
    """
    plan, last_units = planned.plan, np.array(["", *planned.profile.names])
    banded = isinstance(plan, optim.BandPlan)
    return {
        "client": planned.fleet.client,
        "cut": plan.cuts,
        "unit": last_units[plan.cuts],
        "share_flops": plan.shares,
        **({"uplink_part": plan.uplink_hz, "downlink_part": plan.downlink_hz} if banded else {}),
        **{f"{name}_s": values for name, values in seconds(planned)._asdict().items()},
        "client_s": plan.client_s,
    }
