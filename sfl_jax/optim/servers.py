"""Several servers: which one each client takes, its cut there, and the shares of every server together.

Each server has its compute, links of its own to every client, and perhaps a limited memory. For a time T the
clients must be assigned so that no server is asked for more than it has; see `assignment.py`. What is too
much for the relaxation at T bounds every plan from below, and the least T of the relaxation is found by
halving. Just above it, whole assignments are looked for, further above the longer none is found. A server's
clients, cuts and shares are then the single-server optimum of `exact.py` or `memory.py`. What is left between
plan and bound is the plan's gap.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64
from numpy.typing import ArrayLike, NDArray

from sfl_jax.errors import BadInput
from sfl_jax.optim.assignment import Choice, Options, Relaxed, relaxed, repaired
from sfl_jax.optim.costs import Floats, Terms
from sfl_jax.optim.infeasible import why_infeasible
from sfl_jax.optim.memory import mixed_end_s, solve_memory
from sfl_jax.optim.packing import Packed, packed
from sfl_jax.optim.plan import Infeasible
from sfl_jax.optim.shares import SLACK, rounding
from sfl_jax.optim.solve import solve

_TOLERANCE = 1e-8  # relative, of the relaxation's least time
_FIRST, _FURTHER = 1e-7, 2.5  # how far above the bound whole assignments are looked for, relative
_FURTHEST = 1e9
_LIKELY = 0.3  # of a client's share: so far above the bound whole assignments are likely
_TRIES = 20  # to close the gap, once there are some
_FAILED = 3  # of them in a row that tell nothing
_MANY = 2000  # clients, for whom each start takes long
_NOISE, _STARTS = 0.1, 6  # of prices, relative, and how many of their cheapest options are repaired


class Servers(NamedTuple):
    """E servers; NumPy. memory_bytes: inf is no limit.  Rates are 0 where there is no link."""

    flops: Float64[np.ndarray, " E"]
    memory_bytes: Float64[np.ndarray, " E"]
    uplink_bps: Float64[np.ndarray, "K E"]
    downlink_bps: Float64[np.ndarray, "K E"]

    def terms(self, terms: Terms, servers: ArrayLike) -> Terms:
        """The terms with each client's links to its own server (K,), or of all to one."""
        rows = np.arange(len(terms.samples))
        own = np.broadcast_to(np.asarray(servers), rows.shape)
        up, down = (rates[rows, own] for rates in (self.uplink_bps, self.downlink_bps))
        return terms._replace(
            uplink_bps=np.where(up > 0, up, 1.0), downlink_bps=np.where(down > 0, down, 1.0)
        )

    @property
    def reach(self) -> Bool[np.ndarray, "K E"]:
        """Which clients have links, both ways, to which server."""
        return (self.uplink_bps > 0) & (self.downlink_bps > 0)


class ServersPlan(NamedTuple):
    """A `Plan` of several servers: the shares of a server's clients add up to its FLOP/s at most."""

    servers: NDArray[np.int32]  # (K,) place among the servers; of whoever trains alone, whose link it uses
    cuts: NDArray[np.int32]
    shares: Floats
    client_s: Floats
    round_s: float
    bound_s: float  # proven for all assignments, all cuts and constant shares
    iterations: int
    codecs: NDArray[np.int32]

    @property
    def gap(self) -> float:
        """How far above the optimum the round can be at most, relative."""
        return self.round_s / self.bound_s - 1 if self.bound_s > 0 else float(self.round_s > 0) * np.inf


def solve_servers(terms: Terms, servers: Servers) -> ServersPlan:
    """Servers, cuts and shares that end a round early, session barrier, with a proven bound.

    Infeasible names the clients that no server serves; BadInput says where memories are too small for all, or
    no assignment was found that fits them.
    """
    _check(terms, servers)
    search = _Search(terms, servers)
    search.relax()
    plan = search.whole()
    if plan is None:
        raise BadInput(
            "servers: no assignment was found whose halves fit the memories; they leave too little to spare"
        )
    return plan


class _Tried(NamedTuple):
    """A plan at a time, if one was found; whether that one is left open otherwise."""

    plan: ServersPlan | None
    gave_up: bool = False


class _Search:
    """Seconds of every way (K, E, C), and what is known of the round."""

    def __init__(self, terms: Terms, servers: Servers):
        self.terms, self.servers, self.passes, self.pool = terms, servers, 0, []
        self.hard_s = np.inf  # from when on to go through all options takes too long
        self.clients, (self.columns) = len(terms.samples), terms.shape[1]
        tables = [servers.terms(terms, np.full(self.clients, e)).costs() for e in range(len(servers.flops))]
        usable = np.stack([costs.allowed for costs in tables], axis=1) & servers.reach[:, :, None]
        self.work = tables[0].server_flop
        usable &= (self.work[:, None] <= 0) | (servers.flops[:, None] > 0)
        self.fixed_s = np.where(usable, np.stack([costs.fixed_s for costs in tables], axis=1), np.inf)
        lost = np.asarray(~np.isfinite(self.fixed_s).any(axis=(1, 2)))
        if lost.any():
            raise self.why_lost(lost)
        self.limited = np.isfinite(servers.memory_bytes)
        with np.errstate(divide="ignore", invalid="ignore"):
            serving_s = np.where(self.work[:, None] > 0, self.work[:, None] / servers.flops[:, None], 0.0)
        self.low_s = float((self.fixed_s + serving_s).min(axis=(1, 2)).max()) * (1 - 2 * SLACK)
        self.error = 4 * rounding(self.clients) + len(servers.flops) * 2.0**-48

    def why_lost(self, lost: Bool[np.ndarray, " K"]) -> Infeasible:
        """The error that names whom no server serves."""
        cut_off = lost & ~self.servers.reach.any(axis=1)
        if cut_off.any():
            clients = tuple(np.flatnonzero(cut_off).tolist())
            return Infeasible(clients, ("it has a link to no server",) * len(clients))
        best = self.servers._replace(
            uplink_bps=self.servers.uplink_bps.max(axis=1, keepdims=True),
            downlink_bps=self.servers.downlink_bps.max(axis=1, keepdims=True),
        )
        return why_infeasible(best.terms(self.terms, 0), float(self.servers.flops.max()), lost)

    def options(self, time_s: float) -> Options:
        """What each client can choose to end by then: its best column of servers whose memory is not limited,
        and all of the others'. Shares are rounded down."""
        left_s = (time_s - self.fixed_s) + SLACK * time_s
        with np.errstate(divide="ignore", invalid="ignore"):
            share = np.where(
                self.work[:, None] > 0, self.work[:, None] / left_s / self.servers.flops[:, None], 0.0
            )
        share = np.where((left_s > 0) | ((left_s >= 0) & (self.work[:, None] <= 0)), share, np.inf)
        server, parts, memory, columns = [], [], [], []
        for e, is_limited in enumerate(self.limited):
            chosen = np.arange(self.columns) if is_limited else share[:, e].argmin(axis=1)[:, None]
            chosen = np.broadcast_to(chosen, (self.clients, chosen.shape[-1]))
            server.append(np.full(chosen.shape[1], e))
            parts.append(np.take_along_axis(share[:, e], chosen, axis=1))
            columns.append(chosen)
            taken = self.terms.server_bytes[chosen] / self.servers.memory_bytes[e] if is_limited else 0.0
            memory.append(np.broadcast_to(taken, chosen.shape))
        joined = (np.concatenate(each, axis=1) for each in (parts, memory, columns))
        return Options(np.concatenate(server), *joined)

    def relaxed(self, time_s: float, *, settle: bool = False) -> tuple[Options, Relaxed]:
        """The options and their relaxation at a time, from the choices that mattered last."""
        options = self.options(time_s)
        rows = np.arange(self.clients)
        pool = [choice for choice in self.pool if np.isfinite(options.share[rows, choice]).all()]
        found = relaxed(options, self.error, pool, settle=settle)
        self.passes += found.passes
        self.pool = [choice for choice, part in zip(found.choices, found.parts, strict=True) if part > 0]
        return options, found

    def relax(self) -> None:
        """Raises low_s to the least time of the relaxation."""
        if self.limited.any() and self.relaxed(self.low_s * _FURTHEST)[1].is_too_much:
            raise self.why_full()
        high_s, guess_s = np.inf, self.low_s * (1 + _TOLERANCE)
        while high_s > self.low_s * (1 + _TOLERANCE):
            options, found = self.relaxed(guess_s)
            if found.is_too_much:
                self.low_s = guess_s
            else:
                high_s = min(guess_s, self.mixture_end_s(options, found))
            guess_s = 0.5 * (self.low_s + high_s) if np.isfinite(high_s) else 2 * guess_s

    def mixture_end_s(self, options: Options, found: Relaxed) -> float:
        """When a mixture of choices ends if each server gives its best shares."""
        kept = [(part, choice) for part, choice in zip(found.parts, found.choices, strict=True) if part > 0]
        parts = np.repeat([part for part, _ in kept], self.clients)
        chosen = np.concatenate([choice for _, choice in kept])
        rows = np.tile(np.arange(self.clients), len(kept))
        server, column = options.server[chosen], options.column[rows, chosen]
        fixed_s, work = self.fixed_s[rows, server, column], parts * self.work[rows, column]
        return max(
            mixed_end_s(fixed_s[server == e], work[server == e], flops)
            for e, flops in enumerate(self.servers.flops)
        )

    def why_full(self) -> BadInput:
        """The error where the halves fit no memories, not even as a mixture."""
        usable = np.isfinite(self.fixed_s) & self.limited[:, None]
        free = (np.isfinite(self.fixed_s) & ~self.limited[:, None]).any(axis=(1, 2))
        least = np.where(usable, self.terms.server_bytes, np.inf).min(axis=(1, 2))
        least, room = np.where(free, 0.0, least).sum(), self.servers.memory_bytes[self.limited].sum()
        missing = f"; {least - room:.4g} bytes are missing" if least > room else ", or links to the others"
        return BadInput(
            f"servers: the halves of all clients take {least:.4g} bytes or more, and the memories are"
            f" {room:.4g} bytes{missing}"
        )

    def whole(self) -> ServersPlan | None:
        """The best plan of whole assignments found: looked for just above low_s and then further above."""
        reach, best = _FIRST, None
        while best is None and reach < _FURTHEST:
            best = self.tried(self.low_s * (1 + reach)).plan
            reach *= _FURTHER
            if np.isfinite(self.hard_s):  # nothing is proven any more, and just above the bound little fits
                reach = max(reach, _LIKELY / self.clients)
        return None if best is None else self.closed(best)

    def closed(self, best: ServersPlan) -> ServersPlan:
        """A better plan or a better bound than the first ones, until they meet or the tries are used up."""
        part, failed = 0.5, 0
        for _ in range(_TRIES):
            gap_s = best.round_s - self.low_s
            if gap_s <= _TOLERANCE * best.round_s or failed == _FAILED:
                break
            below_s = best.round_s * (1 - 0.5 * _TOLERANCE)
            found = self.tried(min(self.low_s + part * gap_s, below_s))
            if found.plan is not None and found.plan.round_s < best.round_s:
                best, part, failed = found.plan, 1.0 if not found.gave_up else 0.7, 0
            elif found.gave_up:
                part, failed = 0.5 * (1 + part), failed + 1
            else:
                part = min(2 * part, 1.0)
        return best._replace(bound_s=self.low_s, iterations=self.passes)

    def tried(self, time_s: float) -> _Tried:
        """A plan of an assignment that fits at a time. If there is none for certain, that raises low_s."""
        options, relaxation = self.relaxed(time_s, settle=True)
        if relaxation.is_too_much:
            answer = Packed(None)
        elif time_s >= self.hard_s:
            answer = Packed(None, gave_up=True)
        else:
            answer = packed(options, relaxation.prices, self.error)
        if answer.choice is not None:
            return _Tried(self.plan(options.server[answer.choice]))
        if not answer.gave_up:
            self.low_s = time_s
            return _Tried(None)
        self.hard_s = min(self.hard_s, time_s)
        costs = options.costs(relaxation.prices)
        found = [repaired(options, start, costs) for start in self.starts(options, relaxation)]
        plans = [self.plan(options.server[choice]) for choice in found if choice is not None]
        return _Tried(min(plans, key=lambda plan: plan.round_s, default=None), gave_up=True)

    def starts(self, options: Options, relaxation: Relaxed) -> list[Choice]:
        """The options that the relaxation has most of, the cheapest, and the cheapest at prices close by."""
        votes, rows = np.zeros(options.share.shape), np.arange(self.clients)
        for part, choice in zip(relaxation.parts, relaxation.choices, strict=True):
            votes[rows, choice] += part
        votes = np.where(np.isfinite(options.share), votes, -1.0)
        rng, size = np.random.default_rng(0), len(relaxation.prices)
        number = _STARTS if self.clients < _MANY else 1
        noises = [np.ones(size), *rng.uniform(1 - _NOISE, 1 + _NOISE, (number, size))]
        cheapest = [options.costs(relaxation.prices * noise).argmin(axis=1) for noise in noises]
        return [votes.argmax(axis=1), *cheapest]

    def plan(self, assigned: Choice) -> ServersPlan:
        """The optimal cuts and shares of every server for the clients assigned to it (K,)."""
        clients, servers = self.clients, self.servers
        cuts, codecs, shares, client_s = (
            np.zeros(clients, kind) for kind in (np.int32, np.int32, float, float)
        )
        for e, (flops, memory_bytes) in enumerate(zip(servers.flops, servers.memory_bytes, strict=True)):
            here = assigned == e
            if here.any():
                own = servers.terms(self.terms, np.full(clients, e))
                plan = (
                    solve_memory(own, float(flops), float(memory_bytes), here)
                    if self.limited[e]
                    else solve(own, float(flops), present=here)
                )
                cuts[here], codecs[here] = plan.cuts[here], plan.codecs[here]
                shares[here], client_s[here] = plan.shares[here], plan.client_s[here]
        return ServersPlan(
            assigned.astype(np.int32),
            cuts,
            shares,
            client_s,
            float(client_s.max()),
            self.low_s,
            self.passes,
            codecs,
        )


def _check(terms: Terms, servers: Servers) -> None:
    count, clients = len(servers.flops), len(terms.samples)
    if not count:
        raise BadInput("servers: there are none; give one or more")
    for name, values, shape in (
        ("memory_bytes", servers.memory_bytes, (count,)),
        ("uplink_bps", servers.uplink_bps, (clients, count)),
        ("downlink_bps", servers.downlink_bps, (clients, count)),
    ):  # fmt: skip
        if np.shape(values) != shape:
            raise BadInput(f"servers.{name} has shape {np.shape(values)}; it must be {shape}")
    if not ((servers.flops > 0) & (servers.flops < np.inf)).all():
        raise BadInput(f"servers.flops={servers.flops}: must be finite numbers of FLOP/s, above 0")
    if not (servers.memory_bytes > 0).all():
        raise BadInput(f"servers.memory_bytes={servers.memory_bytes}: must be above 0, inf for no limit")
    for rates in (servers.uplink_bps, servers.downlink_bps):
        if not ((rates >= 0) & (rates < np.inf)).all():
            raise BadInput("servers: rates must be finite numbers of bit/s, 0 where a client is out of reach")
