import math
from dataclasses import replace

import finite
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfl_jax.errors import BadInput
from sfl_jax.fleet import Links, availability, cohort, fading_rates, random_fleet


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**64 - 1), round=st.integers(0, 10**6), clients=st.integers(1, 300), data=st.data()
)
def test_a_cohort_is_sorted_without_repetition_and_of_the_size_asked(seed, round, clients, data):
    size = data.draw(st.integers(1, clients))
    ids = cohort(seed, round, clients, size)
    assert ids.shape == (size,)
    assert (np.diff(ids) > 0).all()
    assert ids[0] >= 0
    assert ids[-1] < clients
    np.testing.assert_array_equal(ids, cohort(seed, round, clients, size))


def test_cohorts_change_with_seed_and_round_and_ask_everyone_alike():
    rounds = [cohort(1, round, 20, 5) for round in range(4000)]
    assert len({ids.tobytes() for ids in rounds}) > 3000
    asked = np.bincount(np.concatenate(rounds), minlength=20)
    # Each client is asked 1000 times, with deviation sqrt(4000 * 1/4 * 3/4) = 27.4.
    assert abs(asked - 1000).max() < 5 * 27.4
    assert not np.array_equal(cohort(1, 2, 1000, 10), cohort(2, 1, 1000, 10))


@pytest.mark.parametrize("size", [0, -1, 21])
def test_impossible_cohorts(size):
    with pytest.raises(BadInput, match=f"^cohort_size={size}: must be 1 to 20"):
        cohort(0, 0, 20, size)


def test_availability_has_the_probability_asked_and_its_limits():
    everyone = range(50_000)
    assert availability(0, 0, everyone, 0.0).all()
    assert not availability(0, 0, everyone, 1.0).any()
    assert availability(0, 0, everyone, 0.3).mean() == pytest.approx(0.7, abs=5 * math.sqrt(0.21 / 50_000))
    assert availability(0, 0, [], 0.5).shape == (0,)
    present = np.array([availability(0, round, [3, 4], 0.5) for round in range(2000)])
    assert present.mean(0) == pytest.approx(0.5, abs=0.06)
    assert np.corrcoef(present.T)[0, 1] == pytest.approx(0, abs=0.12)
    assert np.corrcoef(present[1:, 0], present[:-1, 0])[0, 1] == pytest.approx(0, abs=0.12)


@pytest.mark.parametrize("probability", [-0.1, 1.1, float("nan")])
def test_no_probability(probability):
    with pytest.raises(BadInput, match=r"drop_probability=.*: must be 0 to 1"):
        availability(0, 0, [0], probability)


def test_a_client_is_there_or_fades_whoever_else_is_asked():
    fleet, ids = random_fleet(40, seed=0), [33, 2, 17]
    whole, links = availability(7, 3, range(40), 0.5), Links(coherence_s=math.inf)
    np.testing.assert_array_equal(availability(7, 3, ids, 0.5), whole[ids])
    faded = fading_rates(fleet, links, 7, 3)
    part = fading_rates(fleet.take(ids), links, 7, 3, ids)
    np.testing.assert_array_equal(part.uplink_bps, faded.uplink_bps[ids])
    np.testing.assert_array_equal(part.downlink_bps, faded.downlink_bps[ids])
    # The ids matter: without them these clients would get the fades of the first three.
    assert finite.differ_everywhere(fading_rates(fleet.take(ids), links, 7, 3).uplink_bps, part.uplink_bps)
    for seed, round in ((7, 4), (8, 3), (3, 7)):
        assert finite.differ_everywhere(fading_rates(fleet, links, seed, round).uplink_bps, faded.uplink_bps)


def test_shannon_rates_by_hand():
    """Gain 1e-4 / 10² = 1e-6 at 10 m and 1e-8 at 100 m; noise 1e-15 W/Hz.

    Up over 1 MHz at 0.2 W: SNR 0.2e-6 / 1e-9 = 200 and 2. Down over 2 MHz at 1 W: 500 and 5.
    """
    fleet = replace(
        random_fleet(2, seed=0), distance_m=np.array([10.0, 100.0]), transmit_w=np.array([0.2, 0.2])
    )
    links = Links(
        uplink_hz=1e6,
        downlink_hz=2e6,
        server_transmit_w=1.0,
        noise_w_per_hz=1e-15,
        gain_at_1m=1e-4,
        path_loss_exponent=2.0,
        rayleigh=False,
    )
    rates = fading_rates(fleet, links, 0, 0)
    np.testing.assert_allclose(rates.uplink_bps, [1e6 * math.log2(201), 1e6 * math.log2(3)], rtol=1e-12)
    np.testing.assert_allclose(rates.downlink_bps, [2e6 * math.log2(501), 2e6 * math.log2(6)], rtol=1e-12)
    np.testing.assert_array_equal(rates.flops, fleet.flops)
    assert finite.differ_everywhere(fleet.uplink_bps, rates.uplink_bps)


def test_a_rate_far_below_the_noise_is_small_and_not_nothing():
    fleet = replace(random_fleet(1, seed=0), distance_m=np.array([1e9]), transmit_w=np.array([1e-9]))
    links = Links(rayleigh=False)
    watt = 1e-9 * links.gain_at_1m * 1e9**-links.path_loss_exponent
    wanted = watt / links.noise_w_per_hz / math.log(2)  # log2(1 + x) is x / ln 2 for such an x
    assert fading_rates(fleet, links, 0, 0).uplink_bps == pytest.approx(wanted, rel=1e-9, abs=0)


def test_rayleigh_gains_are_exponential_and_apart_for_up_and_down():
    """|h|², recovered from the rate, has the distribution function 1 - exp(-x)."""
    clients = 20_000
    fleet = random_fleet(clients, seed=0)
    links = Links(coherence_s=math.inf)  # one fade
    rates, plain = (fading_rates(fleet, replace(links, rayleigh=on), 0, 0) for on in (True, False))
    gains = [
        np.expm1(np.log(2) * getattr(rates, f"{way}_bps") / hz)
        / np.expm1(np.log(2) * getattr(plain, f"{way}_bps") / hz)
        for way, hz in (("uplink", links.uplink_hz), ("downlink", links.downlink_hz))
    ]
    for gain in gains:
        function = np.sort(1 - np.exp(-gain))
        assert abs(function - np.linspace(0, 1, clients)).max() < 0.015
    assert abs(np.corrcoef(gains)[0, 1]) < 0.04


def test_rates_over_many_fades_are_the_mean_of_what_fades_give():
    """The long-run mean against 200,000 draws of one link; the mean of few fades against one draw each."""
    fleet = replace(
        random_fleet(200_000, seed=0), distance_m=np.full(200_000, 300.0), transmit_w=np.full(200_000, 0.2)
    )
    one = fading_rates(fleet, Links(coherence_s=math.inf), 0, 0)
    for way in ("uplink_bps", "downlink_bps"):
        (mean,) = set(getattr(fading_rates(fleet, Links(), 0, 0), way))
        drawn = getattr(one, way)
        assert mean == pytest.approx(drawn.mean(), abs=5 * drawn.std() / math.sqrt(200_000))
    few, long_run = fleet.take(range(50)), fading_rates(fleet.take(range(50)), Links(), 0, 0)
    bits = 10 * long_run.uplink_bps[0]  # ten seconds at that rate
    for coherence_s, fades in ((20, 1), (10, 1), (5, 2), (2.6, 4), (0.001, None)):
        rates = fading_rates(few, Links(coherence_s=coherence_s), 3, 7, transfer_bits=bits)
        if fades is None:  # too many to draw
            np.testing.assert_array_equal(rates.uplink_bps, long_run.uplink_bps)
            continue
        gains = [
            -np.log1p(
                -np.random.Generator(np.random.Philox(key=[3, 4], counter=[0, 7, n, 0])).random((50, 2))
            )
            for n in range(fades)
        ]
        snr = 0.2 * 4.65e-5 * 300**-3.5 / (3.98e-21 * 5e6)
        expected = np.mean([5e6 * np.log2(1 + snr * gain[:, 0]) for gain in gains], axis=0)
        np.testing.assert_allclose(rates.uplink_bps, expected, rtol=1e-9)


def test_a_round_on_fading_links_is_near_that_of_the_mean_channel():
    """With one fade for a whole round, the deepest fade of many clients would decide the round."""
    fleet = random_fleet(100, seed=0)
    plain = fading_rates(fleet, Links(rayleigh=False), 0, 0).uplink_bps
    fading = fading_rates(fleet, Links(), 0, 0).uplink_bps
    one = np.array([fading_rates(fleet, Links(coherence_s=math.inf), 0, r).uplink_bps for r in range(50)])
    assert (fading < plain).all()  # Jensen
    assert (plain / fading).max() < 2
    assert np.median((plain / one).max(axis=1)) > 20


def test_links_that_make_no_sense():
    fleet = random_fleet(2, seed=0)
    for value in (-1.0, math.nan):
        with pytest.raises(BadInput, match=f"links: coherence_s={value}: must be 0 or more"):
            fading_rates(fleet, Links(coherence_s=value), 0, 0)
    for column in ("distance_m", "transmit_w"):
        with pytest.raises(BadInput, match="need the columns distance_m and transmit_w"):
            fading_rates(replace(fleet, **{column: None}), Links(), 0, 0)
    for name in ("uplink_hz", "downlink_hz", "noise_w_per_hz", "gain_at_1m", "server_transmit_w"):
        for value in (0.0, -1.0, float("nan"), float("inf")):
            with pytest.raises(BadInput, match=f"links: {name}={value}: must be a positive number"):
                fading_rates(fleet, replace(Links(), **{name: value}), 0, 0)
