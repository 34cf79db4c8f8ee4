"""Statistics that are estimated after a round, and FedProx's term, against calculations by hand."""

import itertools

import numpy as np
import pytest
from optim import oracles

from sfl_jax import optim

BATCH, BATCHES, FLOPS = 16, 4, 1e9


def given(tail_units=0, state=(0, 7, 0, 5, 0), rtt=True):
    work = optim.Work(batch_size=BATCH, min_cut=0, tail_units=tail_units)
    profile = oracles.profile(5)
    profile.state = np.array(state)
    fleet = oracles.fleet(3)
    fleet.samples = np.array([20, 50, 200])  # one batch, three, and more than are used
    fleet.rtt_s = np.array([0.01, 0.2, 0.05]) if rtt else None
    return work, profile, fleet, optim.terms(profile, fleet, work)


def by_hand(work, profile, fleet, last):
    """(seconds off the server, FLOP on it) of each client and cut; NaN where the cut is forbidden."""
    top, fixed_s, flop = 5 - work.tail_units, np.full((3, 6), np.nan), np.zeros((3, 6))
    for k, cut in itertools.product(range(3), [*range(top), 5]):
        steps = min(max(fleet.samples[k] // BATCH, 1), BATCHES)
        served = [unit for unit in range(cut, top) if unit < last]
        own = [unit for unit in range(5) if unit < last and not cut <= unit < top]
        half_s = 0.0 if fleet.rtt_s is None else fleet.rtt_s[k] / 2
        down, up = 32 * profile.parameters[own].sum(), 32 * profile.state[own].sum()
        seconds = down / fleet.downlink_bps[k] + up / fleet.uplink_bps[k]
        seconds += half_s * bool(own) + half_s * bool(up)
        for _ in range(steps):
            seconds += 2 * BATCH * profile.forward_macs[own].sum() / fleet.flops[k]
            if served:
                bits = profile.smashed[cut] * (32 if cut else work.image_bits)
                seconds += BATCH * bits / fleet.uplink_bps[k] + half_s
                flop[k, cut] += 2 * BATCH * profile.forward_macs[served].sum()
            if cut < top < last:
                seconds += 32 * BATCH * profile.smashed[top] / fleet.downlink_bps[k] + half_s
        fixed_s[k, cut] = seconds
    return fixed_s, flop


@pytest.mark.parametrize(("tail_units", "last"), [(0, 4), (1, 4), (2, 4), (3, 2)])
@pytest.mark.parametrize("rtt", [True, False])
def test_seconds_and_bound_are_those_of_a_calculation_by_hand(tail_units, last, rtt):
    work, profile, fleet, terms = given(tail_units, (0, 7, 0, 5 * (last == 4), 0), rtt)
    phase = optim.estimation(profile, terms, work, {}, BATCHES)
    fixed_s, flop = by_hand(work, profile, fleet, last)
    allowed = terms.costs().allowed & np.isfinite(fixed_s)
    costs = optim.Costs(np.nan_to_num(fixed_s), flop, allowed)
    best_s, rounds_s = oracles.cut_rounds_s(costs, FLOPS)
    everybody = np.ones(3, bool)
    for columns, expected in list(rounds_s.items())[::17]:
        found = phase.seconds(np.array(columns), FLOPS, everybody)
        assert found == pytest.approx(expected, rel=1e-9), columns
    bound_s = phase.bound_s(FLOPS, everybody)
    assert bound_s == pytest.approx(best_s, rel=1e-8)
    assert bound_s <= best_s * (1 + 1e-12)


def test_without_statistics_nothing_is_sent_or_computed():
    work, profile, _, terms = given(state=(0,) * 5)
    down, up = optim.estimation(profile, terms, work, {}, BATCHES)
    for part in (
        down.up_bits,
        down.down_bits,
        down.model_bits,
        down.forward_flop,
        down.work_flop,
        up.model_bits,
    ):
        assert not part.any()
    everybody = np.ones(3, bool)
    assert optim.estimation(profile, terms, work, {}, BATCHES).seconds(np.full(3, 2), FLOPS, everybody) == 0


def test_an_absent_client_has_no_part_in_it():
    work, profile, _, terms = given()
    present, columns = np.array([True, False, True]), np.array([1, 2, 3])
    found = optim.estimation(profile, terms, work, {}, BATCHES).seconds(columns, FLOPS, present)
    alone = optim.estimation(profile, terms.take(present), work, {}, BATCHES)
    assert found == pytest.approx(alone.seconds(columns[present], FLOPS, np.ones(2, bool)), rel=1e-12)


@pytest.mark.parametrize("tail_units", [0, 1])
def test_fedprox_adds_three_flop_for_each_parameter_and_step_where_the_unit_is(tail_units):
    work, profile, fleet, before = given(tail_units)
    for once in (range(0), range(3, 5 - tail_units)):
        own_work = work._replace(proximal=True, step_once=once)
        after = optim.terms(profile, fleet, own_work)
        for cut in [*range(3), 5]:
            own = [unit for unit in range(5) if (unit < cut or unit >= 5 - tail_units) and unit not in once]
            others = [unit for unit in range(5) if unit not in own and unit not in once]
            added = BATCH * (after.backward_flop - before.backward_flop)[cut]
            assert added == pytest.approx(3 * profile.parameters[own].sum(), rel=1e-6)
            added = BATCH * (after.work_flop - before.work_flop)[cut]
            assert added == pytest.approx(3 * profile.parameters[others].sum(), rel=1e-6)
        np.testing.assert_array_equal(after.forward_flop, before.forward_flop)
