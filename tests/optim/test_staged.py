import itertools
from fractions import Fraction

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optim import oracles

from sfl_jax import optim
from sfl_jax.errors import BadInput
from sfl_jax.optim import staged

KEY = jax.random.key(1)
SECONDS = st.sampled_from([0.0, 0.5, 1.0, 1.0, 2.0, 1e-6, 1e6]) | st.floats(0.01, 10.0)


@st.composite
def tables(draw):
    """Stages with ties, zeros and forbidden cuts; every client has a cut."""
    clients, cuts = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    size = clients * cuts
    parts = [
        np.array(draw(st.lists(SECONDS, min_size=size, max_size=size))).reshape(clients, cuts)
        for _ in range(3)
    ]
    forbidden = np.array(draw(st.lists(st.booleans(), min_size=size, max_size=size))).reshape(clients, cuts)
    forbidden[:, draw(st.integers(0, cuts - 1))] = False
    return staged.Stages(*(np.where(forbidden, np.inf, part) for part in parts))


def rounds_s(costs):
    """The exact rounds of all vectors of cuts."""
    choices = [np.flatnonzero(np.isfinite(row)) for row in costs.before_s]
    rows = range(len(choices))
    for cuts in itertools.product(*choices):
        before, serving, after = ([Fraction(part[k, cuts[k]]) for k in rows] for part in costs)
        yield max(before) + sum(serving) + max(after)


@settings(max_examples=400, deadline=None)
@given(tables())
def test_the_optimum_is_that_of_enumeration_and_the_bound_holds_exactly(costs):
    optimum = min(rounds_s(costs))
    cuts, bound_s, _ = staged.optimal_cuts(costs)
    rows = np.arange(len(cuts))
    mine = staged.Stages(*(part[rows, cuts] for part in costs))
    assert staged.round_seconds(mine) == pytest.approx(float(optimum), rel=1e-9, abs=1e-300)
    assert Fraction(bound_s) <= optimum
    assert bound_s == pytest.approx(float(optimum), rel=1e-8, abs=1e-300)


def test_a_hopeless_cut_does_not_loosen_the_bound():
    costs = staged.Stages(np.array([[0.0, 0.0]]), np.array([[0.0, 1e6]]), np.array([[0.125, 0.0]]))
    _, bound_s, _ = staged.optimal_cuts(costs)
    assert 0.125 * (1 - 1e-12) <= bound_s <= 0.125


def test_a_worse_search_would_be_noticed():
    """The best plan at the least first barrier is not the optimum."""
    costs = staged.Stages(np.array([[1.0, 2.0]]), np.array([[9.0, 1.0]]), np.array([[1.0, 1.0]]))
    assert min(rounds_s(costs)) == 4
    assert staged.optimal_cuts(costs)[0].tolist() == [1]
    assert staged._Order(costs).least_rest(np.array([1.0, 2.0]))[0].tolist() == [10.0, 2.0]


def terms_of(clients=4, units=4, seed=0, **columns):
    return optim.terms(oracles.profile(units, seed), oracles.fleet(clients, seed, **columns), optim.Work())


@pytest.mark.parametrize("method", optim.STAGED_METHODS)
@pytest.mark.parametrize("server_flops", [1e8, 1e9, 1e11])
def test_every_method_is_a_staged_round_and_bounded(method, server_flops):
    for seed in range(5):
        terms = terms_of(seed=seed)
        plan = optim.solve(terms, server_flops, method, "staged", key=KEY)
        seconds = terms.seconds(plan.cuts, np.full(4, server_flops))
        before = seconds.model_down + seconds.client_forward + seconds.smashed_up
        after = seconds.gradient_down + seconds.client_backward + seconds.model_up
        np.testing.assert_allclose(
            plan.round_s, before.max() + seconds.server.sum() + after.max(), rtol=1e-12
        )
        np.testing.assert_allclose(plan.client_s, sum(seconds), rtol=1e-12)
        optimum = min(rounds_s(staged.stages(terms, server_flops)))
        assert Fraction(plan.bound_s) <= optimum <= Fraction(plan.round_s)
        assert plan.bound_s == pytest.approx(float(optimum), rel=1e-8)
        assert np.isnan(plan.shares).all()
        if method == "exact":
            assert plan.round_s == pytest.approx(float(optimum), rel=1e-9)


def test_the_best_common_cut_is_the_best_column():
    terms = terms_of(5, 6)
    costs = staged.stages(terms, 1e9)
    columns = costs.before_s.max(axis=0) + costs.serving_s.sum(axis=0) + costs.after_s.max(axis=0)
    plan = optim.solve(terms, 1e9, "common_cut", "staged")
    np.testing.assert_allclose(plan.round_s, columns.min(), rtol=1e-12)
    assert set(plan.cuts) == {int(columns.argmin())}


def test_many_clients_take_few_tries():
    terms = terms_of(60, 12)
    plan = optim.solve(terms, 6e10, "exact", "staged")
    assert plan.gap < 1e-8
    assert plan.iterations < 60 * 13 / 4


def test_absent_clients_cost_nothing():
    terms, present = terms_of(5), np.array([True, False, True, True, False])
    for method in optim.STAGED_METHODS:
        plan = optim.solve(terms, 1e9, method, "staged", key=KEY, present=present)
        assert plan.cuts[~present].tolist() == [4, 4]
        assert plan.client_s[~present].tolist() == [0.0, 0.0]
        if method != "random_cut":
            alone = optim.solve(terms.take(present), 1e9, method, "staged")
            np.testing.assert_allclose(plan.round_s, alone.round_s, rtol=1e-12)
        nobody = optim.solve(terms, 1e9, method, "staged", key=KEY, present=np.zeros(5, bool))
        assert (nobody.round_s, nobody.bound_s) == (0.0, 0.0)


def test_random_cuts_are_allowed_ones():
    terms = terms_of(200, 5, memory_bytes=np.full(200, 1.7e6))
    allowed = terms.costs().allowed
    plan = optim.solve(terms, 1e9, "random_cut", "staged", key=KEY)
    assert allowed[np.arange(200), plan.cuts].all()
    assert set(plan.cuts) == set(np.flatnonzero(allowed.any(axis=0)))


def test_who_cannot_be_served_is_named():
    terms = terms_of(3, memory_bytes=np.array([1e12, 10.0, 1e12]))
    with pytest.raises(optim.Infeasible, match="client 1: every cut needs"):
        optim.solve(terms, 1e9, "exact", "staged")
    terms = terms_of(3, memory_bytes=np.array([1e12, 1.0e6, 1e12]))
    with pytest.raises(optim.Infeasible, match="client 1: cut 4 needs"):
        optim.solve(terms, 1e9, "no_split", "staged")
    with pytest.raises(optim.Infeasible, match="server_flops=0"):
        optim.solve(terms, 0.0, "exact", "staged")


def test_what_staged_cannot_do_is_refused():
    with pytest.raises(BadInput, match="method=greedy: barrier=staged allows only exact"):
        optim.solve(terms_of(), 1e9, "greedy", "staged")
    with pytest.raises(BadInput, match="needs Terms"):
        optim.solve(terms_of().costs(), 1e9, "exact", "staged")
