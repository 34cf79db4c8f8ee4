import itertools
from fractions import Fraction

import numpy as np
import pytest
from optim import oracles
from scipy import optimize

from sfl_jax import optim
from sfl_jax.errors import BadInput
from sfl_jax.optim import assignment, packing, servers


def instance(seed, clients, count, units=3, limited=0.5, cut_off=0.2):
    """(terms, servers): own links to every server, some missing; some memories bind."""
    rng = np.random.default_rng(seed)
    terms = optim.terms(oracles.profile(units, seed), oracles.fleet(clients, seed), optim.Work())
    rates = [
        part[:, None] * np.exp(rng.normal(size=(clients, count)))
        for part in (terms.uplink_bps, terms.downlink_bps)
    ]
    missing = rng.random((clients, count)) < cut_off
    missing[np.arange(clients), rng.integers(0, count, clients)] = False
    rates[0][missing] = 0
    memory = np.where(rng.random(count) < limited, rng.uniform(0.3, 2, count) * terms.server_bytes[1], np.inf)
    return terms, optim.Servers(10.0 ** rng.uniform(7, 10, count), np.floor(memory), *rates)


def tables(terms, of):
    """The costs of every server, alone."""
    return [of.terms(terms, e).costs() for e in range(len(of.flops))]


def best_round_s(terms, of):
    """The optimum by enumeration of servers and cuts."""
    costs, best = tables(terms, of), np.inf
    ways = [
        [
            (e, cut)
            for e in range(len(of.flops))
            if of.reach[k, e]
            for cut in np.flatnonzero(costs[e].allowed[k])
        ]
        for k in range(len(terms.samples))
    ]
    for choice in itertools.product(*ways):
        round_s = 0.0
        for e, (flops, memory) in enumerate(zip(of.flops, of.memory_bytes, strict=True)):
            mine = [(k, cut) for k, (server, cut) in enumerate(choice) if server == e]
            if mine and round_s < best:
                rows, cuts = map(np.array, zip(*mine, strict=True))
                taken = terms.server_bytes[cuts].sum()
                own = costs[e].fixed_s[rows, cuts], costs[e].server_flop[rows, cuts]
                round_s = max(round_s, oracles.least_time_s(*own, flops)) if taken <= memory else np.inf
        best = min(best, round_s)
    return best


def assert_sound(terms, of, plan):
    """Everything that the plan promises, in exact fractions."""
    costs = tables(terms, of)
    for e, (flops, memory) in enumerate(zip(of.flops, of.memory_bytes, strict=True)):
        here = plan.servers == e
        assert of.reach[here, e].all()
        assert sum(map(Fraction, plan.shares[here].tolist())) <= Fraction(flops)
        assert terms.server_bytes[terms.columns(plan.cuts, plan.codecs)][here].sum() <= memory
        for k in np.flatnonzero(here):
            work = Fraction(costs[e].server_flop[k, plan.cuts[k]])
            serving = work / Fraction(plan.shares[k]) if work else Fraction(0)
            assert costs[e].allowed[k, plan.cuts[k]]
            assert Fraction(costs[e].fixed_s[k, plan.cuts[k]]) + serving <= Fraction(plan.client_s[k])
    assert plan.client_s.max() == plan.round_s >= plan.bound_s


@pytest.mark.parametrize(
    "seed", [*range(6), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(6, 40))]
)
def test_small_fleets_are_planned_as_by_enumeration(seed):
    terms, of = instance(seed, clients=4 - (seed % 3 == 2), count=1 + seed % 3)
    plan, best = optim.solve_servers(terms, of), best_round_s(terms, of)
    assert_sound(terms, of, plan)
    assert plan.bound_s <= best * (1 + 1e-12)
    assert plan.round_s == pytest.approx(best, rel=1e-9)
    assert plan.gap < 2e-8


def test_one_server_is_planned_as_ever():
    terms = optim.terms(oracles.profile(5), oracles.fleet(9), optim.Work())
    links = terms.uplink_bps[:, None], terms.downlink_bps[:, None]
    plan = optim.solve_servers(terms, optim.Servers(np.array([1e9]), np.array([np.inf]), *links))
    alone = optim.solve(terms, 1e9)
    np.testing.assert_array_equal(plan.cuts, alone.cuts)
    assert plan.round_s == alone.round_s
    assert plan.bound_s <= alone.round_s <= plan.bound_s * (1 + 1e-7)


def fullest(terms, of, time_s, seconds=20.0):
    """How full the fullest server must be to end by time_s, from below and from above, by HiGHS."""
    needs = []
    for costs, flops in zip(tables(terms, of), of.flops, strict=True):
        with np.errstate(divide="ignore", invalid="ignore"):
            share = np.where(costs.server_flop > 0, costs.server_flop / (time_s - costs.fixed_s) / flops, 0.0)
        needs.append(np.where(costs.allowed & (costs.fixed_s < time_s), share, np.inf).min(axis=1))
    needs = np.where(of.reach, np.stack(needs, axis=1), np.inf)
    clients, places = np.nonzero(np.isfinite(needs))
    pairs, count = len(clients), len(of.flops)
    one_each = np.zeros((len(needs), pairs + 1))
    one_each[clients, np.arange(pairs)] = 1
    within = np.zeros((count, pairs + 1))
    within[places, np.arange(pairs)], within[:, -1] = needs[clients, places], -1
    answer = optimize.milp(
        np.append(np.zeros(pairs), 1.0), integrality=np.append(np.ones(pairs), 0.0),
        constraints=[
            optimize.LinearConstraint(one_each, 1, 1), optimize.LinearConstraint(within, -np.inf, 0),
        ],
        bounds=optimize.Bounds(0, np.append(np.ones(pairs), np.inf)), options={"time_limit": seconds},
    )  # fmt: skip
    return answer.mip_dual_bound, answer.fun


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_highs_finds_no_assignment_by_the_bound(count):
    terms, of = instance(3, clients=24, count=count, limited=0.0)
    plan = optim.solve_servers(terms, of)
    assert_sound(terms, of, plan)
    assert plan.gap < 0.02
    assert fullest(terms, of, plan.bound_s * (1 - 1e-3))[0] > 1
    assert fullest(terms, of, plan.round_s * (1 + 1e-3))[1] < 1


def random_options(seed, clients=5, count=2, memory=True):
    rng = np.random.default_rng(seed)
    shape = clients, 2 * count
    share = (0.2 + rng.random(shape)) * rng.uniform(0.3, 1.5)
    share = np.where(rng.random(shape) < 0.1, np.inf, share)
    share[np.isinf(share).all(axis=1), 0] = 0.1
    taken = rng.random(shape) * 2 / clients if memory else np.zeros(shape)
    column = np.broadcast_to(np.arange(2 * count), shape)
    return assignment.Options(np.repeat(np.arange(count), 2), share, taken, column)


def fits(options, choice):
    return bool((options.loads(np.array(choice)) <= 1).all())


def some_choice_fits(options):
    """By enumeration."""
    clients, places = options.share.shape
    every, rows = np.array(list(itertools.product(range(places), repeat=clients))), np.arange(clients)
    of_server = options.server[every] == np.arange(options.servers)[:, None, None]  # (E, choices, K)
    loads = [
        np.where(of_server, part[rows, every], 0).sum(axis=2) for part in (options.share, options.memory)
    ]
    return bool((np.array(loads) <= 1).all(axis=(0, 1)).any())


@pytest.mark.parametrize("memory", [False, True])
def test_what_packs_is_found_and_what_does_not_is_proven(memory):
    outcomes = set()
    for seed in range(60):
        options = random_options(seed, memory=memory)
        can = some_choice_fits(options)
        found = assignment.relaxed(options, 1e-12, [], settle=True)
        if found.is_too_much:
            assert not can
            outcomes.add("too much")
            continue
        answer = packing.packed(options, found.prices, 1e-12)
        assert not answer.gave_up
        assert (answer.choice is not None) == can
        outcomes.add("fits" if can else "gap")
        if can:
            assert fits(options, answer.choice)
        moved = assignment.repaired(options, found.choices[0], options.costs(found.prices))
        assert moved is None or (can and fits(options, moved))
        mixed = sum(p * options.loads(c) for p, c in zip(found.parts, found.choices, strict=True))
        assert mixed.max() <= 1 + 1e-9
    assert outcomes == {"too much", "fits", "gap"}


def test_a_search_that_gives_up_still_finds_a_plan_and_a_bound(monkeypatch):
    terms, of = instance(5, clients=16, count=3, limited=0.0)
    exact = optim.solve_servers(terms, of)
    monkeypatch.setattr(packing, "MOST_STATES", 1)
    rough = optim.solve_servers(terms, of)
    assert_sound(terms, of, rough)
    assert rough.bound_s <= exact.bound_s <= exact.round_s <= rough.round_s * (1 + 1e-9)
    assert rough.gap < 0.1


def test_who_and_what_is_refused_is_named():
    terms, of = instance(0, clients=4, count=2, limited=0.0)
    links = of.uplink_bps.copy()
    links[2] = 0
    with pytest.raises(optim.Infeasible, match="client 2: it has a link to no server"):
        optim.solve_servers(terms, of._replace(uplink_bps=links))
    weak = terms._replace(memory_bytes=terms.memory_bytes * np.array([1, 0, 1, 1]))
    with pytest.raises(optim.Infeasible, match="client 1: every cut needs"):
        optim.solve_servers(weak, of)
    weak = terms._replace(memory_bytes=np.full(4, terms.needed_bytes[2]))
    tight = of._replace(memory_bytes=np.full(2, terms.server_bytes[2]), uplink_bps=np.ones((4, 2)) * 1e7)
    words = rf"the halves of all clients take {4 * terms.server_bytes[2]:.4g} bytes or more, .* are missing"
    with pytest.raises(BadInput, match=words.replace("+", r"\+")):
        optim.solve_servers(weak, tight)
    for change, words in (
        ({"flops": np.array([1e9, 0.0])}, r"servers.flops="),
        ({"memory_bytes": np.array([1e9, 0.0])}, r"servers.memory_bytes="),
        ({"memory_bytes": np.array([1e9])}, "has shape"),
        ({"downlink_bps": -of.downlink_bps}, "rates must be"),
        ({"flops": np.zeros(0)}, "there are none"),
    ):
        with pytest.raises(BadInput, match=words):
            optim.solve_servers(terms, of._replace(**change))


def test_memories_that_whole_halves_do_not_fit_are_refused(monkeypatch):
    """Three equal halves fit two memories of one and a half each, as a mixture only."""
    terms, of = instance(1, clients=3, count=2, limited=0.0, cut_off=0.0)
    weak = terms._replace(memory_bytes=np.full(3, terms.needed_bytes[2]))
    least = terms.server_bytes[2]
    of = of._replace(memory_bytes=np.full(2, 1.5 * least))
    with pytest.raises(BadInput, match="no assignment was found"):
        optim.solve_servers(weak, of)
    assert optim.solve_servers(weak, of._replace(memory_bytes=np.array([2, 1]) * least)).gap < 2e-8
    assert servers.Servers._fields[0] == "flops"
