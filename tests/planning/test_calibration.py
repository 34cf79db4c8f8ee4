"""Measured rounds: rates are recovered from noisy ones, intervals cover, and bad rows are refused."""

import dataclasses

import numpy as np
import pytest
from optim import oracles

from sfl_jax import optim
from sfl_jax.errors import BadInput
from sfl_jax.fleet import Device, Fleet, MeasuredRounds, read_measured
from sfl_jax.planning import calibration
from sfl_jax.planning.calibration import RESOURCES, calibrate, fitted_fleet

UNITS, WORK = 5, optim.Work()
NAMES = [f"unit{k}" for k in range(UNITS)]


def assumed(clients, seed=0, device=False):
    """A fleet with trips; with a device, every other client is measured by it."""
    made = oracles.fleet(clients, seed)
    rates = {name: getattr(made, name) for name in ("flops", "uplink_bps", "downlink_bps", "memory_bytes")}
    fleet = Fleet(np.arange(clients).astype(str), **rates, samples=made.samples, rtt_s=np.full(clients, 0.02))
    if not device:
        return fleet
    seconds = np.random.default_rng(seed).uniform(0.01, 0.1, UNITS)
    names = np.where(np.arange(clients) % 2, "d", "")
    return dataclasses.replace(
        fleet, device=names, flops=np.where(names == "", fleet.flops, np.inf),
        devices={"d": Device("net", WORK.batch_size, tuple(NAMES), seconds, 2 * seconds)},
    )  # fmt: skip


def terms_of(fleet):
    return optim.terms(oracles.profile(UNITS, 1), fleet, WORK)


def true_fleet(fleet, factors):
    """The fleet that takes `factors` (K, 3) times as long."""
    compute, up, down = factors.T
    slowdown = None if fleet.device is None else np.where(fleet.device == "", 1.0, compute)
    return dataclasses.replace(
        fleet, flops=fleet.flops / compute, uplink_bps=fleet.uplink_bps / up,
        downlink_bps=fleet.downlink_bps / down, slowdown=slowdown,
    )  # fmt: skip


def rounds(fleet, per_client, noise, seed, totals, cuts=range(1, UNITS + 1)):
    """Synthetic measurements with relative Gaussian errors: of the transfers and the compute, or of all of a
    session but the server and the trips."""
    rng, clients = np.random.default_rng(seed), len(fleet)
    client = np.repeat(np.arange(clients), per_client)
    cut = np.tile(np.resize(np.array(list(cuts)), per_client), clients)
    terms = terms_of(fleet).take(client)
    whole = terms.seconds(cut, np.full(len(cut), 1e8))
    air = terms._replace(latency=None).seconds(cut, np.full(len(cut), 1e8))
    wrong = 1 + noise * rng.standard_normal(len(cut))
    seconds = {name: np.full(len(cut), np.nan) for name in whole._fields} | {"server": whole.server}
    total_s = np.full(len(cut), np.nan)
    if totals:
        moving = np.sum([part for name, part in air._asdict().items() if name != "server"], axis=0)
        still = np.sum(whole, axis=0) - moving
        total_s = moving * wrong + still
    else:
        compute, up = ("client_forward", "client_backward"), ("smashed_up", "model_up")
        pairs = compute, up, ("model_down", "gradient_down")
        for pair in pairs:
            wrong = 1 + noise * rng.standard_normal(len(cut))
            for name in pair:
                moving = getattr(air, name)
                seconds[name] = np.where(moving > 0, moving * wrong + getattr(whole, name) - moving, np.nan)
    shares = np.where(whole.server > 0, 1e8, np.nan)
    return MeasuredRounds(
        np.zeros(len(cut), int), client, cut, seconds, total_s, shares, np.arange(len(cut)) + 2
    )


def keeping(measured, rows):
    """Some of the rows."""
    return MeasuredRounds(*(
        {name: values[rows] for name, values in part.items()} if isinstance(part, dict) else part[rows]
        for part in measured
    ))  # fmt: skip


@pytest.mark.parametrize("totals", [False, True])
@pytest.mark.parametrize("device", [False, True])
def test_rates_are_recovered_without_noise(totals, device):
    fleet = assumed(6, device=device)
    factors = np.random.default_rng(1).uniform(0.5, 2, (6, 3))
    true = true_fleet(fleet, factors)
    found = calibrate(terms_of(fleet), rounds(true, 15, 0.0, 2, totals))
    assert set(found.how.tolist()) == {calibration.SEPARATE if totals else calibration.BY_TERM}
    np.testing.assert_allclose(found.factor, factors, rtol=1e-8)
    np.testing.assert_allclose(found.fitted_s, found.measured_s, rtol=1e-9)
    assert not np.allclose(found.predicted_s, found.measured_s, rtol=1e-2)
    again = fitted_fleet(fleet, found)
    for name in ("flops", "uplink_bps", "downlink_bps"):
        np.testing.assert_allclose(getattr(again, name), getattr(true, name), rtol=1e-8)
    new, old = terms_of(again).column(2)[0], terms_of(true).column(2)[0]
    np.testing.assert_allclose(new, old, rtol=1e-8)
    assert found.server[0] == pytest.approx(1)


@pytest.mark.parametrize("totals", [False, True])
def test_intervals_cover_the_truth_as_often_as_they_say(totals):
    """400 clients: 95 % of the intervals, within the error of such a count."""
    clients = 400
    fleet = assumed(clients, 3)
    factors = np.random.default_rng(1).uniform(0.7, 1.5, (clients, 3))
    if totals:
        factors[:, 2] = factors[:, 1]  # links cannot be told apart
    found = calibrate(terms_of(fleet), rounds(true_fleet(fleet, factors), 10, 0.02, 3, totals))
    apart = found.how == (calibration.LINKS if totals else calibration.BY_TERM)
    covers = ((found.low <= factors) & (factors <= found.high))[apart][:, :2]
    assert apart.sum() > 150
    # Rows of totals that cannot be told apart are left out, which favours narrow intervals a little.
    assert covers.mean() == pytest.approx(0.95, abs=0.025)
    assert np.median(np.abs(found.factor / factors - 1)[apart]) < 0.02
    assert ((found.low <= found.factor) & (found.factor <= found.high))[apart].all()


def test_an_interval_of_half_the_width_would_be_noticed(monkeypatch):
    monkeypatch.setattr(calibration, "CONFIDENCE", 0.5)
    fleet = assumed(200)
    found = calibrate(terms_of(fleet), rounds(fleet, 10, 0.02, 1, False))
    assert ((found.low <= 1) & (found.high >= 1)).mean() < 0.65


def test_totals_at_one_cut_give_one_factor_for_all():
    fleet = assumed(3)
    factors = np.full((3, 3), 1.0) * np.array([[0.5], [1.0], [2.0]])
    true = true_fleet(fleet, factors)
    found = calibrate(terms_of(fleet), rounds(true, 6, 0.01, 1, True, cuts=[2]))
    assert set(found.how.tolist()) == {calibration.TOGETHER}
    np.testing.assert_allclose(found.factor, factors, rtol=0.02)
    one = calibrate(terms_of(fleet), rounds(true, 1, 0.0, 1, True, cuts=[2]))
    np.testing.assert_allclose(one.factor, factors, rtol=1e-9)
    assert np.isnan(one.low).all()  # one row leaves nothing to judge its error by


def test_clients_that_were_not_measured_keep_their_rates():
    fleet = assumed(3)
    measured = rounds(true_fleet(fleet, np.full((3, 3), 2.0)), 4, 0.0, 1, False)
    only = keeping(measured, slice(4))
    found = calibrate(terms_of(fleet), only)
    assert found.how.tolist() == [calibration.BY_TERM, *[calibration.NOT_MEASURED] * 2]
    assert found.rows.tolist() == [4, 0, 0]
    again = fitted_fleet(fleet, found)
    np.testing.assert_allclose(fleet.flops / again.flops, [2, 1, 1], rtol=1e-9)
    assert len(RESOURCES) == found.factor.shape[1]


def test_a_broadcast_is_no_downlink():
    """The downlink is twice as slow, the broadcast as fast as assumed."""
    fleet = assumed(2)
    terms = terms_of(fleet)._replace(broadcast_bps=np.full(2, 1e6))
    factors = np.tile([1.0, 1.0, 2.0], (2, 1))
    measured = rounds(true_fleet(fleet, factors), 5, 0.0, 1, False)
    model_s = terms.take(measured.client).seconds(measured.cut, np.ones(10)).model_down
    found = calibrate(terms, measured._replace(seconds=measured.seconds | {"model_down": model_s}))
    np.testing.assert_allclose(found.factor, factors, rtol=1e-9)


def test_a_total_needs_the_seconds_of_the_server():
    fleet = assumed(2)
    measured = rounds(fleet, 3, 0.0, 1, True)
    nothing = np.full(6, np.nan)
    blind = measured._replace(share_flops=nothing, seconds=measured.seconds | {"server": nothing})
    with pytest.raises(BadInput, match=r"r\.csv:2: client_s at cut 1 includes the server; must have"):
        calibrate(terms_of(fleet), blind, "r.csv")
    by_share = measured._replace(seconds=measured.seconds | {"server": nothing})
    np.testing.assert_allclose(
        calibrate(terms_of(fleet), by_share).factor, calibrate(terms_of(fleet), measured).factor, rtol=1e-9
    )


SERVER_FLOPS = 2e8


def totals_with_shares(fleet, times, noise, seed, per_client=12, cuts=range(1, UNITS + 1), share_of=None):
    """Totals with a share of the server, which takes `times` the seconds that the share says. Errors are
    relative to all of a session but the trips.

    share_of: (rows,) from 0 to 1; None: drawn, from a tenth to all.
    """
    rng, clients = np.random.default_rng(seed), len(fleet)
    client = np.repeat(np.arange(clients), per_client)
    cut = np.tile(np.resize(np.array(list(cuts)), per_client), clients)
    share_of = rng.uniform(0.1, 1, len(cut)) if share_of is None else share_of
    shares, terms = SERVER_FLOPS * share_of, terms_of(fleet).take(client)
    whole = terms.seconds(cut, shares / times)
    moving_s = np.sum(terms._replace(latency=None).seconds(cut, shares / times), axis=0)
    trips_s = np.sum(whole, axis=0) - moving_s
    total_s = moving_s * (1 + noise * rng.standard_normal(len(cut))) + trips_s
    seconds = {name: np.full(len(cut), np.nan) for name in whole._fields}
    lines = np.arange(len(cut)) + 2
    return MeasuredRounds(np.zeros(len(cut), int), client, cut, seconds, total_s, shares, lines)


def test_the_speed_of_the_server_is_recovered_from_totals():
    fleet = assumed(6)
    factors = np.random.default_rng(1).uniform(0.5, 2, (6, 3))
    found = calibrate(terms_of(fleet), totals_with_shares(true_fleet(fleet, factors), 1.7, 0.0, 2))
    assert found.server_how == calibration.SEPARATE
    np.testing.assert_allclose(found.server, 1.7, rtol=1e-7)
    np.testing.assert_allclose(found.factor, factors, rtol=1e-6)
    np.testing.assert_allclose(found.fitted_s, found.measured_s, rtol=1e-9)
    assert not np.allclose(found.predicted_s, found.measured_s, rtol=1e-2)


def test_the_interval_of_the_server_covers_its_speed_as_often_as_it_says():
    """300 times 5 clients, in which the clients' own intervals cover too, though the server is fitted."""
    fleet = assumed(5)
    factors = np.random.default_rng(1).uniform(0.7, 1.5, (5, 1)) * np.ones((1, 3))
    true, server, compute = true_fleet(fleet, factors), [], []
    for seed in range(300):
        found = calibrate(terms_of(fleet), totals_with_shares(true, 0.8, 0.02, seed))
        assert found.server_how == calibration.SEPARATE
        server.append(found.server)
        compute.append((found.low <= factors) & (factors <= found.high))
    factor, low, high = np.array(server).T
    assert np.mean((low <= 0.8) & (high >= 0.8)) == pytest.approx(0.95, abs=0.035)
    assert np.mean(factor) == pytest.approx(0.8, abs=3 * np.std(factor) / np.sqrt(300))
    assert np.mean(high - low) < 0.2
    assert np.mean(compute) == pytest.approx(0.95, abs=0.025)


def test_one_client_with_two_shares_tells_the_server_of_all():
    """One client had two shares at one cut. The other had one cut and one share."""
    fleet = assumed(2)
    measured = totals_with_shares(fleet, 1.3, 0.001, 0, 6, [2], np.array([0.2, 0.9] * 3 + [0.5] * 6))
    found = calibrate(terms_of(fleet), measured)
    assert found.server[1] < 1.3 < found.server[2]
    np.testing.assert_allclose(found.factor, 1, atol=0.02)
    alone = calibrate(terms_of(fleet), keeping(measured, measured.client == 1))
    assert (alone.server_how, np.isnan(alone.server).all()) == (calibration.NOT_TOLD, True)
    assert alone.factor[1, 0] > 1.05  # the given speed stays, and the client takes the blame


def test_totals_with_much_noise_do_not_tell_the_server():
    fleet = assumed(3)
    for seed in range(6):
        found = calibrate(terms_of(fleet), totals_with_shares(fleet, 1.3, 1.0, seed, 8))
        assert (found.server_how, np.isnan(found.server).all()) == (calibration.UNSURE, True)
    measured = rounds(fleet, 4, 0.01, 1, False)
    wild = np.tile([1e-3, 1e3], 6) * measured.seconds["server"]
    unsure = calibrate(terms_of(fleet), measured._replace(seconds=measured.seconds | {"server": wild}))
    assert (unsure.server_how, np.isnan(unsure.server).all()) == (calibration.UNSURE, True)
    without = measured._replace(share_flops=np.full(12, np.nan))
    assert calibrate(terms_of(fleet), without).server_how == calibration.NOT_MEASURED


def test_seconds_of_the_server_say_more_than_totals():
    fleet = assumed(3)
    measured, direct = totals_with_shares(fleet, 1.3, 0.01, 4), rounds(fleet, 4, 0.0, 1, False)
    by_share = terms_of(fleet).take(direct.client).seconds(direct.cut, np.full(12, 1e8)).server
    direct = direct._replace(seconds=direct.seconds | {"server": 1.3 * by_share})
    both = MeasuredRounds(*(
        {name: np.concatenate([one[name], other[name]]) for name in one}
        if isinstance(one, dict) else np.concatenate([one, other])
        for one, other in zip(direct, measured, strict=True)
    ))  # fmt: skip
    found = calibrate(terms_of(fleet), both)
    assert found.server_how == calibration.BY_TERM
    np.testing.assert_allclose(found.server, 1.3, rtol=1e-9)
    np.testing.assert_allclose(found.factor, 1, atol=0.05)


GOOD = "round,client,cut,client_s,server_s\n1,a,2,3.5,0.5\n2,b,5,1.25,\n"


def test_a_file_is_read(tmp_path):
    (tmp_path / "r.csv").write_text(GOOD)
    measured = read_measured(tmp_path / "r.csv", ["b", "a"], UNITS)
    assert measured.client.tolist() == [1, 0]
    assert (measured.round.tolist(), measured.cut.tolist()) == ([1, 2], [2, 5])
    assert measured.total_s.tolist() == [3.5, 1.25]
    assert measured.seconds["server"][0] == 0.5
    assert np.isnan(measured.seconds["server"]).tolist() == [False, True]
    assert np.isnan(measured.seconds["model_up"]).all()


BAD = {
    "r.csv:2: column client: 'c': must be a client of the fleet": ("1,a", "1,c"),
    "r.csv:3: client b: column cut: '6': must be an integer, 0 to 5": ("b,5", "b,6"),
    "r.csv:2: client a: column round: 'x': must be an integer": ("1,a", "x,a"),
    "r.csv:2: client a: column client_s: '-1': must be a positive number, or empty": ("3.5", "-1"),
    "r.csv:2: client a: column server_s: '-1': must be a number, 0 or more, or empty": ("0.5", "-1"),
    "r.csv:3: client a in round 1 is also on line 2": ("2,b", "1,a"),
    "r.csv:3: column server_s: missing; a line has 5 cells": ("1.25,", "1.25"),
    "r.csv:1: column 'seconds': must be one of round, client": ("client_s", "seconds"),
    "r.csv:1: column cut: missing": ("cut,client_s", "smashed_up_s,client_s"),
    "r.csv:1: column client_s: must occur once": ("server_s", "client_s"),
    "r.csv:1: no seconds of clients; must have client_s": ("client_s,server_s", "server_s,share_flops"),
    "r.csv:2: no rows": (GOOD.partition("\n")[2], ""),
}


@pytest.mark.parametrize(("words", "change"), BAD.items(), ids=BAD)
def test_a_wrong_file_is_refused_with_its_line(tmp_path, words, change):
    (tmp_path / "r.csv").write_text(GOOD.replace(*change, 1))
    with pytest.raises(BadInput, match=words):
        read_measured(tmp_path / "r.csv", ["a", "b"], UNITS)
    with pytest.raises(
        BadInput,
        match=r"none\.csv: No such file or directory; give the path of a CSV file with round,client,cut",
    ):
        read_measured(tmp_path / "none.csv", ["a"], UNITS)
