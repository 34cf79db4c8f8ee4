"""The certificate of a network, and what must break it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from federated import rounds
from flax import linen as nn

from sfl_jax.federated import certificate, protocol
from sfl_jax.models import Chain

SHAPE = (rounds.SMALL_SIZE, rounds.SMALL_SIZE, 1)


def rows(**options):
    return list(certificate.certify(rounds.SMALL_CHAIN, SHAPE, **options))


@pytest.mark.parametrize("tail_units", [0, 1])
def test_every_cut_of_a_network_holds(tail_units):
    found = rows(tail_units=tail_units)
    assert [row.cut for row in found] == list(range(rounds.SMALL_CUTS))
    assert all(row.holds for row in found)
    assert max(row.difference for row in found) < 1e-13
    below = [2, 3, 3, 0] if not tail_units else [3, 4, 0, 0]  # smashed data, labels, features, gradients
    assert [row.messages for row in found] == below


def scaled(self, gradient, original=protocol.Session.down):
    original(self, jax.tree.map(lambda g: g * (1 + 1e-7), gradient))


def other_key(step_key, index, original=protocol.unit_key):
    return original(step_key, index + 1)


def nothing(gradient, *rest):
    return jax.tree.map(lambda g: g * np.nan, gradient)


@pytest.mark.parametrize(
    ("owner", "name", "wrong"),
    [
        (protocol.Session, "down", scaled),  # the gradient that comes down
        (protocol, "unit_key", other_key),  # the random numbers of a unit
        (protocol, "_adjusted", nothing),  # numbers that are not finite
    ],
)
def test_a_wrong_party_is_noticed(monkeypatch, owner, name, wrong):
    monkeypatch.setattr(owner, name, wrong)
    found = rows()
    assert not found[1].holds


def test_a_number_that_is_not_finite_in_the_last_unit_alone_is_noticed(monkeypatch):
    update = protocol.Copy.update

    def poisoned(copy, *arguments):
        update(copy, *arguments)
        if copy.index == rounds.SMALL_CUTS - 2:
            copy.variables = jax.tree.map(lambda x: x * np.nan, copy.variables)

    monkeypatch.setattr(protocol.Copy, "update", poisoned)
    assert not any(row.holds for row in rows())


def test_a_network_of_one_class_has_loss_0_and_holds():
    class One(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(1)(x.reshape(len(x), -1))

    found = list(certificate.certify(Chain((One(),)), SHAPE, classes=1))
    assert [row.loss_difference for row in found] == [0, 0]
    assert all(row.holds for row in found)


def test_distances_are_counted_in_the_step_of_the_unit():
    start, whole = (
        {"w": jnp.zeros(3), "b": jnp.zeros(())},
        {"w": jnp.array([0.0, 2.0, 0.0]), "b": jnp.ones(())},
    )
    parted = {"w": jnp.array([0.0, 2.0, 1.0]), "b": jnp.ones(())}
    assert certificate.distance(parted, whole, start) == 0.5
    assert certificate.distance(whole, whole, start) == 0
    assert certificate.distance(start, start, start) == 0
    assert certificate.distance(parted, whole, whole) == np.inf
    assert np.isnan(certificate.distance({"w": start["w"] * np.nan, "b": start["b"]}, whole, start))
