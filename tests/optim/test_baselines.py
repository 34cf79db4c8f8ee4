import numpy as np
import pytest
from optim import oracles

from sfl_jax import optim

METHODS = ("greedy", "common_cut", "no_split", "equal_shares")


@pytest.mark.parametrize("seed", range(4))
def test_common_cut_is_the_best_of_all_columns(seed):
    terms = optim.terms(oracles.profile(6, seed), oracles.fleet(5, seed), optim.Work(min_cut=2))
    costs, clients = terms.costs(), np.arange(5)
    rounds_s = [
        oracles.least_time_s(costs.fixed_s[:, cut], costs.server_flop[:, cut], 1e9) for cut in range(2, 7)
    ]
    plan = optim.solve(terms, 1e9, "common_cut")
    assert plan.cuts.tolist() == [2 + int(np.argmin(rounds_s))] * 5
    np.testing.assert_allclose(plan.round_s, min(rounds_s), rtol=1e-11)
    assert (plan.cuts[clients] >= 2).all()


def test_common_cut_leaves_out_what_one_client_cannot_do():
    fixed_s = np.array([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    costs = optim.Costs(fixed_s, np.zeros((2, 3)), np.array([[False, True, True], [True, True, True]]))
    assert optim.solve(costs, 1.0, "common_cut").cuts.tolist() == [1, 1]
    alone = optim.solve(costs, 1.0, "common_cut", present=np.array([False, True]))
    assert alone.cuts.tolist() == [2, 0]  # the absent one is at L
    with pytest.raises(optim.Infeasible, match="client 0: cut 0 is forbidden") as caught:
        optim.solve(
            costs._replace(allowed=np.array([[False, True, True], [True, False, False]])), 1.0, "common_cut"
        )
    assert caught.value.clients == (0,)


def test_equal_shares_are_equal_before_they_are_trimmed():
    fixed_s, work = np.array([[1.0, 20.0], [5.0, 20.0]]), np.array([[8.0, 0.0], [2.0, 0.0]])
    plan = optim.solve(optim.Costs(fixed_s, work, np.ones((2, 2), bool)), 4.0, "equal_shares")
    # At 2 FLOP/s each the ends are 1 + 4 and 5 + 1; the first client needs less to end at 6 too.
    np.testing.assert_allclose(plan.round_s, 6.0, rtol=1e-12)
    np.testing.assert_allclose(plan.shares, [8 / 5, 2.0], rtol=1e-12)


def test_greedy_moves_who_holds_up_the_round_as_long_as_that_helps():
    # All-local ends are 9, 6 and 4. Client 0 moves first, to 1 + 12/4 = 4. Then client 1 at 6 holds the round
    # up. If both share, 12/(T-1) + 4/(T-3) = 4 has the root 4 + sqrt(3), below 6. Then neither has a better
    # cut.
    fixed_s = np.array([[1.0, 9.0], [3.0, 6.0], [4.0, 4.0]])
    work = np.array([[12.0, 0.0], [4.0, 0.0], [1.0, 0.0]])
    plan = optim.solve(optim.Costs(fixed_s, work, np.ones((3, 2), bool)), 4.0, "greedy")
    assert plan.cuts.tolist() == [0, 0, 1]
    np.testing.assert_allclose(plan.round_s, 4 + np.sqrt(3), rtol=1e-11)
    assert plan.iterations == 3


def test_greedy_is_not_stopped_by_others_who_end_as_late():
    # All three end at 9 alone, and at 1 + 3 * 4/4 = 4 together on the server. No single move leads there.
    costs = optim.Costs(np.tile([1.0, 9.0], (3, 1)), np.tile([4.0, 0.0], (3, 1)), np.ones((3, 2), bool))
    plan = optim.solve(costs, 4.0, "greedy")
    assert plan.cuts.tolist() == [0, 0, 0]
    np.testing.assert_allclose(plan.round_s, 4.0, rtol=1e-11)


def test_greedy_is_a_local_optimum_between_no_split_and_exact():
    for seed in range(5):
        terms = optim.terms(oracles.profile(5, seed), oracles.fleet(8, seed), optim.Work())
        costs, clients = terms.costs(), np.arange(8)
        plan = optim.solve(terms, 8e8, "greedy")
        assert plan.round_s <= optim.solve(terms, 8e8, "no_split").round_s
        holder = int(
            np.argmax(np.where(plan.shares > 0, plan.shares, plan.client_s >= plan.round_s * (1 - 1e-12)))
        )
        for cut in np.flatnonzero(costs.allowed[holder]):
            cuts = plan.cuts.copy()
            cuts[holder] = cut
            other_s = oracles.least_time_s(
                costs.fixed_s[clients, cuts], costs.server_flop[clients, cuts], 8e8
            )
            assert other_s >= plan.round_s * (1 - 1e-10)
