import itertools
from fractions import Fraction

import numpy as np
import pytest
from optim import oracles
from scipy import optimize

from sfl_jax import optim
from sfl_jax.errors import BadInput
from sfl_jax.optim import bandwidth

POOLED, SEPARATE = 3.0, (2.0, 1.0)


def terms_of(clients, seed=0, units=3, **columns):
    return optim.terms(oracles.profile(units, seed), oracles.fleet(clients, seed, **columns), optim.Work())


def fixed_cuts_round_s(fixed_s, demands, least=0.0):
    """The least round of fixed cuts by a general-purpose solver over T and the log parts of each budget of 1.

    least: parts (K,) of budget 1 that must be given.
    """
    budgets, clients = demands.shape
    rough = (fixed_s + demands.sum(axis=0) * clients).max()

    def split(x):
        return np.exp(x[1:].reshape(budgets, clients)), x[0] * rough

    found = optimize.minimize(
        lambda x: x[0],
        np.r_[1.0, np.full(budgets * clients, -np.log(clients))],
        constraints=[
            {"type": "ineq", "fun": lambda x: 1 - split(x)[0].sum(axis=1)},
            {"type": "ineq", "fun": lambda x: split(x)[0][1] - least},
            {
                "type": "ineq",
                "fun": lambda x: (split(x)[1] - fixed_s - (demands / split(x)[0]).sum(axis=0)) / rough,
            },
        ],
        method="SLSQP",
        options={"maxiter": 500, "ftol": 1e-13},
    )
    return found.x[0] * rough


@pytest.mark.parametrize("band_hz", [POOLED, SEPARATE], ids=["pooled", "separate"])
@pytest.mark.parametrize("seed", range(3))
def test_round_and_bound_enclose_the_optimum_of_enumeration(band_hz, seed):
    terms, server_flops = terms_of(2, seed), 2e9
    plan = bandwidth.solve_bandwidth(terms, server_flops, band_hz, reference_hz=1.0)
    fixed_s, amounts, allowed = bandwidth.demands(terms, (1.0, 1.0), pooled=band_hz == POOLED)
    budgets = np.r_[server_flops, band_hz]
    rows = np.arange(2)
    optimum = min(
        fixed_cuts_round_s(fixed_s[rows, cuts], amounts[:, rows, cuts] / budgets[:, None])
        for cuts in itertools.product(*(np.flatnonzero(row) for row in allowed))
    )
    assert plan.bound_s <= optimum * (1 + 1e-6)
    assert plan.round_s >= optimum * (1 - 1e-6)
    # With two clients the prices balance poorly, but the cuts found are still within a few per cent.
    assert plan.round_s <= optimum * 1.05


def joules(terms, plan):
    """What each client spends under a band plan, by the formula of the costs."""
    moved = terms._replace(uplink_bps=terms.uplink_bps * plan.uplink_hz)
    return moved.joules(plan.cuts)


@pytest.mark.parametrize("band_hz", [POOLED, SEPARATE], ids=["pooled", "separate"])
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_energy_budgets_hold_at_the_part_of_the_band_that_is_given(band_hz, seed):
    power = {"cycles_per_s": np.full(3, 1e9), "kappa": np.full(3, 1e-30), "transmit_w": np.full(3, 0.2)}
    free = terms_of(3, seed, energy_j=np.full(3, 1e9), **power)
    server_flops = 2e9
    spent = joules(free, bandwidth.solve_bandwidth(free, server_flops, band_hz, reference_hz=1.0))
    # A lower budget for the client that spends most, so that it needs more of the band.
    budget = np.where(spent == spent.max(), 0.8 * spent, 2 * spent)
    terms = free._replace(energy=free.energy._replace(budget_j=budget))
    plan = bandwidth.solve_bandwidth(terms, server_flops, band_hz, reference_hz=1.0)
    assert (joules(terms, plan) <= budget * (1 + 1e-12)).all()
    assert (joules(free, plan) > 0).all()
    budgets = np.r_[server_flops, band_hz]
    fixed_s, amounts, allowed = bandwidth.demands(terms, (1.0, 1.0), pooled=band_hz == POOLED)
    least = bandwidth._least_parts(terms, terms.energy, 1 / budgets[1])
    rows = np.arange(3)
    optimum = min(
        fixed_cuts_round_s(fixed_s[rows, cuts], amounts[:, rows, cuts] / budgets[:, None], least[rows, cuts])
        for cuts in itertools.product(*(np.flatnonzero(row) for row in allowed & (least < 1)))
        if least[rows, cuts].sum() < 1
    )
    assert plan.bound_s <= optimum * (1 + 1e-6)
    assert optimum * (1 - 1e-6) <= plan.round_s <= optimum * 1.1


def test_energy_budgets_that_need_more_than_the_band_are_refused():
    power = {"cycles_per_s": np.full(2, 1e9), "kappa": np.full(2, 1e-40), "transmit_w": np.full(2, 0.2)}
    free = terms_of(2, 0, energy_j=np.full(2, 1e9), **power)
    least_j = np.min([free.joules(cut) for cut in range(1, free.shape[1])], axis=0)  # at one Hz each
    for factor, fits in ((1.01, True), (0.9, False)):  # 2 Hz would be enough for each client alone
        terms = free._replace(energy=free.energy._replace(budget_j=factor * least_j))
        if fits:
            assert bandwidth.solve_bandwidth(terms, 2e9, (2.0, 2.0), reference_hz=1.0).round_s > 0
        else:
            with pytest.raises(
                BadInput, match="energy budgets together need more than the whole uplink band"
            ):
                bandwidth.solve_bandwidth(terms, 2e9, (2.0, 2.0), reference_hz=1.0)
    terms = free._replace(energy=free.energy._replace(budget_j=np.array([0.4, 1]) * least_j))
    with pytest.raises(optim.Infeasible, match=r"client 0: every cut costs at least .* J; the client"):
        bandwidth.solve_bandwidth(terms, 2e9, (2.0, 2.0), reference_hz=1.0)


@pytest.mark.parametrize("band_hz", [POOLED, SEPARATE], ids=["pooled", "separate"])
def test_budgets_and_ends_hold_in_fractions(band_hz):
    terms, server_flops = terms_of(6, 4), 1e9
    plan = bandwidth.solve_bandwidth(terms, server_flops, band_hz, reference_hz=1.0)
    up_hz, down_hz = (Fraction(band) for band in (band_hz if band_hz == SEPARATE else (band_hz, band_hz)))
    assert sum(map(Fraction, plan.shares.tolist())) <= Fraction(server_flops)
    assert sum(map(Fraction, plan.uplink_hz.tolist())) <= up_hz
    assert sum(map(Fraction, plan.downlink_hz.tolist())) <= down_hz
    if band_hz == POOLED:
        np.testing.assert_array_equal(plan.uplink_hz, plan.downlink_hz)
    # Rates proportional to the band give the session's seconds.
    moved = terms._replace(
        uplink_bps=terms.uplink_bps * plan.uplink_hz, downlink_bps=terms.downlink_bps * plan.downlink_hz
    )
    with np.errstate(divide="ignore"):
        seconds = moved.seconds(plan.cuts, plan.shares)
    np.testing.assert_allclose(sum(seconds), plan.client_s, rtol=1e-12)
    assert (sum(seconds) <= plan.round_s).all()
    assert plan.bound_s <= plan.round_s == plan.client_s.max()


def test_with_bands_as_given_no_plan_of_compute_alone_is_better_than_the_bound():
    """A plan with every client at the reference band is one way to spend K reference bands."""
    for seed in range(5):
        terms = terms_of(6, seed)
        alone = optim.solve(terms, 1e9)
        plan = bandwidth.solve_bandwidth(terms, 1e9, 6.0, reference_hz=1.0)
        assert plan.bound_s <= alone.round_s
        assert plan.round_s <= alone.round_s


def test_a_band_without_end_leaves_the_compute_problem():
    terms = terms_of(6)
    free = terms._replace(uplink_bps=terms.uplink_bps * 1e12, downlink_bps=terms.downlink_bps * 1e12)
    for band_hz in (1e14, (1e14, 1e14)):
        plan = bandwidth.solve_bandwidth(terms, 1e9, band_hz, reference_hz=1.0)
        np.testing.assert_allclose(plan.round_s, optim.solve(free, 1e9).round_s, rtol=1e-5)


def test_more_of_anything_does_not_lengthen_the_bound():
    terms = terms_of(6)
    base = bandwidth.solve_bandwidth(terms, 1e9, SEPARATE, reference_hz=1.0)
    for server_flops, band_hz in ((2e9, SEPARATE), (1e9, (4.0, 1.0)), (1e9, (2.0, 2.0))):
        more = bandwidth.solve_bandwidth(terms, server_flops, band_hz, reference_hz=1.0)
        assert more.bound_s < base.bound_s


def test_absent_clients_and_clients_without_a_cut():
    terms = terms_of(4, memory_bytes=np.array([1e12, 10.0, 1e12, 1e12]))
    with pytest.raises(optim.Infeasible, match="client 1: every cut needs"):
        bandwidth.solve_bandwidth(terms, 1e9, POOLED, reference_hz=1.0)
    present = np.array([True, False, True, True])
    plan = bandwidth.solve_bandwidth(terms, 1e9, POOLED, reference_hz=1.0, present=present)
    alone = bandwidth.solve_bandwidth(terms.take(present), 1e9, POOLED, reference_hz=1.0)
    np.testing.assert_allclose([plan.round_s, plan.bound_s], [alone.round_s, alone.bound_s], rtol=1e-9)
    assert (plan.shares[1], plan.uplink_hz[1], plan.client_s[1]) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("server_flops", "band_hz", "reference_hz", "message"),
    [
        (0.0, POOLED, 1.0, "server_flops=0.0"),
        (1e9, 0.0, 1.0, "band_hz=0.0"),
        (1e9, (1.0, -1.0), 1.0, "band_hz=-1.0"),
        (1e9, POOLED, np.inf, "reference_hz=inf"),
    ],
)
def test_budgets_without_sense_are_refused(server_flops, band_hz, reference_hz, message):
    with pytest.raises(BadInput, match=message):
        bandwidth.solve_bandwidth(terms_of(2), server_flops, band_hz, reference_hz=reference_hz)


@pytest.mark.slow
@pytest.mark.parametrize("bands", [1, 2], ids=["pooled", "separate"])
def test_the_gap_of_a_hundred_clients_is_below_a_thousandth_nineteen_times_in_twenty(bands):
    """Log-normal fleets (sigma 0.3, 1); a client's part 1e8 to 1e10 FLOP/s and 0.1 to 1 reference bands."""
    gaps = []
    for seed in range(20):
        for spread in (0.3, 1.0):
            terms = terms_of(100, seed, units=20, spread=spread)
            for per_client in (1e8, 1e9, 1e10):
                for hz in (10.0, 100.0):
                    band_hz = hz if bands == 1 else (0.6 * hz, 0.4 * hz)
                    gaps.append(
                        bandwidth.solve_bandwidth(terms, per_client * 100, band_hz, reference_hz=1.0).gap
                    )
    assert np.min(gaps) >= 0
    assert np.quantile(gaps, 0.95) <= 1e-3
