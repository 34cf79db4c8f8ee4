"""Which device runs which client: each client once, little padding, and devices that end together."""

import itertools
import math

import numpy as np
import pytest
from federated import rounds
from hypothesis import given
from hypothesis import strategies as st

from sfl_jax import datasets
from sfl_jax.federated.balance import chunk_size, deal, fill_chunks, places_per_client


@pytest.mark.parametrize(
    ("clients", "chunk", "devices"), [(10, 4, 1), (7, 4, 1), (97, 4, 1), (6, 2, 4), (1, 8, 2), (9, 3, 2)]
)
def test_chunks_hold_every_client_once(clients, chunk, devices):
    work = rounds.assignments(cuts=[1] * clients)
    arranged, size = fill_chunks(work, chunk, devices)
    assert 1 <= size <= chunk
    assert len(arranged.client) % (size * devices) == 0
    there = arranged.weight > 0
    assert sorted(arranged.client[there]) == sorted(work.client)
    order = np.argsort(arranged.client[there])
    np.testing.assert_array_equal(arranged.batches[there][order], work.batches)
    assert not arranged.steps[~there].any()


@pytest.mark.parametrize("devices", [1, 2, 3, 8])
def test_a_chunk_has_the_fewest_idle_places_of_those_that_take_the_fewest_turns(devices):
    for clients in range(1, 40):
        for most in range(1, 20):
            turns = {size: math.ceil(clients / size / devices) for size in range(1, most + 1)}
            best = min(size for size in turns if turns[size] == min(turns.values()))
            assert chunk_size(clients, most, devices) == best
            assert chunk_size(clients, best, devices) == best


@pytest.mark.parametrize(
    ("clients", "most", "devices", "size"),
    [(17, 16, 1, 9), (34, 16, 1, 12), (37, 16, 1, 13), (19, 4, 1, 4), (10, 16, 1, 10), (2, 5, 1, 2),
     (17, 16, 4, 5), (9, 8, 8, 2), (3, 2, 8, 1)],
)  # fmt: skip
def test_a_cohort_that_nothing_divides_is_still_computed_together(clients, most, devices, size):
    arranged, found = fill_chunks(rounds.assignments(cuts=[1] * clients, steps=1, batch=1), most, devices)
    assert found == size
    slots = len(arranged.client) // devices // size
    assert len(arranged.client) == devices * slots * size
    # The most places of a device, counted, against the number by which a size is chosen.
    busiest = (arranged.weight.reshape(devices, slots, size) > 0).any(2).sum(1).max()
    assert places_per_client(clients, size, devices) == busiest * size * min(devices, clients) / clients


@pytest.mark.parametrize(("clients", "most"), [(100, 1.15), (1000, 1.05)])
@pytest.mark.parametrize("seed", range(3))
def test_few_steps_are_run_in_vain(clients, most, seed):
    """Sizes from Dirichlet(0.5), like 60,000 samples in batches of 32; chunks of 4."""
    labels = np.random.default_rng(seed).integers(0, 10, 60_000)
    parts = datasets.partition(labels, clients, name="dirichlet", alpha=0.5, seed=seed)
    steps = np.array([max(len(part) // 32, 1) for part in parts])

    def ratio(steps):
        arranged, size = fill_chunks(rounds.assignments(cuts=[1] * clients, steps=steps, batch=1), 4)
        return (arranged.steps.reshape(-1, size).max(1) * size).sum() / steps.sum()

    assert 1 <= ratio(steps) <= most
    as_they_come = (steps[: clients // 4 * 4].reshape(-1, 4).max(1) * 4).sum() / steps.sum()
    assert as_they_come > most  # this is why clients are ordered


def loads(steps, devices, slots):
    """The steps that each device runs."""
    filled = np.zeros(devices * slots, int)
    filled[deal(steps, devices, slots)] = steps
    return filled.reshape(devices, slots).sum(1)


@given(st.lists(st.integers(0, 60), min_size=1, max_size=7), st.integers(1, 3))
def test_no_deal_is_better_by_more_than_a_third(steps, devices):
    steps = np.array(sorted(steps, reverse=True))
    best = min(
        max(sum(s for s, d in zip(steps, where, strict=True) if d == device) for device in range(devices))
        for where in itertools.product(range(devices), repeat=len(steps))
    )
    assert loads(steps, devices, slots=len(steps)).max() <= best * 4 / 3


@given(st.lists(st.integers(0, 60), min_size=1, max_size=40), st.integers(1, 8))
def test_slots_are_kept_and_nobody_is_lost(steps, devices):
    slots = -(-len(steps) // devices)
    places = deal(np.array(sorted(steps, reverse=True)), devices, slots)
    assert len(set(places)) == len(steps)
    assert 0 <= places.min() <= places.max() < devices * slots
    assert loads(np.array(sorted(steps, reverse=True)), devices, slots).sum() == sum(steps)


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_unequal_clients_keep_all_devices_busy(devices):
    """100 very unequal clients in chunks of 4: within a tenth of the optimum, and better than in turn."""
    steps = np.random.default_rng(0).pareto(1.5, 100)
    steps = np.minimum(1 + 10 * steps, 100).astype(int)
    arranged, size = fill_chunks(rounds.assignments(cuts=[1] * 100, steps=steps, batch=1), 4, devices)
    own = arranged.steps.reshape(devices, -1, size).max(2).sum(1)
    chunks = np.sort(steps)[::-1][::size]
    slots = -(-len(chunks) // devices)
    least = max(chunks.max(), chunks.sum() / devices)
    in_turn = np.zeros((slots, devices), int)
    in_turn.flat[: len(chunks)] = chunks
    assert own.max() <= 1.1 * least
    assert in_turn.sum(0).max() > own.max()
