import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optim import oracles

from sfl_jax import optim
from sfl_jax.errors import BadInput
from sfl_jax.optim.alternating import _starts
from sfl_jax.optim.table import table as table_of

KEY = jax.random.key(3)


def instance(seed, per_client=3e7, clients=20, spread=1.0):
    return optim.terms(
        oracles.profile(8, seed), oracles.fleet(clients, seed, spread), optim.Work()
    ), per_client * clients


@pytest.mark.parametrize("seed", range(6))
def test_at_rest_neither_half_helps(seed):
    terms, server_flops = instance(seed)
    plan = optim.solve(terms, server_flops, "alternating")
    costs = terms.costs()
    with np.errstate(divide="ignore", invalid="ignore"):
        serving_s = np.where(costs.server_flop > 0, costs.server_flop / plan.shares[:, None], 0.0)
    ends = np.where(costs.allowed, costs.fixed_s + serving_s, np.inf)
    # At these shares no cuts end the slowest client earlier.
    assert ends.min(axis=1).max() >= plan.round_s * (1 - 1e-9)
    clients = np.arange(len(plan.cuts))
    best_s = oracles.least_time_s(
        costs.fixed_s[clients, plan.cuts], costs.server_flop[clients, plan.cuts], server_flops
    )
    np.testing.assert_allclose(plan.round_s, best_s, rtol=1e-10)
    assert plan.iterations >= 2


def test_a_client_whose_share_falls_to_zero_never_comes_back_unless_it_is_called():
    # With half the server each, neither client is faster than alone, so both leave the server.
    costs = optim.Costs(
        np.array([[1.0, 10.0], [1.0, 9.0]]), np.array([[12.0, 0.0], [12.0, 0.0]]), np.ones((2, 2), bool)
    )
    plan = optim.solve(costs, 2.0, "alternating")
    assert plan.cuts.tolist() == [1, 1]
    assert plan.round_s == pytest.approx(10.0)
    assert optim.solve(costs, 2.0).round_s == pytest.approx(9.0)
    recalled = optim.solve(costs, 2.0, "alternating", recall=True)
    assert recalled.cuts.tolist() == [0, 1]
    assert recalled.round_s == pytest.approx(9.0)


@st.composite
def ties(draw):
    """Seconds and work are drawn from few numbers, so many clients end a round together."""
    fixed_s, work = (
        np.array(draw(st.lists(st.sampled_from([0.0, 1.0, 2.0, 4.0, 9.0, 20.0]), min_size=12, max_size=12)))
        for _ in range(2)
    )
    costs = optim.Costs(fixed_s.reshape(3, 4), work.reshape(3, 4), np.ones((3, 4), bool))
    costs.server_flop[:, -1] = 0.0
    return costs, draw(st.sampled_from([1.0, 2.0, 4.0, 7.0]))


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(oracles.instances(shapes=((3, 4),)) | ties())
def test_with_clients_called_back_rest_is_the_optimum(instance):
    costs, server_flops = instance
    optimum = oracles.best_round_s(costs, server_flops)
    if np.isinf(optimum):
        return
    plan = optim.solve(costs, server_flops, "alternating", recall=True)
    oracles.assert_sound(costs, server_flops, plan)
    np.testing.assert_allclose(plan.round_s, optimum, rtol=1e-9)


def test_of_those_that_end_last_together_all_come_back_that_can():
    # Both end at 9 alone, for which they need 2.5 and 0.5 of the 4 FLOP/s; 2 each are too few for the first.
    # The second also ends at 9 with its 0.5, and must not leave the server when the first comes back with
    # 3.5.
    costs = optim.Costs(
        np.array([[1.0, 9.0], [1.0, 9.0]]), np.array([[20.0, 0.0], [4.0, 0.0]]), np.ones((2, 2), bool)
    )
    plan = optim.solve(costs, 4.0, "alternating", recall=True)
    assert plan.cuts.tolist() == [0, 0]
    assert plan.round_s == pytest.approx(7.0)  # 20 / 6 + 4 / 6 = 4


@pytest.mark.parametrize(
    "per_client", [pytest.param(flops, marks=pytest.mark.slow) for flops in (1e6, 3e7, 1e9)]
)
def test_larger_fleets_are_called_back_in_few_steps_for_their_size(per_client):
    better = 0
    for seed in range(4):
        terms, server_flops = instance(seed, per_client, clients=60)
        trapped = optim.solve(terms, server_flops, "alternating")
        plan = optim.solve(terms, server_flops, "alternating", recall=True)
        assert plan.gap < 1e-9
        assert trapped.iterations <= plan.iterations <= 100 + 60
        better += plan.round_s < trapped.round_s * (1 - 1e-6)
    assert better or per_client > 1e6  # else no client was trapped, and this proves nothing


def test_more_starts_are_never_worse_and_often_better():
    better = 0
    for seed in range(12):
        terms, server_flops = instance(seed, per_client=1e8)
        one = optim.solve(terms, server_flops, "alternating")
        more = optim.solve(
            terms, server_flops, "alternating", key=KEY, starts=("equal", "proportional", "random", "random")
        )
        assert more.round_s <= one.round_s
        assert more.iterations > one.iterations
        better += more.round_s < one.round_s * (1 - 1e-6)
    assert better >= 3


def test_random_starts_differ_from_each_other_and_by_key():
    terms, server_flops = instance(0, per_client=1e8)
    rounds = {
        optim.solve(terms, server_flops, "alternating", key=jax.random.key(seed), starts=("random",)).round_s
        for seed in range(6)
    }
    assert len(rounds) > 1


@pytest.mark.parametrize("units", [7, 10, 70])
def test_a_proportional_start_gives_each_client_its_part_of_the_work_it_may_leave(units):
    """Each cut counts once, for any number of cuts that a sweep unrolls at a time."""
    terms = optim.terms(oracles.profile(units), oracles.fleet(5), optim.Work(min_cut=2))
    costs = terms.costs()
    work = np.where(costs.allowed, costs.server_flop, 0.0).sum(axis=1)
    with jax.enable_x64(True):
        table = table_of(jax.tree.map(jnp.asarray, terms))
        (shares,) = _starts(terms, table, 3e9, np.ones(5, bool), ("proportional",), None)
    np.testing.assert_allclose(shares, 3e9 * work / work.sum(), rtol=1e-12)


@pytest.mark.parametrize(
    ("starts", "message"), [((), "choose some of"), (("best",), "choose some"), (("random",), "key")]
)
def test_starts_without_sense(starts, message):
    terms, server_flops = instance(0)
    with pytest.raises(BadInput, match=message):
        optim.solve(terms, server_flops, "alternating", starts=starts)
