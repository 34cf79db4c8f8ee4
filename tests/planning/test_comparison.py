"""The comparison of methods and schemes: sweeps, errors of the costs, a run's clocks."""

import dataclasses
import itertools
from unittest import mock

import numpy as np
import pytest

from sfl_jax import fleet, optim
from sfl_jax.commands import compare, parts
from sfl_jax.commands.config import Config
from sfl_jax.planning import comparison
from sfl_jax.run import clocks as run_clocks
from sfl_jax.run.parts import RIVALS
from sfl_jax.run.rounds import prepare

# Few units, and six clients in every plan, so that the tests share their compiled programs.
SMALL = Config(model="efficientnetv2-tiny", clients=6, server_flops=1e9)
PLANNER = parts.planner(SMALL)


@pytest.fixture(scope="module", autouse=True)
def slow_clients():
    """Random fleets with a hundredth of the compute: else no client would split so small a network."""
    drawn = fleet.random_fleet

    def slow(*given, **named):
        clients = drawn(*given, **named)
        return dataclasses.replace(clients, flops=clients.flops / 100)

    with mock.patch.object(fleet, "random_fleet", slow):
        yield


@pytest.fixture(scope="module")
def rows():
    return list(comparison.sweeps(PLANNER, compare._fleets(SMALL)))


def test_every_method_is_in_every_case_of_every_sweep(rows):
    methods = comparison.methods("session")
    assert set(optim.METHODS) < set(methods)
    by_case = {case: list(group) for case, group in itertools.groupby(rows, lambda row: row[:4])}
    assert {len(group) for group in by_case.values()} == {len(methods)}
    assert {sweep for sweep, *_ in by_case} == {"server_flops", "clients", "uplink", "heterogeneity"}
    assert {fleet for _, _, fleet, _ in by_case} == set(range(comparison.RANDOM_FLEETS))
    for group in by_case.values():
        assert tuple(row.method for row in group) == methods
        assert len({(row.optimum_s, row.bound_s) for row in group}) == 1
        assert all(row.bound_s <= row.optimum_s <= row.round_s * (1 + 1e-9) for row in group)
        assert group[0].round_s == group[0].optimum_s


def test_a_sweep_changes_what_it_says(rows):
    exact = [row for row in rows if row.method == "exact" and row.fleet == 0]

    def rounds_s(sweep):
        return np.array([row.round_s for row in exact if row.sweep == sweep])

    assert (np.diff(rounds_s("server_flops")) <= 0).all()
    assert (np.diff(rounds_s("uplink")) <= 0).all()
    assert (np.diff(rounds_s("clients")) >= 0).all()
    for sweep in ("server_flops", "uplink", "clients", "heterogeneity"):
        assert len(set(rounds_s(sweep))) > 1
    clients, _, terms = parts.read_terms(SMALL)
    few = optim.solve(terms.take(np.arange(3)), SMALL.server_flops)
    (row,) = (row for row in exact if (row.sweep, row.value) == ("clients", 3))
    assert row.round_s == pytest.approx(few.round_s, rel=1e-9)
    assert len(clients) == 6
    (row,) = (row for row in exact if (row.sweep, row.value) == ("uplink", 1))
    assert row.round_s == pytest.approx(optim.solve(terms, SMALL.server_flops).round_s, rel=1e-9)


def test_spread_keeps_geometric_means_and_scales_distances_from_them():
    _, _, terms = parts.read_terms(SMALL)
    for value in (0.0, 0.5, 1.0, 2.0):
        spread = comparison.spread(terms, value)
        for name in ("flops", "uplink_bps", "downlink_bps"):
            before, after = np.log(getattr(terms, name)), np.log(getattr(spread, name))
            np.testing.assert_allclose(after.mean(), before.mean(), rtol=1e-12)
            np.testing.assert_allclose(after.std(), value * before.std(), rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(spread.samples, terms.samples)


@pytest.mark.parametrize("barrier", ["session", "staged"])
def test_a_plan_kept_under_its_own_costs_lasts_as_planned(barrier):
    planner = dataclasses.replace(PLANNER, barrier=barrier)
    _, _, terms = parts.read_terms(SMALL)
    plan = optim.solve(terms, planner.server_flops, barrier=barrier)
    assert comparison.kept_round_s(plan, terms, planner) == pytest.approx(plan.round_s, rel=1e-9)
    slower = terms._replace(
        flops=terms.flops / 2, uplink_bps=terms.uplink_bps / 2, downlink_bps=terms.downlink_bps / 2
    )
    kept_s = comparison.kept_round_s(plan, slower, planner)
    assert plan.round_s * 1.1 < kept_s <= 2 * plan.round_s


def test_a_kept_plan_gives_the_whole_server():
    _, _, terms = parts.read_terms(SMALL)
    for method in ("exact", "equal_shares", "no_split"):
        plan = optim.solve(terms, SMALL.server_flops, method)
        shares = comparison.whole_shares(method, plan, SMALL.server_flops)
        assert (shares >= plan.shares * (1 - 1e-12)).all()
        if method == "equal_shares":
            assert set(shares) <= {0.0, SMALL.server_flops / terms.shape[0]}
        np.testing.assert_array_equal(shares > 0, plan.shares > 0)
        assert method != "exact" or shares.sum() == pytest.approx(SMALL.server_flops)
        kept = plan._replace(shares=shares)
        assert comparison.kept_round_s(kept, terms, PLANNER) <= plan.round_s * (1 + 1e-9)


def test_errors_are_as_large_as_they_say_and_cost_a_kept_plan_something():
    terms = parts.read_terms(SMALL)[2]
    rows = list(comparison.errors(PLANNER, terms, draws=20))
    assert len(rows) == 2 * 20 * len(comparison.methods("session"))
    exact = [row for row in rows if row.method == "exact"]
    small, large = (
        [row.round_s / row.optimum_s for row in exact if row.value == error] for error in (0.1, 0.2)
    )
    assert np.min(small + large) >= 1 - 1e-9
    assert 1.005 < np.mean(small) < np.mean(large)
    # If rates are off by at most e, kept rounds are at most (1 + e)/(1 - e) times the optimum.
    assert np.max(small) <= 1.1 / 0.9
    assert np.max(large) <= 1.2 / 0.8
    nominal_s = optim.solve(terms, SMALL.server_flops).round_s
    for error in comparison.ERRORS:
        optima = np.array([row.optimum_s for row in exact if row.value == error]) / nominal_s
        assert ((1 / (1 + error) <= optima) & (optima <= 1 / (1 - error))).all()
        assert len(set(optima)) == 20
    assert [row.optimum_s for row in comparison.errors(PLANNER, terms, draws=2)][:9] == [
        row.optimum_s for row in rows[:9]
    ]


def test_the_clock_of_a_run_is_that_of_its_own_plans():
    config = dataclasses.replace(SMALL, clients=12, cohort_size=6, rounds=4)
    built = parts.build(dataclasses.replace(config, links="fading")).parts
    clocks = run_clocks.clocks(built, 4)
    assert list(clocks) == list(comparison.methods("session"))
    prepared = [prepare(built, round) for round in range(4)]
    np.testing.assert_allclose(clocks["exact"].seconds, np.cumsum([each.plan.round_s for each in prepared]))
    for rival in RIVALS:
        np.testing.assert_allclose(
            clocks[rival].seconds, np.cumsum([each.rival_s[rival] for each in prepared])
        )
    own_s = clocks["exact"].seconds
    assert all((own_s <= clock.seconds * (1 + 1e-9)).all() for clock in clocks.values())
    assert clocks["random_cut"].seconds[-1] > own_s[-1] * 1.01
    for name, values in clocks["exact"].ledger.items():
        assert values.tolist() == [getattr(each.ledger, name) for each in prepared]
    alone = clocks["no_split"].ledger
    assert (alone["smashed_up_bytes"] == 0).all()
    assert (alone["server_flop"] == 0).all()
    assert (alone["client_flop"] >= clocks["exact"].ledger["client_flop"]).all()


def test_a_method_that_cannot_serve_everybody_never_ends():
    built = parts.build(dataclasses.replace(SMALL, clients=12, cohort_size=6, rounds=2)).parts
    poor = built.terms._replace(memory_bytes=np.where(np.arange(12) % 2, 1e12, 1.2e6))
    clocks = run_clocks.clocks(dataclasses.replace(built, terms=poor), 2)
    assert np.isinf(clocks["no_split"].seconds).all()
    assert np.isnan(clocks["no_split"].ledger["client_flop"]).all()
    assert np.isfinite(clocks["exact"].seconds).all()
