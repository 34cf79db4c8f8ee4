"""Without the cuts that are not needed, the optimum, its proof and the numbers of the cuts stay the same."""

import sys

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optim import oracles

from sfl_jax import models, optim
from sfl_jax.optim.needed import needed_cuts

UNITS, CLIENTS = 9, 4


@pytest.fixture(scope="module", autouse=True)
def few_are_many():
    """Drops cuts for small fleets too; usually this needs fleets that are too large for the oracles."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["sfl_jax.optim.solve"], "MANY", 1)
        yield


@st.composite
def instances(draw):
    """Terms of a chain with runs of equal units (so with ties) and a server; memory and energy may bind."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    run = np.repeat(np.arange(UNITS), draw(st.sampled_from([1, 3, 4, UNITS])))[:UNITS]
    profile = oracles.profile(UNITS, draw(st.integers(0, 99)))
    for name in ("forward_macs", "backward_macs", "parameters", "state", "activations"):
        setattr(profile, name, getattr(profile, name)[run])
    profile.smashed[1:-1] = profile.smashed[1:-1][run[:-1]]
    if draw(st.booleans()):
        profile.smashed[1:-1] = rng.permutation(profile.smashed[1:-1])
    if draw(st.booleans()):
        profile.parameters[:] = 0
    fleet = oracles.fleet(CLIENTS, draw(st.integers(0, 99)), draw(st.sampled_from([0.0, 1.0, 6.0])))
    work = optim.Work(min_cut=draw(st.integers(0, 2)))
    terms = optim.terms(profile, fleet, work)
    if draw(st.booleans()):
        terms = terms._replace(memory_bytes=rng.choice(np.sort(terms.needed_bytes)[2:], CLIENTS))
    if draw(st.booleans()):
        rates = {"cycles_per_s": np.full(CLIENTS, 1e9), "kappa": np.full(CLIENTS, 1e-27)}
        rates |= {"transmit_w": rng.uniform(0, 1, CLIENTS), "energy_j": np.zeros(CLIENTS)}
        energy = optim.terms(profile, oracles.fleet(CLIENTS, **rates), work)
        each = np.array([energy.joules(cut)[rng.integers(CLIENTS)] for cut in range(UNITS + 1)])
        # A little more than some cut takes: at exactly that much, rounding would decide.
        terms = terms._replace(energy=energy.energy._replace(budget_j=1.001 * rng.choice(each, CLIENTS)))
    return terms, CLIENTS * draw(st.sampled_from([0.0, 1e6, 1e8, 1e10]))


def assert_as_with_all(terms, server_flops):
    """Compares the plan of the needed cuts with the plan of all cuts, and with exact fractions."""
    with jax.enable_x64(True):
        every = jax.tree.map(np.asarray, jax.jit(optim.solve_arrays)(terms, server_flops))
    if not every.feasible:
        with pytest.raises(optim.Infeasible):
            optim.solve(terms, server_flops)
        return
    plan = optim.solve(terms, server_flops)
    np.testing.assert_allclose(plan.round_s, every.round_s, rtol=1e-11)
    np.testing.assert_allclose(plan.bound_s, every.bound_s, rtol=1e-11)
    oracles.assert_sound(terms.costs(), server_flops, plan)
    np.testing.assert_allclose(sum(terms.seconds(plan.cuts, plan.shares)), plan.client_s, rtol=1e-12)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(instances())
def test_the_optimum_and_its_proof_are_those_of_all_cuts(instance):
    assert_as_with_all(*instance)


@settings(max_examples=50, deadline=None)
@given(instances(), st.floats(0.9, 3.0))
def test_the_smallest_server_is_that_of_all_cuts(instance, factor):
    terms, _ = instance
    costs = terms.costs()
    if not costs.allowed.any(axis=1).all():
        return
    round_s = factor * np.where(costs.allowed, costs.fixed_s, np.inf).min(axis=1).max()
    need = oracles.least_need(costs, round_s)
    if need is None:
        with pytest.raises(optim.Infeasible):
            optim.smallest_server(terms, round_s)
        return
    found = optim.smallest_server(terms, round_s)
    # The dense table's seconds are rounded; shares with little time left magnify the error.
    np.testing.assert_allclose(found.server_flops, float(need), rtol=1e-9)


@pytest.fixture
def solve_with(monkeypatch):
    """Makes solve() use other cuts than the needed ones."""
    solve = sys.modules["sfl_jax.optim.solve"]
    return lambda cuts: monkeypatch.setattr(solve, "needed_cuts", lambda _: cuts)


def test_without_a_cut_that_is_needed_there_is_no_optimum_and_no_proof(solve_with):
    terms = optim.terms(oracles.profile(6), oracles.fleet(CLIENTS), optim.Work())
    needed, cuts = needed_cuts(terms), optim.solve(terms, 1e9).cuts
    assert_as_with_all(terms, 1e9)
    solve_with(needed[needed != np.bincount(cuts).argmax()])
    with pytest.raises(AssertionError):
        assert_as_with_all(terms, 1e9)


def efficientnet(name="s", memory_bytes=1e12, **columns):
    profile = models.profile(models.create(f"efficientnetv2-{name}", 10, 1), (32, 32, 1))
    fleet = oracles.fleet(3, memory_bytes=np.full(3, memory_bytes), **columns)
    return optim.terms(profile, fleet, optim.Work())


def test_of_equal_blocks_in_a_row_only_the_ends_are_needed():
    terms = efficientnet()
    needed = needed_cuts(terms)
    assert needed.tolist() == [1, 3, 4, 7, 8, 11, 12, 17, 26, 27, 41, 43]
    assert 43 - needed.size > 2 * needed.size


def test_memory_and_energy_that_may_bind_keep_cuts():
    """Memory may end halfway into a run of equal units; a mixture of cuts may break an energy budget."""
    ample, largest = efficientnet(), efficientnet().needed_bytes.max()
    tight = efficientnet(memory_bytes=0.5 * largest)
    beyond = tight.needed_bytes > 0.5 * largest
    assert set(np.flatnonzero(beyond[:-1])) <= set(needed_cuts(tight))
    assert len(needed_cuts(efficientnet(memory_bytes=largest))) == len(needed_cuts(ample))
    budget = {name: np.ones(3) for name in ("cycles_per_s", "kappa", "transmit_w", "energy_j")}
    assert needed_cuts(efficientnet(**budget)).tolist() == list(range(1, 44))


def test_one_of_two_equal_cuts_is_kept():
    terms = optim.terms(oracles.profile(3), oracles.fleet(2), optim.Work(min_cut=0))
    same = {
        name: values[[0, 1, 1, 3]] for name, values in terms._asdict().items() if np.shape(values) == (4,)
    }
    assert needed_cuts(terms._replace(**same)).tolist() in ([0, 1, 3], [0, 2, 3])
