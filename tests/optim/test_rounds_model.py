import numpy as np
import pytest

from sfl_jax.errors import BadInput
from sfl_jax.optim import rounds_model
from sfl_jax.optim.rounds_model import Features, RoundsModel


def known(number=12, seed=0):
    rng = np.random.default_rng(seed)
    return Features(rng.uniform(5, 50, number), rng.uniform(0, 400, number), rng.choice([0.0, 0.02], number))


TRUE = RoundsModel(0.01, 1e-5, 0.05)


def test_constants_that_made_the_rounds_are_found():
    features = known()
    model = rounds_model.fit_rounds(features, TRUE.rounds(features))
    np.testing.assert_allclose(model, TRUE, rtol=1e-6)
    np.testing.assert_allclose(rounds_model.left_out(features, TRUE.rounds(features)), TRUE.rounds(features))


def test_constants_are_never_negative_and_one_training_is_enough():
    features = known()
    model = rounds_model.fit_rounds(features, 1 / (features.progress * (0.01 + 1e-5 * features.drift)))
    assert model.drift_cost == pytest.approx(0, abs=1e-12)
    one = features.of([3])
    assert rounds_model.fit_rounds(one, np.array([7.0])).rounds(one) == pytest.approx(7.0)
    assert np.isnan(rounds_model.left_out(one, np.array([7.0])))


def test_too_much_drift_never_arrives():
    assert np.isinf(TRUE.rounds(Features(np.array([5.0]), np.array([1e3]), np.array([0.0]))))


def test_units_of_the_server_are_updated_by_every_client():
    parts = np.array([1.0, 2.0, 3.0, 4.0])
    progress, drift, noise = rounds_model.features(parts, 2, 5.0, 4.0, 40.0, 0.1)
    assert progress == pytest.approx(0.3 * 4 + 0.7 * 40)
    assert (drift, noise) == (pytest.approx(0.3 * 25), 0.1)


@pytest.mark.parametrize("rounds", [[], [0.0, 1.0], [np.nan, 2.0]])
def test_rounds_that_are_none_are_refused(rounds):
    with pytest.raises(BadInput, match="rounds: must be at least one finite number above 0"):
        rounds_model.fit_rounds(known(len(rounds)), np.array(rounds))


def test_momentum_that_starts_anew_costs_updates():
    velocity, moved = 0.0, 0.0
    for _ in range(7):
        velocity = 0.9 * velocity + 0.1  # a gradient of 1, and steps of 1 in the long run
        moved += velocity
    assert rounds_model.restarted(7.0, 0.9) == pytest.approx(moved)
    assert rounds_model.restarted(7.0, 0.0) == 7
