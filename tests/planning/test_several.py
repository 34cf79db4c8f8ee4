"""Several servers: pulls against finite differences of the planned round."""

import numpy as np
import pytest
from scipy.optimize import brentq

from sfl_jax import planning
from sfl_jax.commands import parts
from sfl_jax.commands.config import Config
from sfl_jax.fleet import Fleet, ServerList

CONFIG = Config(model="efficientnetv2-tiny")
STEP_S = 1e-4


def fleet_of(draw):
    """Clients whose rates are 10^8 to 10^9 FLOP/s and bit/s. draw: (3, K) from 0 to 1."""
    rates = dict(zip(("flops", "uplink_bps", "downlink_bps"), 10.0 ** (8 + draw), strict=True))
    count = draw.shape[1]
    fleet = Fleet(client=np.arange(count).astype(str), memory_bytes=np.full(count, 1e9), **rates)
    return fleet.with_samples(np.full(count, 96))


def planned(fleet, flops, links=None):
    """A plan for servers with these FLOP/s. links: (K, E) which links there are; None: all."""
    links = np.ones((len(fleet), len(flops))) if links is None else links
    rates = (part[:, None] * links for part in (fleet.uplink_bps, fleet.downlink_bps))
    names, memory = np.array([f"s{e}" for e in range(len(flops))]), np.full(len(flops), np.inf)
    _, profile, terms = parts.read_terms(CONFIG, fleet)
    return planning.plan_servers(profile, fleet, terms, ServerList(names, np.array(flops), memory, *rates))


def round_s(made, later_s):
    """The round of the same servers and cuts, where each client needs `later_s` (K,) more off the server."""
    plan, terms = made.plan, made.terms
    fixed_s, work, _ = terms.at(terms.columns(plan.cuts, plan.codecs))
    fixed_s = fixed_s + later_s
    ends_s = [fixed_s[work == 0].max(initial=0)]
    for e, flops in enumerate(made.servers.flops):
        own = (plan.servers == e) & (work > 0)
        if own.any():
            low = fixed_s[own].max()
            ends_s.append(
                brentq(
                    lambda time_s, own=own, flops=flops: 1
                    - (work[own] / np.maximum(time_s - fixed_s[own], 1e-30)).sum() / flops,
                    low, low + 1e6, xtol=1e-13, rtol=1e-14,
                )
            )  # fmt: skip
    return max(ends_s)


@pytest.mark.parametrize("flops", [[3e9, 1e9], [2e8, 3e8, 5e8], [1e12, 1e11]], ids=str)
def test_pulls_are_the_slopes_of_the_round(flops):
    made = planned(fleet_of(np.random.default_rng(len(flops)).random((3, 9))), flops)
    count = len(made.fleet)
    assert round_s(made, np.zeros(count)) == pytest.approx(made.plan.round_s, rel=1e-9)
    slopes = [(round_s(made, step) - round_s(made, -step)) / (2 * STEP_S) for step in STEP_S * np.eye(count)]
    pulls = planning.several_pulls(made)
    np.testing.assert_allclose(pulls, slopes, atol=1e-5)
    assert pulls.sum() == pytest.approx(1)
    table = planning.several_table(made)
    np.testing.assert_array_equal(table["pull_percent"], 100 * pulls)
    for e, server_flops in enumerate(flops):
        own = made.plan.servers == e
        given = table["share_percent"][own].sum() / 100 * server_flops
        assert given == pytest.approx(table["share_flops"][own].sum())


def test_where_two_servers_end_together_all_pulls_add_up_to_1():
    """Twins: each client is there twice, with a link to one server only."""
    twice = fleet_of(np.repeat(np.random.default_rng(5).random((3, 4)), 2, axis=1))
    made = planned(twice, [3e8, 3e8], np.tile(np.eye(2), (4, 1)))
    pulls = planning.several_pulls(made)
    assert sorted(planning.several_binding(made)) == [0, 1]
    assert pulls.sum() == pytest.approx(1)
    np.testing.assert_allclose(pulls[::2], pulls[1::2], rtol=1e-9)
    for k, step in enumerate(STEP_S * np.eye(8)):
        now_s = round_s(made, 0 * step)
        assert round_s(made, -step) == pytest.approx(now_s)  # the other server ends as late as before
        assert (round_s(made, step) - now_s) / STEP_S == pytest.approx(2 * pulls[k], abs=1e-3)
    assert round_s(made, np.full(8, -STEP_S)) == pytest.approx(made.plan.round_s - STEP_S, abs=1e-9)
