"""The compiled schemes against the two-party protocol: unequal cuts, steps and weights, and a noisy codec."""

import dataclasses
import functools
import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from federated import rounds

from sfl_jax.errors import BadInput
from sfl_jax.federated import protocol, protocol_schemes, round
from sfl_jax.federated.optimizers import of_optax
from sfl_jax.schemes import create
from sfl_jax.schemes.psl import Psl
from sfl_jax.schemes.sfl import Sfl
from sfl_jax.schemes.sfl_v2 import SflV2
from sfl_jax.schemes.sl import Sl

KEY, TOLERANCE = jax.random.key(7), 1e-10
CHAIN, SIZE = rounds.SMALL_CHAIN, rounds.SMALL_SIZE
L = len(CHAIN)


class Case(NamedTuple):
    """A scheme, and its protocol: (world, works, order, shared_state) -> Result."""

    scheme: Any
    protocol: Any
    cuts: tuple[int, ...] = (1, 3, 0, 2, 1)
    steps: tuple[int, ...] = (2, 1, 2, 3, 0)
    optimizer: str = "sgd"
    practice: Any = types.MappingProxyType({})  # fields of `Training`


def of_sfl(world, works, order, state, **options):
    return protocol_schemes.Result(*protocol.run_round(world, works, **options), [])


def of_psl(most, batch="separate"):
    def run(world, works, order, state, **options):
        return protocol_schemes.run_psl(world, works, most, batch, state, **options)

    return run


V2, SL = protocol_schemes.run_sfl_v2, protocol_schemes.run_sl


def v2(world, works, order, state, by="client", **options):
    return V2(world, works, order, by, state, **options)


# FedProx, a clip that bites in some units, and augmentation.
PRACTICE = {"proximal": 0.7, "clip_norm": 0.4, "augment": rounds.mirror}
BY_STEP = functools.partial(v2, by="step")
CASES = {
    "sl": Case(Sl(), SL, practice=PRACTICE),
    "sfl_v2 by client": Case(SflV2(), v2, optimizer="adam"),
    "sfl_v2 by step, tail": Case(SflV2(order="step", tail_units=1), BY_STEP),
    "psl, tail": Case(Psl(most=1, tail_units=1), of_psl(1), (1, 0, 1, 1, 0)),
    "psl, joined": Case(Psl(most=1, server_batch="joined"), of_psl(1, "joined"), (1, 0, 1, 1, 0), (2,) * 5),
}
SLOW = {
    "sfl, tail": Case(Sfl(tail_units=1), of_sfl, practice=PRACTICE),
    "sl, tail": Case(Sl(tail_units=1), SL),
    "sl, adam": Case(Sl(), SL, optimizer="adam"),
    "sfl_v2 by client, tail": Case(SflV2(tail_units=2), v2),
    "sfl_v2 by step": Case(SflV2(order="step"), BY_STEP, practice=PRACTICE),
    "sfl_v2 by step, adam": Case(SflV2(order="step"), BY_STEP, optimizer="adam"),
    "psl": Case(Psl(most=2), of_psl(2), (1, 2, 0, 2, 1), practice=PRACTICE),
    "psl, adam": Case(Psl(most=2), of_psl(2), (1, 2, 0, 2, 1), optimizer="adam"),
    "psl, all shared": Case(Psl(most=0), of_psl(0), (0,) * 5, optimizer="adam"),
    "psl, own all": Case(Psl(), of_psl(L)),
    "psl, joined, tail": Case(
        Psl(most=1, server_batch="joined", tail_units=1), of_psl(1, "joined"), (1, 0, 1, 1, 0), (2,) * 5
    ),
}
EVERY = CASES | SLOW


def mostly_slow(names, quick=()):
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


def training_of(case, codecs=rounds.NOISY, **changes):
    plain = rounds.training(case.optimizer, codecs, CHAIN)
    scheme = case.scheme
    changes = {**case.practice, **changes}
    return dataclasses.replace(plain, scheme=scheme.engine(), tail_units=scheme.tail_units, **changes)


def work_of(case):
    work = rounds.assignments(case.cuts, np.array(case.steps), batch=3)
    order = np.random.default_rng(3).permutation(len(case.cuts))
    return work._replace(turn=np.argsort(order).astype(np.int32)), order.tolist()


def program_of(training):
    body = round.run_round if training.scheme is None else training.scheme.run_round
    return jax.jit(functools.partial(body, training, 5, None))


@functools.cache
def start():
    return rounds.start(CHAIN, SIZE)


@pytest.fixture(autouse=True)
def _float64():
    start.cache_clear()
    with jax.enable_x64(True):
        yield


def two_rounds(case):
    """(compiled, expected): the variables by unit and the loss after each of two rounds."""
    variables, samples = start()
    training, (work, order) = training_of(case), work_of(case)
    program, model = program_of(training), round.start_model(training, variables)
    world = rounds.world(training, variables, samples, KEY, rounds.OF_OPTAX[case.optimizer](rounds.RATE))
    options = {"tail_units": case.scheme.tail_units}
    found, expected, state = [], [], None
    for number in range(2):
        key = jax.random.fold_in(KEY, number)
        model, loss, diverged = program(model, samples, work, key, jnp.asarray(rounds.RATE))
        assert (diverged.client == -1).all()
        found.append((rounds.by_unit(CHAIN, model.variables), loss))
        world = dataclasses.replace(world, key=key)
        outcome = case.protocol(world, rounds.works(work), order, state, **options)
        world, state = dataclasses.replace(world, variables=outcome.variables), outcome.shared_state
        expected.append((outcome.variables, outcome.loss))
    return found, expected


@pytest.mark.parametrize("name", mostly_slow(EVERY, CASES))
def test_two_rounds_equal_those_of_the_protocol(name):
    found, expected = two_rounds(EVERY[name])
    for (variables, loss), (own, own_loss) in zip(found, expected, strict=True):
        assert rounds.difference(variables, own) < TOLERANCE
        np.testing.assert_allclose(loss, own_loss, rtol=TOLERANCE)
    assert rounds.difference(found[1][0], found[0][0]) > 0.01, "the round moved the variables"


def one_round(case, work, training=None, model=None, key=KEY):
    training = training or training_of(case)
    variables, samples = start()
    model = model or round.start_model(training, variables)
    new, loss, diverged = program_of(training)(model, samples, work, key, jnp.asarray(rounds.RATE))
    return new, loss, diverged


WRONG = {
    "the order reversed": ("sfl_v2 by client", lambda w: w._replace(turn=w.turn[::-1].copy())),
    "another cut": ("sfl_v2 by step, tail", lambda w: w._replace(cut=(w.cut + 1) % L)),
    "equal weights": ("psl, tail", lambda w: w._replace(weight=np.ones_like(w.weight))),
    "a step less": ("sl", lambda w: w._replace(steps=np.maximum(w.steps - 1, 0))),
}


@pytest.mark.parametrize("name", mostly_slow(WRONG, ["a step less"]))
def test_other_work_gives_other_numbers(name):
    case, change = EVERY[WRONG[name][0]], WRONG[name][1]
    work, _ = work_of(case)
    training = training_of(case)
    right, wrong = (one_round(case, one, training)[0].variables for one in (work, change(work)))
    assert rounds.difference(right, wrong) > 1e-3


@pytest.mark.parametrize("name", mostly_slow(["sl", "sfl, tail"], ["sl"]))
@pytest.mark.parametrize("change", [{"proximal": 0.0}, {"clip_norm": 0.0}, {"augment": None}])
def test_each_part_of_the_practice_changes_the_numbers(name, change):
    case, (work, _) = EVERY[name], work_of(EVERY[name])
    right, wrong = (
        one_round(case, work, training)[0].variables
        for training in (training_of(case), training_of(case, **change))
    )
    assert rounds.difference(right, wrong) > 1e-3


@pytest.mark.parametrize("name", mostly_slow(["sl", "psl"]))
def test_a_state_that_is_kept_makes_another_second_round(name):
    case = EVERY[name]
    forgets = dataclasses.replace(case.scheme, keeps_state=False)
    work, _ = work_of(case)
    after = []
    for scheme in (case.scheme, forgets):
        own = case._replace(scheme=scheme)
        training = training_of(own)
        model, *_ = one_round(own, work, training)
        after.append([model.variables, one_round(own, work, training, model)[0].variables])
    assert rounds.difference(after[0][0], after[1][0]) == 0
    assert rounds.difference(after[0][1], after[1][1]) > 1e-3


@pytest.mark.slow
def test_with_an_identity_link_sl_knows_no_cut_and_psl_its_largest_alone():
    for name, cuts, alike in [("sl", (3, 3, 1, 0, 2), True), ("psl", (2, 1, 2, 0, 0), True),
                              ("sfl_v2 by client", (3, 3, 1, 0, 2), False)]:  # fmt: skip
        case = EVERY[name]
        training, (work, _) = training_of(case, codecs=None), work_of(case)
        other = work._replace(cut=np.array(cuts, np.int32))
        results = [one_round(case, one, training)[0].variables for one in (work, other)]
        apart = rounds.difference(*results)
        assert (apart < 1e-12) if alike else (apart > 1e-3), name


@pytest.mark.slow
def test_psl_chunks_change_nothing_but_rounding():
    case = EVERY["psl"]
    training, (work, _) = training_of(case), work_of(case)
    variables, samples = start()
    model = round.start_model(training, variables)
    results = [
        jax.jit(functools.partial(training.scheme.run_round, training, size, None))(
            model, samples, work, KEY, jnp.asarray(rounds.RATE)
        )[0].variables
        for size in (5, 1)
    ]
    assert rounds.difference(*results) < TOLERANCE


def spoilt(case):
    """(work in which the second client meets NaN at its second step, the samples)."""
    _, samples = start()
    work, order = work_of(case)
    work = work._replace(steps=np.full_like(work.steps, 2))
    batches = work.batches.copy()
    batches[batches == len(samples.labels) - 1] = 0
    batches[1, 1] = len(samples.labels) - 1
    images = np.array(samples.images)
    images[-1] = 0
    return work._replace(batches=batches), order, samples._replace(images=images)


@pytest.mark.parametrize(
    ("name", "skips"),
    [
        ("sl", True),
        *(
            pytest.param(name, skips, marks=pytest.mark.slow)
            for name, skips in [
                ("sfl_v2 by client", False),
                ("sfl_v2 by step", True),
                ("psl", False),
                ("psl, tail", True),
                ("psl, joined", False),
            ]
        ),
    ],
)
def test_a_client_that_diverges_has_no_influence_from_then_on(name, skips):
    case = EVERY[name]
    training = training_of(case, skip_diverged=skips, preprocess=rounds.preprocess_black_to_nan)
    work, order, samples = spoilt(case)
    variables, _ = start()
    model, loss, diverged = program_of(training)(
        round.start_model(training, variables), samples, work, KEY, jnp.asarray(rounds.RATE)
    )
    world = rounds.world(training, variables, samples, KEY, rounds.OF_OPTAX[case.optimizer](rounds.RATE))
    options = {"tail_units": case.scheme.tail_units, "skip_diverged": skips}
    outcome = case.protocol(world, rounds.works(work), order, None, **options)
    assert outcome.diverged == [work.client[1]] == diverged.client[diverged.client >= 0].tolist()
    assert rounds.difference(rounds.by_unit(CHAIN, model.variables), outcome.variables) < TOLERANCE
    if name != "psl, joined":  # the batch cannot be joined without it
        np.testing.assert_allclose(loss, outcome.loss, rtol=TOLERANCE)
    moved = rounds.difference(model.variables, variables)
    assert moved > 1e-3 if skips else moved == 0


def test_other_cuts_steps_and_orders_compile_nothing():
    case = EVERY["sfl_v2 by step"]
    training, (work, _) = training_of(case), work_of(case)
    program, (variables, samples) = program_of(training), start()
    others = (
        work,
        work._replace(cut=work.cut[::-1].copy(), steps=np.ones_like(work.steps), turn=work.turn * 0),
    )
    for one in others:
        program(round.start_model(training, variables), samples, one, KEY, jnp.asarray(rounds.RATE))
    assert program._cache_size() == 1


@pytest.mark.slow
def test_an_optimiser_that_looks_at_leaves_gets_the_units_as_they_are():
    case = EVERY["sfl_v2 by client"]._replace(optimizer="sgd")
    lars = optax.lars(0.1)
    variables, samples = start()
    training = training_of(case, optimizer=of_optax(lars, variables.params))
    work, order = work_of(case)
    world = rounds.world(training, variables, samples, KEY, lars)
    model, *_ = program_of(training)(round.start_model(training, variables), samples, work, KEY, jnp.ones(()))
    outcome = case.protocol(world, rounds.works(work), order, None)
    assert rounds.difference(rounds.by_unit(CHAIN, model.variables), outcome.variables) < 1e-9


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: create("sfl_v3"), "scheme=sfl_v3: must be one of sfl, sfl_v2, psl, sl, fl"),
        (lambda: create("sl", order="step"), "scheme=sl: has no order"),
        (lambda: create("sfl_v2", order="random"), "server_order=random: must be one of client, step"),
        (lambda: create("psl", server_batch="both"), "server_batch=both: must be one of separate, joined"),
        (lambda: create("psl", most=9).check(L), "max_cut=9: must be at most 3, the units of the network"),
        (lambda: create("sl", tail_units=3).check(L), "tail_units=3: must be 0 to 2"),
    ],
)
def test_what_is_no_scheme_is_refused_in_a_line(make, line):
    with pytest.raises(BadInput) as caught:
        make()
    assert str(caught.value).startswith(line)
