import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from optim import oracles
from scipy import optimize

from sfl_jax import optim
from sfl_jax.errors import BadInput
from sfl_jax.optim import memory


@st.composite
def instances(draw):
    """(Costs, server FLOP/s, bytes of each column, memory), where everybody fits somehow."""
    costs, server_flops = draw(oracles.instances())
    count = costs.fixed_s.shape[1]
    sizes = np.array(
        draw(st.lists(st.sampled_from([0, 1, 1, 2, 3, 7]), min_size=count, max_size=count)), float
    )
    usable = costs.allowed & ((costs.server_flop <= 0) | (server_flops > 0))
    assume(usable.any(axis=1).all())
    least = np.where(usable, sizes, np.inf).min(axis=1).sum()
    return costs._replace(allowed=usable), server_flops, sizes, least + draw(st.integers(0, 9))


def choices(costs, sizes, limit):
    """Every vector of columns that fits the memory."""
    every = itertools.product(*(np.flatnonzero(row) for row in costs.allowed))
    return [columns for columns in map(np.array, every) if sizes[columns].sum() <= limit]


def round_s(costs, columns, server_flops):
    rows = np.arange(len(columns))
    return oracles.least_time_s(costs.fixed_s[rows, columns], costs.server_flop[rows, columns], server_flops)


def ends_by(costs, columns, server_flops, time_s):
    """Whether columns can end by time_s, in exact fractions."""
    need, time = Fraction(0), Fraction(time_s)
    for client, column in enumerate(columns):
        left = time - Fraction(costs.fixed_s[client, column])
        work = Fraction(costs.server_flop[client, column])
        if left < 0 or (work > 0 and left == 0):
            return False
        need += work / left if work else 0
    return need <= Fraction(server_flops)


@settings(max_examples=60, deadline=None)
@given(instances())
def test_columns_are_those_of_enumeration_and_the_bound_is_proven(instance):
    costs, server_flops, sizes, limit = instance
    found = memory.best_columns(costs, sizes, server_flops, limit, 0.0)
    assert costs.allowed[np.arange(len(found.columns)), found.columns].all()
    assert sizes[found.columns].sum() <= limit
    mine, fitting = round_s(costs, found.columns, server_flops), choices(costs, sizes, limit)
    assert mine <= min(round_s(costs, columns, server_flops) for columns in fitting) * (1 + 2e-9)
    assert found.low_s >= mine * (1 - 2e-9)
    if found.low_s > 0:
        assert not any(ends_by(costs, columns, server_flops, found.low_s) for columns in fitting)


def terms_of(clients, seed=0, units=8, **work):
    return optim.terms(oracles.profile(units, seed), oracles.fleet(clients, seed), optim.Work(**work))


def used(terms, plan):
    return terms.server_bytes[terms.columns(plan.cuts, plan.codecs)].sum()


def limited(terms, server_flops, part):
    """The plan where only a part is there of the memory that the plan without a limit takes."""
    limit = float(int(part * used(terms, optim.solve(terms, server_flops))))
    return limit, optim.solve_memory(terms, server_flops, limit)


@pytest.mark.parametrize(
    ("server_flops", "part"),
    [(1e9, 0.3), *(pytest.param(*each, marks=pytest.mark.slow) for each in ((1e9, 0.8), (2e10, 0.3)))],
)
def test_highs_proves_that_no_plan_ends_by_the_bound(server_flops, part):
    """At a given time the least need within the memory is a mixed-integer linear program."""
    terms = terms_of(25)
    limit, plan = limited(terms, server_flops, part)
    costs, sizes = terms.costs(), terms.server_bytes

    def need(time_s):
        with np.errstate(divide="ignore", invalid="ignore"):
            needs = np.where(costs.server_flop > 0, costs.server_flop / (time_s - costs.fixed_s), 0.0)
        clients, columns = np.nonzero(costs.allowed & (costs.fixed_s < time_s))
        one_each = (clients == np.arange(25)[:, None]).astype(float)
        rows = [
            optimize.LinearConstraint(one_each, 1, 1),
            optimize.LinearConstraint(sizes[columns], -np.inf, limit),
        ]
        answer = optimize.milp(
            needs[clients, columns] / server_flops, constraints=rows, integrality=np.ones(len(clients)),
            bounds=optimize.Bounds(0, 1), options={"mip_rel_gap": 0.0},
        )  # fmt: skip
        return answer.mip_dual_bound, answer.fun

    assert plan.gap < 2e-9
    assert need(plan.bound_s * (1 - 1e-4))[0] > 1
    assert need(plan.round_s * (1 + 1e-4))[1] < 1


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_a_plan_keeps_what_it_promises(part):
    terms, server_flops = terms_of(12), 1e9
    plain = optim.solve(terms, server_flops)
    limit, plan = limited(terms, server_flops, part)
    assert used(terms, plan) <= limit
    assert plan.bound_s <= plan.round_s
    assert plain.round_s < plan.round_s
    shares = sum(map(Fraction, plan.shares.tolist()))
    assert shares <= Fraction(server_flops)
    fixed_s, work, _ = terms.at(plan.cuts)
    for client in range(12):
        serving = Fraction(work[client]) / Fraction(plan.shares[client]) if work[client] else Fraction(0)
        assert (
            Fraction(fixed_s[client]) + serving <= Fraction(plan.client_s[client]) <= Fraction(plan.round_s)
        )


def test_memory_enough_for_the_plan_changes_nothing():
    terms = terms_of(12)
    plain = optim.solve(terms, 1e9)
    again = optim.solve_memory(terms, 1e9, used(terms, plain))
    for mine, its in zip(plain, again, strict=True):
        np.testing.assert_array_equal(mine, its)


def test_absent_clients_take_no_memory():
    terms, here = terms_of(12), np.arange(12) % 3 > 0
    limit, _ = limited(terms.take(here), 1e9, 0.5)
    some, alone = (
        optim.solve_memory(terms, 1e9, limit, here),
        optim.solve_memory(terms.take(here), 1e9, limit),
    )
    np.testing.assert_array_equal(some.cuts[here], alone.cuts)
    assert some.round_s == pytest.approx(alone.round_s, rel=1e-9)
    assert (some.cuts[~here] == 8).all()
    assert not some.client_s[~here].any()


def test_codecs_are_chosen_within_the_memory():
    profile = oracles.profile(6)
    bits = profile.smashed * 32.0
    wires = {"whole": optim.Wire(bits, bits), "half": optim.Wire(bits / 2, bits)}
    terms = optim.terms(profile, oracles.fleet(3), optim.Work(), wires)
    limit, plan = limited(terms, 1e9, 0.6)
    costs = terms.costs()
    best = min(round_s(costs, columns, 1e9) for columns in choices(costs, terms.server_bytes, limit))
    assert plan.round_s == pytest.approx(best, rel=2e-9)
    assert used(terms, plan) <= limit
    assert plan.codecs.any()


def test_a_half_takes_what_is_left_of_the_network():
    """Parameters, gradients, two slots, statistics, activations of a batch; 4 bytes each."""
    profile = oracles.profile(5)
    work = optim.Work(batch_size=10, optimizer_slots=2)
    terms = optim.terms(profile, oracles.fleet(2), work)
    for cut in range(6):
        floats = 4 * profile.parameters[cut:].sum() + profile.state[cut:].sum()
        floats += 10 * profile.activations[cut:].sum()
        assert terms.server_bytes[cut] == 4 * floats
    np.testing.assert_array_equal(terms.server_bytes + terms.needed_bytes, terms.needed_bytes[-1])
    # Who holds the tail too leaves that much less.
    tail = optim.terms(profile, oracles.fleet(2), work._replace(tail_units=2))
    np.testing.assert_array_equal(tail.server_bytes[:3], terms.server_bytes[:3] - terms.server_bytes[3])


def test_what_is_missing_is_said():
    weak = oracles.fleet(3, memory_bytes=np.array([1e12, 2.2e6, 2.2e6]))
    terms = optim.terms(oracles.profile(5), weak, optim.Work())
    usable = optim.servable(terms, 1e9)
    least = [terms.server_bytes[row].min() for row in usable]
    assert least[0] == 0 < least[1]
    limit = sum(least)
    assert used(terms, optim.solve_memory(terms, 1e9, limit)) == limit
    words = (
        rf"2 of 3 clients cannot train alone, .* take {limit:.4g} bytes or more; 1 bytes are missing".replace(
            "+", r"\+"
        )
    )
    with pytest.raises(BadInput, match=words):
        optim.solve_memory(terms, 1e9, limit - 1)
    for wrong in (0.0, -1.0, np.inf, np.nan):
        with pytest.raises(BadInput, match="server_memory_bytes="):
            optim.solve_memory(terms, 1e9, wrong)


def staged_rounds(terms, server_flops, limit):
    """Every choice of cuts that fits, with its staged round by the formula."""
    clients, count = terms.shape
    for cuts in map(np.array, itertools.product(range(1, count), repeat=clients)):
        if terms.server_bytes[cuts].sum() <= limit:
            seconds = terms.seconds(cuts, np.full(clients, server_flops))
            yield seconds.before_server.max() + seconds.server.sum() + seconds.after_server.max()


@pytest.mark.parametrize(("seed", "part"), [(0, 0.2), (0, 0.9), (1, 0.6), (2, 0.4)])
def test_the_staged_optimum_within_the_memory_is_that_of_enumeration(seed, part):
    terms, server_flops = terms_of(4, seed, units=4), 10.0 ** (8 + seed)
    limit = float(int(part * used(terms, optim.solve(terms, server_flops, barrier="staged"))))
    plan = optim.solve_staged_memory(terms, server_flops, limit)
    best = min(staged_rounds(terms, server_flops, limit))
    assert used(terms, plan) <= limit
    assert plan.bound_s <= best * (1 + 1e-12)
    assert plan.round_s == pytest.approx(best, rel=1e-9)
    assert plan.gap < 1e-9
    assert plan.round_s >= optim.round_seconds(terms, plan.cuts, server_flops, "staged")


def test_a_staged_search_that_stops_early_says_its_gap(monkeypatch):
    from sfl_jax.optim import staged_memory

    terms = terms_of(30)
    limit = float(int(0.5 * used(terms, optim.solve(terms, 1e9, barrier="staged"))))
    whole = optim.solve_staged_memory(terms, 1e9, limit)
    monkeypatch.setattr(staged_memory, "_ELEMENTS", 1)
    monkeypatch.setattr(staged_memory, "_LEAST_BOXES", 3)
    early = optim.solve_staged_memory(terms, 1e9, limit)
    assert early.bound_s < whole.bound_s <= whole.round_s <= early.round_s * (1 + 1e-12)
    assert early.gap > 1e-6 > whole.gap


@pytest.mark.parametrize("band", [6.0, pytest.param((6.0, 6.0), marks=pytest.mark.slow)])
def test_a_band_plan_within_the_memory_is_between_its_bound_and_fixed_cuts(band):
    terms, server_flops = terms_of(6), 2e9
    plain = optim.solve_bandwidth(terms, server_flops, band, reference_hz=1.0)
    limit = float(int(0.5 * used(terms, plain)))
    plan = optim.solve_band_memory(terms, server_flops, band, limit, reference_hz=1.0)
    assert used(terms, plan) <= limit
    assert plain.bound_s <= plan.bound_s <= plan.round_s
    assert plan.gap < 0.02
    assert plan.shares.sum() <= server_flops
    assert plan.uplink_hz.sum() <= 6
    # No better within the memory than equal parts of the band with the best cuts there.
    assert plan.round_s <= optim.solve_memory(terms, server_flops, limit).round_s * (1 + 1e-9)
    ends_s = optim.session_ends_s(terms, plan, server_flops)
    np.testing.assert_allclose(ends_s, plan.client_s, rtol=1e-9)
    roomy = optim.solve_band_memory(terms, server_flops, band, used(terms, plain), reference_hz=1.0)
    np.testing.assert_array_equal(roomy.cuts, plain.cuts)


def test_a_band_with_energy_budgets_is_refused_within_a_memory():
    power = {name: np.ones(2) for name in ("cycles_per_s", "kappa", "transmit_w", "energy_j")}
    terms = optim.terms(oracles.profile(3), oracles.fleet(2, **power), optim.Work())
    with pytest.raises(
        BadInput, match="server_memory_bytes=5: cannot be planned with a shared band and energy"
    ):
        optim.solve_band_memory(terms, 1e9, 2.0, 5.0, reference_hz=1.0)
