"""Which clients come in time, and how long a round lasts that waits for them."""

import numpy as np
import pytest

from sfl_jax import fleet, optim
from sfl_jax.fleet import Delays, Faults
from sfl_jax.planning import Planner, turnout

SERVER = 10.0


def planned(before, server, after, barrier="session"):
    """(planner, terms, plan) of clients with one cut and these seconds.

    server: on the whole server under the staged barrier, on a share under the session barrier.
    """
    before, server, after = (np.array(part, float) for part in (before, server, after))
    clients = len(before)
    amounts = {
        name: np.zeros(1) for name in ("up_bits", "down_bits", "model_bits", "needed_bytes", "server_bytes")
    }
    # Everything before the server is compute, everything after it is a download.
    terms = optim.Terms(
        samples=np.ones(clients), steps=np.ones(clients), flops=1 / before, uplink_bps=np.ones(clients),
        downlink_bps=1 / after, memory_bytes=np.ones(clients), energy=None, forward_flop=np.ones(1),
        backward_flop=np.zeros(1), work_flop=np.ones(1), permitted=np.ones(1, bool),
        **{**amounts, "down_bits": np.ones(1)},
    )  # fmt: skip
    staged = barrier == "staged"
    whole = SERVER * server if staged else np.ones(clients)
    terms = terms._replace(samples=whole, flops=terms.flops * whole, downlink_bps=terms.downlink_bps * whole)
    shares = np.full(clients, np.nan) if staged else 1 / server
    round_s = before.max() + server.sum() + after.max() if staged else (before + server + after).max()
    own = optim.Plan(np.zeros(clients, np.int32), shares, before + server + after, round_s, round_s, 0)
    return Planner(server_flops=SERVER, barrier=barrier), terms, own


def went(planned, stays, slowdown, factor=0.0, present=None):
    planner, terms, plan = planned
    delayed = Delays(np.array(stays, bool), np.array(slowdown, float))
    return turnout(planner, factor, terms, plan, delayed, present)


@pytest.mark.parametrize(
    ("stays", "slowdown", "factor", "came", "round_s"),
    [
        ([1, 1, 1], [1, 1, 1], 0, [1, 1, 1], 10),  # nothing happens
        ([1, 1, 1], [2, 1, 1], 0, [1, 1, 1], 14),  # no deadline: waits for the slowest client
        ([1, 0, 1], [1, 1, 1], 0, [1, 0, 1], 8),  # does not wait for a drop-out
        ([0, 0, 0], [1, 1, 1], 0, [0, 0, 0], 10),  # no client came: the planned round is lost
        ([1, 1, 1], [2, 1, 1], 1.3, [0, 1, 1], 13),  # late: the server waited until the deadline
        ([1, 0, 1], [1, 1, 1], 1.5, [1, 0, 1], 15),  # the server cannot know that a client will never come
        ([1, 1, 1], [1.5, 1, 1], 1.5, [1, 1, 1], 11),  # late for the plan, in time for the deadline
        ([1, 1, 1], [9, 9, 9], 1.0, [0, 0, 0], 10),
        ([1, 1, 1], [1, 1, 1], 1.0, [1, 1, 1], 10),  # the plan itself is in time
    ],
)
def test_who_came_and_how_long_it_took(stays, slowdown, factor, came, round_s):
    result = went(planned([4, 7, 1], [2, 2, 3], [2, 1, 2]), stays, slowdown, factor)
    np.testing.assert_array_equal(result.came, np.array(came, bool))
    assert result.round_s == pytest.approx(round_s, rel=1e-14)


def test_what_a_plan_adds_to_its_slowest_client_is_added_to_the_late_too():
    config, terms, plan = planned([4, 7, 1], [2, 2, 3], [2, 1, 2])
    plan = plan._replace(round_s=plan.round_s + 0.5)
    for slowdown, round_s in (([1, 1, 1], 10.5), ([2, 1, 1], 14.5)):
        assert went((config, terms, plan), [1, 1, 1], slowdown).round_s == pytest.approx(round_s)


@pytest.mark.parametrize(
    ("stays", "slowdown", "factor", "came", "round_s"),
    [
        ([1, 1], [1, 1], 0, [1, 1], 22),  # 10 + (1 + 1) + 10
        (
            [0, 1],
            [1, 1],
            0,
            [0, 1],
            12,
        ),  # 1 + 1 + 10: the first barrier does not wait, the server has less to do
        ([1, 1], [2, 1], 0, [1, 1], 32),  # 20 + 2 + 10: only one barrier is later
        ([1, 1], [1, 2], 0, [1, 1], 32),  # 10 + 2 + 20
        ([0, 0], [1, 1], 0, [0, 0], 22),
        ([0, 1], [1, 1], 1.5, [0, 1], 33),  # the server began at 33 - 12, without the first client
        ([1, 1], [2, 1], 1.5, [1, 1], 32),  # in time for both
        ([1, 1], [3, 1], 1.5, [0, 1], 33),  # not for the first barrier; 21 + 1 + 10
        ([1, 1], [1, 3], 1.5, [1, 0], 33),  # not for the second
        ([0, 1], [1, 1], 1.0, [0, 1], 22),
    ],
)
def test_at_two_barriers_each_waits_for_its_own(stays, slowdown, factor, came, round_s):
    """Before the server (10, 1) s, on it (1, 1) s, after it (1, 10) s."""
    result = went(planned([10, 1], [1, 1], [1, 10], "staged"), stays, slowdown, factor)
    np.testing.assert_array_equal(result.came, np.array(came, bool))
    assert result.round_s == pytest.approx(round_s, rel=1e-14)


def test_nobody_waits_for_whoever_is_not_in_the_plan():
    for barrier, round_s in (("session", 2 + 0.1 + 20), ("staged", 2 + 1 + 20)):
        config, terms, _ = planned([10, 1], [1, 1], [1, 10], barrier)
        here = np.array([False, True])
        own = optim.solve(terms, SERVER, "exact", barrier, present=here)
        result = went((config, terms, own), [1, 1], [5, 2], 3.0, here)
        np.testing.assert_array_equal(result.came, here)
        assert result.round_s == pytest.approx(round_s)


def test_a_server_that_works_for_whoever_waits_does_so_for_the_late_too():
    """Both clients need 4 s of the server, and their data arrive after 1 and 2 s."""
    _, terms, plan = planned([1, 2], [4, 4], [1, 1], "staged")
    planner = Planner(server_flops=SERVER, method="work_conserving")
    own = plan._replace(client_s=np.array([6.0, 10.0]), round_s=10.0)
    for stays, slowdown, round_s in (
        ([1, 1], [1, 1], 2 + 4 + 3 + 1),
        ([0, 1], [1, 1], 2 + 4 + 1),
        ([1, 1], [1, 5], 10 + 4 + 5),
        ([1, 1], [5, 1], 5 + 4 + 5),  # the slow client has the longer way back, so the other waits
    ):
        assert went((planner, terms, own), stays, slowdown).round_s == pytest.approx(round_s)


def test_delays_belong_to_round_and_client():
    faults = Faults(drop_probability=0.3, jitter=0.5)
    everybody, some = faults.delays(4, 7, np.arange(4000)), faults.delays(4, 7, np.array([3, 90]))
    np.testing.assert_array_equal(some.stays, everybody.stays[[3, 90]])
    np.testing.assert_array_equal(some.slowdown, everybody.slowdown[[3, 90]])
    assert everybody.stays.mean() == pytest.approx(0.7, abs=0.03)
    assert everybody.slowdown.min() >= 1
    assert everybody.slowdown.mean() == pytest.approx(1.5, abs=0.04)
    later = faults.delays(4, 8, np.arange(4000))
    assert (later.slowdown != everybody.slowdown).mean() > 0.99
    assert (later.stays != everybody.stays).mean() == pytest.approx(2 * 0.7 * 0.3, abs=0.03)


def test_without_delays_all_is_as_planned():
    none = Faults().delays(0, 0, np.arange(3))
    for barrier in ("session", "staged"):
        planner, terms, plan = planned([4, 7, 1], [2, 2, 3], [2, 1, 2], barrier)
        plan = plan._replace(round_s=np.nextafter(plan.round_s, np.inf))
        result = turnout(planner, 0.0, terms, plan, none)
        assert result.came.all()
        assert result.round_s == plan.round_s
    np.testing.assert_array_equal(fleet.slowdowns(0, 0, np.arange(5), 0.0), 1)
