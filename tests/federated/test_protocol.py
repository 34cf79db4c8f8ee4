"""The compiled session at every cut against two parties that exchange messages."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from federated import rounds

from sfl_jax.federated import protocol, round

TOLERANCE = {False: 1e-5, True: 1e-10}  # by x64
SETTINGS = [
    (x64, optimizer, link)
    for x64 in (False, True)
    for optimizer in rounds.OPTIMIZERS
    for link in (None, rounds.SCALING)
]
QUICK = [(True, "sgd", rounds.SCALING)]  # the others are slow


class Both(NamedTuple):
    """Sessions of one client a cut, compiled (products, vmapped) and by the protocol (lax.conv, one by
    one).
    """

    tolerance: float
    scaled: bool
    variables: object
    compiled: list
    reference: list


def name(setting):
    x64, optimizer, link = setting
    return f"{'x64' if x64 else 'float32'}-{optimizer}-{'scaling' if link else 'identity'}"


@pytest.fixture(
    scope="module",
    params=[pytest.param(s, id=name(s), marks=[] if s in QUICK else pytest.mark.slow) for s in SETTINGS],
)
def both(request):
    x64, optimizer, link = request.param
    with jax.enable_x64(x64):
        variables, samples = rounds.start()
        # The same batches and keys for every cut, so that cuts may be compared.
        work = rounds.assignments(steps=2)
        work = work._replace(
            client=work.client * 0, batches=np.broadcast_to(work.batches[:1], work.batches.shape)
        )
        key = jax.random.key(7)
        compiled = rounds.sessions(rounds.training(optimizer, link), variables, samples, work, key)
        parties = rounds.training(optimizer, link, rounds.REFERENCE_CHAIN)
        reference = [
            protocol.run_session(parties, variables, samples, rounds.client(work, k), key, rounds.RATE)
            for k in range(rounds.CUTS)
        ]
        yield Both(TOLERANCE[x64], link is not None, variables, compiled, reference)


def test_every_cut_equals_the_protocol(both):
    for cut, ((variables, loss), (expected, expected_loss)) in enumerate(
        zip(both.compiled, both.reference, strict=True)
    ):
        assert rounds.difference(variables, expected) < both.tolerance, f"cut {cut}"
        np.testing.assert_allclose(loss, expected_loss, rtol=both.tolerance, err_msg=f"cut {cut}")
        # The session moved the variables by far more than the tolerance.
        assert rounds.difference(variables, both.variables) > 0.01


def test_cuts_differ_exactly_where_the_link_does_something(both):
    for cut in range(rounds.CUTS - 1):
        apart = rounds.difference(both.compiled[cut][0], both.compiled[cut + 1][0])
        if both.scaled:
            assert apart > 1e-3, f"cuts {cut} and {cut + 1}"
        else:
            assert apart == 0, f"cuts {cut} and {cut + 1}"


@pytest.mark.slow
@pytest.mark.parametrize("x64", [False, True], ids=["float32", "x64"])
def test_adam_that_makes_whole_steps_equals_the_protocol_at_every_cut(x64):
    with jax.enable_x64(x64):
        variables, samples = rounds.start()
        work = rounds.assignments(steps=2, batch=rounds.SHARP_BATCH)
        key, rate = jax.random.key(7), rounds.SHARP_RATE
        compiled = rounds.sessions(
            rounds.sharp_training(x64, rounds.SCALING), variables, samples, work, key, rate
        )

        def apart(cut, **changes):
            parties = rounds.sharp_training(x64, rounds.SCALING, rounds.REFERENCE_CHAIN, **changes)
            expected, _ = protocol.run_session(
                parties, variables, samples, rounds.client(work, cut), key, rate
            )
            # Two steps of the same direction would be 2. A momentum of such gradients would move by 0.02.
            assert rounds.typical_update(expected.params, variables.params, rate) > 1.2
            return rounds.distance(compiled[cut][0].params, expected.params, variables.params)

        found = [apart(cut) for cut in range(rounds.CUTS)]
        assert max(found) < TOLERANCE[x64], found
        for wrong in ({"b1": 0.901}, {"b2": 0.99}, {"eps": 1.1 * rounds.SHARP[x64]}):
            assert apart(3, **wrong) > 3 * TOLERANCE[x64], wrong


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", rounds.OPTIMIZERS)
@pytest.mark.parametrize("x64", [False, True], ids=["float32", "x64"])
def test_a_round_of_any_cuts_equals_that_of_the_protocol(x64, optimizer):
    """Chunks, unequal sessions and weights, and a link with which every cut gives other numbers."""
    with jax.enable_x64(x64):
        variables, samples = rounds.start()
        work, key = rounds.assignments(), jax.random.key(7)
        program = jax.jit(
            functools.partial(round.run_round, rounds.training(optimizer, rounds.SCALING), 3, None)
        )

        def run(work):
            model, loss, _ = program(round.Model.of(variables), samples, work, key, jnp.asarray(rounds.RATE))
            return model.variables, loss

        parties = rounds.training(optimizer, rounds.SCALING, rounds.REFERENCE_CHAIN)
        expected, expected_loss = protocol.run_round(parties, variables, samples, work, key, rounds.RATE)
        mean, loss = run(work)
        assert rounds.difference(mean, expected) < TOLERANCE[x64]
        np.testing.assert_allclose(loss, expected_loss, rtol=TOLERANCE[x64])
        first = np.arange(rounds.CUTS) == 0
        for wrong in ({"weight": work.weight + first.astype(np.float32)}, {"cut": work.cut + 2 * first}):
            other = run(
                work._replace(**{name: x.astype(getattr(work, name).dtype) for name, x in wrong.items()})
            )
            assert rounds.difference(other[0], expected) > 10 * TOLERANCE[x64], wrong


class Spy(protocol.Server):
    """A server that notes what it is sent and what it answers."""

    seen: list

    def answer(self, message, key):
        down, loss = super().answer(message, key)
        self.seen.append((message, down))
        return down, loss


def test_nothing_else_crosses_the_cut(monkeypatch):
    monkeypatch.setattr(Spy, "seen", [], raising=False)
    monkeypatch.setattr(protocol, "Server", Spy)
    variables, samples = rounds.start()
    work = rounds.client(rounds.assignments(cuts=[3], steps=1), 0)
    protocol.run_session(
        rounds.training(chain=rounds.REFERENCE_CHAIN),
        variables,
        samples,
        work,
        jax.random.key(7),
        rounds.RATE,
    )
    [(up, down)] = Spy.seen
    assert up._fields == ("smashed", "labels")
    assert up.smashed.shape == down.gradient.shape == (4, 4, 4, 16)
    assert up.labels.shape == (4,)
