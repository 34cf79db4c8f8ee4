"""The compiled session and round at every cut, against two parties that exchange messages."""

import ast
import dataclasses
import functools
from pathlib import Path
from typing import NamedTuple

import finite
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from federated import rounds

from sfl_jax import fleet as fleets
from sfl_jax import models, optim
from sfl_jax.federated import protocol, round

TOLERANCE = {False: 1e-5, True: 1e-10}  # by x64
SETTINGS = [
    (x64, optimizer, codec)
    for x64 in (False, True)
    for optimizer in rounds.OPTIMIZERS
    for codec in (None, rounds.SCALING)
]
QUICK = [(True, "sgd", rounds.SCALING)]  # of fewer units; the other settings use the whole network
KEY = jax.random.key(7)


class Both(NamedTuple):
    """Sessions of one client for each cut: compiled (products, vmapped), and by the protocol (lax.conv, one
    by one).
    """

    tolerance: float
    scaled: bool
    chain: object
    variables: object
    compiled: list
    reference: list


def name(setting):
    x64, optimizer, codec = setting
    return f"{'x64' if x64 else 'float32'}-{optimizer}-{'scaling' if codec else 'identity'}"


@pytest.fixture(
    scope="module",
    params=[pytest.param(s, id=name(s), marks=pytest.mark.slow) for s in SETTINGS],
)
def both(request):
    x64, optimizer, codec = request.param
    chains = rounds.CHAIN, rounds.REFERENCE_CHAIN
    chain, reference_chain = map(rounds.short, chains) if request.param in QUICK else chains
    with jax.enable_x64(x64):
        variables, samples = rounds.start(chain)
        # All cuts have the same batches and keys, so that they can be compared.
        work = rounds.assignments(range(len(chain) + 1), steps=2)
        work = work._replace(
            client=work.client * 0, batches=np.broadcast_to(work.batches[:1], work.batches.shape)
        )
        compiled = rounds.sessions(rounds.training(optimizer, codec, chain), variables, samples, work, KEY)
        parties = rounds.training(optimizer, codec, reference_chain)
        world = rounds.world(parties, variables, samples, KEY, rounds.OF_OPTAX[optimizer](rounds.RATE))
        reference = [protocol.run_session(world, one) for one in rounds.works(work)]
        yield Both(TOLERANCE[x64], codec is not None, chain, variables, compiled, reference)


def test_every_cut_equals_the_protocol(both):
    for cut, ((variables, loss), (expected, expected_loss)) in enumerate(
        zip(both.compiled, both.reference, strict=True)
    ):
        units = rounds.by_unit(both.chain, variables)
        assert rounds.difference(units, expected) < both.tolerance, f"cut {cut}"
        np.testing.assert_allclose(loss, expected_loss, rtol=both.tolerance, err_msg=f"cut {cut}")
        # The session moved the variables by far more than the tolerance.
        assert rounds.difference(variables, both.variables) > 0.01


def test_cuts_differ_exactly_where_the_codec_does_something(both):
    """At cut 0 images go up unchanged, and at cut L nothing goes up."""
    for cut in range(len(both.chain)):
        apart = rounds.difference(both.compiled[cut][0], both.compiled[cut + 1][0])
        if both.scaled:
            assert apart > 1e-3, f"cuts {cut} and {cut + 1}"
        else:
            assert apart == 0, f"cuts {cut} and {cut + 1}"
    finite.assert_equal(both.compiled[0], both.compiled[-1])


@pytest.mark.slow
def test_adam_that_makes_whole_steps_equals_the_protocol_at_every_cut():
    with jax.enable_x64(True):
        variables, samples = rounds.start()
        work = rounds.assignments(steps=2, batch=rounds.SHARP_BATCH)
        rate = rounds.SHARP_RATE
        training = rounds.sharp_training(True, rounds.SCALING)
        compiled = rounds.sessions(training, variables, samples, work, KEY, rate)
        parties = rounds.sharp_training(True, rounds.SCALING, rounds.REFERENCE_CHAIN)

        def apart(cut, **changes):
            adam = optax.adam(rate, **{"eps": rounds.SHARP[True], **changes})
            world = rounds.world(parties, variables, samples, KEY, adam)
            expected, _ = protocol.run_session(world, rounds.works(work)[cut])
            found, expected, start = (
                [unit["params"] for unit in units]
                for units in (
                    rounds.by_unit(rounds.CHAIN, compiled[cut][0]), expected, world.variables,
                )
            )  # fmt: skip
            # Two steps in the same direction would give 2. Momentum with such gradients would move by 0.02.
            assert rounds.typical_update(expected, start, rate) > 1.2
            return rounds.distance(found, expected, start)

        found = [apart(cut) for cut in range(rounds.CUTS)]
        assert max(found) < TOLERANCE[True], found
        for wrong in ({"b1": 0.901}, {"b2": 0.99}, {"eps": 1.1 * rounds.SHARP[True]}):
            assert apart(3, **wrong) > 3 * TOLERANCE[True], wrong


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", rounds.OPTIMIZERS)
@pytest.mark.parametrize("x64", [False, True], ids=["float32", "x64"])
def test_a_round_of_any_cuts_equals_that_of_the_protocol(x64, optimizer):
    """Chunks, unequal sessions and weights, and a codec with which every cut gives other numbers."""
    with jax.enable_x64(x64):
        variables, samples = rounds.start()
        work = rounds.assignments()
        program = jax.jit(
            functools.partial(round.run_round, rounds.training(optimizer, rounds.SCALING), 3, None)
        )

        def run(work):
            model, loss, _ = program(round.Model.of(variables), samples, work, KEY, jnp.asarray(rounds.RATE))
            return rounds.by_unit(rounds.CHAIN, model.variables), loss

        parties = rounds.training(optimizer, rounds.SCALING, rounds.REFERENCE_CHAIN)
        world = rounds.world(parties, variables, samples, KEY, rounds.OF_OPTAX[optimizer](rounds.RATE))
        expected, expected_loss, _ = protocol.run_round(world, rounds.works(work))
        mean, loss = run(work)
        assert rounds.difference(mean, expected) < TOLERANCE[x64]
        np.testing.assert_allclose(loss, expected_loss, rtol=TOLERANCE[x64])
        first = np.arange(rounds.CUTS) == 0
        for wrong in ({"weight": work.weight + first.astype(np.float32)}, {"cut": work.cut + 2 * first}):
            other = run(
                work._replace(**{name: x.astype(getattr(work, name).dtype) for name, x in wrong.items()})
            )
            assert rounds.difference(other[0], expected) > 10 * TOLERANCE[x64], wrong


# Like NOISY, but a gradient whose key gives a large number comes down as NaN.
BREAKING = dataclasses.replace(
    rounds.NOISY, down=lambda g, key: jnp.where(rounds.number(key) > 0.95, jnp.nan, rounds.NOISY.down(g, key))
)


class Small(NamedTuple):
    """Rounds of the small chain: two clients for each cut, with 0 to 3 steps, random numbers and a noisy
    codec. The last sample is black and gives NaN; no client sees it.

    run: assignments -> (variables by unit, loss, who diverged) of the compiled round.
    """

    run: object
    world: protocol.World
    work: object


@pytest.fixture(scope="module")
def small_round():
    with jax.enable_x64(True):
        yield small()


def small():
    variables, samples = rounds.start(rounds.SMALL_CHAIN, rounds.SMALL_SIZE)
    work = rounds.assignments(
        cuts=[*range(rounds.SMALL_CUTS)] * 2, steps=np.array([2, 1, 3, 2, 1, 3, 2, 0]), batch=6
    )
    samples, _ = rounds.poisoned(samples, work, 0)
    work.batches[work.batches == len(samples.labels) - 1] = 0
    training = rounds.training("sgd", rounds.NOISY, rounds.SMALL_CHAIN)
    training = dataclasses.replace(
        training, preprocess=rounds.preprocess_black_to_nan, skip_diverged=True, codecs=BREAKING
    )
    program = jax.jit(functools.partial(round.run_round, training, 4, None))

    def run(work):
        model, loss, diverged = program(
            round.Model.of(variables), samples, work, KEY, jnp.asarray(rounds.RATE)
        )
        named = [int(client) for client in diverged.client if client >= 0]
        return rounds.by_unit(rounds.SMALL_CHAIN, model.variables), float(loss), named

    sgd = rounds.OF_OPTAX["sgd"](rounds.RATE)
    return Small(run, rounds.world(training, variables, samples, KEY, sgd), work)


def assert_same_round(found, expected, nobody_came=False):
    assert rounds.difference(found[0], expected[0]) < TOLERANCE[True]
    assert found[1] == pytest.approx(expected[1], rel=TOLERANCE[True], nan_ok=nobody_came)
    assert found[2] == expected[2]


def test_a_round_with_random_numbers_and_a_noisy_codec_equals_the_protocol(small_round):
    found = small_round.run(small_round.work)
    assert_same_round(found, protocol.run_round(small_round.world, rounds.works(small_round.work)))
    assert rounds.difference(found[0], small_round.world.variables) > 0.01


def test_a_client_whose_last_update_alone_is_not_finite_diverged(small_round):
    """Its losses are finite."""
    work, place = small_round.work, 2  # at cut 2, of three steps

    def numbers(client):
        keys = (jax.random.fold_in(jax.random.fold_in(KEY, client), step) for step in range(3))
        return [rounds.number(protocol.codec_key(key, protocol.DOWN)) for key in keys]

    client = next(c for c in range(100, 1000) if [n > 0.95 for n in numbers(c)] == [False, False, True])
    work = work._replace(client=np.where(np.arange(8) == place, client, work.client).astype(np.int32))
    assert np.isfinite(protocol.run_session(small_round.world, rounds.works(work)[place])[1])
    found = small_round.run(work)
    assert found[2] == [client]
    assert_same_round(found, protocol.run_round(small_round.world, rounds.works(work), skip_diverged=True))


# Changes that must break the equality. Each is made to one client of the protocol.
WRONG_WORK = {
    "another client's keys": {"client": 90},
    "another cut": {"cut": 1},
    "the steps in another order": {"batches": lambda batches: batches[::-1]},
    "a step less": {"batches": lambda batches: batches[1:]},
}
WRONG_CODE = {
    "the key of the next unit": ("unit_key", lambda key, index: jax.random.fold_in(key, index + 1)),
    "one key for all units": ("unit_key", lambda key, index: key),
    "one key for both directions": ("codec_key", lambda key, direction: jax.random.fold_in(key, 77)),
}


@pytest.fixture(scope="module")
def session(small_round):
    """(the third client, with cut 2 and 3 steps; its session by the protocol)."""
    one = rounds.works(small_round.work)[2]
    return one, protocol.run_session(small_round.world, one)[0]


@pytest.mark.parametrize("name", WRONG_WORK)
def test_other_work_is_another_session(name, small_round, session):
    one, right = session
    [(field, value)] = WRONG_WORK[name].items()
    wrong = dataclasses.replace(one, **{field: value(one.batches) if callable(value) else value})
    assert rounds.difference(protocol.run_session(small_round.world, wrong)[0], right) > 1e-4


@pytest.mark.parametrize("name", WRONG_CODE)
def test_other_keys_are_another_session(name, small_round, session, monkeypatch):
    one, right = session
    monkeypatch.setattr(protocol, *WRONG_CODE[name])
    assert rounds.difference(protocol.run_session(small_round.world, one)[0], right) > 1e-4


def test_a_session_of_no_steps_changes_nothing_and_has_loss_0(small_round):
    one = rounds.works(small_round.work)[7]
    assert not len(one.batches)
    variables, loss = protocol.run_session(small_round.world, one)
    finite.assert_equal(variables, small_round.world.variables)
    assert loss == 0


def test_diverged_clients_are_those_of_the_protocol(small_round):
    work = small_round.work._replace(batches=small_round.work.batches.copy())
    work.batches[5, 2] = work.batches[0, 1] = 63  # the last steps of these two clients
    found, works = small_round.run(work), rounds.works(work)
    assert found[2] == [work.client[0], work.client[5]]
    assert_same_round(found, protocol.run_round(small_round.world, works, skip_diverged=True))
    variables, loss, diverged = protocol.run_round(small_round.world, works)
    finite.assert_equal(variables, small_round.world.variables)
    assert (loss, diverged) == (pytest.approx(found[1]), found[2])


ABSENT = {
    "one": np.arange(8) != 2,
    "all but one": np.arange(8) == 6,
    "all but the one of no steps": np.arange(8) == 7,
    "all": np.zeros(8, bool),
}


@pytest.mark.parametrize("who", ABSENT)
def test_absent_clients_are_those_of_the_protocol(who, small_round):
    work = small_round.work._replace(weight=small_round.work.weight * ABSENT[who])
    found = small_round.run(work)
    expected = protocol.run_round(small_round.world, rounds.works(work))
    assert_same_round(found, expected, nobody_came=who == "all")
    if who == "all":
        finite.assert_equal(found[0], small_round.world.variables)
        assert np.isnan(found[1])


@pytest.mark.parametrize("cut", range(rounds.SMALL_CUTS))
def test_nothing_else_crosses_the_cut(cut, small_round):
    one, transport = rounds.works(small_round.work)[cut], protocol.Transport()
    one = dataclasses.replace(one, batches=one.batches[:1])
    protocol.run_session(small_round.world, one, transport)
    (first, down), *inside, (last, up) = transport.messages
    assert (first, last) == (protocol.MODEL_DOWN, protocol.MODEL_UP)
    assert len(down) == len(up) == cut
    kinds = [kind for kind, _ in inside]
    if cut == rounds.SMALL_CUTS - 1:
        assert kinds == []
        return
    assert kinds == ["smashed_up", "labels_up", *(["gradient_down"] if cut else [])]
    assert inside[1][1].shape == (6,)
    if cut == 0:
        np.testing.assert_array_equal(inside[0][1], small_round.world.images[one.batches[0]])
    else:
        assert inside[0][1].shape == inside[2][1].shape == (6, {1: 12, 2: 8}[cut])


@pytest.mark.parametrize("cut", range(rounds.SMALL_CUTS))
def test_the_bytes_of_its_messages_are_those_of_the_plan(cut):
    """In float32. Clocks and bytes come from the same terms."""
    chain, steps, batch, transport = rounds.SMALL_CHAIN, 2, 6, protocol.Transport()
    training = rounds.training("sgd", None, chain)
    with jax.enable_x64(False):
        variables, samples = rounds.start(chain, rounds.SMALL_SIZE)
        work = rounds.assignments(cuts=[cut], steps=steps, batch=batch)
        world = rounds.world(training, variables, samples, KEY, optax.sgd(0.1))
        protocol.run_session(world, rounds.works(work)[0], transport)
    stored = samples.images.shape[1:]
    entering = jax.eval_shape(training.preprocess, jax.ShapeDtypeStruct((1, *stored), samples.images.dtype))
    profile = models.profile(chain, entering.shape[1:], stored_shape=stored)
    fleet = fleets.random_fleet(1).with_samples([steps * batch])
    terms = optim.terms(profile, fleet, optim.Work(batch_size=batch, min_cut=0))
    assert (
        8 * (transport.bytes["smashed_up"] + transport.bytes["labels_up"])
        == steps * batch * terms.up_bits[cut]
    )
    assert 8 * transport.bytes["gradient_down"] == steps * batch * terms.down_bits[cut]
    assert 8 * transport.bytes["model_down"] == 8 * transport.bytes["model_up"] == terms.model_bits[cut]
    assert transport.bytes["smashed_up"] > 0 or cut == rounds.SMALL_CUTS - 1


def test_it_shares_no_code_with_the_compiled_round():
    tree = ast.parse(Path(protocol.__file__).read_text())
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            found.add(node.module.split(".")[0])
    assert found == {
        "collections",
        "dataclasses",
        "functools",
        "jax",
        "jaxtyping",
        "numpy",
        "optax",
        "typing",
    }
