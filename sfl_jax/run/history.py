"""What the plans of a run's rounds were: cuts, shares, seconds by term, and which clients held a round up."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int64, Shaped

from sfl_jax import optim, planning
from sfl_jax.fleet import Fleet
from sfl_jax.planning import Planned
from sfl_jax.run.parts import Parts

TERMS = optim.Seconds._fields


class History(NamedTuple):
    """The plans of R rounds of a fleet of N clients and a network with C cuts, as they were made.

    Delays and drop-outs come after a plan, so they are not in it. A client without rounds has NaN as its
    means.

    cuts: how many clients of each round had each cut. seconds: each round's seconds by term, see
    `round_seconds`. planned_s: the planned round. holder: the client with the largest pull in each round, -1
    without clients. rounds: in how many rounds each client was planned. cut, share: the means over these
    rounds; a share is a part of the server. pull: over all rounds, how much of the round each client held up,
    see `pulls`. longest: the term that was longest while it did, an index in TERMS. names, flops: of the
    clients. units: names of the units.
    """

    cuts: Int64[np.ndarray, "R C"]
    seconds: Float64[np.ndarray, "R 7"]
    planned_s: Float64[np.ndarray, " R"]
    holder: Int64[np.ndarray, " R"]
    rounds: Int64[np.ndarray, " N"]
    cut: Float64[np.ndarray, " N"]
    share: Float64[np.ndarray, " N"]
    pull: Float64[np.ndarray, " N"]
    longest: Int64[np.ndarray, " N"]
    names: Shaped[np.ndarray, " N"]
    flops: Float64[np.ndarray, " N"]
    units: tuple[str, ...]


class Builder:
    """Makes the history of a run from the plans of its rounds, which `add` takes one by one."""

    def __init__(self, parts: Parts, rounds: int):
        clients, units = len(parts.fleet), len(parts.profile.names)
        self._parts = parts
        self._cuts = np.zeros((rounds, units + 1), np.int64)
        self._seconds = np.zeros((rounds, len(TERMS)))
        self._planned_s, self._holder = np.zeros(rounds), np.full(rounds, -1)
        self._rounds, self._pull = np.zeros(clients, np.int64), np.zeros(clients)
        self._cut, self._share = np.zeros(clients), np.zeros(clients)
        self._held = np.zeros((clients, len(TERMS)))  # the seconds of each client, weighted by its pull

    def add(
        self,
        round: int,
        ids: Int64[np.ndarray, " K"],
        clients: Fleet,
        terms: optim.Terms,
        plan: optim.Plan | optim.BandPlan,
        present: Bool[np.ndarray, " K"],
    ) -> None:
        """Adds the plan of a round, counted from 0.

        ids: its clients as indices in the fleet. clients, terms: theirs, see `rounds.cohort`. present: who of
        them is in the plan.
        """
        self._planned_s[round] = plan.round_s
        if not present.any():
            return
        planner, here = self._parts.planner, np.flatnonzero(present)
        ids = ids[here]
        own = Planned(planner, self._parts.profile, clients.take(here), terms.take(here), _of(plan, here))
        by_term, pull = np.stack(planning.seconds(own)), pulls(own)
        self._cuts[round] = np.bincount(own.plan.cuts, minlength=self._cuts.shape[1])
        self._seconds[round] = round_seconds(planner.barrier, by_term, pull)
        self._holder[round] = ids[pull.argmax()]
        self._rounds[ids] += 1
        self._cut[ids] += own.plan.cuts
        self._share[ids] += own.plan.shares / max(planner.server_flops, 1e-300)
        self._pull[ids] += pull
        self._held[ids] += (pull * by_term).T

    def history(self) -> History:
        """The history of the rounds so far."""
        fleet = self._parts.fleet
        return History(
            self._cuts, self._seconds, self._planned_s, self._holder, self._rounds,
            _means(self._cut, self._rounds), _means(self._share, self._rounds), self._pull,
            self._held.argmax(axis=1), fleet.client, np.asarray(fleet.flops, float),
            tuple(self._parts.profile.names),
        )  # fmt: skip


def _means(sums, times):
    return np.divide(sums, times, np.full(len(sums), np.nan), where=times > 0)


def of_plan(planned: Planned) -> History:
    """The history of a single round of a whole fleet."""
    plan, by_term, pull = planned.plan, np.stack(planning.seconds(planned)), pulls(planned)
    units = tuple(planned.profile.names)
    return History(
        np.bincount(plan.cuts, minlength=len(units) + 1)[None],
        round_seconds(planned.planner.barrier, by_term, pull)[None], np.array([plan.round_s]),
        np.array([pull.argmax()]), np.ones(len(plan.cuts), np.int64), plan.cuts.astype(float),
        plan.shares / max(planned.planner.server_flops, 1e-300), pull, by_term.argmax(axis=0),
        planned.fleet.client, np.asarray(planned.fleet.flops, float), units,
    )  # fmt: skip


def pulls(planned: Planned) -> Float64[np.ndarray, " K"]:
    """How much of a round each client holds up, (K,) that add up to 1.

    Under the session barrier it is the pull of `planning.binding`: what the round gains, as a part of what
    the client saves. Under the staged barrier the slowest before the server and the slowest after it hold
    half each. Under the others sessions follow each other, so a client's pull is its part of all seconds.
    """
    barrier, clients = planned.planner.barrier, len(planned.plan.cuts)
    found = np.zeros(clients)
    if barrier in ("session", "staged"):
        who = planning.binding(planned)
        found[who.clients] = who.pull
    else:
        found = np.sum(planning.seconds(planned), axis=0)
    return found / found.sum() if found.sum() > 0 else np.full(clients, 1 / clients)


def round_seconds(
    barrier: str, seconds: Float64[np.ndarray, "7 K"], pull: Float64[np.ndarray, " K"]
) -> Float64[np.ndarray, " 7"]:
    """A round's seconds by term, from each client's, in the order of TERMS.

    Session barrier: those of the client with the largest pull. Other barriers: between two points where
    clients wait for each other, those of the slowest client, and the sum over clients where they take turns.
    Under lockstep this holds where all clients have the same number of steps.
    """
    if barrier == "session":
        return seconds[:, pull.argmax()]
    return np.concatenate([
        seconds[slice(*phase)].sum(axis=1)
        if phase in _IN_TURN[barrier]
        else seconds[slice(*phase)][:, seconds[slice(*phase)].sum(axis=0).argmax()]
        for phase in _PHASES[barrier]
    ])  # fmt: skip


# The terms [first, last) between two points where clients wait, and those phases in which they take turns.
_PHASES: dict[str, Any] = {
    "staged": ((0, 3), (3, 4), (4, 7)),
    "in_turn": ((0, 1), (1, 6), (6, 7)),
    "handover": ((0, 7),),
    "lockstep": ((0, 1), (1, 3), (3, 4), (4, 6), (6, 7)),
}
_IN_TURN: dict[str, Any] = {
    "staged": ((3, 4),), "in_turn": ((1, 6),), "handover": ((0, 7),), "lockstep": ((3, 4),),
}  # fmt: skip


def _of(plan: Any, here: Int64[np.ndarray, " k"]) -> Any:
    """The plan of these clients."""
    per_client = ("cuts", "shares", "client_s", "codecs", "uplink_hz", "downlink_hz")
    kept = {name: getattr(plan, name) for name in per_client if name in plan._fields}
    return plan._replace(**{name: own[here] for name, own in kept.items() if len(own)})
