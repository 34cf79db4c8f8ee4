import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optim import highs, oracles

from sfl_jax import optim

WIDE = st.sampled_from([0.0, 1e-6, 1.0, 1e6]) | st.floats(-6, 6).map(lambda x: 10.0**x)


@st.composite
def wide_instances(draw, clients=30, cuts=5):
    """Many clients, numbers over twelve decades, with zeros and ties."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    spread = draw(st.sampled_from([0.0, 0.3, 6.0]))

    def table():
        values = 10.0 ** rng.uniform(-spread, spread, (clients, cuts))
        return np.where(rng.random((clients, cuts)) < draw(st.sampled_from([0.0, 0.2])), draw(WIDE), values)

    work = table()
    if draw(st.booleans()):
        work[:, -1] = 0.0
    allowed = rng.random((clients, cuts)) < 0.8
    allowed[np.arange(clients), rng.integers(0, cuts, clients)] = True
    return optim.Costs(table(), work, allowed), draw(WIDE.filter(lambda flops: flops > 0))


def optimum_by_bisection(costs, server_flops):
    """The root of need by plain bisection in NumPy."""
    fixed_s = np.where(costs.allowed, costs.fixed_s, np.inf)

    def meets(time_s):
        with np.errstate(all="ignore"):
            shares = np.where(costs.server_flop > 0, costs.server_flop / (time_s - fixed_s), 0.0)
        return (
            np.where(fixed_s <= time_s, np.where(shares < 0, np.inf, shares), np.inf).min(axis=1).sum()
            <= server_flops
        )

    low, high = 0.0, (fixed_s + costs.server_flop * len(fixed_s) / server_flops).min(axis=1).max() * 2
    for _ in range(400):
        middle = 0.5 * (low + high)
        low, high = (low, middle) if meets(middle) else (middle, high)
    return high


@settings(max_examples=60, deadline=None)
@given(wide_instances())
def test_many_clients_and_twelve_decades(instance):
    costs, server_flops = instance
    plan = optim.solve(costs, server_flops)
    np.testing.assert_allclose(plan.round_s, optimum_by_bisection(costs, server_flops), rtol=2e-11)
    oracles.assert_sound(costs, server_flops, plan)
    assert plan.round_s == 0 or plan.gap < 2e-11


@pytest.mark.parametrize(
    ("spread", "per_client"), [(spread, flops) for spread in (0.05, 1.0) for flops in (1e7, 1e9, 1e11)]
)
def test_few_passes_are_enough(spread, per_client):
    """Equal clients are the hardest case: many switch between the server and training alone."""
    terms = optim.terms(oracles.profile(12), oracles.fleet(400, spread=spread), optim.Work())
    plan = optim.solve(terms, per_client * 400)
    oracles.assert_sound(terms.costs(), per_client * 400, plan)
    assert plan.gap < 1e-10
    assert plan.iterations <= 30


@pytest.mark.slow
def test_a_sampled_start_changes_the_passes_not_the_plan(monkeypatch):
    terms = optim.terms(oracles.profile(6), oracles.fleet(300, spread=0.2), optim.Work())
    plain = optim.solve(terms, 1e10)
    exact = sys.modules["sfl_jax.optim.exact"]
    monkeypatch.setattr(exact, "MANY", 300)
    monkeypatch.setattr(exact, "_SAMPLE", 40)
    with jax.enable_x64(True):
        sampled = jax.jit(optim.solve_arrays)(terms, 1e10)
    np.testing.assert_allclose(sampled.round_s, plain.round_s, rtol=1e-10)
    np.testing.assert_array_equal(sampled.cuts, plain.cuts)
    assert sampled.iterations != plain.iterations


@pytest.mark.slow
def test_more_cuts_than_are_unrolled():
    terms = optim.terms(oracles.profile(70), oracles.fleet(5), optim.Work())
    plan, dense = optim.solve(terms, 1e9), optim.solve(terms.costs(), 1e9)
    np.testing.assert_array_equal(plan.cuts, dense.cuts)
    np.testing.assert_allclose(plan.round_s, optimum_by_bisection(terms.costs(), 1e9), rtol=1e-11)
    key = jax.random.key(0)
    cuts = optim.solve(terms, 1e9, "random_cut", key=key).cuts
    assert cuts.min() >= 1
    assert len(set(cuts)) > 1


def bytes_per_client(clients, units=43):
    """The compiled search's temporary memory."""
    terms = optim.terms(oracles.profile(units), oracles.fleet(4), optim.Work())
    with jax.enable_x64(True):
        many = jax.tree.map(
            lambda part: jax.ShapeDtypeStruct((clients if len(part) == 4 else len(part),), part.dtype), terms
        )
        search = jax.jit(lambda *given: optim.solve_arrays(*given))  # new: else a compilation is reused
        program = search.lower(many, jax.ShapeDtypeStruct((), np.float64)).compile()
    return program.memory_analysis().temp_size_in_bytes / clients


@pytest.mark.slow
def test_nothing_of_size_clients_times_cuts_is_made(monkeypatch):
    assert bytes_per_client(300_000) < 10 * 8
    # Without the optimisation barriers the compiler makes the whole table ahead of the loop.
    exact = sys.modules["sfl_jax.optim.exact"]
    unguarded = {name: getattr(jax.lax, name) for name in ("while_loop", "fori_loop")}
    monkeypatch.setattr(
        exact, "lax", SimpleNamespace(**unguarded, optimization_barrier=lambda values: values)
    )
    assert bytes_per_client(300_000) > 44 * 8


def scarce_medium_rich(clients, seed=0):
    terms = optim.terms(oracles.profile(5, seed), oracles.fleet(clients, seed), optim.Work())
    return [(terms.costs(), per_client * clients) for per_client in (3e7, 3e8, 3e9)]


@pytest.mark.parametrize("regime", [0, 1, 2], ids=["scarce", "medium", "rich"])
@pytest.mark.parametrize(
    ("clients", "closeness"),
    [
        (10, 1.05),
        pytest.param(50, 1.25, marks=pytest.mark.slow),
    ],  # at 50 clients each HiGHS run stops after a minute
)
def test_highs_bounds_the_optimum_from_both_sides(clients, closeness, regime):
    costs, server_flops = scarce_medium_rich(clients)[regime]
    plan = optim.solve(costs, server_flops)
    below = highs.tangent(costs, server_flops, plan.round_s).round_s
    above = highs.discretised(costs, server_flops, plan.round_s).round_s
    assert below <= plan.bound_s * (1 + 1e-6)
    assert plan.round_s <= above * (1 + 1e-6)
    assert above / below < closeness  # else the bounds prove little
