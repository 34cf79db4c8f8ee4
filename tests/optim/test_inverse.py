from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from optim import oracles

from sfl_jax import optim
from sfl_jax.errors import BadInput


@settings(max_examples=100, deadline=None)
@given(oracles.instances(), st.sampled_from([0.5, 1.0, 2.0, 3.5, 1e3]))
def test_the_smallest_server_is_enough_and_nothing_below_its_bound_is(instance, round_s):
    costs, _ = instance
    need = oracles.least_need(costs, round_s)
    if need is None:
        with pytest.raises(optim.Infeasible):
            optim.smallest_server(costs, round_s)
        return
    server = optim.smallest_server(costs, round_s)
    assert Fraction(server.bound_flops) <= need <= Fraction(server.server_flops)
    assert sum(map(Fraction, server.shares.tolist())) <= Fraction(server.server_flops)
    clients = np.arange(len(server.cuts))
    for fixed_s, work, share in zip(
        costs.fixed_s[clients, server.cuts],
        costs.server_flop[clients, server.cuts],
        server.shares,
        strict=True,
    ):
        serving = Fraction(work) / Fraction(share) if work else 0
        assert Fraction(fixed_s) + serving <= Fraction(round_s)
    assert server.server_flops <= server.bound_flops * (1 + 1e-12)


@settings(max_examples=30, deadline=None)
@given(oracles.instances(local=True, shapes=((3, 4),)))
def test_it_undoes_the_optimum(instance):
    costs, server_flops = instance
    assume(server_flops > 0 and np.isfinite(oracles.best_round_s(costs, server_flops)))
    plan = optim.solve(costs, server_flops)
    assume(plan.round_s > 0)
    server = optim.smallest_server(costs, plan.round_s)
    assert server.bound_flops <= server_flops
    if server.server_flops > 0:
        assert optim.solve(costs, server.server_flops).round_s <= plan.round_s * (1 + 1e-11)


def test_terms_and_absent_clients():
    terms = optim.terms(oracles.profile(5), oracles.fleet(6), optim.Work())
    wanted_s = optim.solve(terms, 1e10).round_s
    server = optim.smallest_server(terms, wanted_s)
    assert (server.shares > 0).sum() > 1
    assert server.server_flops == pytest.approx(1e10, rel=1e-9)
    assert optim.solve(terms, server.server_flops).round_s == pytest.approx(wanted_s, rel=1e-9)
    present = server.shares < server.shares.max()
    fewer = optim.smallest_server(terms, wanted_s, present)
    assert fewer.server_flops == pytest.approx(server.server_flops - server.shares.max(), rel=1e-9)
    assert not fewer.shares[~present].any()


def test_whoever_cannot_make_it_is_named():
    terms = optim.terms(oracles.profile(5), oracles.fleet(4), optim.Work())
    soonest_s = terms.costs().fixed_s.min(axis=1, where=terms.costs().allowed, initial=np.inf)
    between = np.sort(soonest_s)[1:3].mean()
    with pytest.raises(optim.Infeasible, match=r"needs more than .* s with any server") as caught:
        optim.smallest_server(terms, between)
    assert caught.value.clients == tuple(np.flatnonzero(soonest_s > between))
    with pytest.raises(optim.Infeasible, match="every cut is forbidden"):
        optim.smallest_server(optim.Costs(np.ones((1, 1)), np.ones((1, 1)), np.zeros((1, 1), bool)), 1.0)
    with pytest.raises(BadInput, match="round_s=nan"):
        optim.smallest_server(terms, np.nan)
