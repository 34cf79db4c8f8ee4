"""Measured devices, round-trip times and a broadcast: their seconds, and the optimum of every method."""

import itertools
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from optim import oracles

from sfl_jax import optim
from sfl_jax.errors import BadInput
from sfl_jax.optim.needed import needed_cuts

UNITS, BATCH = 4, 32
TERMS = ("devices", "rtt", "broadcast", "all")
# Each compiles its own search, which takes seconds.
COMPILED = [*(pytest.param(one, marks=pytest.mark.slow) for one in TERMS[:-1]), "all"]


def device(seed, units=UNITS, batch_size=BATCH):
    rng = np.random.default_rng(seed)
    forward_s = rng.uniform(0.001, 0.1, units)
    return SimpleNamespace(
        batch_size=batch_size, forward_s=forward_s, backward_s=forward_s * rng.uniform(1, 3, units)
    )


def made(what, clients=3, seed=0, work=None, units=UNITS, **columns):
    """(terms, fleet) with these terms; with devices, the last client has flops."""
    work, rng = work or optim.Work(batch_size=BATCH), np.random.default_rng(seed)
    if what in ("devices", "all"):
        names = np.array([*("ab"[k % 2] for k in range(clients - 1)), ""])
        columns |= {
            "device": names,
            "slowdown": rng.uniform(0.5, 3, clients),
            "devices": {name: device(seed + at, units) for at, name in enumerate("ab")},
            "flops": np.where(names == "", 1e8, np.inf),
        }
    if what in ("rtt", "all"):
        columns["rtt_s"] = rng.uniform(0.01, 0.5, clients)
    fleet = oracles.fleet(clients, seed, **columns)
    terms = optim.terms(oracles.profile(units, seed), fleet, work)
    if what in ("broadcast", "all"):
        terms = terms._replace(broadcast_bps=np.full(clients, 5e6))
    return terms, fleet


def seconds(terms, fleet, client, cut, tail=0, image_bits=8):
    """The six terms off the server of one client, unit by unit and message by message."""
    units = len(terms.work_flop) - 1
    profile = oracles.profile(units, terms_seed(fleet))
    mine = [
        unit
        for unit in range(units)
        if unit < cut or (cut < units - tail + (not tail) and unit >= units - tail)
    ]
    batches = max(int(fleet.samples[client]) // BATCH, 1)
    samples = batches * BATCH
    name = "" if fleet.device is None else fleet.device[client]
    forward = backward = 0.0
    for unit in mine:
        if name:
            own = fleet.devices[name]
            forward += batches * fleet.slowdown[client] * own.forward_s[unit]
            backward += batches * fleet.slowdown[client] * own.backward_s[unit]
        else:
            forward += samples * 2 * profile.forward_macs[unit] / fleet.flops[client]
            backward += samples * 2 * profile.backward_macs[unit] / fleet.flops[client]
    up, down = fleet.uplink_bps[client], fleet.downlink_bps[client]
    half = 0.0 if fleet.rtt_s is None else fleet.rtt_s[client] / 2
    model_bits = 32 * sum(int(profile.parameters[unit] + profile.state[unit]) for unit in mine)
    model_bps = down if terms.broadcast_bps is None else terms.broadcast_bps[client]
    model_down = model_up = smashed_up = gradient_down = 0.0
    if mine:
        model_down, model_up = half + model_bits / model_bps, half + model_bits / up
    for _ in range(batches):
        if cut == units:
            break
        crossing = BATCH * int(profile.smashed[cut])
        if cut == 0:
            smashed_up += half + BATCH * (int(profile.smashed[0]) * image_bits + 32 * (not tail)) / up
        else:
            smashed_up += half + (crossing * 32 + BATCH * 32 * (not tail)) / up
            gradient_down += half + crossing * 32 / down
        if tail:
            features = BATCH * int(profile.smashed[units - tail]) * 32
            smashed_up += half + features / up
            gradient_down += half + features / down
    return model_down, forward, smashed_up, gradient_down, backward, model_up


def terms_seed(fleet):
    return fleet.seed


@pytest.mark.parametrize("what", TERMS)
@pytest.mark.parametrize("tail", [0, 1])
def test_the_seconds_are_those_of_every_unit_and_message(what, tail):
    for seed in range(3):
        terms, fleet = made(what, 3, seed, optim.Work(batch_size=BATCH, min_cut=0, tail_units=tail))
        fleet.seed = seed
        cuts = [*range(UNITS - tail + 1), UNITS] if tail else range(UNITS + 1)
        for client, cut in itertools.product(range(3), cuts):
            if tail and cut == UNITS - tail:
                continue  # no such cut: the server would hold nothing
            expected = seconds(terms, fleet, client, cut, tail)
            mine = terms.seconds(np.full(3, cut), np.ones(3))
            found = [getattr(mine, name)[client] for name in mine._fields if name != "server"]
            np.testing.assert_allclose(found, expected, rtol=1e-13)
            np.testing.assert_allclose(terms.column(cut)[0][client], sum(expected), rtol=1e-13)
            assert terms.compute_s(cut)[client] == pytest.approx(expected[1] + expected[4], rel=1e-13)


@pytest.mark.parametrize("what", COMPILED)
def test_exact_is_the_optimum_of_enumeration(what):
    moved = 0
    for seed, server_flops in itertools.product(range(4), (1e7, 1e9, 1e11)):
        terms, _ = made(what, 3, seed)
        costs = terms.costs()
        plan = optim.solve(terms, server_flops)
        optimum = oracles.best_round_s(costs, server_flops)
        assert plan.round_s == pytest.approx(optimum, rel=1e-11)
        oracles.assert_sound(costs, server_flops, plan)
        assert plan.gap < 1e-10
        plain = terms._replace(latency=None, broadcast_bps=None)
        moved += optim.solve(plain, server_flops).round_s < optimum * (1 - 1e-6)
    assert moved or what == "devices"


@pytest.mark.parametrize("what", TERMS)
@pytest.mark.parametrize("barrier", ["staged", "in_turn", "handover", "lockstep"])
def test_under_other_barriers_exact_is_the_optimum_of_enumeration(what, barrier):
    for seed in range(2):
        terms, _ = made(what, 3, seed)
        columns = map(np.array, itertools.product(*(np.flatnonzero(row) for row in terms.costs().allowed)))
        optimum = min(optim.round_seconds(terms, one, 1e9, barrier) for one in columns)
        plan = optim.solve(terms, 1e9, "exact", barrier)
        assert plan.round_s == pytest.approx(optimum, rel=2e-9)
        assert plan.bound_s <= optimum * (1 + 1e-13)
        assert plan.gap < 3e-9
        ends_s = optim.session_ends_s(terms, plan, 1e9, barrier)
        assert ends_s.max() == pytest.approx(plan.round_s, rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("what", TERMS)
def test_all_methods_see_the_same_seconds(what):
    """Each method's plan is a round of the dense costs, and never below the optimum."""
    terms, _ = made(what, 3, 1)
    costs, key = terms.costs(), jax.random.key(0)
    optimum = optim.solve(costs, 1e9).round_s
    for method in optim.METHODS:
        plan = optim.solve(terms, 1e9, method, key=key)
        fixed_s, work, allowed = costs.at(plan.cuts)
        assert allowed.all()
        with np.errstate(divide="ignore", invalid="ignore"):
            ends_s = fixed_s + np.where(work > 0, work / plan.shares, 0.0)
        np.testing.assert_allclose(plan.client_s, ends_s, rtol=1e-12)
        assert plan.round_s >= optimum * (1 - 1e-11)
        if method == "alternating":
            dense = optim.solve(costs, 1e9, method, key=key)
            np.testing.assert_array_equal(plan.cuts, dense.cuts)
        np.testing.assert_allclose(optim.session_ends_s(terms, plan, 1e9), plan.client_s, rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("what", TERMS)
def test_cuts_that_are_dropped_are_not_needed(what, monkeypatch):
    """With runs of equal units cuts are dropped; the optimum and its proof stay."""
    for seed in range(2):
        terms, _ = made(what, 3, seed, units=6)
        run = np.array([0, 1, 1, 1, 2, 3])
        profile = oracles.profile(6, seed)
        for name in ("forward_macs", "backward_macs", "parameters", "state", "activations"):
            setattr(profile, name, getattr(profile, name)[run])
        profile.smashed[1:-1] = profile.smashed[1:-1][run[:-1]]
        fleet = made(what, 3, seed, units=6)[1]
        same = optim.terms(profile, fleet, optim.Work(batch_size=BATCH))._replace(
            broadcast_bps=terms.broadcast_bps
        )
        for costs in (terms, same):
            best = oracles.best_round_s(costs.costs(), 1e9)
            with monkeypatch.context() as patch:
                patch.setattr(sys.modules["sfl_jax.optim.solve"], "MANY", 1)
                plan = optim.solve(costs, 1e9)
            assert plan.round_s == pytest.approx(best, rel=1e-11)
            oracles.assert_sound(costs.costs(), 1e9, plan)
            needed = needed_cuts(costs)
            kept = costs.costs()._replace(allowed=np.isin(np.arange(7), needed) & costs.costs().allowed)
            assert oracles.best_round_s(kept, 1e9) == pytest.approx(best, rel=1e-13)
        if what in ("rtt", "broadcast"):
            assert len(needed_cuts(same)) < 6


def test_a_device_that_is_slow_in_one_unit_keeps_a_cut_that_flop_would_drop():
    profile = oracles.profile(3)
    for name in ("forward_macs", "backward_macs", "parameters", "state", "activations"):
        getattr(profile, name)[:] = 100
    profile.smashed[1:-1] = 50
    columns = {"device": np.array(["a", "a"]), "flops": np.full(2, np.inf)}
    for slow, needed in (([1, 1, 1], [1, 3]), ([1, 1, 9], [1, 2, 3])):
        seconds_s = np.array(slow, float)
        own = SimpleNamespace(batch_size=BATCH, forward_s=seconds_s, backward_s=seconds_s)
        fleet = oracles.fleet(2, devices={"a": own}, **columns)
        terms = optim.terms(profile, fleet, optim.Work(batch_size=BATCH))
        found = needed_cuts(terms).tolist()
        assert (2 in found) == (2 in needed)


@pytest.mark.parametrize("what", COMPILED)
def test_several_servers_and_their_memory(what):
    for seed in range(2):
        terms, _ = made(what, 3, seed, units=3)
        rates = [np.repeat(rate[:, None], 2, axis=1) for rate in (terms.uplink_bps, terms.downlink_bps)]
        servers = optim.Servers(np.array([1e8, 1e9]), np.full(2, np.inf), *rates)
        optimum = np.inf
        for choice in itertools.product(range(2), repeat=3):
            groups = [[k for k in range(3) if choice[k] == e] for e in range(2)]
            rounds_s = [
                oracles.best_round_s(terms.take(group).costs(), flops)
                for group, flops in zip(groups, servers.flops, strict=True) if group
            ]  # fmt: skip
            optimum = min(optimum, max(rounds_s))
        plan = optim.solve_servers(terms, servers)
        assert plan.bound_s <= optimum * (1 + 1e-12)
        assert plan.round_s == pytest.approx(optimum, rel=1e-7)
        limit = 1.5 * terms.server_bytes[1]
        within = optim.solve_memory(terms, 1e9, limit)
        assert terms.server_bytes[within.cuts].sum() <= limit
        best = np.inf
        costs = terms.costs()
        for cuts in itertools.product(*(np.flatnonzero(row) for row in costs.allowed)):
            if terms.server_bytes[list(cuts)].sum() <= limit:
                fixed_s, work, _ = costs.at(np.array(cuts))
                best = min(best, oracles.least_time_s(fixed_s, work, 1e9))
        assert within.round_s == pytest.approx(best, rel=1e-8)


def test_a_shared_band_shortens_transfers_alone():
    """One client with all of the band: its round is that of the whole budgets, and no band is quicker."""
    terms, _ = made("devices", 2, 2, rtt_s=np.array([0.1, 0.3]))
    one = terms.take([0])
    for band in (1.0, 1e9):
        faster = one._replace(uplink_bps=one.uplink_bps * band, downlink_bps=one.downlink_bps * band)
        alone = optim.solve(faster, 1e9)
        plan = optim.solve_bandwidth(one, 1e9, (band, band), reference_hz=1.0)
        assert plan.round_s == pytest.approx(alone.round_s, rel=1e-7)
        assert plan.bound_s <= alone.round_s * (1 + 1e-12)
        ends_s = optim.session_ends_s(one, plan, 1e9)
        np.testing.assert_allclose(ends_s, plan.client_s, rtol=1e-9)
    # However fast the link, messages travel.
    assert plan.round_s > one.travel_s(int(plan.cuts[0]))[0] > 0
    with pytest.raises(BadInput, match="broadcast_bps: cannot be planned with a shared band"):
        optim.solve_bandwidth(one._replace(broadcast_bps=np.ones(1)), 1e9, 1.0, reference_hz=1.0)


@pytest.mark.parametrize("what", TERMS)
def test_slower_clients_are_slower_in_every_term(what):
    terms, _ = made(what, 3, 1)
    slow = np.array([1.0, 2.0, 3.0])
    cuts, shares = np.array([1, 2, 3]), np.full(3, 1e8)
    before, after = terms.seconds(cuts, shares), optim.slower(terms, slow).seconds(cuts, shares)
    for name, was, now in zip(before._fields, before, after, strict=True):
        np.testing.assert_allclose(now, was * (1 if name == "server" else slow), rtol=1e-14)
    taken = terms.take([2, 0]).seconds(cuts[[2, 0]], shares[[2, 0]])
    for was, now in zip(before, taken, strict=True):
        np.testing.assert_array_equal(was[[2, 0]], now)


def counted_and_measured():
    """Terms of two clients by FLOP, and by a device with the same seconds; with energy budgets."""
    power = {"cycles_per_s": np.full(2, 1e9), "kappa": np.full(2, 1e-27), "transmit_w": np.full(2, 0.5)}
    profile, work = oracles.profile(UNITS), optim.Work(batch_size=BATCH)
    counted = optim.terms(profile, oracles.fleet(2, **power, energy_j=np.full(2, 9.0)), work)
    own = SimpleNamespace(
        batch_size=BATCH,
        forward_s=2 * BATCH * profile.forward_macs / 1e8,
        backward_s=2 * BATCH * profile.backward_macs / 1e8,
    )
    columns = {"device": np.array(["a", "a"]), "devices": {"a": own}, "flops": np.full(2, np.inf)}
    columns["slowdown"] = 1e8 / counted.flops
    fleet = oracles.fleet(2, **power, energy_j=np.full(2, 9.0), **columns)
    measured = optim.terms(profile, fleet, work)
    return counted, measured


def test_energy_counts_measured_seconds_like_those_of_flop():
    counted, measured = counted_and_measured()
    for cut in range(UNITS + 1):
        np.testing.assert_allclose(measured.joules(cut), counted.joules(cut), rtol=1e-13)
        np.testing.assert_allclose(measured.column(cut)[0], counted.column(cut)[0], rtol=1e-13)


@pytest.mark.slow
def test_energy_budgets_forbid_the_same_cuts_by_measured_seconds():
    counted, measured = counted_and_measured()
    limit = np.median([counted.joules(cut) for cut in range(1, UNITS + 1)], axis=0) * 1.001
    plans = [
        optim.solve(terms._replace(energy=terms.energy._replace(budget_j=limit)), 1e9)
        for terms in (counted, measured)
    ]
    np.testing.assert_array_equal(plans[0].cuts, plans[1].cuts)
    assert plans[0].round_s == pytest.approx(plans[1].round_s, rel=1e-12)


REFUSED = {
    "device a: was measured with batch_size=8, and batch_size=32 is asked for": {"batch_size": 8},
    "device a: forward_s must be above 0 for every unit": {"forward_s": np.array([0.0, 1, 1, 1])},
    r"device a: backward_s has shape \(3,\); must be \(4,\)": {"backward_s": np.ones(3)},
    "client 1: device=b: is not among the devices": {"device": np.array(["a", "b"])},
    "client 0: must have flops or a device, and not both": {"flops": np.full(2, 1e9)},
    "client 1: must have flops or a device, and not both": {"device": np.array(["a", ""])},
    "slowdown must be above 0 and finite": {"slowdown": np.array([1.0, 0.0])},
    "client 0: rtt_s=0.0: must be above 0": {"rtt_s": np.array([0.0, 1.0])},
    "client 0: flops=inf: must be finite": {"device": None},
}


@pytest.mark.parametrize(("words", "change"), REFUSED.items(), ids=REFUSED)
def test_terms_that_are_missing_or_zero_are_refused(words, change):
    own = device(0)
    for name in ("batch_size", "forward_s", "backward_s"):
        setattr(own, name, change.get(name, getattr(own, name)))
    columns = {"device": np.array(["a", "a"]), "devices": {"a": own}, "flops": np.full(2, np.inf)}
    columns |= {name: value for name, value in change.items() if not hasattr(own, name)}
    with pytest.raises(BadInput, match=words):
        optim.terms(oracles.profile(UNITS), oracles.fleet(2, **columns), optim.Work(batch_size=BATCH))
