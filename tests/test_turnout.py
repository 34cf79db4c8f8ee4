"""Who comes, and how long a round lasts that waits for them."""

import numpy as np
import pytest

from sfl_jax import fleet
from sfl_jax.config import Config
from sfl_jax.turnout import Delays, delays, turnout

CLIENT_S = np.array([8.0, 10.0, 6.0])


@pytest.mark.parametrize(
    ("stays", "slowdown", "factor", "came", "round_s"),
    [
        ([1, 1, 1], [1, 1, 1], 0, [1, 1, 1], 10),  # nothing happens
        ([1, 1, 1], [2, 1, 1], 0, [1, 1, 1], 16),  # no deadline: the slowest is waited for
        ([1, 0, 1], [1, 1, 1], 0, [1, 0, 1], 8),  # a drop-out is not waited for
        ([0, 0, 0], [1, 1, 1], 0, [0, 0, 0], 10),  # nobody came: the planned round is lost
        ([1, 1, 1], [2, 1, 1], 1.5, [0, 1, 1], 15),  # late: the server waited until the deadline
        ([1, 0, 1], [1, 1, 1], 1.5, [1, 0, 1], 15),  # the server cannot know that one will never come
        ([1, 1, 1], [1.5, 1, 1], 1.5, [1, 1, 1], 12),  # late for the plan, in time for the deadline
        ([1, 1, 1], [9, 9, 9], 1.0, [0, 0, 0], 10),
        ([1, 1, 1], [1, 1, 1], 1.0, [1, 1, 1], 10),  # the plan itself is in time
    ],
)
def test_who_came_and_how_long_it_took(stays, slowdown, factor, came, round_s):
    delayed = Delays(np.array(stays, bool), np.array(slowdown, float))
    result = turnout(CLIENT_S, 10.0, delayed, factor)
    np.testing.assert_array_equal(result.came, np.array(came, bool))
    assert result.round_s == round_s


def test_what_a_barrier_adds_is_added_to_everybody():
    delayed = Delays(np.ones(3, bool), np.array([1.0, 1.2, 1.0]))
    assert turnout(CLIENT_S, 13.0, delayed, 0).round_s == pytest.approx(15)


def test_delays_belong_to_round_and_client():
    config = Config(drop_probability=0.3, jitter=0.5, seed=4)
    everybody, some = delays(config, 7, np.arange(4000)), delays(config, 7, np.array([3, 90]))
    np.testing.assert_array_equal(some.stays, everybody.stays[[3, 90]])
    np.testing.assert_array_equal(some.slowdown, everybody.slowdown[[3, 90]])
    assert everybody.stays.mean() == pytest.approx(0.7, abs=0.03)
    assert everybody.slowdown.min() >= 1
    assert everybody.slowdown.mean() == pytest.approx(1.5, abs=0.04)
    assert (delays(config, 8, np.arange(4000)).slowdown != everybody.slowdown).mean() > 0.99


def test_without_delays_all_is_as_planned():
    none = delays(Config(), 0, np.arange(3))
    result = turnout(CLIENT_S, 10.0, none, 0)
    assert result.came.all()
    assert result.round_s == 10
    np.testing.assert_array_equal(fleet.slowdowns(0, 0, np.arange(5), 0.0), 1)
