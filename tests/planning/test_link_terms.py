"""Airtime, broadcast, round-trip times and devices: in plans, in the clock of training, and in the ledger."""

import dataclasses
import itertools

import numpy as np
import pytest
from optim import oracles
from run import test_run

import sfl_jax as sfl
from sfl_jax import optim, planning
from sfl_jax.errors import BadInput
from sfl_jax.fleet import Device, Fleet
from sfl_jax.planning import Planner
from sfl_jax.run.clocks import clocks
from sfl_jax.run.rounds import prepare

UNITS = len(test_run.CHAIN)
NAMES = sfl.models.profile(test_run.CHAIN, test_run.DATA.train_images.shape[1:]).names


def fleet_of(clients, **columns):
    made = oracles.fleet(clients, 1)
    rates = {name: getattr(made, name) for name in ("flops", "uplink_bps", "downlink_bps", "memory_bytes")}
    return Fleet(np.arange(clients).astype(str), **(rates | columns))


def test_airtime_is_the_best_division_of_one_medium():
    """Two clients: no cuts, and no parts of airtime and server on a fine grid, end sooner than the plan."""
    terms = optim.terms(oracles.profile(3, 2), oracles.fleet(2, 2), optim.Work())
    planner, fleet = Planner(server_flops=2e8, band="airtime"), fleet_of(2)
    linked = planning.linked(planner, fleet, terms)
    plan = planning.solve(planner, fleet, linked)
    fixed_s, air_s, work = (
        np.stack(parts, axis=1)
        for parts in zip(*(
            (one.client_forward + one.client_backward,
             one.smashed_up + one.model_up + one.model_down + one.gradient_down, one.server)
            for one in (terms.seconds(np.full(2, cut), np.ones(2)) for cut in range(1, 4))
        ), strict=True)
    )  # fmt: skip
    parts, best = np.linspace(0, 1, 403)[1:-1], np.inf
    for first, second in itertools.product(range(3), repeat=2):
        rows, cuts = np.arange(2), np.array([first, second])
        own, air, flop = fixed_s[rows, cuts], air_s[rows, cuts], work[rows, cuts] / 2e8
        ends = [
            own[k] + air[k] / part[:, None] + flop[k] / part[None, :]
            for k, part in enumerate((parts, 1 - parts))
        ]
        best = min(best, np.maximum(*ends).min())
    assert plan.bound_s <= best
    assert best * 0.97 <= plan.round_s <= best * 1.05
    # At these parts of the time, with the rates of the fleet, all ends are those of the plan.
    given = plan.uplink_hz / 2
    assert given.sum() <= 1 + 1e-9
    own = terms.faster(uplink=given, downlink=given).seconds(plan.cuts, plan.shares)
    np.testing.assert_allclose(np.sum(own, axis=0), plan.client_s, rtol=1e-9)


def test_a_broadcast_brings_the_model_at_one_rate_and_is_counted_once():
    run = test_run.make(planner=sfl.Planner(server_flops=1e6, broadcast_bps=1e5))
    planned = run.plan()
    down = planning.seconds(planned).model_down
    np.testing.assert_allclose(down, planned.terms.model_bits[planned.plan.cuts] / 1e5, rtol=1e-12)
    plain = test_run.make(planner=sfl.Planner(server_flops=1e6))
    bits = planned.terms.model_bits[planned.plan.cuts]
    assert prepare(run.parts, 0).ledger.model_down_bytes == round(bits.max() / 8)
    own = prepare(plain.parts, 0)
    assert own.ledger.model_down_bytes == round(planned.terms.model_bits[own.plan.cuts].sum() / 8)


def measured(batch_size=10):
    rng = np.random.default_rng(3)
    forward_s = rng.uniform(0.001, 0.01, UNITS)
    return Device("own", batch_size, NAMES, forward_s, 2 * forward_s)


@pytest.mark.parametrize(
    "scheme", ["sfl", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sfl_v2", "sl", "psl"))]
)
def test_the_clock_of_training_has_the_seconds_of_plans(scheme):
    """With trips and devices: the simulated round is the plan's, and that of `optim.round_seconds`."""
    clients = len(test_run.FLEET)
    names = np.array(["slow" if k % 2 else "" for k in range(clients)])
    fleet = dataclasses.replace(
        test_run.FLEET, rtt_s=np.linspace(0.01, 0.1, clients), device=names,
        flops=np.where(names == "", test_run.FLEET.flops, np.inf), slowdown=np.linspace(1, 4, clients),
        devices={"slow": measured()},
    )  # fmt: skip
    run = test_run.make(fleet=fleet, scheme=scheme, execution=sfl.Execution())
    made = prepare(run.parts, 0)
    planned = run.plan()
    assert made.turnout.round_s == pytest.approx(planned.plan.round_s, rel=1e-12)
    assert clocks(run.parts, 1, ())["exact"].seconds[0] == pytest.approx(made.turnout.round_s, rel=1e-12)
    barrier = run.parts.planner.barrier
    again = optim.round_seconds(planned.terms, made.plan.cuts, run.parts.planner.server_flops, barrier)
    assert again == pytest.approx(made.turnout.round_s, rel=1e-9)
    plain = planned.terms._replace(latency=None)
    assert optim.round_seconds(plain, made.plan.cuts, 1e6, barrier) < again * (1 - 1e-6)
    whole = planned.terms.compute_s(UNITS)[planned.fleet.device == "slow"]
    slow = planned.fleet.slowdown[planned.fleet.device == "slow"]
    steps = planned.terms.steps[planned.fleet.device == "slow"]
    np.testing.assert_allclose(whole, steps * slow * 3 * measured().forward_s.sum(), rtol=1e-12)


def test_devices_of_another_network_or_batch_size_are_refused():
    names = np.full(len(test_run.FLEET), "d")
    flops = np.full(len(names), np.inf)
    for device, words in (
        (measured(8), "batch_size=8, and batch_size=10 is asked for"),
        (dataclasses.replace(measured(), units=NAMES[::-1]), "its units have other names"),
    ):
        fleet = dataclasses.replace(test_run.FLEET, device=names, flops=flops, devices={"d": device})
        with pytest.raises(BadInput, match=words):
            test_run.make(fleet=fleet)


def test_what_the_terms_exclude_is_refused():
    for change, words in (
        ({"broadcast_bps": 1e6, "band": "airtime"}, "broadcast_bps=1e.06: needs band=fixed, not airtime"),
        (
            {"broadcast_bps": 1e6, "barrier": "handover"},
            "barrier=handover a client gets the model after",
        ),
        ({"broadcast_bps": -1.0}, "broadcast_bps=-1.0: must be a finite number, at least 0"),
    ):
        with pytest.raises(BadInput, match=words):
            Planner(**change)
    energy = {name: np.ones(2) for name in ("cycles_per_s", "kappa", "transmit_w", "energy_j")}
    with pytest.raises(BadInput, match="band=airtime: cannot be planned with energy budgets"):
        planning.check_links(Planner(band="airtime"), fleet_of(2, **energy))


def test_values_in_another_unit_are_asked_about():
    rates = {"flops": np.full(2, 1e10), "uplink_bps": np.array([2e7, 20.0]), "downlink_bps": np.full(2, 1e7)}
    asked = planning.doubts(fleet_of(2, **rates, rtt_s=np.full(2, 30.0)))
    assert asked == [
        "rtt_s is 30 s at least; are the numbers in milliseconds?",
        "uplink_bps of client 1 is 20 bit/s, and of 1 of 2 clients below 1e+04; is it in Mbit/s?",
    ]
    rates["uplink_bps"] = np.full(2, 1e7)
    assert planning.doubts(fleet_of(2, **rates, rtt_s=np.full(2, 0.03))) == []
