import dataclasses

import numpy as np
import pytest

from sfl_jax import optim, planning
from sfl_jax.commands import parts
from sfl_jax.commands.config import Config, validate
from sfl_jax.errors import BadInput
from sfl_jax.fleet import Fleet
from sfl_jax.planning import Planner
from sfl_jax.run import suiting

LIMIT = 3e7  # less than half of what plans without a limit take
CONFIG = Config(model="efficientnetv2-tiny", server_flops=1e10)


@pytest.fixture(scope="module")
def free():
    """Slow clients on good links, so that they need the server."""
    draw = np.random.default_rng(0).random((3, 12))
    rates = dict(zip(("flops", "uplink_bps", "downlink_bps"), 10.0 ** (8 + draw), strict=True))
    fleet = Fleet(client=np.arange(12).astype(str), memory_bytes=np.full(12, 1e9), **rates)
    _, profile, terms = parts.read_terms(CONFIG, fleet.with_samples(np.full(12, 96)))
    planner = parts.planner(CONFIG)
    return planning.Planned(planner, profile, fleet, terms, planning.solve(planner, fleet, terms))


def within(free, **changes):
    planner = dataclasses.replace(free.planner, **{"server_memory_bytes": LIMIT} | changes)
    return free._replace(planner=planner, plan=planning.solve(planner, free.fleet, free.terms))


@pytest.mark.parametrize("changes", [{}, {"barrier": "staged"}, {"band": "pooled"}], ids=str)
def test_a_limited_memory_lengthens_the_round_and_is_kept(free, changes):
    some, roomy = within(free, **changes), within(free, **changes, server_memory_bytes=0.0)
    table = planning.table(some)
    assert 0 < table["server_bytes"].sum() <= LIMIT < planning.server_bytes(roomy).sum()
    assert "server_bytes" not in planning.table(roomy)
    assert roomy.plan.round_s < some.plan.bound_s <= some.plan.round_s
    more = within(free, **changes, server_memory_bytes=1.1 * LIMIT)
    assert planning.memory_gain_s(some) == pytest.approx(some.plan.round_s - more.plan.round_s)
    assert planning.memory_gain_s(some) > 0


def test_planners_that_do_not_know_the_limit_are_refused():
    with pytest.raises(BadInput, match=r"^server_memory_bytes=5: needs method=exact, not greedy$"):
        Planner("greedy", server_memory_bytes=5.0)
    with pytest.raises(BadInput, match=r"^server_memory_bytes=5: needs barrier=session or .* not lockstep$"):
        Planner(barrier="lockstep", server_memory_bytes=5.0)
    for wrong in (-1.0, np.inf, np.nan):
        with pytest.raises(
            BadInput, match=r"^server_memory_bytes=.*: must be a finite number of bytes, or 0"
        ):
            Planner(server_memory_bytes=wrong)


def test_a_cohort_that_does_not_fit_is_refused_before_the_first_round(free):
    weak = free.terms._replace(memory_bytes=np.where(np.arange(12) < 6, free.terms.needed_bytes[2], 1e9))
    cohorts = [(0, np.arange(6, 12)), (1, np.arange(4, 10)), (2, np.arange(6))]
    two = 2 * weak.server_bytes[2]
    planner = dataclasses.replace(free.planner, server_memory_bytes=float(two))
    planning.check_rounds(planner, free.fleet, weak, cohorts[:2])
    with pytest.raises(
        BadInput, match=r"^round 3: server_memory_bytes=.*: 6 of 6 clients cannot train alone"
    ):
        planning.check_rounds(planner, free.fleet, weak, cohorts)
    with pytest.raises(BadInput, match="are missing"):
        planning.serve(planner, free.fleet, weak, 0)


def test_schemes_with_one_half_for_all_are_refused_and_rivals_must_know_the_limit():
    planner = Planner(server_memory_bytes=5.0)
    for name in ("sfl_v2", "psl", "sl"):
        scheme = parts.scheme(Config(scheme=name))
        with pytest.raises(BadInput, match=rf"server_memory_bytes=5: needs scheme=sfl, .* not {name}$"):
            suiting.planner_for(scheme, planner)
    assert suiting.planner_for(parts.scheme(Config(scheme="fl")), planner).method == "no_split"
    assert suiting.rivals_for(planner, ("no_split", "common_cut")) == ("no_split",)
    assert suiting.rivals_for(Planner(), ("no_split", "common_cut")) == ("no_split", "common_cut")
    with pytest.raises(
        BadInput, match=r"^rivals: common_cut does not know server_memory_bytes=5; choose some"
    ):
        suiting.check_rivals(planner, ("no_split", "common_cut"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "greedy"}, "--server_memory_bytes=5: needs --method=exact, not greedy"),
        ({"target_round_s": 3.0}, "--target_round_s=3: needs --server_memory_bytes=0"),
    ],
)
def test_flags_that_exclude_a_limit(changes, words):
    with pytest.raises(BadInput) as caught:
        validate(Config(server_memory_bytes=5.0, **changes), "plan")
    assert words in str(caught.value)


def test_the_flag_reaches_the_planner():
    assert parts.planner(Config(server_memory_bytes=5.0)).server_memory_bytes == 5.0
    assert optim.CLOCKS.keys() >= {"staged"}
