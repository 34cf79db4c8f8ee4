"""What a round does whatever its plan is: the clock, the bound and every method's clock have it."""

import numpy as np
import pytest
from run import test_ledger, test_schemes

import sfl_jax as sfl
from sfl_jax import optim, planning
from sfl_jax.run import clocks, closing, rounds
from sfl_jax.schemes.psl import Psl

FLOPS = 1e6


def made(**changes):
    planner = sfl.Planner(server_flops=FLOPS)
    return test_schemes.make(chain=sfl.Chain(test_ledger.UNITS), planner=planner, **changes)


def plan_alone(run, number=0):
    """(the terms of a round, its plan, who is there)"""
    _, clients, terms, available = rounds.cohort(run.parts, number)
    return terms, *planning.serve(run.parts.planner, clients, terms, number, available)[:2]


@pytest.mark.parametrize("faults", [sfl.Faults(), sfl.Faults(jitter=0.5, drop_probability=0.3)])
def test_the_estimation_of_statistics_adds_its_seconds_and_their_bound(faults):
    plain, run = made(faults=faults), made(faults=faults, batch_norm="reestimated")
    for number in range(2):
        terms, plan, _ = plan_alone(run, number)
        without, found = rounds.prepare(plain.parts, number), rounds.prepare(run.parts, number)
        came, delays = found.turnout.came, faults.delays(run.parts.seed, number, found.assignments.client)
        phase = closing.estimation(run.parts, optim.slower(terms, delays.slowdown))
        added_s = phase.seconds(plan.cuts, FLOPS, came)
        assert added_s > 0
        assert found.turnout.round_s == pytest.approx(without.turnout.round_s + added_s, rel=1e-12)
        quick_s = closing.estimation(run.parts, terms).bound_s(FLOPS, came)
        assert found.plan.bound_s == pytest.approx(without.plan.bound_s + quick_s, rel=1e-12)
        assert 0 < quick_s <= added_s * (1 + 1e-12)
        assert found.plan.bound_s <= found.plan.round_s * (1 + 1e-12)
    of_methods = clocks.clocks(run.parts, 2, ["common_cut"])
    seconds = [rounds.prepare(run.parts, number).turnout.round_s for number in range(2)]
    np.testing.assert_allclose(of_methods["exact"].seconds, np.cumsum(seconds), rtol=1e-12)


def test_fedprox_of_shared_copies_is_computed_once_a_step():
    plain, run = made(scheme=Psl(most=2)), made(scheme=Psl(most=2), proximal=0.1)
    terms, plan, present = plan_alone(run)
    found = rounds.prepare(run.parts, 0)
    shared = run.parts.profile.parameters[2:].sum()
    added_s = 3 * shared * terms.steps[present].max() / FLOPS
    columns = terms.columns(plan.cuts, plan.codecs)
    round_s = optim.round_seconds(terms, columns, FLOPS, "lockstep")
    assert found.turnout.round_s == pytest.approx(round_s + added_s, rel=1e-9)
    assert found.plan.bound_s == pytest.approx(plan.bound_s + added_s, rel=1e-9)
    work_flop = run.parts.terms.work_flop - plain.parts.terms.work_flop
    of_unit_1 = 3 * run.parts.profile.parameters[1] / run.parts.batch_size
    assert work_flop[1] == pytest.approx(of_unit_1), "its replicas step with each client"
    assert work_flop[2] == pytest.approx(0.0, abs=1e-9)
