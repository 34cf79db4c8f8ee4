"""Prepares a round on the host: its cohort, its plan and its batches."""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from sfl_jax import datasets, fleet, optim, planning
from sfl_jax.federated.session import Assignment
from sfl_jax.planning import Turnout
from sfl_jax.run import closing
from sfl_jax.run.ledger import Ledger, ledger
from sfl_jax.run.parts import Parts


class Prepared(NamedTuple):
    """A round before it runs.

    left_out: names each client that no plan can serve in this round, and says why. rival_s: the round's
    seconds under other planning methods. ledger: its bytes, memory and work.
    """

    round: int
    plan: optim.Plan | optim.BandPlan
    left_out: tuple[str, ...]
    turnout: Turnout
    rival_s: dict[str, float]
    assignments: Assignment
    learning_rate: float
    ledger: Ledger


def prepare(parts: Parts, round: int) -> Prepared:
    """The cohort, plan and batches of a round."""
    ids, clients, terms, available = cohort(parts, round)
    plan, present, left_out = planning.serve(parts.planner, clients, terms, round, available)
    indices, steps = datasets.batches(
        parts.division, ids, seed=parts.seed, round=round, local_epochs=parts.local_epochs,
        batch_size=parts.batch_size, steps_max=parts.steps_max,
    )  # fmt: skip
    assert clients.samples is not None
    delayed, factor = parts.faults.delays(parts.seed, round, ids), parts.faults.deadline_factor
    comers = planning.turnout(parts.planner, factor, terms, plan, delayed, present)
    plan, comers = closing.added(parts, terms, plan, comers, delayed.slowdown)
    # An absent client keeps its place with 0 steps. So shapes stay the same, and nothing compiles again.
    weights = np.where(comers.came, parts.sampling.weights(clients.samples), 0).astype(np.float32)
    steps = np.where(comers.came, steps, 0).astype(np.int32)
    turn = fleet.order(parts.seed, round, len(ids)).astype(np.int32) if parts.scheme.has_order else None
    assignments = Assignment(ids.astype(np.int32), plan.cuts, weights, steps, indices, turn)
    if isinstance(parts.training.codecs, tuple):
        assignments = assignments._replace(codec=plan.codecs.astype(np.int32))
    rival_s = {name: _round_s(parts, terms, name, delayed, present) for name in parts.rivals}
    done = ledger(parts, terms, plan, comers.came)
    return Prepared(round, plan, left_out, comers, rival_s, assignments, parts.rate(round), done)


def ledger_after(
    parts: Parts, done: Prepared, diverged: Int[np.ndarray, " D"], steps: Int[np.ndarray, " D"]
) -> Ledger:
    """The ledger of a round in which clients diverged. diverged: their indices. steps: how many each took."""
    ids, _, terms, _ = cohort(parts, done.round)
    ended = np.full(len(ids), -1)
    place = {int(id): k for k, id in enumerate(ids)}
    ended[[place[int(id)] for id in diverged]] = steps
    return ledger(parts, terms, done.plan, done.turnout.came, ended)


def cohort(parts: Parts, round: int) -> tuple[np.ndarray, fleet.Fleet, optim.Terms, np.ndarray]:
    """A round's clients: their indices, the clients, their terms with the round's links, who is available."""
    ids, available = asked(parts, round)
    clients = parts.fleet.take(ids)
    terms = planning.linked(parts.planner, clients, parts.terms.take(ids), round, ids)
    return ids, clients, terms, available


def asked(parts: Parts, round: int) -> tuple[np.ndarray, np.ndarray]:
    """(indices of the clients asked in a round, which of them are available); both (K,)."""
    assert parts.fleet.samples is not None
    return parts.sampling.cohort(parts.seed, round, parts.fleet.samples, parts.cohort_size)


def _round_s(parts, terms, method, delayed, present) -> float:
    """The round's seconds under a rival method with the same clients and delays. Infinite if it is
    infeasible.
    """
    planner, factor = parts.planner, parts.faults.deadline_factor
    try:
        plan = optim.solve(terms, planner.server_flops, method, planner.barrier, present=present)
        done = planning.turnout(planner, factor, terms, plan, delayed, present)
        return closing.added(parts, terms, plan, done, delayed.slowdown)[1].round_s
    except optim.Infeasible:
        return math.inf
