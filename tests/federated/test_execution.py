"""The alternatives of computing clients are timed in real shapes, and the fastest is taken."""

import functools
import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from sfl_jax import models
from sfl_jax.federated import execution
from sfl_jax.federated.balance import places_per_client
from sfl_jax.federated.execution import Alternative, choose, chunk_sizes, remember, remembered

FORMS = ("product", "conv")


def timed(table):
    """(a replacement for measuring, its calls)."""
    asked = []

    def seconds(one):
        asked.append(tuple(one))
        return table[tuple(one)]

    return seconds, asked


def test_the_fastest_is_chosen():
    seconds, asked = timed(
        {("product", 1): 3.0, ("product", 2): 2.0, ("product", 4): 2.1, ("conv", 1): 2.5, ("conv", 2): 1.9,
         ("conv", 4): 1.0}
    )  # fmt: skip
    choice, tried = choose(FORMS, [1, 2, 4], seconds)
    assert choice == ("conv", 4)
    assert len(asked) == 6
    assert tried[choice] == min(tried.values()) == 1.0


def test_no_time_is_spent_on_what_is_far_slower():
    seconds, asked = timed({("product", 1): 1.0, ("product", 2): 0.9, ("product", 4): 1.2, ("conv", 1): 40.0})
    choice, _ = choose(FORMS, [1, 2, 4, 8, 16], seconds)
    assert choice == ("product", 2)
    assert asked == [("product", 1), ("product", 2), ("product", 4), ("conv", 1)]


def test_nothing_is_measured_without_a_choice():
    assert choose(("conv",), [3], lambda _: pytest.fail("measured")) == (("conv", 3), {})


def test_idle_places_cost_their_part():
    """17 clients: chunks of nine run 18 places, which pays only if nine at once are that much faster."""
    sizes = chunk_sizes(17, 1)
    places = functools.partial(places_per_client, 17)
    for nine, best in ((0.9, 9), (0.96, 1)):
        seconds, asked = timed({("conv", size): nine if size == 9 else 1.0 for size in sizes})
        choice, tried = choose(("conv",), sizes, seconds, places)
        assert choice == ("conv", best)
        assert [size for _, size in asked] == sizes
        assert tried[Alternative("conv", 9)] == pytest.approx(nine * 18 / 17)
        assert tried[Alternative("conv", 1)] == 1.0


def test_idle_places_are_no_sign_that_larger_chunks_are_slower():
    seconds, _ = timed({("conv", size): 1.0 - 0.01 * size for size in (1, 2, 3)})
    assert choose(("conv",), [1, 2, 3], seconds, functools.partial(places_per_client, 3))[0] == ("conv", 3)


@pytest.mark.parametrize(
    ("clients", "devices", "sizes"),
    [(100, 1, [1, 2, 4, 8, 15]), (10, 1, [1, 2, 4, 5, 10]), (17, 1, [1, 2, 4, 6, 9]), (1, 1, [1]),
     (16, 4, [1, 2, 4]), (17, 4, [1, 2, 3, 5]), (3, 8, [1])],
)  # fmt: skip
def test_chunks_are_those_that_leave_the_fewest_places_idle(clients, devices, sizes):
    assert chunk_sizes(clients, devices) == sizes


def test_the_heaviest_units_stand_for_all_that_are_like_them(monkeypatch):
    chain = models.create("efficientnetv2-b0")
    profile = models.profile(chain, (32, 32, 1))
    asked = []
    monkeypatch.setattr(execution, "_seconds_of_unit", lambda *given: asked.append(given) or 1.0)
    images = jax.ShapeDtypeStruct((8, 32, 32, 1), jnp.float32)
    total = execution.seconds_per_client(chain, profile, images, 3, jax.devices()[:1])
    names = [chain.units[index].name for _, index, *_ in asked]
    macs = dict(zip(profile.names, profile.forward_macs + profile.backward_macs, strict=True))
    # Seven equal blocks end stage 6, four end stage 5: more work than any other kind.
    assert names == ["block6h", "block5e"]
    assert total == 7 + 4
    assert 7 * macs["block6h"] + 4 * macs["block5e"] > 0.4 * sum(macs.values())
    assert [execution._inputs(chain, images)[index].shape for _, index, *_ in asked] == [
        (8, 1, 1, 192), (8, 2, 2, 112),
    ]  # fmt: skip


@pytest.fixture
def forget():
    """Forgets what was measured when called, and after the test, whose clock may not be the real one."""
    yield execution._seconds_of_unit.cache_clear
    execution._seconds_of_unit.cache_clear()


def test_a_unit_is_measured_for_one_client_and_for_several(monkeypatch, forget):
    chain = models.create("efficientnetv2-tiny", layer_form="conv")
    profile = models.profile(chain, (8, 8, 1))
    images = jax.ShapeDtypeStruct((4, 8, 8, 1), jnp.float32)
    assert 0 < execution.seconds_per_client(chain, profile, images, 1, jax.devices()[:1]) < 1
    forget()
    # Each call of the clock is one second later.
    monkeypatch.setattr(execution, "time", SimpleNamespace(perf_counter=itertools.count().__next__))
    monkeypatch.setattr(execution, "UNITS", 1)
    own, of_two = (
        execution.seconds_per_client(chain, profile, images, clients, jax.devices()[:1]) for clients in (1, 2)
    )
    assert own * execution.STEPS in (1, 2)  # this many units are like the heaviest
    assert of_two == own / 2


def test_two_runs_of_a_process_make_the_same_choice(forget):
    """Their times would differ by noise, and another chunk or form of layers rounds differently."""

    def tried(layer_form, clients):
        chain = models.create("cnn", layer_form=layer_form)
        profile = models.profile(chain, (12, 12, 1))
        images = jax.ShapeDtypeStruct((4, 12, 12, 1), jnp.float32)
        return execution.seconds_per_client(chain, profile, images, clients, jax.devices()[:1])

    forget()
    alternatives = ("conv", 1), ("conv", 2)
    first, second = [[tried(*one) for one in alternatives] for _ in range(2)]
    assert first == second
    assert len(set(first)) == len(alternatives)


def test_what_was_measured_is_found_again(tmp_path):
    path = tmp_path / "new" / "executions.json"
    key, tried = ("cpu", 4, "b0"), {Alternative("product", 4): 0.25, Alternative("conv", 1): 3.0}
    assert remembered(path, key) is None
    remember(path, key, Alternative("product", 4), tried)
    remember(path, ("cpu", 2, "b0"), Alternative("conv", 1), {})
    assert remembered(path, key) == (Alternative("product", 4), tried)
    assert remembered(path, ("cpu", 2, "b0")) == (Alternative("conv", 1), {})
    assert remembered(path, ("gpu", 4, "b0")) is None
    for broken in ("", "[]", "{", '{"[\\"cpu\\", 4, \\"b0\\"]": 3}'):
        path.write_text(broken)
        assert remembered(path, key) is None
    path.unlink()
    path.mkdir()
    remember(
        path, key, Alternative("product", 4), tried
    )  # without a place nothing is kept, and nothing fails
    assert remembered(path, key) is None
