"""What the plans of a run's rounds were."""

import dataclasses

import numpy as np
import pytest
from commands import small_world

from sfl_jax import fleet, models, optim, planning
from sfl_jax.commands import parts
from sfl_jax.commands.config import Config
from sfl_jax.planning import Planned, Planner
from sfl_jax.run import clocks, history, rounds

UNITS, CLIENTS = 4, 5
BARRIERS = ("session", *optim.CLOCKS)


def planned(barrier, server_flops=3e9, seed=0):
    """A plan of random clients and a random network. All clients have the same number of steps."""
    rng = np.random.default_rng(seed)
    costs = [rng.integers(10**4, 10**6, UNITS) for _ in range(5)]
    smashed = np.array([*rng.integers(10**2, 10**4, UNITS), 0])
    profile = models.Profile(tuple(f"unit{i}" for i in range(UNITS)), *costs, smashed)
    clients = fleet.random_fleet(CLIENTS, seed=seed).with_samples([64] * CLIENTS)
    terms = optim.terms(profile, clients, optim.Work(1, 32))
    planner = Planner("exact", server_flops, barrier=barrier)
    return Planned(planner, profile, clients, terms, planning.solve(planner, clients, terms))


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("barrier", BARRIERS)
def test_the_seconds_by_term_add_up_to_the_round(barrier, seed):
    """The oracle is the planner's own formula of each barrier, which knows no terms."""
    plan = planned(barrier, seed=seed)
    pull = history.pulls(plan)
    seconds = history.round_seconds(barrier, np.stack(planning.seconds(plan)), pull)
    assert seconds.sum() == pytest.approx(plan.plan.round_s, rel=1e-6)
    assert (seconds >= 0).all()
    assert pull.sum() == pytest.approx(1)
    assert (pull >= 0).all()


def test_a_pull_is_what_the_round_gains_if_the_client_saves_a_second():
    """By finite differences: the client's model goes up faster, cuts stay, shares are found again."""
    plan = planned("session", server_flops=1e8)
    pull, step_s = history.pulls(plan), 1e-6 * plan.plan.round_s
    served = plan.plan.shares > 0
    assert served.sum() == 3, "the others end sooner, and hold nothing up"
    assert pull[~served].tolist() == [0, 0]
    fixed_s, work, _ = (values[served] for values in plan.terms.at(plan.plan.cuts))
    for client in range(3):
        saved = fixed_s - step_s * (np.arange(3) == client)
        gain_s = _round_s(fixed_s, work, 1e8) - _round_s(saved, work, 1e8)
        assert gain_s / step_s == pytest.approx(pull[served][client], abs=1e-4)


def _round_s(fixed_s, work, server_flops):
    """The time at which the clients' needs add up to the server, by bisection."""
    low, high = fixed_s.max(), fixed_s.max() + work.sum() / server_flops + 1
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (low, middle) if (work / (middle - fixed_s)).sum() < server_flops else (middle, high)
    return high


def made(built, count):
    """(the history of the first rounds, the clock of their plans)"""
    builder = history.Builder(built, count)
    own, *_ = clocks.clocks(built, count, (), builder.add).values()
    return builder.history(), own


@pytest.fixture(scope="module")
def built():
    small = Config(
        model="efficientnetv2-tiny", image_size=8, clients=small_world.CLIENTS, cohort_size=4, batch_size=4,
        server_flops=1e8, layer_form="conv", seed=3,
    )  # fmt: skip
    with small_world.world():
        return parts.build(small).parts


def test_a_history_is_that_of_the_plans_that_a_run_makes(built):
    found, clock = made(built, 6)
    totals = np.zeros((3, len(built.fleet)))
    for round in range(6):
        done = rounds.prepare(built, round)
        ids = done.assignments.client
        assert found.planned_s[round] == done.plan.round_s
        assert found.seconds[round].sum() == pytest.approx(done.plan.round_s)
        assert found.cuts[round].tolist() == np.bincount(done.plan.cuts, minlength=3).tolist()
        assert found.holder[round] in ids
        shares = done.plan.shares / built.planner.server_flops
        totals[:, ids] += np.stack([np.ones(len(ids)), done.plan.cuts, shares])
    assert found.rounds.tolist() == totals[0].tolist()
    came = found.rounds > 0
    assert found.cut[came] == pytest.approx(totals[1, came] / totals[0, came])
    assert found.share[came] == pytest.approx(totals[2, came] / totals[0, came])
    assert np.isnan(found.cut[~came]).all()
    assert found.pull.sum() == pytest.approx(6)
    assert found.units == tuple(built.profile.names)
    assert np.cumsum(found.planned_s) == pytest.approx(clock.seconds)


def test_who_is_not_there_has_no_part_in_a_plan(built, monkeypatch):
    """One client of each round is away, and in one round all are."""
    ask = rounds.asked

    def asked(parts, round):
        ids, available = ask(parts, round)
        return ids, available & (np.arange(len(ids)) != 1) & (round != 2)

    monkeypatch.setattr(rounds, "asked", asked)
    found, _ = made(built, 4)
    assert found.cuts.sum(axis=1).tolist() == [3, 3, 0, 3]
    assert (found.holder[2], found.seconds[2].sum()) == (-1, 0)
    away = [ask(built, round)[0][1] for round in range(4)]
    others = np.concatenate([np.delete(ask(built, round)[0], 1) for round in (0, 1, 3)])
    assert (found.rounds[np.setdiff1d(away, others)] == 0).all()


def test_parts_of_a_band_are_those_of_the_clients_that_are_there(built, monkeypatch):
    away = dataclasses.replace(built, planner=dataclasses.replace(built.planner, band="pooled"))
    ask = rounds.asked
    monkeypatch.setattr(rounds, "asked", lambda *given: (ask(*given)[0], np.array([True, False, True, True])))
    found, _ = made(away, 2)
    assert found.seconds.sum(axis=1) == pytest.approx(found.planned_s, rel=1e-6)
