import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optim import oracles

from sfl_jax import optim, registry
from sfl_jax.errors import BadInput
from sfl_jax.optim.plan import Chosen

KEY = jax.random.key(7)
ON_COSTS = [method for method in optim.METHODS if method != "regression"]


def solve(costs, server_flops, method="exact", **options):
    return optim.solve(costs, server_flops, method, key=KEY, **options)


@settings(max_examples=150, deadline=None)
@given(oracles.instances())
def test_exact_is_the_optimum_of_enumeration_and_its_proof_holds_in_fractions(instance):
    costs, server_flops = instance
    optimum = oracles.best_round_s(costs, server_flops)
    if np.isinf(optimum):
        with pytest.raises(optim.Infeasible) as caught:
            solve(costs, server_flops)
        assert caught.value.clients
        return
    plan = solve(costs, server_flops)
    oracles.assert_sound(costs, server_flops, plan)
    np.testing.assert_allclose(plan.round_s, optimum, rtol=1e-11)
    assert plan.round_s == 0 or plan.gap < 1e-11


@pytest.mark.parametrize(
    "method", [pytest.param(m, marks=() if m == "greedy" else pytest.mark.slow) for m in ON_COSTS]
)
@settings(max_examples=30, deadline=None)
@given(instance=oracles.instances(local=True, shapes=((3, 4),)))
def test_every_method_is_sound_and_bounded_by_the_optimum(method, instance):
    costs, server_flops = instance
    optimum = oracles.best_round_s(costs, server_flops)
    try:
        plan = solve(costs, server_flops, method)
    except optim.Infeasible:
        assert method in ("no_split", "common_cut") or np.isinf(optimum)
        return
    oracles.assert_sound(costs, server_flops, plan)
    assert plan.bound_s <= optimum * (1 + 1e-12)
    assert plan.round_s >= optimum * (1 - 1e-12)


@st.composite
def chains(draw):
    """(Terms, server FLOP/s) of three unequal clients and three units; memory and min_cut may bind."""
    profile = oracles.profile(3, draw(st.integers(0, 99)))
    fleet = oracles.fleet(3, draw(st.integers(0, 99)), draw(st.sampled_from([0.0, 1.0, 6.0])))
    terms = optim.terms(profile, fleet, optim.Work(min_cut=draw(st.integers(0, 2))))
    if draw(st.booleans()):
        cuts = draw(st.lists(st.integers(2, 3), min_size=3, max_size=3))
        terms = terms._replace(memory_bytes=terms.needed_bytes[cuts])
    return terms, draw(st.sampled_from([1e6, 1e8, 1e9, 1e11]))


@pytest.mark.parametrize("method", optim.METHODS)
@settings(max_examples=30, deadline=None)
@given(instance=chains())
def test_every_method_keeps_the_contract_on_terms(method, instance):
    terms, server_flops = instance
    costs = terms.costs()
    optimum = oracles.best_round_s(costs, server_flops)
    try:
        plan = solve(terms, server_flops, method)
    except optim.Infeasible:
        assert method in ("no_split", "common_cut")
        return
    oracles.assert_sound(costs, server_flops, plan)
    # The sum of seconds here has another order than in the table.
    assert plan.bound_s <= optimum * (1 + 1e-12)
    assert plan.round_s >= optimum * (1 - 1e-12)
    assert method != "exact" or plan.gap < 1e-11
    assert plan.iterations >= 1


def test_the_fraction_oracle_notices_a_bound_or_a_share_that_is_a_little_off():
    costs, server_flops = optim.Costs(np.ones((2, 1)), np.ones((2, 1)), np.ones((2, 1), bool)), 2.0
    plan = solve(costs, server_flops)
    oracles.assert_sound(costs, server_flops, plan)
    more = np.nextafter(2.0, 3.0)
    for wrong in (
        plan._replace(bound_s=plan.round_s),
        plan._replace(
            shares=np.array([1.0, np.nextafter(1.0, 2.0)]), client_s=np.full(2, more), round_s=more
        ),
        plan._replace(round_s=2.0 - 1e-15),
    ):
        with pytest.raises(AssertionError):
            oracles.assert_sound(costs, server_flops, wrong)


# Three clients: the server makes the first faster, makes no difference to the second, makes the third slower.
SMALL = optim.Costs(
    np.array([[1.0, 3.0, 9.0], [2.0, 2.0, 2.0], [5.0, 6.0, 3.0]]),
    np.array([[8.0, 4.0, 0.0], [6.0, 3.0, 0.0], [9.0, 2.0, 0.0]]),
    np.ones((3, 3), bool),
)
# At 4 FLOP/s client 0 ends at 1 + 8/4 with cut 0, and the others use no server. Equal shares are 4/3 each:
# client 0's best cut is then 1, at 3 + 4/(4/3). From there alternation gives it the whole server. The common
# cut 1 ends where 4/(T-3) + 3/(T-2) + 2/(T-6) = 4, a cubic.
COMMON_S = np.roots([4, -53, 213, -258]).real.max()
BY_HAND = {
    "exact": ([0, 2, 2], 3.0),
    "alternating": ([0, 2, 2], 3.0),
    "equal_shares": ([1, 2, 2], 6.0),
    "common_cut": ([1, 1, 1], COMMON_S),
    "no_split": ([2, 2, 2], 9.0),
}


@pytest.mark.parametrize("method", BY_HAND)
def test_methods_on_an_instance_solved_by_hand(method):
    cuts, round_s = BY_HAND[method]
    plan = solve(SMALL, 4.0, method)
    assert plan.cuts.tolist() == cuts
    np.testing.assert_allclose(plan.round_s, round_s, rtol=1e-10)
    np.testing.assert_allclose(plan.bound_s, 3.0, rtol=1e-10)


def test_random_cuts_are_allowed_cuts_all_of_them_likely():
    allowed = np.tile([False, True, True, False, True], (3000, 1))
    costs = optim.Costs(np.ones((3000, 5)), np.zeros((3000, 5)), allowed)
    plan = solve(costs, 1.0, "random_cut")
    counts = np.bincount(plan.cuts, minlength=5)
    assert counts[[0, 3]].tolist() == [0, 0]
    assert (abs(counts[[1, 2, 4]] - 1000) < 150).all()
    assert (plan.cuts != optim.solve(costs, 1.0, "random_cut", key=jax.random.key(8)).cuts).any()


@pytest.mark.parametrize("method", optim.METHODS)
def test_absent_clients_cost_nothing(method):
    costs, dense, server_flops = SMALL, SMALL, 4.0
    if method == "regression":
        costs, server_flops = optim.terms(oracles.profile(3), oracles.fleet(3), optim.Work()), 1e9
        dense = costs.costs()
    present = np.array([True, False, True])
    plan = solve(costs, server_flops, method, present=present)
    oracles.assert_sound(dense, server_flops, plan, present)
    assert plan.cuts[1] == costs.shape[1] - 1
    if method in ("exact", "alternating"):  # the others compile for each shape
        alone = solve(costs.take(present), server_flops, method)
        np.testing.assert_allclose(plan.round_s, alone.round_s, rtol=1e-12)
    nobody = solve(costs, server_flops, method, present=np.zeros(3, bool))
    assert (nobody.round_s, nobody.bound_s) == (0.0, 0.0)


@pytest.mark.parametrize("method", ON_COSTS)
def test_terms_and_their_dense_form_have_one_plan(method):
    for seed, server_flops in itertools.product(range(3), (1e7, 1e9, 1e11)):
        terms = optim.terms(oracles.profile(3, seed), oracles.fleet(3, seed), optim.Work())
        factored, dense = (solve(costs, server_flops, method) for costs in (terms, terms.costs()))
        oracles.assert_sound(terms.costs(), server_flops, factored)
        np.testing.assert_array_equal(factored.cuts, dense.cuts)
        np.testing.assert_allclose(factored.round_s, dense.round_s, rtol=1e-11)
        seconds = terms.seconds(factored.cuts, factored.shares)
        np.testing.assert_allclose(sum(seconds), factored.client_s, rtol=1e-12)


SLOW_TWINS = ("regression", "alternating", "greedy", "random_cut", "equal_shares", "common_cut", "no_split")


@pytest.mark.parametrize(
    "method", [pytest.param(m, marks=pytest.mark.slow if m in SLOW_TWINS else ()) for m in optim.METHODS]
)
def test_the_pure_twin_gives_the_same_plans_under_vmap(method):
    fleets = [oracles.fleet(3, seed) for seed in range(5)]
    many = [optim.terms(oracles.profile(3), fleet, optim.Work()) for fleet in fleets]
    keys = jax.random.split(KEY, 5)
    with jax.enable_x64(True):
        stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *many)
        curves = [optim.relaxed(terms, optim.fit_curves(terms)) for terms in many]
        relaxed = jax.tree.map(lambda *parts: jnp.stack(parts), *curves)

        def twin(terms, key, curves):
            return optim.solve_arrays(terms, 1e9, method, key, curves=curves)

        solutions = jax.jit(jax.vmap(twin))(stacked, keys, relaxed)
    assert bool(solutions.feasible.all())
    for index, terms in enumerate(many):
        plan = optim.solve(terms, 1e9, method, key=keys[index])
        np.testing.assert_array_equal(solutions.cuts[index], plan.cuts)
        np.testing.assert_allclose(solutions.shares[index], plan.shares, rtol=1e-9)
        np.testing.assert_allclose(solutions.round_s[index], plan.round_s, rtol=1e-12)
        np.testing.assert_allclose(solutions.bound_s[index], plan.bound_s, rtol=1e-11)


def test_the_pure_twin_flags_what_solve_refuses():
    costs = SMALL._replace(allowed=np.array([[1, 1, 1], [0, 0, 0], [1, 1, 1]], bool))
    with jax.enable_x64(True):
        twin = jax.jit(optim.solve_arrays)
        assert not twin(costs, 4.0).feasible
        assert not twin(SMALL._replace(server_flop=SMALL.server_flop + 1.0), 0.0).feasible
        assert twin(SMALL, 0.0).feasible
    with pytest.raises(BadInput, match="float32"):
        optim.solve_arrays(SMALL, 4.0)


def test_nothing_is_compiled_again_when_numbers_change():
    compiled = []

    def listen(event, duration, **_):
        compiled.extend([event] * (event == "/jax/core/compile/backend_compile_duration"))

    def plan(seed, server_flops):
        terms = optim.terms(oracles.profile(3), oracles.fleet(9, seed), optim.Work()).take(
            np.arange(seed, seed + 5)
        )
        return optim.solve(terms, server_flops, present=np.arange(5) != seed)

    plan(0, 1e9)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for seed, server_flops in ((1, 1e8), (2, 1e11), (3, 0.0)):
            plan(seed, server_flops)
        assert not compiled
        jax.jit(lambda x: x * 3.5)(jnp.ones(3))
        assert compiled  # the listener notices compilations
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_float32_outside_stays_float32():
    assert not jax.config.jax_enable_x64
    plan = solve(SMALL, 4.0)
    assert {plan.shares.dtype, plan.client_s.dtype} == {np.dtype(np.float64)}
    assert jnp.ones(1).dtype == jnp.float32


NO_MEMORY = oracles.fleet(3, memory_bytes=np.array([1e12, 10.0, 1e12]))
NO_ENERGY = oracles.fleet(
    3,
    cycles_per_s=np.full(3, 1e9),
    kappa=np.full(3, 1e-27),
    transmit_w=np.ones(3),
    energy_j=np.array([1e9, 1e9, 1e-9]),
)
UNSERVED = {
    "memory": (
        NO_MEMORY,
        {},
        1e9,
        "exact",
        (1,),
        "client 1: every cut needs at least .* bytes of memory; the client has 10",
    ),
    "memory at L": (NO_MEMORY, {"min_cut": 0}, 1e9, "no_split", (1,), "client 1: cut 4 needs .* bytes"),
    "memory, common": (NO_MEMORY, {}, 1e9, "common_cut", (1,), "client 1: cut 1 needs"),
    "energy": (
        NO_ENERGY,
        {},
        1e9,
        "exact",
        (2,),
        "client 2: every cut costs at least .* J; the client's budget is 1e-09 J",
    ),
    "no server": (
        NO_MEMORY,
        {"min_cut": 0},
        0.0,
        "exact",
        (1,),
        "client 1: .* needs a server, and server_flops=0",
    ),
}


@pytest.mark.parametrize(
    ("fleet", "changes", "server_flops", "method", "clients", "message"), UNSERVED.values(), ids=UNSERVED
)
def test_infeasible_names_the_clients_and_what_stands_in_their_way(
    fleet, changes, server_flops, method, clients, message
):
    terms = optim.terms(oracles.profile(4), fleet, optim.Work(**changes))
    with pytest.raises(optim.Infeasible, match=message) as caught:
        solve(terms, server_flops, method)
    assert caught.value.clients == clients
    assert len(caught.value.reasons) == 1
    assert "\n" not in str(caught.value)
    # Without them the rest can be served.
    others = np.array([client not in clients for client in range(3)])
    assert solve(terms, server_flops, method, present=others).round_s > 0


REFUSED = {
    "method=best: choose one of exact": {"method": "best"},
    "barrier=none: choose one of session": {"barrier": "none"},
    "server_flops=nan": {"server_flops": np.nan},
    "server_flops=-1.0": {"server_flops": -1.0},
    "random_cut: needs key": {"method": "random_cut", "key": None},
    "present: shape": {"present": np.ones(2, bool)},
    "costs.fixed_s: has": {"costs": SMALL._replace(fixed_s=SMALL.fixed_s - 2.0)},
    "costs.server_flop: has": {"costs": SMALL._replace(server_flop=SMALL.server_flop + np.inf)},
    "costs: shapes": {"costs": SMALL._replace(allowed=np.ones((3, 2), bool))},
}


@pytest.mark.parametrize("options", REFUSED.values(), ids=REFUSED)
def test_input_without_sense_is_refused_in_one_line(options, request):
    call = {"costs": SMALL, "server_flops": 4.0, "key": KEY} | options
    with pytest.raises(BadInput, match=request.node.callspec.id) as caught:
        optim.solve(**call)
    assert "\n" not in str(caught.value)


def test_a_method_registered_later_is_planned_by_and_refused_before(monkeypatch):
    monkeypatch.setattr(registry.METHODS, "_members", dict(registry.METHODS._members))
    with pytest.raises(BadInput, match="method=alone: choose one of"):
        solve(SMALL, 4.0, "alone")
    registry.METHODS.register("alone", lambda costs, *_: Chosen(jnp.full(costs.shape[0], costs.shape[1] - 1)))
    assert solve(SMALL, 4.0, "alone").round_s == solve(SMALL, 4.0, "no_split").round_s
    with pytest.raises(BadInput, match=r"choose one of exact.*, no_split, alone"):
        solve(SMALL, 4.0, "work_conserving")
