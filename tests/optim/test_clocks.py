import functools
import itertools

import jax
import numpy as np
import pytest
from optim import highs, oracles

from sfl_jax import optim
from sfl_jax.errors import BadInput
from sfl_jax.optim import clocks, maxima, programs

KEY = jax.random.key(1)
CLOCKS = ("in_turn", "handover", "lockstep")
FLOPS = (1e7, 1e9, 1e11)


def terms_of(clients=3, units=4, seed=0, equal=False, spread=1.0, work=None, **columns):
    if equal:
        columns["samples"] = np.full(clients, 100)
    fleet = oracles.fleet(clients, seed, spread, **columns)
    return optim.terms(oracles.profile(units, seed), fleet, work or optim.Work(batch_size=64))


def simulated_s(terms, columns, server_flops, barrier, most=max):
    """The round by simulation, event by event."""
    k, l = np.arange(len(columns)), columns
    samples, steps = terms.samples, terms.steps.astype(int)
    batch = samples / steps
    down, up = terms.model_bits[l] / terms.downlink_bps, terms.model_bits[l] / terms.uplink_bps
    forward = batch * (terms.forward_flop[l] / terms.flops + terms.up_bits[l] / terms.uplink_bps)
    serving = batch * terms.work_flop[l] / server_flops
    backward = batch * (terms.backward_flop[l] / terms.flops + terms.down_bits[l] / terms.downlink_bps)
    middle = np.zeros(len(l))
    if (tail := terms.tail) is not None:
        before = batch * (tail.forward_flop[l] / terms.flops + tail.up_bits[l] / terms.uplink_bps)
        after = batch * (tail.backward_flop[l] / terms.flops + tail.down_bits[l] / terms.downlink_bps)
        forward, backward, middle = forward - before, backward - after, before + after
    now = 0.0
    if barrier == "handover":
        for client in k:
            now += down[client]
            for _ in range(steps[client]):
                now += forward[client]
                now += serving[client] + middle[client]
                now += backward[client]
            now += up[client]
        return now
    now = max(now + down[client] for client in k)
    if barrier == "in_turn":
        for client in k:
            for _ in range(steps[client]):
                now += forward[client] + serving[client] + middle[client] + backward[client]
    else:
        for step in range(steps.max()):
            active = [client for client in k if step < steps[client]]
            now = most(now + forward[client] for client in active)
            for client in active:
                now += serving[client] / 3  # the first visit
            now = most(now + middle[client] for client in active)
            for client in active:
                now += serving[client] * 2 / 3
            now = most(now + backward[client] for client in active)
    return max(now + up[client] for client in k)


def every_choice(terms):
    allowed = terms.costs().allowed
    return [np.array(one) for one in itertools.product(*(np.flatnonzero(row) for row in allowed))]


@pytest.mark.parametrize("barrier", CLOCKS)
def test_the_formula_is_the_simulated_round(barrier):
    for seed in range(5):
        terms = terms_of(4, 5, seed)
        columns = np.random.default_rng(seed).integers(0, 6, 4)
        expected = simulated_s(terms, columns, 1e9, barrier)
        assert optim.round_seconds(terms, columns, 1e9, barrier) == pytest.approx(expected, rel=1e-12)
        here = np.array([True, False, True, True])
        expected = simulated_s(terms.take(here), columns[here], 1e9, barrier)
        assert optim.round_seconds(terms, columns, 1e9, barrier, here) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("barrier", CLOCKS)
def test_a_tail_is_a_second_visit_to_the_server(barrier):
    """The amounts follow from the profile; the round, from a simulation; the plan, from enumeration."""
    work, differ = optim.Work(batch_size=64, tail_units=1), 0
    for seed in range(4):
        terms = terms_of(3, 4, seed, equal=seed % 2 == 0, work=work)
        profile = oracles.profile(4, seed)
        assert terms.tail.forward_flop[:3].tolist() == [2 * profile.forward_macs[-1]] * 3
        assert terms.tail.up_bits[:3].tolist() == [32 * profile.smashed[3]] * 3
        choices = every_choice(terms)
        rounds_s = [optim.round_seconds(terms, one, 1e9, barrier) for one in choices]
        expected = [simulated_s(terms, one, 1e9, barrier) for one in choices]
        np.testing.assert_allclose(rounds_s, expected, rtol=1e-12)
        plan = optim.solve(terms, 1e9, "exact", barrier)
        assert plan.round_s == pytest.approx(min(rounds_s), rel=2e-9)
        assert plan.bound_s <= min(rounds_s) * (1 + 1e-13)
        once = optim.round_seconds(terms._replace(tail=None), plan.cuts, 1e9, barrier)
        differ += once != pytest.approx(plan.round_s, rel=1e-6)
    assert (differ > 0) == (barrier == "lockstep")  # where clients wait in the middle of a step
    with pytest.raises(BadInput, match="barrier=staged: has no second visit to the server"):
        optim.solve(terms, 1e9, "exact", "staged")


def test_a_step_that_waits_for_nobody_would_be_noticed():
    terms = terms_of(4, 5, 0)
    columns = np.array([1, 2, 3, 4])
    wrong = simulated_s(terms, columns, 1e9, "lockstep", most=min)
    assert optim.round_seconds(terms, columns, 1e9, "lockstep") > wrong * 1.01


def test_known_clocks_evaluate_known_plans():
    terms = terms_of(4, 5)
    for barrier in optim.BARRIERS:
        plan = optim.solve(terms, 1e9, "exact", barrier)
        assert optim.round_seconds(terms, plan.cuts, 1e9, barrier) == pytest.approx(plan.round_s, rel=1e-9)
    slow = optim.slower(terms, np.array([2.0, 1.0, 1.0, 5.0]))
    assert optim.round_seconds(slow, plan.cuts, 1e9, "in_turn") > optim.round_seconds(
        terms, plan.cuts, 1e9, "in_turn"
    )


@pytest.mark.parametrize("barrier", CLOCKS)
@pytest.mark.parametrize("equal", [True, False])
def test_exact_is_the_optimum_of_enumeration(barrier, equal):
    for seed, server_flops in itertools.product(range(6), FLOPS):
        terms = terms_of(4, 4, seed, equal, spread=(0.3, 1.0, 3.0)[seed % 3])
        choices = every_choice(terms)
        optimum = min(optim.round_seconds(terms, one, server_flops, barrier) for one in choices)
        plan = optim.solve(terms, server_flops, "exact", barrier)
        assert plan.round_s == pytest.approx(optimum, rel=2e-9)
        assert plan.bound_s <= optimum * (1 + 1e-13)
        assert plan.gap < 3e-9
        assert np.isnan(plan.shares).all()
        assert plan.codecs.tolist() == [0] * 4


@functools.cache
def small_rounds():
    """(terms, server FLOP/s, the optimum by enumeration) of small fleets with unequal numbers of steps."""
    found = []
    for seed, server_flops in itertools.product(range(3), FLOPS):
        terms = terms_of(4, 4, seed)
        rounds_s = (optim.round_seconds(terms, one, server_flops, "lockstep") for one in every_choice(terms))
        found.append((terms, server_flops, min(rounds_s)))
    return found


def test_bounds_hold_where_the_search_gives_up(monkeypatch):
    """Forces fewer groups, as with very many numbers of steps, and gives the search no budget. The linear
    programs find and prove what it did not.
    """
    gaps = {0: [], programs.LARGEST: []}
    for groups, (largest, found) in zip([1, 32], gaps.items(), strict=True):
        monkeypatch.setattr(clocks, "_GROUPS", groups)
        monkeypatch.setattr(maxima, "_ELEMENTS", 1)
        monkeypatch.setattr(programs, "LARGEST", largest)
        for terms, server_flops, optimum in small_rounds():
            plan = optim.solve(terms, server_flops, "exact", "lockstep")
            assert plan.bound_s <= optimum * (1 + 1e-13)
            assert optimum <= plan.round_s * (1 + 1e-13)
            assert not largest or plan.round_s == pytest.approx(optimum, rel=2e-9)
            found.append(plan.gap)
    assert max(gaps[0]) > 0.01, "without linear programs some are not solved"
    assert max(gaps[largest]) < 3e-9


@pytest.mark.parametrize("multipliers", ["right", "random", "none", "failed"])
def test_the_bound_of_a_program_holds_for_any_multipliers(multipliers, monkeypatch):
    """Only its tightness depends on what HiGHS says."""
    rng, solve, given, parts = np.random.default_rng(0), programs.linprog, [], []

    def other(*arguments):
        found = solve(*arguments)
        size = len(found.ineqlin.marginals)
        if multipliers != "right":
            found.ineqlin.marginals = -rng.exponential(10.0, size) * (multipliers == "random")
        found.status = 4 * (multipliers == "failed")
        return found

    monkeypatch.setattr(programs, "linprog", other)
    monkeypatch.setattr(maxima, "_ELEMENTS", 1)
    monkeypatch.setattr(clocks, "_GROUPS", 1)
    monkeypatch.setattr(programs, "least", lambda *arguments: given.append(arguments) or arguments[2])
    for terms, server_flops, optimum in small_rounds():
        optim.solve(terms, server_flops, "exact", "lockstep")
        if not given:
            continue  # the first search has it
        search = programs._Search(*given.pop())
        highest = search.maxima([one.seconds.max(axis=1) for one in search.chains])
        lowest = [np.zeros_like(one) for one in highest]
        bound_s = search.solved(search.allowed, lowest, highest).bound_s
        assert bound_s <= optimum * (1 + 1e-13)
        parts.append(bound_s / optimum)
    assert len(parts) > 3
    assert (max(parts) > 0.95) == (multipliers == "right")


@pytest.mark.slow
def test_many_unequal_clients_are_planned_to_the_optimum_of_highs(monkeypatch):
    """The first search gives up at once. HiGHS, as a solver of mixed-integer programs, finds no better."""
    monkeypatch.setattr(maxima, "_ELEMENTS", 1)
    for tail_units in (0, 1):
        terms = terms_of(12, 6, 5, work=optim.Work(batch_size=16, tail_units=tail_units))
        plan = optim.solve(terms, 1e9, "exact", "lockstep")
        assert plan.gap < 3e-9
        assert plan.round_s == pytest.approx(
            highs.lockstep_s(clocks._table(terms, 1e9), terms.steps), rel=1e-5
        )


def test_a_search_without_one_maximum_would_be_noticed():
    """If the search ignores the wait for gradients, it finds other cuts, which take longer."""
    worse = 0
    for seed in range(12):
        terms = terms_of(4, 4, seed, equal=True)
        table = clocks._table(terms, 1e9)
        table = table._replace(backward_s=np.where(np.isfinite(table.backward_s), 0.0, np.inf))
        blind = clocks._lockstep(table, terms.steps).columns
        plan = optim.solve(terms, 1e9, "exact", "lockstep")
        worse += optim.round_seconds(terms, blind, 1e9, "lockstep") > plan.round_s * 1.001
    assert worse


@pytest.mark.parametrize("barrier", CLOCKS)
@pytest.mark.parametrize("method", optim.STAGED_METHODS)
def test_every_method_is_a_round_of_the_clock_and_bounded(barrier, method):
    for seed in range(4):
        terms = terms_of(4, 5, seed, memory_bytes=np.full(4, 1e12))
        plan = optim.solve(terms, 1e9, method, barrier, key=KEY)
        assert plan.round_s == pytest.approx(optim.round_seconds(terms, plan.cuts, 1e9, barrier), rel=1e-12)
        assert plan.bound_s == pytest.approx(optim.solve(terms, 1e9, "exact", barrier).bound_s)
        assert plan.bound_s <= plan.round_s
        assert (plan.client_s <= plan.round_s).all()
        ends_s = optim.session_ends_s(terms, plan, 1e9, barrier)
        np.testing.assert_allclose(ends_s, np.full(4, plan.round_s), rtol=1e-12)
        if method == "common_cut":
            common = [optim.round_seconds(terms, np.full(4, cut), 1e9, barrier) for cut in range(1, 6)]
            assert plan.round_s == pytest.approx(min(common), rel=1e-12)
        if method == "no_split":
            assert plan.cuts.tolist() == [5] * 4


@pytest.mark.parametrize("barrier", CLOCKS)
def test_absent_clients_cost_nothing(barrier):
    terms, present = terms_of(5), np.array([True, False, True, True, False])
    for method in optim.STAGED_METHODS:
        plan = optim.solve(terms, 1e9, method, barrier, key=KEY, present=present)
        assert plan.cuts[~present].tolist() == [4, 4]
        assert plan.client_s[~present].tolist() == [0.0, 0.0]
        if method != "random_cut":
            alone = optim.solve(terms.take(present), 1e9, method, barrier)
            np.testing.assert_allclose(plan.round_s, alone.round_s, rtol=1e-12)
        nobody = optim.solve(terms, 1e9, method, barrier, key=KEY, present=np.zeros(5, bool))
        assert (nobody.round_s, nobody.bound_s) == (0.0, 0.0)
    assert optim.round_seconds(terms, plan.cuts, 1e9, barrier, np.zeros(5, bool)) == 0


@pytest.mark.slow
def test_no_cut_is_above_max_cut():
    work = optim.Work(max_cut=2)
    terms = terms_of(5, work=work)
    assert terms.permitted.tolist() == [False, True, True, False, False]
    for method in ("exact", "common_cut", "random_cut"):
        for barrier in ("session", "lockstep"):
            assert optim.solve(terms, 1e9, method, barrier, key=KEY).cuts.max() <= 2
    assert optim.solve(terms, 1e9, "regression").cuts.max() <= 2
    with pytest.raises(optim.Infeasible, match="client 0: min_cut or max_cut forbids cut 4"):
        optim.solve(terms, 1e9, "no_split", "lockstep")
    for wrong in (0, 5):
        with pytest.raises(BadInput, match=f"max_cut={wrong}: the chain has 4 units; choose 1"):
            terms_of(work=optim.Work(max_cut=wrong))


def test_who_cannot_be_served_is_named():
    terms = terms_of(3, memory_bytes=np.array([1e12, 10.0, 1e12]))
    for barrier in CLOCKS:
        with pytest.raises(optim.Infeasible, match="client 1: every cut needs"):
            optim.solve(terms, 1e9, "exact", barrier)
        weak = terms_of(3, memory_bytes=np.array([1e12, 2.5e6, 1e12]))
        with pytest.raises(optim.Infeasible, match=r"client 1: .*server_flops=0"):
            optim.solve(weak, 0.0, "exact", barrier)


@pytest.mark.parametrize("barrier", CLOCKS)
def test_what_a_clock_cannot_do_is_refused(barrier):
    with pytest.raises(BadInput, match=f"method=greedy: barrier={barrier} allows only exact"):
        optim.solve(terms_of(), 1e9, "greedy", barrier)
    with pytest.raises(BadInput, match="needs Terms"):
        optim.solve(terms_of().costs(), 1e9, "exact", barrier)
    with pytest.raises(BadInput, match="barrier=none: choose one of session, staged"):
        optim.round_seconds(terms_of(), np.ones(3, int), 1e9, "none")
    with pytest.raises(BadInput, match=r"columns: shape \(2,\); must be \("):
        optim.round_seconds(terms_of(), np.ones(2, int), 1e9, barrier)
