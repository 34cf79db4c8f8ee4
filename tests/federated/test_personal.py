"""Normalisation that is not averaged, against sessions of the two-party protocol with each client's own."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from federated import rounds

from sfl_jax.errors import BadInput
from sfl_jax.federated import protocol, round
from sfl_jax.federated.personal import LAYERS, STATISTICS, Personal
from sfl_jax.models import Variables
from sfl_jax.run import suiting
from sfl_jax.schemes import create

CHAIN, SIZE, CLIENTS, TOLERANCE = rounds.SMALL_CHAIN, rounds.SMALL_SIZE, 9, 1e-10
KEY = jax.random.key(5)
IDS = (1, 4, 6, 8), (4, 1, 0, 7)  # of two rounds; some come twice


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def work_of(number):
    work = rounds.assignments((1, 3, 0, 2), np.array([2, 1, 2, 3]), batch=5, seed=number)
    return work._replace(client=np.array(IDS[number], np.int32))


def training_of(kind, **changes):
    personal = Personal(kind, CLIENTS) if kind else None
    return dataclasses.replace(rounds.training("sgd", rounds.NOISY, CHAIN), personal=personal, **changes)


def is_own(kind, path):
    """Whether a leaf of a unit, as the protocol has it, stays with its client."""
    names = [part.key for part in path[1:]]
    return names[0] == "batch_stats" or (kind == LAYERS and any("BatchNorm" in name for name in names))


def merged(kind, units, own):
    """Global variables with a client's own leaves in them."""
    return jax.tree_util.tree_map_with_path(lambda path, x, y: y if is_own(kind, path) else x, units, own)


def two_rounds(kind, size=4, **changes):
    """(compiled, expected) after two rounds: (global variables by unit, [those of each client])."""
    training, (variables, samples) = training_of(kind, **changes), rounds.start(CHAIN, SIZE)
    program = jax.jit(functools.partial(round.run_round, training, size, None))
    model = round.start_model(training, variables)
    start = rounds.by_unit(CHAIN, variables)
    own = [start] * CLIENTS
    for number in range(2):
        key, work = jax.random.fold_in(KEY, number), work_of(number)
        model, *_ = program(model, samples, work, key, jnp.asarray(rounds.RATE))
        world = rounds.world(training, variables, samples, key, rounds.OF_OPTAX["sgd"](rounds.RATE))
        results = []
        for one in rounds.works(work):
            begin = dataclasses.replace(world, variables=merged(kind, start, own[one.client]))
            results.append(protocol.run_session(begin, one)[0])
            own[one.client] = results[-1]
        weights = work.weight.astype(float) / work.weight.sum()
        start = protocol.weighted_mean(results, weights.tolist())
    found = rounds.by_unit(CHAIN, model.variables)
    rows = [jax.tree.map(lambda x, k=k: x[k], model.kept) for k in range(CLIENTS)]
    of_clients = [rounds.by_unit(CHAIN, training.personal.merged(model.packed, row).unpack()) for row in rows]
    return (found, of_clients), (start, [merged(kind, start, units) for units in own])


@pytest.mark.parametrize("size", [4, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", [LAYERS, pytest.param(STATISTICS, marks=pytest.mark.slow)])
def test_two_rounds_equal_sessions_that_start_from_each_clients_own(kind, size):
    (found, of_clients), (expected, own) = two_rounds(kind, size)
    assert rounds.difference(found, expected) < TOLERANCE
    for client in range(CLIENTS):
        assert rounds.difference(of_clients[client], own[client]) < TOLERANCE
    assert rounds.difference(of_clients[1], of_clients[4]) > 1e-3, "clients keep something of their own"


@pytest.mark.slow
def test_what_is_averaged_gives_other_numbers():
    (kept, _), _ = two_rounds(LAYERS)
    (averaged, _), _ = two_rounds(STATISTICS)
    assert rounds.difference(kept, averaged) > 1e-3


@pytest.mark.slow
def test_a_client_that_diverges_keeps_what_it_had():
    training = training_of(LAYERS, skip_diverged=True, preprocess=rounds.preprocess_black_to_nan)
    variables, samples = rounds.start(CHAIN, SIZE)
    work = work_of(0)
    work = work._replace(batches=work.batches % (len(samples.labels) - 1))
    samples, work = rounds.poisoned(samples, work, 2)
    model = round.start_model(training, variables)
    before = jax.tree.map(np.asarray, model.kept)
    program = jax.jit(functools.partial(round.run_round, training, 2, None))
    model, _, diverged = program(model, samples, work, KEY, jnp.asarray(rounds.RATE))
    assert diverged.client.tolist() == [-1, -1, IDS[0][2], -1]
    same = [
        all(
            np.array_equal(a[k], b[k])
            for a, b in zip(*map(jax.tree.leaves, (before, model.kept)), strict=True)
        )
        for k in range(CLIENTS)
    ]
    assert [k for k in range(CLIENTS) if not same[k]] == [1, 4, 8]


def test_statistics_are_estimated_again_under_the_new_model():
    """Against the mean and the biased variance of each batch, in NumPy, layer by layer."""
    training, (variables, samples) = training_of(None, reestimates=True), rounds.start(CHAIN, SIZE)
    training = dataclasses.replace(training, codecs=None)
    work = work_of(0)
    program = jax.jit(functools.partial(round.run_round, training, 2, None))
    model, *_ = program(round.start_model(training, variables), samples, work, KEY, jnp.asarray(rounds.RATE))
    after, expected, weights = model.variables, [], work.weight.astype(float) / work.weight.sum()
    for client, steps, batches in zip(work.client, work.steps, work.batches, strict=True):
        of_client = []
        for step in range(steps):
            key = jax.random.fold_in(jax.random.fold_in(KEY, client), step)
            x, stats = training.preprocess(samples.images[batches[step]]), []
            for index, unit in enumerate(CHAIN.units[:2]):
                hidden = np.asarray(x).reshape(len(x), -1) @ after.params[index]["Dense_0"]["kernel"]
                stats += [hidden.mean(0), hidden.var(0)]
                part, own = (
                    CHAIN.split(index)[1].split(1)[0],
                    Variables(after.params[index : index + 1], after.batch_stats[index : index + 1]),
                )
                x, _ = part.apply(own, x, train=True, key=key)
                assert unit is part.units[0]
            of_client.append(stats)
        expected.append([np.mean(values, axis=0) for values in zip(*of_client, strict=True)])
    expected = [
        sum(w * x for w, x in zip(weights, values, strict=True)) for values in zip(*expected, strict=True)
    ]
    found = [after.batch_stats[i]["BatchNorm_0"][name] for i in range(2) for name in ("mean", "var")]
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)
    plain, *_ = jax.jit(functools.partial(round.run_round, training_of(None, codecs=None), 2, None))(
        round.start_model(training, variables), samples, work, KEY, jnp.asarray(rounds.RATE)
    )
    assert rounds.difference(plain.variables.params, after.params) < TOLERANCE
    assert rounds.difference(plain.variables.batch_stats, after.batch_stats) > 1e-3


def test_schemes_that_share_copies_refuse_other_normalisation():
    assert suiting.personal_for(create("sfl"), "averaged", 3) is None
    assert suiting.personal_for(create("sfl"), "reestimated", 3) is None
    assert suiting.personal_for(create("fl"), "local", 3) == Personal("local", 3)
    with pytest.raises(BadInput, match="batch_norm=local: must be averaged with scheme=psl"):
        suiting.personal_for(create("psl"), "local", 3)
    with pytest.raises(BadInput, match="batch_norm=mean: must be one of averaged"):
        suiting.personal_for(create("sfl"), "mean", 3)
