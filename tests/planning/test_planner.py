import dataclasses

import finite
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sfl_jax import fleet as fleets
from sfl_jax import optim, planning
from sfl_jax.commands import parts
from sfl_jax.commands.config import Config
from sfl_jax.errors import BadInput
from sfl_jax.fleet import Fleet, write_fleet
from sfl_jax.optim import bandwidth

TINY = Config(model="efficientnetv2-tiny", server_flops=1e10)
HEADER = "client,flops,uplink_bps,downlink_bps,memory_bytes,samples\n"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Slow clients on good links, so that they need the server."""
    draw = np.random.default_rng(0).random((3, 12))
    rates = dict(zip(("flops", "uplink_bps", "downlink_bps"), 10.0 ** (8 + draw), strict=True))
    path = tmp_path_factory.mktemp("fleet") / "fleet.csv"
    fleet = Fleet(client=np.arange(12).astype(str), memory_bytes=np.full(12, 1e9), **rates)
    write_fleet(path, fleet.with_samples(np.full(12, 96)))
    return dataclasses.replace(TINY, fleet=str(path))


def make_plan(config):
    return parts.planned(config)[1]


@pytest.fixture(scope="module")
def planned(tiny):
    return make_plan(tiny)


def least_time(fixed_s, work, flops):
    """The round of fixed cuts by plain bisection, independent of the code under test."""
    low, high = fixed_s.max(), fixed_s.max() + work.sum() / flops
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (low, middle) if (work / (middle - fixed_s)).sum() <= flops else (middle, high)
    return high


def test_terms_add_up_to_the_sessions(planned):
    table = planning.table(planned)
    terms = [name for name in table if name.endswith("_s") and name != "client_s"]
    assert len(terms) == 7
    np.testing.assert_allclose(sum(table[name] for name in terms), table["client_s"], rtol=1e-12)
    assert table["client_s"].max() == planned.plan.round_s
    assert table["share_flops"].sum() <= TINY.server_flops


def test_a_client_by_hand(planned):
    table, profile, fleet = planning.table(planned), planned.profile, planned.fleet
    k = int(np.argmax(table["share_flops"]))
    cut = table["cut"][k]
    samples = 96  # three whole batches of 32
    floats = profile.parameters[:cut].sum() + profile.state[:cut].sum()
    left = profile.forward_macs[cut:].sum() + profile.backward_macs[cut:].sum()
    assert table["client"][k] == str(k)
    assert table["unit"][k] == profile.names[cut - 1]
    assert table["model_down_s"][k] == pytest.approx(32 * floats / fleet.downlink_bps[k], rel=1e-12)
    assert table["server_s"][k] == pytest.approx(samples * 2 * left / table["share_flops"][k], rel=1e-12)


def test_pull_is_what_a_second_less_brings(planned):
    who = planning.binding(planned)
    assert who.together
    assert sorted(who.clients) == np.flatnonzero(planned.plan.shares).tolist()
    assert who.pull.sum() == pytest.approx(1)
    assert (np.diff(who.pull) <= 0).all()
    fixed_s, work, _ = planned.terms.at(planned.plan.cuts)
    step = 1e-4 * planned.plan.round_s
    for client, pull in zip(who.clients, who.pull, strict=True):
        nudge = step * (np.arange(12) == client)
        rounds_s = [least_time(fixed_s + sign * nudge, work, TINY.server_flops) for sign in (1, -1)]
        assert (rounds_s[0] - rounds_s[1]) / (2 * step) == pytest.approx(pull, rel=1e-3)
    assert who.pull[0] > 1.2 * who.pull[-1]  # equal pulls would prove nothing


def test_a_client_that_needs_no_server_holds_up_alone(tiny):
    slow = make_plan(dataclasses.replace(tiny, method="no_split"))
    who = planning.binding(slow)
    assert not who.together
    assert who.clients.tolist() == [int(np.argmax(slow.plan.client_s))]
    assert who.pull.tolist() == [1.0]
    gains = planning.gains(slow)
    assert gains.server_s == 0
    # Nearly all of its time is its own compute.
    assert gains.compute_s == pytest.approx(slow.plan.round_s * (1 - 1 / 1.1), rel=0.05)
    assert gains.compute_s > 10 * max(gains.uplink_s, gains.downlink_s)


def test_staged_rounds_are_held_up_before_and_after_the_server(planned, tiny):
    staged = planned._replace(
        planner=dataclasses.replace(planned.planner, barrier="staged"),
        plan=planned.plan._replace(shares=np.full(12, np.nan)),
    )
    table = planning.table(staged)
    down, forward, up, server, gradient, backward, model_up = (
        values for name, values in table.items() if name.endswith("_s") and name != "client_s"
    )
    _, work, _ = planned.terms.at(planned.plan.cuts)
    np.testing.assert_allclose(server, work / tiny.server_flops)

    def round_s(sooner):
        before = (down + forward + up - sooner).max()
        return before + server.sum() + (gradient + backward + model_up - sooner).max()

    who = planning.binding(staged)
    gains = [round_s(0) - round_s(1e-9 * (np.arange(12) == k)) for k in range(12)]
    assert who.clients.tolist() == np.flatnonzero(gains).tolist()


def test_equal_shares_are_held_up_by_the_one_that_uses_its_share(tiny):
    planned = make_plan(dataclasses.replace(tiny, method="equal_shares"))
    equal = TINY.server_flops / 12
    fixed_s, work, _ = planned.terms.at(planned.plan.cuts)
    who = planning.binding(planned)
    assert who.clients.tolist() == [int(np.argmax(fixed_s + work / equal))]


@pytest.mark.parametrize("method", ["alternating", pytest.param("regression", marks=pytest.mark.slow)])
def test_the_best_of_several_starts_is_kept(tiny, method):
    scarce = dataclasses.replace(tiny, method=method, server_flops=3e8)
    one = make_plan(scarce)
    starts = ("proportional", "equal", "random", "random")
    more = make_plan(dataclasses.replace(scarce, starts=",".join(starts))).plan
    asked = optim.solve(one.terms, 3e8, method, key=planning.round_key(scarce.seed, 0), starts=starts)
    np.testing.assert_array_equal(more.cuts, asked.cuts)
    assert (more.round_s, more.iterations) == (asked.round_s, asked.iterations)
    assert more.iterations > one.plan.iterations
    if method == "alternating":  # regression compares its starts on the curves, not on the table
        assert more.round_s <= one.plan.round_s


def test_gains_are_those_of_planning_anew(planned, tiny, tmp_path):
    gains = planning.gains(planned)
    richer = make_plan(dataclasses.replace(tiny, server_flops=1.1e10))
    after = {}
    for name in ("uplink_bps", "downlink_bps", "flops"):
        faster = dataclasses.replace(planned.fleet, **{name: getattr(planned.fleet, name) * 1.1})
        write_fleet(tmp_path / "fleet.csv", faster)
        after[name] = make_plan(dataclasses.replace(TINY, fleet=str(tmp_path / "fleet.csv"))).plan
    assert gains.server_s == pytest.approx(planned.plan.round_s - richer.plan.round_s, rel=1e-6)
    for gain_s, plan in zip(gains[1:], after.values(), strict=True):
        assert gain_s == pytest.approx(planned.plan.round_s - plan.round_s, rel=1e-6)
    assert np.min(gains) > 0
    assert len({round(gain_s / gains.server_s, 6) for gain_s in gains}) == 4


@pytest.mark.parametrize("factor", [1.02, 1.5, 1e4])
def test_the_smallest_server_is_smallest(planned, factor):
    fixed_s = np.stack([planned.terms.column(cut)[0] for cut in range(1, planned.terms.shape[1])])
    target_s = factor * fixed_s.min(axis=0).max()
    flops = planning.smallest_server(planned.fleet, planned.terms, float(target_s))
    if flops == 0:
        assert factor == 1e4
        return
    below, above = (optim.solve(planned.terms, flops * by) for by in (1 - 1e-6, 1 + 1e-6))
    assert below.bound_s > target_s  # proven: a smaller server cannot do it
    assert above.round_s <= target_s


def test_a_target_that_no_server_meets(tiny, planned):
    slowest_s = max(
        min(planned.terms.column(cut)[0][k] for cut in range(1, planned.terms.shape[1])) for k in range(12)
    )
    with pytest.raises(
        BadInput, match=r"target_round_s=0.001: .*client 0: needs more than .* s with any server"
    ):
        make_plan(dataclasses.replace(tiny, target_round_s=0.001))
    met = make_plan(dataclasses.replace(tiny, target_round_s=2 * slowest_s))
    assert met.plan.round_s == pytest.approx(2 * slowest_s, rel=1e-9)
    assert finite.differ_everywhere(met.planner.server_flops, tiny.server_flops)


@pytest.mark.parametrize(
    ("optimizer", "momentum", "slots"), [("sgd", 0.0, 0), ("sgd", 0.9, 1), ("adam", 0.0, 2), ("adam", 0.9, 2)]
)
def test_optimiser_state_is_counted(optimizer, momentum, slots):
    assert parts.work(Config(optimizer=optimizer, momentum=momentum)).optimizer_slots == slots


def test_fewer_bits_cross_the_cut(tiny, planned):
    coarse = make_plan(dataclasses.replace(tiny, bits_per_float=8))
    cuts = np.full(12, 2)
    before, after = (each.terms.seconds(cuts, np.ones(12)) for each in (planned, coarse))
    np.testing.assert_allclose(after.gradient_down, before.gradient_down / 4, rtol=1e-12)
    labels_s = 96 * 32 / planned.fleet.uplink_bps  # labels keep their bits
    np.testing.assert_allclose(after.smashed_up - labels_s, (before.smashed_up - labels_s) / 4, rtol=1e-12)
    np.testing.assert_array_equal(after.model_up, before.model_up)
    assert coarse.plan.round_s < planned.plan.bound_s


@pytest.mark.parametrize(
    ("fleet", "changes", "words"),
    [
        ("a,1e9,1e6,1e6,1e9,10\ncam-7,1e9,1e6,1e6,1e2,10\n", {}, "client cam-7: every cut needs"),
        ("a,1e9,1e6,1e6,1e9,10\n", {"min_cut": 99}, "--min_cut=99: must be at most"),
        ("", {}, "no clients"),
    ],
)
def test_what_cannot_be_planned(tmp_path, fleet, changes, words):
    path = tmp_path / "fleet.csv"
    path.write_text(HEADER + fleet)
    with pytest.raises(BadInput, match=words) as caught:
        make_plan(dataclasses.replace(TINY, fleet=str(path), **changes))
    assert "\n" not in str(caught.value)


def test_in_training_too_a_client_that_no_plan_serves_is_named(tiny, planned):
    """Unless links vary: the next round may serve it."""
    memory_bytes = np.where(np.arange(12) == 7, 1.0, planned.terms.memory_bytes)
    terms = planned.terms._replace(memory_bytes=memory_bytes)
    with pytest.raises(BadInput, match="client 7: every cut needs"):
        planning.serve(planned.planner, planned.fleet, terms, 0)
    served = planning.serve(dataclasses.replace(planned.planner, links="fading"), planned.fleet, terms, 0)
    assert np.flatnonzero(~served.present).tolist() == [7]
    assert "client 7" in served.left_out[0]


def test_the_random_fleet_has_the_samples_that_are_asked_for():
    fleet = parts.read_fleet(Config(clients=5, samples_per_client=7))
    assert fleet.samples.tolist() == [7] * 5


def test_a_fleet_file_must_say_how_many_samples(tmp_path):
    path = tmp_path / "fleet.csv"
    path.write_text("client,flops,uplink_bps,downlink_bps,memory_bytes\na,1e9,1e6,1e6,1e9\n")
    with pytest.raises(BadInput, match="column samples: missing"):
        make_plan(dataclasses.replace(TINY, fleet=str(path)))


def test_links_by_distance_replace_the_rates_and_fade_with_the_round(tiny, planned):
    fleet = planned.fleet
    far = dataclasses.replace(fleet, distance_m=np.geomspace(10, 400, 12), transmit_w=np.full(12, 0.2))
    ids = np.array([7, 2])

    def rates(links, round, chosen=slice(None), **part):
        # One fade lasts the whole round: else the mean makes all rounds equal.
        lasting = 1e9 if links == "fading" else 0.0
        planner = dataclasses.replace(planned.planner, links=links, coherence_s=lasting)
        some = np.arange(12)[chosen]
        terms = planning.linked(planner, far.take(some), planned.terms.take(some), round, **part)
        return terms.uplink_bps, terms.downlink_bps

    np.testing.assert_array_equal(rates("fixed", 0), (fleet.uplink_bps, fleet.downlink_bps))
    plain, faded = rates("shannon", 0), rates("fading", 3)
    assert (np.diff(plain) < 0).all()  # farther is slower
    np.testing.assert_array_equal(plain, rates("shannon", 3))
    for round in (0, 4):
        assert finite.differ_everywhere(faded, rates("fading", round))
    expected = fleets.fading_rates(far, fleets.Links(coherence_s=1e9), tiny.seed, 3)
    np.testing.assert_array_equal(faded, (expected.uplink_bps, expected.downlink_bps))
    # A cohort's clients fade as in the whole fleet; `ids` says which they are.
    np.testing.assert_array_equal(rates("fading", 3, ids, ids=ids), np.array(faded)[:, ids])
    assert finite.differ_everywhere(np.array(rates("fading", 3, ids)), np.array(faded)[:, ids])


def test_a_shorter_fade_is_averaged_over_what_the_whole_model_takes_to_send(tiny, planned):
    far = dataclasses.replace(planned.fleet, distance_m=np.full(12, 200.0), transmit_w=np.full(12, 0.2))
    planner = dataclasses.replace(planned.planner, links="fading", coherence_s=0.05)
    terms = planning.linked(planner, far, planned.terms, 3)
    bits = float(planned.terms.model_bits[-1])
    expected = fleets.fading_rates(far, fleets.Links(coherence_s=0.05), tiny.seed, 3, transfer_bits=bits)
    np.testing.assert_array_equal(terms.uplink_bps, expected.uplink_bps)
    one = fleets.fading_rates(far, fleets.Links(coherence_s=1e9), tiny.seed, 3)
    assert terms.uplink_bps.std() < 0.8 * one.uplink_bps.std()


def test_a_fleet_without_distances_cannot_have_links_by_distance(tiny):
    with pytest.raises(BadInput, match=r"^links=fading: the fleet has no column distance_m"):
        make_plan(dataclasses.replace(tiny, links="fading"))


def test_random_fleets_are_planned_on_fading_links():
    config = dataclasses.replace(TINY, clients=4, links="fading")
    fading = make_plan(config)
    rates = fleets.fading_rates(fading.fleet, fleets.Links(), config.seed, 0)
    np.testing.assert_array_equal(fading.terms.uplink_bps, rates.uplink_bps)
    fixed = make_plan(dataclasses.replace(config, links="fixed"))
    assert finite.differ_everywhere(fading.plan.round_s, fixed.plan.round_s)


@pytest.mark.parametrize("links", ["fixed", "fading"])
def test_rounds_of_cohorts_are_those_of_a_training(links):
    config = dataclasses.replace(
        TINY, clients=12, cohort_size=4, links=links, coherence_s=0.1 * (links == "fading"), seed=3
    )
    planned = make_plan(config)
    rounds_s = planning.cohort_rounds_s(planned, 4, seed=3, rounds=6)
    for round, round_s in enumerate(rounds_s):
        ids = fleets.cohort(3, round, config.clients, 4)
        terms = planned.terms
        if links == "fading":
            bits = float(terms.model_bits[-1])
            now = fleets.Links(coherence_s=0.1)
            rates = fleets.fading_rates(planned.fleet, now, 3, round, transfer_bits=bits)
            terms = terms._replace(uplink_bps=rates.uplink_bps, downlink_bps=rates.downlink_bps)
        assert round_s == optim.solve(terms.take(ids), config.server_flops).round_s
    assert len({*rounds_s}) > 1
    assert not len(planning.cohort_rounds_s(planned, config.clients))


def test_at_cut_0_images_go_up_as_they_are_stored():
    """28 x 28 bytes and a label of 4 bytes; if the stored size is unknown, images have the network's size."""
    for stored, side in ((28, 28), (0, 32)):
        _, _, terms = parts.read_terms(dataclasses.replace(TINY, clients=2, stored_size=stored))
        assert terms.up_bits[0] == 8 * side * side + 32


def test_parts_of_a_pooled_band_are_of_one_width():
    """Separate links are 5 MHz up and 10 MHz down. A part of the pooled band is 10 MHz in both directions."""
    config = dataclasses.replace(TINY, clients=4, links="shannon")
    separate, pooled = (
        parts.read_terms(dataclasses.replace(config, band=b))[::2] for b in ("separate", "pooled")
    )
    (fleet, narrow), (_, wide) = separate, pooled
    gain = 4.65e-5 * fleet.distance_m**-3.5
    for terms, hz in ((narrow, 5e6), (wide, 10e6)):
        rates = hz * np.log2(1 + fleet.transmit_w * gain / (3.98e-21 * hz))
        np.testing.assert_allclose(terms.uplink_bps, rates, rtol=1e-12)
    np.testing.assert_array_equal(narrow.downlink_bps, wide.downlink_bps)


@pytest.mark.parametrize("band", ["pooled", "separate"])
def test_a_shared_band_shortens_the_round_and_adds_up(tiny, band):
    links_bind = dataclasses.replace(tiny, server_flops=1e13)
    shared = make_plan(dataclasses.replace(links_bind, band=band))
    assert shared.plan.bound_s <= shared.plan.round_s < 0.8 * make_plan(links_bind).plan.round_s
    table = planning.table(shared)
    for way in ("uplink", "downlink"):
        assert table[f"{way}_part"].sum() == pytest.approx(12, rel=1e-6)
        assert table[f"{way}_part"].sum() <= 12
    assert (table["uplink_part"] == table["downlink_part"]).all() == (band == "pooled")
    terms = [name for name in table if name.endswith("_s") and name != "client_s"]
    np.testing.assert_allclose(sum(table[name] for name in terms), table["client_s"], rtol=1e-12)


@pytest.mark.parametrize("band", ["pooled", "separate"])
def test_pull_under_a_shared_band_is_what_a_second_less_brings(tiny, band):
    """Compares with the least rounds of the same cuts, by solve_bandwidth on tables with one column."""
    shared = make_plan(dataclasses.replace(tiny, band=band))
    who = planning.binding(shared)
    assert who.pull.sum() == pytest.approx(1)
    budgets = np.r_[TINY.server_flops, [12.0] if band == "pooled" else [12.0, 12.0]]
    fixed_s, amounts, _ = bandwidth.demands(shared.terms, (1.0, 1.0), pooled=band == "pooled")
    rows, cuts = np.arange(12), shared.plan.cuts
    mine = amounts[:, rows, cuts] / budgets[:, None]

    def round_s(nudge):
        with jax.enable_x64(True):
            one = fixed_s[rows, cuts][:, None] + nudge[:, None], mine[:, :, None]
            return float(bandwidth._compiled(*one, np.ones((12, 1), bool), np.ones(12, bool))[3])

    step = 1e-3 * shared.plan.round_s
    for place in (0, 5, 11):
        nudge = step * (np.arange(12) == who.clients[place])
        slope = (round_s(nudge) - round_s(-nudge)) / (2 * step)
        assert slope == pytest.approx(who.pull[place], rel=0.05)
    assert who.pull[0] > 1.2 * who.pull[-1]


def test_a_full_server_holds_up_also_where_a_client_alone_ends_as_late(planned):
    """With many clients, one that trains alone may end within rounding of the round without holding it up."""
    alone = int(np.argmin(planned.plan.shares))
    shares = np.where(np.arange(12) == alone, 0.0, planned.plan.shares)
    shares *= TINY.server_flops / shares.sum()
    ends = np.where(np.arange(12) == alone, planned.plan.round_s * (1 - 1e-8), planned.plan.client_s)
    who = planning.binding(planned._replace(plan=planned.plan._replace(shares=shares, client_s=ends)))
    assert who.together
    assert alone not in who.clients


def test_a_key_has_one_purpose():
    """The keys of rounds differ from those of units (folded from the seed) and of what units draw."""
    seed = jax.random.key(5)

    def bits(key):
        return tuple(jax.random.key_data(key).tolist())

    units = [jax.random.fold_in(seed, unit) for unit in range(110)]
    drawn = {
        bits(key)
        for unit in units[:30]
        for key in (unit, *jax.vmap(jax.random.fold_in, (None, 0))(unit, jnp.arange(30)))
    }
    purposes = (planning.PLAN, planning.TRAINING)
    rounds = {bits(planning.round_key(5, round, each)) for round in range(110) for each in purposes}
    assert len(rounds) == 220
    assert not rounds & (drawn | set(map(bits, units)))
    assert bits(planning.round_key(6, 0)) not in rounds
