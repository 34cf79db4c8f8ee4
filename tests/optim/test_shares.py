import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optim import oracles

from sfl_jax import optim
from sfl_jax.optim import shares

POSITIVE = st.floats(-3, 3).map(lambda x: 10.0**x)


def one_cut(fixed_s, work):
    """Costs with a single cut: only the share problem remains."""
    fixed_s, work = (np.array(values, float)[:, None] for values in (fixed_s, work))
    return optim.Costs(fixed_s, work, np.ones(fixed_s.shape, bool))


@settings(max_examples=100, deadline=None)
@given(
    clients=st.lists(st.tuples(POSITIVE | st.just(0.0), POSITIVE | st.just(0.0)), min_size=4, max_size=4),
    server_flops=POSITIVE,
)
def test_shares_of_fixed_cuts_satisfy_the_kkt_conditions(clients, server_flops):
    fixed_s, work = np.array(clients).T
    plan = optim.solve(one_cut(fixed_s, work), server_flops)
    busy = work > 0
    np.testing.assert_allclose(plan.round_s, oracles.least_time_s(fixed_s, work, server_flops), rtol=1e-11)
    # All clients on the server end with the round. The server is used up unless an all-local one ends last.
    np.testing.assert_allclose(plan.client_s[busy], plan.round_s, rtol=1e-11)
    if busy.any() and plan.round_s > fixed_s[~busy].max(initial=0.0) * (1 + 1e-9):
        left_s = (plan.round_s - fixed_s[busy]).min()
        assert plan.shares.sum() >= server_flops * (1 - 1e-13 * plan.round_s / left_s)
    assert plan.shares.sum() <= server_flops


@pytest.mark.parametrize("server_flops", [2.0, 11.0, 400.0])
def test_multipliers_equal_finite_differences(server_flops):
    fixed_s, work = np.array([1.0, 3.0, 2.0, 0.5]), np.array([5.0, 2.0, 0.0, 9.0])
    plan = optim.solve(one_cut(fixed_s, work), server_flops)
    found = optim.sensitivity(one_cut(fixed_s, work), plan)

    def slope(change, step):
        ends = [oracles.least_time_s(*change(sign * step)) for sign in (-1, 1)]
        return (ends[1] - ends[0]) / (2 * step)

    per_flops = slope(lambda step: (fixed_s, work, server_flops + step), server_flops * 1e-4)
    np.testing.assert_allclose(-found.per_server_flops, per_flops, rtol=1e-5)
    for client, unit in enumerate(np.eye(4)):
        per_s = slope(lambda step, unit=unit: (fixed_s + step * unit, work, server_flops), 1e-5)
        np.testing.assert_allclose(found.per_client_s[client], per_s, rtol=1e-4, atol=1e-9)
    np.testing.assert_allclose(found.per_client_s.sum(), 1.0, rtol=1e-12)


def test_an_all_local_client_that_ends_last_owns_the_round():
    costs = one_cut([1.0, 9.0], [5.0, 0.0])
    found = optim.sensitivity(costs, optim.solve(costs, 100.0))
    assert found.per_server_flops == 0.0
    assert found.per_client_s.tolist() == [0.0, 1.0]


def test_newton_never_passes_the_root():
    with jax.enable_x64(True):
        fixed_s, work = jnp.array([0.0, 1.0, 1.0 - 1e-9]), jnp.array([1e-6, 1e-12, 3.0])
        root = float(shares.end_s(fixed_s, work, 2.0))
        assert float((work / (root - fixed_s)).sum()) >= 2.0 * (1 - 1e-9)
        assert float((work / (root * (1 + 1e-12) - fixed_s)).sum()) <= 2.0
        assert float(shares.end_s(fixed_s, work, 2.0, start_s=root * 3)) == pytest.approx(root, rel=1e-13)
        assert float(shares.end_s(fixed_s, 0 * work, 2.0)) == -np.inf
