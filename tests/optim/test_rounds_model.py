import numpy as np
import pytest

from sfl_jax.errors import BadInput
from sfl_jax.optim import rounds_model
from sfl_jax.optim.rounds_model import Features, RoundsModel


def known(number=12, seed=0):
    rng = np.random.default_rng(seed)
    own, shared, length = rng.uniform(1, 20, number), rng.uniform(1, 20, number), rng.uniform(50, 400, number)
    return Features(own, shared, length, rng.choice([0.0, 0.02], number))


TRUE = RoundsModel(0.01, 0.02, 1e-5, 0.05)


def test_constants_that_made_the_rounds_are_found():
    features = known()
    rounds = TRUE.rounds(features)
    for place in (0, 5):
        own, shared, length, noise = (part[place] for part in features)
        rate = 0.01 * own + 0.02 * shared - (1e-5 * length + 0.05 * noise) * (own + shared)
        assert rounds[place] == pytest.approx(1 / rate)
    np.testing.assert_allclose(rounds_model.fit_rounds(features, rounds), TRUE, rtol=1e-6)
    np.testing.assert_allclose(rounds_model.left_out(features, rounds), rounds)


def test_constants_are_never_negative_and_one_training_is_enough():
    features = known()
    faster = 1 / ((features.own + features.shared) * (0.01 + 1e-5 * features.length))
    assert rounds_model.fit_rounds(features, faster).length_cost == 0
    one = features.of([3])
    assert rounds_model.fit_rounds(one, np.array([7.0])).rounds(one) == pytest.approx(7.0)
    assert np.isnan(rounds_model.left_out(one, np.array([7.0])))


def test_rounds_that_are_too_long_never_arrive():
    assert np.isinf(TRUE.rounds(Features(*(np.array([x]) for x in (5.0, 0.0, 1e4, 0.0)))))


def test_updates_are_weighted_by_the_units_parts():
    parts = np.array([1.0, 2.0, 3.0, 4.0])
    found = rounds_model.features(parts, 2, 5.0, 4.0, 5.0, 0.1)
    assert found == pytest.approx((0.3 * 4, 0.7 * 5, 25.0, 0.1))


def test_momentum_that_starts_at_0_costs_updates():
    velocity, moved = 0.0, 0.0
    for _ in range(7):
        velocity = 0.9 * velocity + 0.1  # a gradient of 1, and steps of 1 in the long run
        moved += velocity
    assert rounds_model.restarted(7.0, 0.9) == pytest.approx(moved)
    assert rounds_model.restarted(7.0, 0.0) == 7


@pytest.mark.parametrize("rounds", [[], [0.0, 1.0], [np.nan, 2.0]])
def test_rounds_that_are_none_are_refused(rounds):
    with pytest.raises(BadInput, match="rounds: must be at least one finite number above 0"):
        rounds_model.fit_rounds(known(len(rounds)), np.array(rounds))
