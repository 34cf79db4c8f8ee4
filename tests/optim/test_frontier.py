import itertools

import numpy as np
import pytest
from optim import oracles
from scipy import optimize

from sfl_jax import optim
from sfl_jax.errors import BadInput
from sfl_jax.optim import knapsack


def instance(seed, clients=4, columns=4):
    """(costs, amounts, server FLOP/s): ties and zeros in every second one, some cells forbidden."""
    rng = np.random.default_rng(seed)
    shape = clients, columns
    fixed_s = rng.choice([1.0, 2.0, 2.0, 5.0], shape) if seed % 2 else 5 * rng.random(shape)
    work = rng.choice([0.0, 1.0, 3.0], shape) if seed % 2 else 3 * rng.random(shape)
    work[:, -1] = 0.0
    amounts = rng.choice([0.0, 1.0, 4.0], shape) if seed % 2 else 9 * rng.random(shape)
    allowed = rng.random(shape) < 0.9
    allowed[:, -1] = True
    return (
        optim.Costs(fixed_s, work, allowed),
        amounts,
        float(rng.choice([0.0, 0.5, 2.0, 10.0], p=[0.1, 0.3, 0.3, 0.3])),
    )


def every(costs, amounts, flops):
    """The round and the amount of all vectors of allowed columns."""
    rows, found = np.arange(len(amounts)), []
    for choice in itertools.product(*(np.flatnonzero(row) for row in costs.allowed)):
        columns = np.array(choice)
        own = costs.fixed_s[rows, columns], costs.server_flop[rows, columns]
        found.append((oracles.least_time_s(*own, flops), amounts[rows, columns].sum()))
    return np.array(found).T


SEEDS = [*range(8), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(8, 60))]


@pytest.mark.parametrize("seed", SEEDS)
def test_the_least_amount_by_a_time_is_that_of_enumeration(seed):
    costs, amounts, flops = instance(seed)
    ends_s, sums = every(costs, amounts, flops)
    finite = np.sort(ends_s[np.isfinite(ends_s)])
    rows = np.arange(len(amounts))
    for time_s in (0.9 * finite[0], *(finite[[0, len(finite) // 9, len(finite) // 2, -1]] * (1 + 1e-9))):
        in_time = ends_s <= time_s
        found = optim.least_amount(costs, amounts, flops, time_s)
        if not in_time.any():
            assert found is None
            continue
        assert found.bound <= sums[in_time].min() * (1 + 1e-12)
        assert found.amount == pytest.approx(sums[in_time].min(), rel=1e-8, abs=1e-12)
        assert found.amount == pytest.approx(amounts[rows, found.columns].sum())
        own = costs.fixed_s[rows, found.columns], costs.server_flop[rows, found.columns]
        assert oracles.least_time_s(*own, flops) <= time_s * (1 + 1e-9)
        assert found.gap < 1e-8 or found.amount == 0


@pytest.mark.parametrize("seed", SEEDS)
def test_the_shortest_round_within_a_budget_is_that_of_enumeration(seed):
    costs, amounts, flops = instance(seed)
    ends_s, sums = every(costs, amounts, flops)
    ends_s, sums = ends_s[np.isfinite(ends_s)], sums[np.isfinite(ends_s)]
    rows = np.arange(len(amounts))
    for budget in np.quantile(sums, [0.0, 0.2, 0.7]):
        best_s = ends_s[sums <= budget * (1 + 1e-12)].min()
        found = optim.shortest_within(costs, amounts, flops, budget * (1 + 1e-12), 0.0)
        own = costs.fixed_s[rows, found.columns], costs.server_flop[rows, found.columns]
        assert found.bound_s <= best_s * (1 + 1e-9)
        assert oracles.least_time_s(*own, flops) == pytest.approx(best_s, rel=1e-7)
        assert amounts[rows, found.columns].sum() <= budget * (1 + 1e-9)
    if sums.min() > 0:
        with pytest.raises(BadInput, match=r"budget=.*: must be at least .*, the least of any cuts"):
            optim.shortest_within(costs, amounts, flops, sums.min() * 0.99, 0.0)


@pytest.mark.parametrize("seed", range(4))
def test_a_frontier_falls_from_the_shortest_round_to_the_least_amount(seed):
    costs, amounts, flops = instance(seed)
    ends_s, sums = every(costs, amounts, flops)
    curve = optim.frontier(costs, amounts, flops, ends_s.min() * (1 + 1e-9), points=9)
    assert curve.times_s[0] == pytest.approx(ends_s.min())
    assert (np.diff(curve.times_s) > 0).all()
    assert (np.diff(curve.amounts) <= 0).all()
    assert (np.diff(curve.bounds) <= 0).all()
    assert curve.amounts[-1] == pytest.approx(sums[np.isfinite(ends_s)].min(), abs=1e-12)
    for time_s, amount, bound in zip(curve.times_s, curve.amounts, curve.bounds, strict=True):
        best = sums[ends_s <= time_s].min()
        assert bound <= best * (1 + 1e-12)
        assert amount == pytest.approx(best, rel=1e-8, abs=1e-12)


def test_a_search_that_gives_up_still_bounds_the_least_amount(monkeypatch):
    costs, amounts, flops = instance(6, clients=5)
    ends_s, sums = every(costs, amounts, flops)
    time_s = np.median(ends_s[np.isfinite(ends_s)])
    monkeypatch.setattr(knapsack, "MOST_STATES", 0)
    found, best = optim.least_amount(costs, amounts, flops, time_s), sums[ends_s <= time_s].min()
    assert found.bound <= best <= found.amount * (1 + 1e-12)


def test_highs_finds_no_plan_that_takes_less():
    """24 clients: a mixed-integer program with the shares of a time."""
    costs, amounts, _ = instance(2, clients=24)
    flops, clients, columns = 4.0, *amounts.shape
    time_s = 1.3 * optim.solve(costs, flops).round_s
    left_s = time_s - costs.fixed_s
    works = costs.allowed & ((left_s > 0) | (costs.server_flop <= 0) & (left_s >= 0))
    shares = np.where(works & (costs.server_flop > 0), costs.server_flop / np.where(works, left_s, 1), 0.0)
    answer = optimize.milp(
        amounts.ravel(), integrality=np.ones(amounts.size),
        bounds=optimize.Bounds(0, works.ravel().astype(float)),
        constraints=[
            optimize.LinearConstraint(np.kron(np.eye(clients), np.ones(columns)), 1, 1),
            optimize.LinearConstraint(shares.ravel()[None], -np.inf, flops),
        ],
        options={"mip_rel_gap": 1e-9},
    )  # fmt: skip
    found = optim.least_amount(costs, amounts, flops, time_s)
    assert found.amount == pytest.approx(answer.fun, rel=1e-6)
    assert found.bound <= answer.fun * (1 + 1e-9)


def test_energy_and_bytes_are_those_of_the_terms():
    columns = {"cycles_per_s": np.full(3, 2e9), "kappa": np.full(3, 1e-28), "transmit_w": np.full(3, 0.5)}
    fleet = oracles.fleet(3, 0, energy_j=np.full(3, np.inf), **columns)
    terms = optim.terms(oracles.profile(3, 0), fleet, optim.Work())
    spent, sent = optim.joules(terms), optim.sent_bytes(terms)
    for client, cut in itertools.product(range(3), range(4)):
        data, up = terms.samples[client], terms.uplink_bps[client]
        flop = data * (terms.forward_flop[cut] + terms.backward_flop[cut])
        airtime_s = (data * terms.up_bits[cut] + terms.model_bits[cut]) / up
        cycles = flop * 2e9 / terms.flops[client]
        assert spent[client, cut] == pytest.approx(1e-28 * 2e9**2 * cycles + 0.5 * airtime_s)
        bits = data * (terms.up_bits[cut] + terms.down_bits[cut]) + 2 * terms.model_bits[cut]
        assert sent[client, cut] == pytest.approx(bits / 8)
    with pytest.raises(BadInput, match="energy: is not known; the fleet needs cycles_per_s"):
        optim.joules(terms._replace(energy=None))
