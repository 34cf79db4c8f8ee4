import numpy as np
import pytest

from sfl_jax.errors import BadInput
from sfl_jax.fleet import random_fleet

RANGES = {
    "flops": (1e10, 1e12),
    "uplink_bps": (5e6, 50e6),
    "downlink_bps": (20e6, 100e6),
    "memory_bytes": (2**29, 2**33),
}


def check_equal(one, other):
    assert one.columns().keys() == other.columns().keys()
    for name, values in one.columns().items():
        np.testing.assert_array_equal(values, other.columns()[name])


@pytest.mark.parametrize(("column", "limits"), RANGES.items())
def test_random_columns_are_log_uniform_over_their_range(column, limits):
    values = getattr(random_fleet(20_000, seed=0), column)
    low, high = np.log(limits)
    place = np.sort((np.log(values) - low) / (high - low))
    assert 0 <= place[0] < 1e-3
    assert 1 - 1e-3 < place[-1] <= 1
    assert abs(place - np.linspace(0, 1, len(place))).max() < 0.015  # Kolmogorov-Smirnov at about 1e-4


def test_random_columns_are_independent_and_distances_uniform_over_the_cell():
    fleet = random_fleet(20_000, seed=0)
    logs = np.log([*(getattr(fleet, column) for column in RANGES), fleet.distance_m])
    assert abs(np.corrcoef(logs) - np.eye(5)).max() < 0.03
    assert fleet.distance_m is not None
    assert fleet.distance_m.min() >= 10
    assert fleet.distance_m.max() <= 500
    within_half_the_radius = (250**2 - 10**2) / (500**2 - 10**2)
    assert (fleet.distance_m < 250).mean() == pytest.approx(within_half_the_radius, abs=0.015)


def test_a_client_depends_on_seed_and_index_alone():
    small, large = random_fleet(7, seed=5), random_fleet(100, seed=5)
    check_equal(small, large.take(range(7)))
    assert small.client.tolist() == list("0123456")
    check_equal(random_fleet(7), random_fleet(7, seed=0))
    assert len(np.unique(large.flops)) == 100
    assert not np.isin(random_fleet(100, seed=6).flops, large.flops).any()
    with pytest.raises(AssertionError):
        check_equal(small, large.take([0, 1, 2, 3, 4, 6, 5]))


def test_take_and_with_samples():
    fleet = random_fleet(5, seed=0)
    assert fleet.samples is None
    part = fleet.with_samples([10, 20, 30, 40, 50]).take([3, 1])
    assert len(part) == 2
    assert part.client.tolist() == ["3", "1"]
    assert part.samples is not None
    assert part.samples.tolist() == [40, 20]
    assert part.flops.tolist() == [fleet.flops[3], fleet.flops[1]]
    assert part.energy_j is None
    assert len(fleet.take([])) == 0
    with pytest.raises(ValueError, match="broadcast"):
        fleet.with_samples([1, 2])


def test_the_seed_may_be_left_out():
    check_equal(random_fleet(3), random_fleet(3, seed=0))


def test_no_clients():
    with pytest.raises(BadInput, match=r"^clients=0: must be at least 1"):
        random_fleet(0, seed=0)
