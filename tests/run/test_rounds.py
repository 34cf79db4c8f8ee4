"""The preparation of a round on the host, before any device takes part."""

import dataclasses
import gc

import finite
import jax
import jax.numpy as jnp
import numpy as np
import plain
import pytest
from commands import small_world

from sfl_jax import fleet, models, optim, planning
from sfl_jax.commands import parts
from sfl_jax.commands.config import Config
from sfl_jax.errors import BadInput
from sfl_jax.federated.round import Diverged, Outcome
from sfl_jax.models import keras_weights
from sfl_jax.run import clocks as run_clocks
from sfl_jax.run import loop
from sfl_jax.run.checkpoints import Progress
from sfl_jax.run.parts import RIVALS
from sfl_jax.run.rounds import cohort, prepare
from sfl_jax.run.state import State, initial_model, start

SMALL = Config(
    model="efficientnetv2-tiny",
    clients=30,
    cohort_size=6,
    server_flops=1e10,
    links="fading",
    **plain.SETTINGS,
    coherence_s=1e9,
)


@pytest.fixture(scope="module")
def built():
    return parts.build(SMALL).parts


def test_a_cohort_is_planned_on_the_links_of_its_round(built):
    for round in (0, 5):
        ids, clients, terms, _ = cohort(built, round)
        faded = fleet.fading_rates(built.fleet, fleet.Links(coherence_s=1e9), SMALL.seed, round)
        np.testing.assert_array_equal(terms.uplink_bps, faded.uplink_bps[ids])
        np.testing.assert_array_equal(terms.downlink_bps, faded.downlink_bps[ids])
        np.testing.assert_array_equal(terms.flops, built.fleet.flops[ids])
        np.testing.assert_array_equal(clients.client, built.fleet.client[ids])
        other = fleet.fading_rates(built.fleet, fleet.Links(coherence_s=1e9), SMALL.seed, round + 1)
        assert finite.differ_everywhere(terms.uplink_bps, other.uplink_bps[ids])
    fixed = dataclasses.replace(built, planner=dataclasses.replace(built.planner, links="fixed"))
    ids, _, terms, _ = cohort(fixed, 0)
    np.testing.assert_array_equal(terms.uplink_bps, built.fleet.uplink_bps[ids])


def test_a_fleet_without_distances_is_refused_before_anything_compiles(tmp_path):
    path = tmp_path / "fleet.csv"
    fleet.write_fleet(path, dataclasses.replace(fleet.random_fleet(30, seed=0), distance_m=None))
    with pytest.raises(BadInput, match=r"links=fading: the fleet has no column distance_m"):
        parts.build(dataclasses.replace(SMALL, fleet=str(path)))
    fixed = dataclasses.replace(SMALL, fleet=str(path), links="fixed", coherence_s=0.0)
    assert len(parts.build(fixed).parts.fleet) == 30


@pytest.mark.parametrize(
    ("method", "memory_bytes", "reason"),
    [
        ("exact", 1000, "every cut needs"),
        ("common_cut", 1000, "cut . needs"),
        ("no_split", 2e6, "cut 8 needs"),
    ],
)
def test_a_client_that_cannot_be_served_in_a_later_round_is_refused_at_the_start(
    method, memory_bytes, reason, tmp_path
):
    path = tmp_path / "fleet.csv"
    poor = min({*range(30)} - {*fleet.cohort(SMALL.seed, 0, 30, 6)})
    clients = fleet.random_fleet(30, seed=0)
    clients.memory_bytes[:] = 1e12
    clients.memory_bytes[poor] = memory_bytes
    fleet.write_fleet(path, clients)
    first = next(round for round in range(99) if poor in fleet.cohort(SMALL.seed, round, 30, 6))
    fixed = {"links": "fixed", "coherence_s": 0.0}
    config = dataclasses.replace(SMALL, fleet=str(path), method=method, **fixed, rounds=first + 1)
    with pytest.raises(BadInput, match=rf"fleet.csv: round {first + 1}: .* client {poor}: {reason}"):
        parts.build(config)
    # A client that does not come needs no service.
    parts.build(dataclasses.replace(config, rounds=first))


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"rounds": 0}, "--rounds=0: must be an integer, at least 1"),
        ({"cohort_size": 200}, "--cohort_size=200: must be at most --clients=30"),
        (
            {"optimizer": "adamw"},
            "--optimizer=adamw: must be one of sgd, adam; adam with --weight_decay is AdamW",
        ),
    ],
)
def test_settings_from_python_are_held_to_the_rules_of_flags(settings, line):
    with pytest.raises(BadInput) as caught:
        parts.build(dataclasses.replace(SMALL, **settings))
    assert str(caught.value) == line


def thrifty(tmp_path, memory_bytes=1e12, budget=1.0):
    """A fleet file whose clients may spend `budget` times the energy of their cheapest cut on fixed links."""
    clients = dataclasses.replace(
        fleet.random_fleet(30, seed=0), memory_bytes=np.full(30, memory_bytes), energy_j=np.full(30, 1e300),
        cycles_per_s=np.full(30, 1e9), kappa=np.full(30, 1e-30),
    )  # fmt: skip
    path = tmp_path / "fleet.csv"
    fleet.write_fleet(path, clients)
    config = dataclasses.replace(SMALL, fleet=str(path), links="shannon", coherence_s=0.0)
    terms = parts.build(config).parts.terms
    terms = planning.linked(parts.planner(config), clients, terms)
    cheapest = np.min([terms.joules(cut) for cut in range(1, terms.shape[1])], axis=0)
    fleet.write_fleet(path, dataclasses.replace(clients, energy_j=budget * cheapest))
    return dataclasses.replace(SMALL, fleet=str(path), rounds=3, cohort_size=12)


@pytest.mark.parametrize("method", ["exact", "common_cut"])
def test_whom_the_links_of_a_round_do_not_serve_is_absent_in_it(method, tmp_path):
    built = parts.build(dataclasses.replace(thrifty(tmp_path), method=method, deadline_factor=1.0)).parts
    rounds = [prepare(built, round) for round in range(3)]
    left_out = [len(done.left_out) for done in rounds]
    assert 0 < min(left_out) <= max(left_out) < 12
    for done in rounds:
        ids, _, terms, _ = cohort(built, done.round)
        costs = terms.costs()
        could = costs.allowed.any(axis=1) if method == "exact" else costs.allowed[:, done.plan.cuts.min()]
        np.testing.assert_array_equal(done.turnout.came, could)
        assert len(done.left_out) == (~could).sum()
        for index, line in zip(np.flatnonzero(~could), done.left_out, strict=True):
            assert line.startswith(f"client {ids[index]}: ")
            assert " J; the client's budget is " in line
        for of_client in (done.assignments.weight, done.assignments.steps, done.plan.client_s):
            np.testing.assert_array_equal(of_client > 0, could)
        # The plan is that of the other clients, and nobody waits for the absent client until the deadline.
        given = terms, SMALL.server_flops
        alone = optim.solve(*given, method, present=could)
        assert done.turnout.round_s == pytest.approx(alone.round_s)
        assert done.plan.round_s == pytest.approx(alone.round_s)
        for name, clock_s in done.rival_s.items():
            try:
                expected = optim.solve(*given, name, present=could).round_s
            except optim.Infeasible:
                expected = np.inf
            assert clock_s == pytest.approx(expected)
        line = line_of(built, done)
        assert line.mean_cut == np.flatnonzero(could).mean()
        assert line.clients == could.sum()
        assert line.client_samples_per_s == done.assignments.steps[could].sum() * SMALL.batch_size / 2
    clocks = run_clocks.clocks(built, 3, RIVALS)
    rounds_s = {name: [done.rival_s[name] for done in rounds] for name in RIVALS}
    rounds_s[method] = [done.turnout.round_s for done in rounds]
    for name, own_s in rounds_s.items():
        np.testing.assert_allclose(clocks[name].seconds, np.cumsum(own_s))


def line_of(built, done):
    """The line of a round that took two seconds, in which client i had cut i."""
    done = done._replace(plan=done.plan._replace(cuts=np.arange(len(done.plan.cuts))))
    state = State(done.round + 1, None, {built.planner.method: 1.0})  # pyright: ignore
    clients = len(done.plan.cuts)
    nobody = Diverged(np.full(clients, -1), np.zeros(clients, int))  # pyright: ignore
    outcome = Outcome(np.float32(0.5), nobody, done.turnout.came.sum())  # pyright: ignore
    sent = loop.Sent(done, state, state, outcome, None, 0.0, None, None)  # pyright: ignore
    return loop._line(built, sent, outcome, None, 9.0, 2.0, 0.0)


@pytest.mark.parametrize(
    "settings", [{"barrier": "staged"}, {"band": "pooled"}, {"method": "random_cut"}, {}]
)
def test_a_round_that_serves_nobody_lasts_no_time(settings, tmp_path):
    config = dataclasses.replace(thrifty(tmp_path, budget=1e-2), **settings)
    built = parts.build(config).parts
    done = prepare(built, 0)
    assert len(done.left_out) == 12
    assert not done.turnout.came.any()
    assert (done.turnout.round_s, done.plan.bound_s, {*done.rival_s.values()}) == (0, 0, {0})
    assert done.assignments.steps.sum() == 0
    line = line_of(built, done)
    assert line.clients == 0
    assert np.isnan(line.mean_cut)


def test_whom_a_shared_band_cannot_serve_together_are_absent(tmp_path):
    """Each of them could be served alone, with the whole band."""
    budget = np.where(np.arange(30) % 2 == 0, 0.5, 99.0)
    built = parts.build(dataclasses.replace(thrifty(tmp_path, budget=budget), band="pooled")).parts
    ids, _, terms, _ = cohort(built, 0)
    modest = terms.costs().allowed.any(axis=1)
    done = prepare(built, 0)
    np.testing.assert_array_equal(done.turnout.came, modest)
    assert len(done.left_out) == 12 - modest.sum()
    reason = "its energy budget needs more than an equal part of the uplink band"
    greedy = [k for k in range(12) if f"client {ids[k]}: {reason}" in done.left_out]
    assert len(greedy) > 1
    for k in greedy:
        optim.solve_bandwidth(terms, SMALL.server_flops, 12.0, reference_hz=1.0, present=np.arange(12) == k)


def test_whom_no_links_serve_is_refused_before_anything_compiles(tmp_path):
    with pytest.raises(BadInput, match=r"fleet.csv: round 1: no plan .* needs .* bytes of memory"):
        parts.build(thrifty(tmp_path, memory_bytes=1000.0))


def live_arrays():
    gc.collect()
    return {id(array): array for array in jax.live_arrays()}


def bytes_since(before):
    """Bytes of the arrays that are alive now and were not in `before`, which keeps its own alive."""
    return sum(array.nbytes for name, array in live_arrays().items() if name not in before)


@pytest.mark.slow
def test_weights_to_start_from_are_held_once(tmp_path, built):
    chain, path = built.training.chain, str(tmp_path / "given.weights.h5")

    def digests_of(seed):
        given = chain.init(jax.random.key(seed), jnp.zeros((1, 32, 32, 1)))
        keras_weights.save(path, chain, given)
        model_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(given))
        before = live_arrays()
        own = parts.build(dataclasses.replace(SMALL, init_from=path))
        assert bytes_since(before) < model_bytes / 2
        state = start(own.parts)
        assert model_bytes <= bytes_since(before) < 1.5 * model_bytes
        second = jax.device_put(initial_model(own.parts))  # it is made on the host
        assert bytes_since(before) >= 2 * model_bytes
        for model in (state.model, second):
            jax.tree.map(np.testing.assert_array_equal, model.variables, given)
        return parts.inputs(own)

    one, other = digests_of(1), digests_of(2)
    assert one["init_from"] != other["init_from"]
    assert one["dataset"] == other["dataset"]


def test_a_run_that_has_begun_needs_the_weights_it_began_with_no_more(tmp_path):
    chain, path = models.create("efficientnetv2-tiny"), tmp_path / "given.weights.h5"
    given = chain.init(jax.random.key(1), jnp.zeros((1, 8, 8, 1)))
    keras_weights.save(str(path), chain, given, keras_weights.CENTRED)
    config = dataclasses.replace(SMALL, image_size=8, clients=small_world.CLIENTS, init_from=str(path))
    with small_world.world(create=models.create):
        begun = parts.build(config)
    reached = Progress(
        2, {}, 0.0, 0.0, 0, "", begun.config.to_dict(), parts.inputs(begun), parts.network(begun)
    )
    path.unlink()
    with small_world.world(create=models.create), pytest.raises(BadInput, match="no such file"):
        parts.build(config)
    with small_world.world(create=models.create):
        later = parts.build(config, progress=reached)
    assert later.scaling == keras_weights.CENTRED == begun.scaling
    assert parts.inputs(later) == parts.inputs(begun)
    assert f"{path} is missing; the run goes on without it" in later.notes
    with small_world.world(create=models.create), pytest.raises(BadInput, match="no such file"):
        parts.build(dataclasses.replace(config, init_from=f"{path}.other"), progress=reached)


@pytest.mark.parametrize(
    ("units", "classes", "line"),
    [(8, 10, "classifier: from {}"), (8, 20, "classifier: random weights, because {} has 20 classes"),
     (7, 10, "classifier: random weights, because {} has none")],
)  # fmt: skip
def test_a_run_says_where_its_classifier_comes_from(units, classes, line, tmp_path):
    chain, _ = models.create("efficientnetv2-tiny", classes).split(units)
    path = str(tmp_path / "given.weights.h5")
    keras_weights.save(path, chain, chain.init(jax.random.key(7), jnp.zeros((1, 8, 8, 1))))
    config = dataclasses.replace(SMALL, image_size=8, clients=small_world.CLIENTS, init_from=path)
    with small_world.world(create=models.create):
        built = parts.build(config)
    assert line.format(path) in built.notes
    kept = initial_model(built.parts).variables.params[-1]["dense"]["dense_kernel"]
    given = models.create("efficientnetv2-tiny", 10).init(jax.random.key(7), jnp.zeros((1, 8, 8, 1)))
    assert finite.are_equal(kept, given.params[-1]["dense"]["dense_kernel"]) == ("from" in line)
