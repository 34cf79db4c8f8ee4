import itertools

import numpy as np
import pytest
from optim import oracles

from sfl_jax import optim
from sfl_jax.errors import BadInput
from sfl_jax.optim import uncertain

SAMPLES = 5


def instance(seed, clients=3, samples=SAMPLES, spread=0.5, **columns):
    """(terms, sampled rates, server FLOP/s)."""
    rng = np.random.default_rng(seed)
    terms = optim.terms(oracles.profile(3, seed), oracles.fleet(clients, seed, **columns), optim.Work())
    shape = samples, clients
    rates = (getattr(terms, name) * np.exp(spread * rng.normal(size=shape)) for name in optim.Rates._fields)
    return terms, optim.Rates(*rates), 10.0 ** rng.uniform(7, 9.5)


def rounds_s(terms, rates, flops, cuts):
    """The round of each sample, by bisection."""
    own = [optim.at_rates(terms, rates.of(n)).at(cuts) for n in range(rates.samples)]
    return np.array([oracles.least_time_s(fixed_s, work, flops) for fixed_s, work, _ in own])


def least_quantile_s(terms, rates, flops, number):
    """The least quantile by enumeration of all cuts that are allowed in every sample."""
    allowed = [optim.at_rates(terms, rates.of(n)).costs().allowed for n in range(rates.samples)]
    ways = [np.flatnonzero(row) for row in np.all(allowed, axis=0)]
    every = map(np.array, itertools.product(*ways))
    return min(np.sort(rounds_s(terms, rates, flops, cuts))[number - 1] for cuts in every)


@pytest.mark.parametrize("quantile", [0.2, 0.6, 1.0])
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 30))])
def test_the_quantile_is_that_of_enumeration_and_never_below_the_bound(seed, quantile):
    terms, rates, flops = instance(seed)
    found = optim.solve_quantile(terms, rates, flops, quantile, spare=0.0)
    number = optim.at_quantile(SAMPLES, quantile)
    best_s = least_quantile_s(terms, rates, flops, number)
    assert found.plan.bound_s <= best_s * (1 + 1e-12)
    assert found.plan.round_s == pytest.approx(best_s, rel=1e-8)
    np.testing.assert_allclose(found.rounds_s, rounds_s(terms, rates, flops, found.plan.cuts), rtol=1e-9)
    assert found.rounds_s[found.sample] == pytest.approx(found.plan.round_s, rel=1e-9)
    assert found.plan.shares.sum() <= flops
    spared = optim.solve_quantile(terms, rates, flops, quantile, spare=0.1)
    assert spared.plan.round_s <= found.plan.round_s * 1.1 * (1 + 1e-8)


def test_trips_and_a_broadcast_are_in_every_sample():
    terms, rates, flops = instance(0)
    trips = optim.costs.Latency(
        np.array([0.3, 1.0, 0.1]), *np.array([[1.0, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1]])
    )
    terms = terms._replace(latency=trips, broadcast_bps=np.full(3, 1e6))
    found = optim.solve_quantile(terms, rates, flops, 0.6, spare=0.0).plan
    best_s = least_quantile_s(terms, rates, flops, 3)
    assert found.bound_s <= best_s * (1 + 1e-12)
    assert found.round_s == pytest.approx(best_s, rel=1e-8)


def test_grouped_samples_prove_more_than_their_own_optima():
    """Over instances whose cuts matter, and never more than the best cuts reach."""
    more = []
    for seed in (0, 8, 12):
        terms, rates, flops = instance(seed)
        own_s = np.array(
            [optim.solve(optim.at_rates(terms, rates.of(n)), flops).bound_s for n in range(SAMPLES)]
        )
        allowed = np.ones((3, 4), bool)
        allowed[:, 0] = False
        bound_s = uncertain._Search(terms, rates, flops, SAMPLES, allowed).bound_s(own_s)
        assert bound_s <= least_quantile_s(terms, rates, flops, SAMPLES) * (1 + 1e-12)
        more.append(bound_s / own_s.max() - 1)
    assert min(more) > -1e-9
    assert max(more) > 0.05


def test_one_sample_is_the_plan_of_its_rates():
    terms, rates, flops = instance(1, samples=1)
    exact = optim.solve(optim.at_rates(terms, rates.of(0)), flops)
    found = optim.solve_quantile(terms, rates, flops, 0.5)
    assert found.plan.bound_s == pytest.approx(exact.bound_s, rel=1e-9)
    assert found.plan.round_s == pytest.approx(exact.round_s, rel=1e-9)


def test_the_worst_case_of_intervals_is_that_of_their_least_rates():
    """With any cuts no rates of the box end later than its corner. So the corner's exact plan is optimal."""
    terms, rates, flops = instance(2, samples=40)
    rng = np.random.default_rng(0)
    for _ in range(10):
        cuts = rng.integers(1, 4, 3)
        corner_s = rounds_s(terms, optim.Rates(*(part[None] for part in rates.least())), flops, cuts)
        assert (rounds_s(terms, rates, flops, cuts) <= corner_s * (1 + 1e-12)).all()


def test_cuts_keep_the_energy_budget_in_every_sample():
    columns = {"cycles_per_s": np.full(3, 1e9), "kappa": np.full(3, 1e-28), "transmit_w": np.full(3, 0.5)}
    terms, rates, flops = instance(3, energy_j=np.full(3, np.inf), **columns)
    joules = np.max(
        [[optim.at_rates(terms, rates.of(n)).joules(cut) for cut in range(4)] for n in range(SAMPLES)], axis=0
    ).T
    budget = np.sort(joules[:, 1:], axis=1)[:, 1]
    limited = terms._replace(energy=terms.energy._replace(budget_j=budget))
    plan = optim.solve_quantile(limited, rates, flops, 0.6).plan
    assert (joules[np.arange(3), plan.cuts] <= budget).all()
    none = terms._replace(energy=terms.energy._replace(budget_j=0 * budget))
    with pytest.raises(optim.Infeasible, match="client 0: every cut costs at least"):
        optim.solve_quantile(none, rates, flops, 0.6)


def test_settled_cuts_are_better_in_rounds_that_were_not_sampled(monkeypatch):
    terms, rates, _ = instance(0, clients=12, samples=220, spread=0.3)
    sampled, others, flops = rates.of(slice(20)), rates.of(slice(20, None)), 1e10
    longest_s = []
    for settles in True, False:
        if not settles:
            monkeypatch.setattr(uncertain._Search, "settle", lambda self, time_s: None)
        found = optim.solve_quantile(terms, sampled, flops, 1.0)
        longest_s.append(optim.rounds_s(terms, others, flops, found.plan.cuts).max())
    assert longest_s[0] < 0.98 * longest_s[1]


def test_moves_are_the_best_of_all_single_moves():
    rng, rows, moved = np.random.default_rng(0), np.arange(4), 0
    for _ in range(20):
        needs = np.where(rng.random((5, 4, 3)) < 0.1, np.inf, rng.random((5, 4, 3)))
        columns = np.zeros(4, np.int32)

        def need(columns, needs=needs):
            return np.sort(needs[:, rows, columns].sum(axis=1))[2]

        ways = [np.where(rows == client, column, columns) for client in rows for column in range(3)]
        best = min(map(need, ways))
        found, made = uncertain._moved(needs, columns, 3, best, 1)
        after, more = uncertain._moved(needs, columns, 3, best, 9)
        assert (found is None) == (best < need(columns)), "one look, and no time to move"
        assert need(after) == pytest.approx(best)
        assert (made, more) == (int(found is None), int(best < need(columns)))
        moved += more
    assert moved > 10


@pytest.mark.parametrize(
    ("rounds", "quantile", "least"), [(4, 0.5, 2), (4, 0.51, 3), (10, 0.9, 9), (3, 1.0, 3), (5, 0.01, 1)]
)
def test_a_quantile_counts_whole_rounds(rounds, quantile, least):
    assert optim.at_quantile(rounds, quantile) == least
    assert optim.quantile_s(np.arange(rounds, 0, -1.0), quantile) == least


def test_what_is_not_allowed_is_named():
    terms, rates, flops = instance(0)
    for quantile in (0.0, 1.5, np.nan):
        with pytest.raises(BadInput, match=r"quantile=.*: must be above 0 and at most 1"):
            optim.solve_quantile(terms, rates, flops, quantile)
    measured = optim.costs.Devices(np.zeros(3, np.int32), *np.ones((2, 3)), *np.ones((2, 1, 4)))
    with pytest.raises(BadInput, match="device: measured seconds are not known to plans for rates"):
        optim.solve_quantile(terms._replace(devices=measured), rates, flops, 0.5)
    with pytest.raises(BadInput, match="spare=-1: must be a finite number"):
        optim.solve_quantile(terms, rates, flops, 0.5, spare=-1)
    with pytest.raises(BadInput, match=r"rates: shapes .* must be \(samples, 3\)"):
        optim.solve_quantile(terms, optim.Rates(*(part[:, :2] for part in rates)), flops, 0.5)
    with pytest.raises(BadInput, match="rates: no samples"):
        optim.solve_quantile(terms, rates.of(slice(0)), flops, 0.5)
    with pytest.raises(BadInput, match=r"rates.uplink_bps: must be finite numbers above 0"):
        optim.solve_quantile(terms, rates._replace(uplink_bps=0 * rates.uplink_bps), flops, 0.5)
    with pytest.raises(optim.Infeasible, match="client 1: every cut needs at least"):
        optim.solve_quantile(terms._replace(memory_bytes=np.array([1e12, 0, 1e12])), rates, flops, 0.5)


def test_seconds_off_the_server_are_linear_in_the_inverse_rates():
    terms, rates, _ = instance(5)
    amounts = uncertain._amounts(terms)
    for n in range(SAMPLES):
        inverse = np.stack([1 / part for part in rates.of(n)])
        found = uncertain._fixed_s(inverse, amounts)
        np.testing.assert_allclose(found, optim.at_rates(terms, rates.of(n)).costs().fixed_s, rtol=1e-12)
