"""The protocol's schemes against SGD with one gradient of the whole network, and against each other."""

import ast
import dataclasses
from pathlib import Path

import finite
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from sfl_jax.federated import protocol, protocol_schemes
from sfl_jax.federated.protocol import ClientWork, Transport, World, run_round
from sfl_jax.federated.protocol_schemes import run_psl, run_sfl_v2, run_sl

pytestmark = pytest.mark.slow
KEY, BATCH, TOLERANCE = jax.random.key(5), 4, 1e-10
OPTIMIZER = optax.sgd(0.1, momentum=0.9)
CODEC = {"up": lambda x, _: 0.5 * x, "down": lambda g, _: 2.0 * g}
DROP = 0.5


class Normed(nn.Module):
    """A unit with statistics, an integer counter and random numbers."""

    @nn.compact
    def __call__(self, x, train):
        calls = self.variable("batch_stats", "calls", lambda: jnp.zeros((), jnp.int32))
        if train:
            calls.value += 1
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(nn.Dense(3)(x))
        number = jax.random.key_data(self.make_rng("drop"))[-1].astype(jnp.result_type(float)) / 2.0**32
        return jnp.tanh(x) * (1 + number)


class Plain(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x, train):
        return jnp.tanh(nn.Dense(self.width)(x))


class Blameless(nn.Module):
    """The identity. The gradient of its parameter is NaN; that of its input is finite."""

    @nn.compact
    def __call__(self, x, train):
        return x + jnp.sqrt(0 * self.param("none", nn.initializers.zeros, (), float))


def preprocess(images):
    return jnp.where(images > 100, jnp.nan, images / 2)


UNITS = (Plain(4), Normed(), Plain(3), Plain(5))
L = len(UNITS)
# Clients have unequal steps and weights. The second and the third have different cuts.
STEPS, WEIGHTS = (2, 3, 1), (1.0, 2.0, 5.0)
ALL_CUTS = ((0, 0, 0), (L, L, L), (1, 3, 2), (4, 0, 1))


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def world():
    """The last sample becomes NaN. No client sees it unless a test says so."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        images = rng.normal(size=(40, 3))
        images[-1] = 1000
        x, variables = jnp.asarray(images[:2]), []
        for index, unit in enumerate(UNITS):
            keys = {"params": jax.random.fold_in(jax.random.key(1), index), "drop": KEY}
            made = jax.tree.map(
                lambda leaf: leaf.astype(float) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf,
                unit.init(keys, x, train=True),
            )
            variables.append(made)
            x = unit.apply(made, x, train=False, rngs={"drop": KEY})
        labels = jnp.asarray(rng.integers(0, 5, 40).astype(np.int32))
        return World(UNITS, variables, OPTIMIZER, preprocess, images, labels, KEY)


def cohort(cuts=(0, 0, 0), steps=STEPS, weights=WEIGHTS):
    rng = np.random.default_rng(2)
    rows = rng.integers(0, 39, (len(cuts), max(STEPS), BATCH))
    return [
        ClientWork(10 + k, cut, weight, rows[k, :count])
        for k, (cut, count, weight) in enumerate(zip(cuts, steps, weights, strict=True))
    ]


def changed(works, k, **changes):
    return [dataclasses.replace(one, **changes) if n == k else one for n, one in enumerate(works)]


def poisoned(works, k, step):
    """The k-th client sees the last sample at this step."""
    batches = works[k].batches.copy()
    batches[step, 1] = 39
    return changed(works, k, batches=batches)


# The reference: every update comes from one gradient of the whole network.


@jax.jit
def whole(params, others, x, labels, keys):
    """((loss, new collections), gradients) of the whole network, with the keys of its units."""

    def loss(params):
        now, news = x, []
        for unit, own, other, key in zip(UNITS, params, others, keys, strict=True):
            variables = {"params": own} | other
            now, new = unit.apply(variables, now, train=True, rngs={"drop": key}, mutable=list(other))
            news.append(new)
        return optax.softmax_cross_entropy_with_integer_labels(now, labels).mean(), news

    return jax.value_and_grad(loss, has_aux=True)(params)


def keys_of(world, client, step):
    key = jax.random.fold_in(jax.random.fold_in(world.key, client), step)
    return [jax.random.fold_in(key, index) for index in range(L)]


def gradients(world, units, rows, keys):
    """(loss, [(gradient, new collections) of each unit]), where a unit is (variables, state)."""
    params = [variables["params"] for variables, _ in units]
    others = [{name: v for name, v in variables.items() if name != "params"} for variables, _ in units]
    images = world.preprocess(world.images[rows])
    (loss, news), found = whole(params, others, images, world.labels[rows], keys)
    return float(loss), list(zip(found, news, strict=True))


def moved(unit, gradient, new):
    variables, state = unit
    updates, state = OPTIMIZER.update(gradient, state, variables["params"])
    return new | {"params": optax.apply_updates(variables["params"], updates)}, state


def started(world):
    return [(variables, OPTIMIZER.init(variables["params"])) for variables in world.variables]


def sgd(world, works, units=None):
    """(units, mean loss of each client) of plain SGD over the clients' batches, one client after another."""
    units, losses = units or started(world), []
    for work in works:
        found = []
        for step, rows in enumerate(work.batches):
            loss, steps = gradients(world, units, rows, keys_of(world, work.client, step))
            units = [moved(unit, *one) for unit, one in zip(units, steps, strict=True)]
            found.append(loss)
        losses.append(np.mean(found))
    return units, losses


def variables_of(units):
    return [variables for variables, _ in units]


def mean(trees, weights):
    def of(*leaves):
        total = sum(w * np.asarray(x, np.float64) for w, x in zip(weights, leaves, strict=True))
        total = total / sum(weights)
        return np.round(total) if leaves[0].dtype.kind == "i" else total

    return jax.tree.map(of, *trees)


def fedavg(world, works):
    """(variables, loss)."""
    results = [sgd(world, [work]) for work in works]
    weights = [work.weight for work in works]
    losses = [loss for _, [loss] in results]
    return mean([variables_of(units) for units, _ in results], weights), np.average(losses, weights=weights)


def in_turn(world, works, turns, is_shared):
    """The variables after steps in this order. is_shared(i, k): whether unit i of client k is shared."""
    rows = {"shared": started(world)} | {k: started(world) for k in range(len(works))}
    whose = {k: ["shared" if is_shared(i, k) else k for i in range(L)] for k in range(len(works))}

    def held(k):
        return [rows[row][i] for i, row in enumerate(whose[k])]

    for k, step in turns:
        batch, keys = works[k].batches[step], keys_of(world, works[k].client, step)
        _, found = gradients(world, held(k), batch, keys)
        for i, one in enumerate(found):
            rows[whose[k][i]][i] = moved(rows[whose[k][i]][i], *one)
    return mean([variables_of(held(k)) for k in range(len(works))], [work.weight for work in works])


def lockstep(world, works, is_shared):
    """The variables after parallel steps. Shared units learn from the mean gradient of all active clients."""
    units = [started(world) for _ in works]
    for step in range(max(len(work.batches) for work in works)):
        active = [k for k, work in enumerate(works) if step < len(work.batches)]
        found = [
            gradients(world, units[k], works[k].batches[step], keys_of(world, works[k].client, step))[1]
            for k in active
        ]
        for i in range(L):
            if is_shared(i):
                one = moved(units[active[0]][i], *mean([of_all[i] for of_all in found], [1] * len(active)))
                for own in units:
                    own[i] = one
            else:
                for k, of_k in zip(active, found, strict=True):
                    units[k][i] = moved(units[k][i], *of_k[i])
    return mean([variables_of(own) for own in units], [work.weight for work in works])


def apart(a, b):
    """The largest difference of any number. All numbers must be finite."""
    return max(np.abs(x - y).max() for x, y in finite.pairs(list(a), list(b)))


def assert_same(a, b):
    assert apart(a, b) < TOLERANCE


def assert_differ(a, b):
    assert apart(a, b) > 1e-4


# Each scheme with its other arguments fixed: (world, works, order, **arguments).
SCHEMES = {
    "sfl_v2-client": run_sfl_v2,
    "sfl_v2-step": lambda *given, **named: run_sfl_v2(*given, by="step", **named),
    "sl": run_sl,
    "psl": lambda world, works, _, **named: run_psl(world, works, L - 1, **named),
    "psl-joined": lambda world, works, _, **named: run_psl(world, works, L - 1, "joined", **named),
}
FORWARD = range(len(STEPS))
ORDER = (2, 0, 1)


@pytest.mark.parametrize("scheme", ["sfl_v2-client", "sfl_v2-step", "sl", "psl"])
def test_with_one_client_it_is_sgd_at_every_cut(world, scheme):
    [work] = cohort()[1:2]
    units, [loss] = sgd(world, [work])
    for cut in range(L if scheme == "psl" else L + 1):
        found = SCHEMES[scheme](world, [dataclasses.replace(work, cut=cut)], [0])
        assert_same(found.variables, variables_of(units))
        assert found.loss == pytest.approx(loss, rel=TOLERANCE)
        assert found.diverged == []
    assert_differ(variables_of(units), world.variables)


def test_sl_is_sgd_over_one_client_after_another_for_any_cuts(world):
    works = cohort()
    units, losses = sgd(world, [works[k] for k in ORDER])
    expected = np.average(losses, weights=[WEIGHTS[k] for k in ORDER])
    for cuts in ALL_CUTS:
        found = run_sl(world, cohort(cuts), ORDER)
        assert_same(found.variables, variables_of(units))
        assert_same(found.shared_state, [state for _, state in units])
        assert found.loss == pytest.approx(expected, rel=TOLERANCE)
    assert_differ(run_sl(world, works, ORDER[::-1]).variables, variables_of(units))


@pytest.mark.parametrize("by", ["client", "step"])
def test_sfl_v2_is_fedavg_where_clients_hold_everything(world, by):
    works = cohort((L, L, L))
    variables, loss = fedavg(world, works)
    found = run_sfl_v2(world, works, ORDER, by)
    assert_same(found.variables, variables)
    assert found.loss == pytest.approx(loss, rel=TOLERANCE)
    assert_differ(found.variables, fedavg(world, cohort(weights=(1, 1, 1)))[0])
    assert_differ(found.variables, run_sfl_v2(world, cohort((L, L - 1, L - 1)), ORDER, by).variables)


def test_sfl_v2_by_client_is_sl_where_the_server_holds_everything(world):
    works = cohort()
    found = run_sl(world, works, ORDER)
    finite.assert_equal(run_sfl_v2(world, works, ORDER).variables, found.variables)
    assert_differ(run_sfl_v2(world, works, ORDER, "step").variables, found.variables)


TURNS = {
    "client": [(2, 0), (0, 0), (0, 1), (1, 0), (1, 1), (1, 2)],
    "step": [(2, 0), (0, 0), (1, 0), (0, 1), (1, 1), (1, 2)],
}


@pytest.mark.parametrize("tail_units", [0, 1])
@pytest.mark.parametrize("by", ["client", "step"])
def test_sfl_v2_shares_what_is_at_the_server(world, by, tail_units):
    top = L - tail_units
    for cuts in ALL_CUTS[2:]:
        works = cohort(cuts)
        found = run_sfl_v2(world, works, ORDER, by, tail_units=tail_units).variables
        assert_same(found, in_turn(world, works, TURNS[by], lambda i, k, c=cuts: c[k] <= i < top))
        assert_differ(found, in_turn(world, works, TURNS[by], lambda i, k, c=cuts: c[k] < i < top))
        assert_differ(found, in_turn(world, works, TURNS[by][::-1], lambda i, k, c=cuts: c[k] <= i < top))
    [other] = TURNS.keys() - {by}
    works = cohort((1, 0, 2))
    results = [run_sfl_v2(world, works, ORDER, one, tail_units=tail_units) for one in (by, other)]
    assert_differ(*(found.variables for found in results))


def test_psl_of_a_server_that_holds_everything_is_sgd_on_large_batches(world):
    """With the mean gradient and the mean statistics of all, or with one batch of all samples."""
    works = cohort()
    assert_same(run_psl(world, works, 0).variables, lockstep(world, works, lambda i: True))
    joined, losses = started(world), []
    for step in range(max(STEPS)):
        rows = np.concatenate([work.batches[step] for work in works if step < len(work.batches)])
        loss, found = gradients(world, joined, rows, keys_of(world, protocol_schemes.JOINED, step))
        joined = [moved(unit, *one) for unit, one in zip(joined, found, strict=True)]
        losses.append(loss)
    found = run_psl(world, works, 0, "joined")
    assert_same(found.variables, variables_of(joined))
    assert_differ(found.variables, run_psl(world, works, 0).variables)
    equal = run_psl(world, cohort(steps=(1, 1, 1), weights=(1, 1, 1)), 0, "joined")
    assert equal.loss == pytest.approx(losses[0], rel=TOLERANCE)


@pytest.mark.parametrize("server_batch", ["separate", "joined"])
def test_psl_is_fedavg_where_clients_hold_everything(world, server_batch):
    works = cohort((L, L, L))
    variables, loss = fedavg(world, works)
    found = run_psl(world, works, L, server_batch)
    assert_same(found.variables, variables)
    assert found.loss == pytest.approx(loss, rel=TOLERANCE)


@pytest.mark.parametrize("server_batch", ["separate", "joined"])
def test_psl_depends_on_cuts_through_the_largest_alone(world, server_batch):
    found = run_psl(world, cohort((2, 2, 2)), 2, server_batch)
    for cuts in ((1, 2, 0), (0, 0, 0)):
        other = run_psl(world, cohort(cuts), 2, server_batch)
        assert_same(other.variables, found.variables)
        assert other.loss == pytest.approx(found.loss, rel=TOLERANCE)
    assert_differ(run_psl(world, cohort((2, 2, 2)), 3, server_batch).variables, found.variables)


@pytest.mark.parametrize("tail_units", [0, 1])
def test_psl_shares_units_from_the_largest_cut_to_the_tail(world, tail_units):
    works, top = cohort((1, 0, 2)), L - tail_units
    found = run_psl(world, works, 2, tail_units=tail_units).variables
    assert_same(found, lockstep(world, works, lambda i: 2 <= i < top))
    assert_differ(found, lockstep(world, works, lambda i: 1 <= i < top))


@pytest.mark.parametrize("tail_units", [0, 1])
def test_joined_batches_are_separate_ones_where_samples_do_not_meet(world, tail_units):
    """Units from 2 on have no statistics and no random numbers. Batches have unequal sizes."""
    works = cohort((1, 2, 0))
    works = changed(works, 0, batches=works[0].batches[:, :2])
    separate, joined = (
        run_psl(world, works, 2, batch, tail_units=tail_units) for batch in ("separate", "joined")
    )
    assert_same(joined.variables, separate.variables)
    assert joined.loss == pytest.approx(separate.loss, rel=TOLERANCE)
    assert_differ(run_psl(world, works, 2, "joined", tail_units=1 - tail_units).variables, joined.variables)


def test_a_cut_above_the_largest_is_refused(world):
    with pytest.raises(ValueError, match=r"max_cut=1: clients \[12\] have larger cuts"):
        run_psl(world, cohort((1, 0, 2)), 1)


def test_a_codec_makes_every_scheme_depend_on_the_cuts(world):
    linked = dataclasses.replace(world, **CODEC)
    for name, scheme in SCHEMES.items():
        results = [scheme(linked, cohort(cuts), ORDER).variables for cuts in ((1, 1, 1), (1, 2, 1))]
        assert_differ(*results)
        if name in ("sl", "psl"):
            assert_same(*(scheme(world, cohort(cuts), ORDER).variables for cuts in ((1, 1, 1), (1, 2, 1))))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_absent_client_is_no_client(world, scheme):
    works = cohort((1, 3, 2))
    found = SCHEMES[scheme](world, changed(works, 1, weight=0.0), ORDER)
    without = SCHEMES[scheme](world, [works[0], works[2]], [1, 0])
    finite.assert_equal(found.variables, without.variables)
    assert (found.loss, found.diverged) == (without.loss, [])
    nobody = SCHEMES[scheme](world, [dataclasses.replace(work, weight=0.0) for work in works], ORDER)
    finite.assert_equal(nobody.variables, world.variables)
    assert np.isnan(nobody.loss)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_client_whose_first_step_is_bad_is_no_client(world, scheme):
    works = cohort((1, 3, 2))
    bad = poisoned(works, 1, 0)
    found = SCHEMES[scheme](world, bad, ORDER, skip_diverged=True)
    without = SCHEMES[scheme](world, changed(works, 1, weight=0.0), ORDER)
    assert_same(found.variables, without.variables)
    assert_same(found.shared_state, without.shared_state)
    assert (found.loss, found.diverged) == (pytest.approx(without.loss, rel=TOLERANCE), [11])
    kept = SCHEMES[scheme](world, bad, ORDER, shared_state=without.shared_state)
    finite.assert_equal(kept.variables, world.variables)
    finite.assert_equal(kept.shared_state, without.shared_state)
    assert kept.diverged == [11]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_nobody_is_left(world, scheme):
    works = cohort((1, 1, 1), steps=(1, 1, 1))
    for k in range(3):
        works = poisoned(works, k, 0)
    found = SCHEMES[scheme](world, works, ORDER, skip_diverged=True)
    finite.assert_equal(found.variables, world.variables)
    assert np.isnan(found.loss)
    assert found.diverged == [10, 11, 12]


@pytest.mark.parametrize("scheme", ["psl", "psl-joined"])
def test_a_bad_gradient_of_a_shared_unit_blames_all(world, scheme):
    units = *UNITS[:-1], Blameless()
    variables = [*world.variables[:-1], {"params": {"none": jnp.zeros(())}}]
    broken = dataclasses.replace(world, units=units, variables=variables, labels=world.labels % 3)
    found = SCHEMES[scheme](broken, cohort((1, 3, 2)), ORDER, skip_diverged=True)
    finite.assert_equal(found.variables, broken.variables)
    assert found.diverged == [10, 11, 12]


def test_a_later_bad_step_is_the_end_of_a_client(world):
    """Its earlier steps on shared copies stay. It is not in the mean, so its own copies are lost."""
    cuts = (1, 3, 2)
    bad = poisoned(cohort(cuts), 1, 1)
    truncated = changed(bad, 1, batches=bad[1].batches[:1])
    # Only the mean uses weights, and the client no longer counts in it.
    weightless = changed(truncated, 1, weight=0.0)
    for by, turns in TURNS.items():
        found = run_sfl_v2(world, bad, ORDER, by, skip_diverged=True)
        left = [turn for turn in turns if turn not in ((1, 1), (1, 2))]
        assert_same(found.variables, in_turn(world, weightless, left, lambda i, k: cuts[k] <= i))
        assert_differ(found.variables, run_sfl_v2(world, truncated, ORDER, by).variables)
        assert_differ(found.variables, run_sfl_v2(world, weightless, ORDER, by).variables)
    found = run_sl(world, bad, ORDER, skip_diverged=True)
    assert_same(found.variables, run_sl(world, truncated, ORDER).variables)
    found = run_psl(world, bad, 3, skip_diverged=True)
    assert_same(found.variables, lockstep(world, weightless, lambda i: i >= 3))
    found = run_psl(world, poisoned(cohort(), 1, 1), 0, "joined", skip_diverged=True)
    assert_same(
        found.variables,
        run_psl(world, changed(cohort(), 1, batches=bad[1].batches[:1]), 0, "joined").variables,
    )


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_gradient_that_breaks_on_its_way_down_is_undone_at_the_server(world, scheme):
    """Its loss is finite, and so are the gradients at the server."""
    bad = protocol.codec_key(jax.random.fold_in(jax.random.fold_in(KEY, 11), 0), protocol.DOWN)

    def down(gradient, key):
        return jnp.where((jax.random.key_data(key) == jax.random.key_data(bad)).all(), jnp.nan, gradient)

    breaking, works = dataclasses.replace(world, down=down), cohort((1, 3, 2))
    found = SCHEMES[scheme](breaking, works, ORDER, skip_diverged=True)
    assert found.diverged == [11]
    assert_same(found.variables, SCHEMES[scheme](world, changed(works, 1, weight=0.0), ORDER).variables)


def test_the_optimiser_state_of_shared_copies_may_be_kept(world):
    works, later = cohort(), dataclasses.replace(world, key=jax.random.key(6))
    first = run_sl(world, works, ORDER)
    later = dataclasses.replace(later, variables=first.variables)
    units = sgd(later, [works[k] for k in ORDER], sgd(world, [works[k] for k in ORDER])[0])[0]
    kept = run_sl(later, works, ORDER, first.shared_state)
    assert_same(kept.variables, variables_of(units))
    assert_same(run_sfl_v2(later, works, ORDER, shared_state=first.shared_state).variables, kept.variables)
    assert_differ(run_sl(later, works, ORDER).variables, kept.variables)
    state = run_psl(world, works, 0).shared_state
    assert_differ(run_psl(later, works, 0, shared_state=state).variables, run_psl(later, works, 0).variables)


def test_units_that_nobody_shares_keep_their_state(world):
    given = run_sl(world, cohort(), ORDER).shared_state
    for found in (
        run_sfl_v2(world, cohort((1, 1, 2)), ORDER, shared_state=given, tail_units=1),
        run_psl(world, cohort((1, 1, 1)), 1, shared_state=given, tail_units=1),
    ):
        finite.assert_equal([given[0], given[-1]], [found.shared_state[0], found.shared_state[-1]])
        for before, after in zip(given[1:-1], found.shared_state[1:-1], strict=True):
            assert_differ(before, after)


# The U-shape.


@pytest.mark.parametrize("tail_units", [1, 2, L])
def test_a_tail_changes_nothing_in_sfl_and_sl(world, tail_units):
    works = cohort((1, 3, 2))
    variables, loss, _ = run_round(world, works)
    assert_same(variables, fedavg(world, works)[0])
    assert_same(run_round(world, works, tail_units=tail_units)[0], variables)
    assert run_round(world, works, tail_units=tail_units)[1] == pytest.approx(loss, rel=TOLERANCE)
    found = run_sl(world, works, ORDER, tail_units=tail_units).variables
    assert_same(found, run_sl(world, works, ORDER).variables)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_cut_in_the_tail_is_plain_fl(world, scheme):
    transport = Transport()
    found = SCHEMES[scheme](world, cohort((2, 2, 3)), ORDER, tail_units=2, transport=transport)
    if scheme != "sl":
        assert_same(found.variables, fedavg(world, cohort())[0])
    assert {kind for kind, _ in transport.messages} == {protocol.MODEL_DOWN, protocol.MODEL_UP}


def test_the_codec_acts_on_both_boundaries_with_keys_of_their_own(world):
    seen = []

    def recording(way):
        def codec(x, key):
            seen.append((way, x.shape, jax.random.key_data(key).tolist()))
            return x

        return codec

    recorded = dataclasses.replace(world, up=recording("up"), down=recording("down"))
    [work] = cohort((1,), (1,), (1.0,))
    step_key = jax.random.fold_in(jax.random.fold_in(KEY, 10), 0)
    of_link = jax.random.fold_in(step_key, 2**31)
    up, down = jax.random.fold_in(of_link, 0), jax.random.fold_in(of_link, 1)
    cut_up, tail_down, tail_up, cut_down = (
        ("up", (BATCH, 4), up),
        ("down", (BATCH, 3), jax.random.fold_in(down, 2**31)),
        ("up", (BATCH, 3), jax.random.fold_in(up, 2**31)),
        ("down", (BATCH, 4), down),
    )
    for cut, tail_units, expected in (
        (1, 0, [cut_up, cut_down]),
        (1, 1, [cut_up, tail_down, tail_up, cut_down]),
        (0, 1, [tail_down, tail_up]),
        (3, 1, []),
        (L, 0, []),
    ):
        seen.clear()
        protocol.run_session(recorded, dataclasses.replace(work, cut=cut), tail_units=tail_units)
        assert seen == [(way, shape, jax.random.key_data(key).tolist()) for way, shape, key in expected]


FOUR = ["smashed_up", "features_down", "gradient_up", "gradient_down"]


def test_labels_stay_with_the_tail(world):
    """The messages of one step."""
    [work] = cohort((1,), (1,), (1.0,))
    for cut, tail_units, expected in (
        (1, 0, ["smashed_up", "labels_up", "gradient_down"]),
        (0, 0, ["smashed_up", "labels_up"]),
        (1, 1, FOUR),
        (0, 1, FOUR[:3]),
        (3, 1, []),
    ):
        one = [dataclasses.replace(work, cut=cut)]
        for run in (
            lambda transport, one=one, n=tail_units: run_round(world, one, transport=transport, tail_units=n),
            lambda transport, one=one, n=tail_units: run_sl(
                world, one, [0], transport=transport, tail_units=n
            ),
            lambda transport, one=one, n=tail_units: run_sfl_v2(
                world, one, [0], transport=transport, tail_units=n
            ),
            lambda transport, one=one, n=tail_units: run_psl(
                world, one, 3, transport=transport, tail_units=n
            ),
            lambda transport, one=one, n=tail_units: run_psl(
                world, one, 3, "joined", transport=transport, tail_units=n
            ),
        ):
            transport = Transport()
            run(transport)
            assert [kind for kind, _ in transport.messages] == ["model_down", *expected, "model_up"]
            assert (
                len(transport.messages[0][1])
                == len(transport.messages[-1][1])
                == (cut + tail_units if expected else L)
            )


@pytest.mark.parametrize("tail_units", [0, 1])
@pytest.mark.parametrize("scheme", ["sfl", *SCHEMES])
def test_the_bytes_of_its_messages(world, scheme, tail_units):
    """The same in all schemes: only what crosses and the client's units, never the server's units."""
    cuts, transport = (1, 0, 2), Transport()
    run = SCHEMES.get(scheme, lambda world, works, _, **named: run_round(world, works, **named))
    run(world, cohort(cuts), ORDER, tail_units=tail_units, transport=transport)
    size = [sum(leaf.nbytes for leaf in jax.tree.leaves(unit)) for unit in world.variables]
    entering = [3, 4, 3, 3]  # numbers of a sample in each unit's input
    model = sum(sum(size[:cut]) + sum(size[L - tail_units :]) for cut in cuts)
    samples = [BATCH * steps for steps in STEPS]
    features = 8 * sum(samples) * entering[-1]
    expected = {
        "model_down": model,
        "smashed_up": 8 * sum(n * entering[cut] for n, cut in zip(samples, cuts, strict=True)),
        "gradient_down": 8 * sum(n * entering[cut] for n, cut in zip(samples, cuts, strict=True) if cut),
        "model_up": model,
    } | (
        {"features_down": features, "gradient_up": features}
        if tail_units
        else {"labels_up": 4 * sum(samples)}
    )
    assert transport.bytes == expected
    assert set(expected) <= set(protocol.KINDS)


def test_the_client_half_of_sl_comes_and_goes_before_the_next_client(world):
    transport = Transport()
    run_sl(world, cohort((1, 1, 1), steps=(1, 1, 0)), ORDER, transport=transport)
    step = ["smashed_up", "labels_up", "gradient_down"]
    ends = ["model_down", "model_up"]
    assert [kind for kind, _ in transport.messages] == [
        *ends, "model_down", *step, "model_up", "model_down", *step, "model_up",
    ]  # fmt: skip
    handed = [payload for kind, payload in transport.messages if kind in ends]
    finite.assert_equal(handed[3], handed[4])  # from one client to the next
    assert_differ(handed[2], handed[3])


def test_it_shares_no_code_with_the_compiled_round():
    tree = ast.parse(Path(protocol_schemes.__file__).read_text())
    found = {
        f"{node.module}.{alias.name}" if isinstance(node, ast.ImportFrom) else alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    ours = {name for name in found if name.startswith("sfl_jax")}
    assert all(name.startswith("sfl_jax.federated.protocol") for name in ours)
    outside = {name.split(".")[0] for name in found - ours}
    assert outside == {"collections", "copy", "jax", "typing"}
