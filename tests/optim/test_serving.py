import itertools

import numpy as np
import pytest
from optim import oracles

from sfl_jax import optim
from sfl_jax.errors import BadInput
from sfl_jax.optim import serving
from sfl_jax.optim.serving import Sessions


def of(first, work, between, last, steps):
    parts = (np.array(part, float) for part in (first, work, between, last))
    return Sessions(*parts, np.array(steps, np.int64))


def tails_of_subsets(first, work, last):
    """The optimum of one machine with arrivals and tails, pre-emption allowed: Carlier's formula."""
    clients = range(len(first))
    sets = (s for n in clients for s in itertools.combinations(clients, n + 1))
    return max(min(first[k] for k in s) + sum(work[k] for k in s) + min(last[k] for k in s) for s in sets)


def ticked(sessions):
    """The same rule, tick by tick, for integers: a tick goes to the job with the longest remaining time."""
    clients = range(len(sessions.steps))
    arrival, left, step = list(sessions.first_s), list(sessions.serving_s), [0] * len(sessions.steps)
    ends, now = [None] * len(sessions.steps), 0
    cycle = sessions.serving_s + sessions.between_s
    while None in ends:
        waits = [k for k in clients if ends[k] is None and arrival[k] <= now]
        if waits:
            to_go = {k: (sessions.steps[k] - 1 - step[k]) * cycle[k] + sessions.last_s[k] for k in waits}
            k = max(waits, key=lambda k: (to_go[k], -k))
            left[k] -= 1
            if left[k] == 0:
                step[k], left[k] = step[k] + 1, sessions.serving_s[k]
                if step[k] == sessions.steps[k]:
                    ends[k] = now + 1 + sessions.last_s[k]
                else:
                    arrival[k] = now + 1 + sessions.between_s[k]
        now += 1
    return ends


def test_two_clients_that_never_wait_for_each_other_beat_the_bound_of_constant_shares():
    ends = serving.ends_s(of([0, 9], [1, 1], [0, 0], [9, 0], [1, 1]))
    assert ends.tolist() == [10, 10]  # with constant shares no round is shorter than 11 s


def test_one_visit_each_is_optimal():
    rng = np.random.default_rng(0)
    for _ in range(200):
        clients = rng.integers(1, 6)
        first, work, last = rng.integers(0, 12, (3, clients)) + np.array([[0], [1], [0]])
        ends = serving.ends_s(of(first, work, np.zeros(clients), last, np.ones(clients)))
        assert ends.max() == tails_of_subsets(first, work, last)


def test_many_visits_follow_the_rule_tick_by_tick():
    rng = np.random.default_rng(1)
    for _ in range(100):
        clients = rng.integers(1, 5)
        first, work, between, last = rng.integers(1, 9, (4, clients))
        # Remaining times that differ: on a tie the rule does not say which job is first.
        sessions = of(first, work, between, last + 1000 * np.arange(clients), rng.integers(1, 5, clients))
        assert serving.ends_s(sessions).tolist() == ticked(sessions)


def terms_of(clients, seed=0, units=3, **columns):
    return optim.terms(
        oracles.profile(units, seed), oracles.fleet(clients, seed, **columns), optim.Work(batch_size=32)
    )


def test_the_bound_holds_for_the_best_cuts_and_the_best_schedule():
    """One step per client, for which the best schedule of fixed cuts is known."""
    for seed in range(6):
        made = terms_of(3, seed)
        terms = made._replace(samples=np.full(3, 32.0), steps=np.ones(3))
        for flops in (1e7, 1e8, 1e9):
            allowed = terms.costs().allowed
            best = np.inf
            for cuts in itertools.product(*(np.flatnonzero(row) for row in allowed)):
                one = serving.sessions(terms, flops, np.array(cuts))
                busy = one.serving_s > 0
                served = (
                    tails_of_subsets(one.first_s[busy], one.serving_s[busy], one.last_s[busy])
                    if busy.any()
                    else 0
                )
                best = min(best, max(served, one.alone_s.max()))
            bound_s = optim.any_schedule_bound_s(terms, flops)
            assert bound_s <= best
            plan = optim.solve_serving(terms, flops)
            assert best * (1 - 1e-9) <= plan.round_s <= best * 1.1
            assert plan.bound_s == bound_s


@pytest.mark.parametrize("clients", [1, 8])
def test_a_plan_is_no_longer_than_constant_shares_with_the_same_cuts_need(clients):
    for seed in range(4):
        terms, flops = terms_of(clients, seed, units=6), 1e8 * clients
        constant, plan = optim.solve(terms, flops), optim.solve_serving(terms, flops)
        assert plan.bound_s <= plan.round_s <= constant.round_s * (1 + 1e-8)
        assert plan.bound_s <= constant.bound_s * (1 + 1e-8)
        assert np.isnan(plan.shares).all()
        ends = serving.ends_s(serving.sessions(terms, flops, plan.cuts))
        np.testing.assert_allclose(plan.client_s, ends, rtol=1e-8)
        assert terms.costs().allowed[np.arange(clients), plan.cuts].all()
    assert clients > 1 or plan.gap < 1e-8  # a client alone never waits


def test_idle_shares_are_what_constant_shares_waste():
    ratios = []
    for seed in range(4):
        terms = terms_of(8, seed, units=6)
        ratios.append(optim.solve_serving(terms, 4e8).round_s / optim.solve(terms, 4e8).round_s)
    assert np.mean(ratios) < 0.95


def test_absent_clients_and_those_that_cannot_be_served():
    terms = terms_of(3, memory_bytes=np.array([1e12, 10.0, 1e12]))
    with pytest.raises(optim.Infeasible, match="client 1: every cut needs"):
        optim.solve_serving(terms, 1e9)
    present = np.array([True, False, True])
    plan, alone = optim.solve_serving(terms, 1e9, present), optim.solve_serving(terms.take(present), 1e9)
    assert (plan.round_s, plan.bound_s) == (alone.round_s, alone.bound_s)
    assert plan.client_s[1] == 0
    assert optim.solve_serving(terms, 1e9, np.zeros(3, bool)).round_s == 0
    with pytest.raises(BadInput, match="server_flops=0"):
        optim.solve_serving(terms, 0.0)
