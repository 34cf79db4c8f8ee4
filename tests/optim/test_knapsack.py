import itertools

import numpy as np
import pytest

from sfl_jax.optim import knapsack

ERROR = 1e-12


def instances(number, seed):
    """(needs, sizes, limit, room): ties and zeros in every second one, forbidden columns in most."""
    rng = np.random.default_rng(seed)
    for turn in range(number):
        clients, columns = rng.integers(1, 6), rng.integers(1, 5)
        shape = clients, columns
        needs = rng.choice([0.0, 0.5, 1.0, 2.0, 7.0], shape) if turn % 2 else rng.random(shape)
        needs = np.where(rng.random(shape) < 0.15, np.inf, needs)
        sizes = rng.integers(0, 6, columns).astype(float)
        yield needs, sizes, float(rng.integers(0, 5 * clients + 1)), 2 * clients * rng.random()


def loads(needs, sizes, columns):
    return needs[np.arange(len(needs)), columns].sum(), sizes[columns].sum()


def least(needs, sizes, limit):
    """The least need within the limit by enumeration; inf if nothing fits."""
    every = (np.array(c) for c in itertools.product(range(needs.shape[1]), repeat=len(needs)))
    found = [loads(needs, sizes, columns) for columns in every]
    return min((need for need, taken in found if taken <= limit), default=np.inf)


def test_dynamic_programming_finds_the_least_need_of_enumeration():
    outcomes = set()
    for needs, sizes, limit, room in instances(300, 0):
        best = least(needs, sizes, limit)
        settled = knapsack.relaxed(needs, sizes, limit, room, ERROR, settle=True)
        if settled.is_too_much:
            assert best > room
            outcomes.add("too much")
            continue
        for price in (settled.price, 0.0):  # any price gives the same answer
            columns = knapsack.least_need(needs, sizes, limit, room, ERROR, price).columns
            outcomes.add("gap" if columns is None else "found")
            if columns is None:
                assert best > room
            else:
                need, taken = loads(needs, sizes, columns)
                assert taken <= limit
                assert need == pytest.approx(best, abs=1e-12)
    assert outcomes == {"too much", "gap", "found"}


def test_the_relaxation_is_never_above_the_least_need():
    for needs, sizes, limit, room in instances(300, 1):
        best = least(needs, sizes, limit)
        quick = knapsack.relaxed(needs, sizes, limit, room, ERROR)
        settled = knapsack.relaxed(needs, sizes, limit, room, ERROR, settle=True)
        assert quick.is_too_much == settled.is_too_much
        if settled.is_too_much:
            assert best > room
            continue
        ends = [loads(needs, sizes, columns) for columns in (settled.inside, settled.outside)]
        parts = settled.part, 1 - settled.part
        mixed = sum(part * need for part, (need, _) in zip(parts, ends, strict=True) if part)
        assert mixed <= best * (1 + 1e-9)
        assert mixed <= room * (1 + 1e-9)
        assert sum(part * taken for part, (_, taken) in zip(parts, ends, strict=True)) <= limit * (1 + 1e-9)


def test_a_start_near_by_changes_the_passes_not_the_answer():
    rng = np.random.default_rng(2)
    needs, sizes = rng.random((40, 12)), np.sort(rng.integers(0, 1000, 12))[::-1].astype(float)
    sizes[-1], needs = 0.0, needs * (1 + np.arange(12))
    cold = knapsack.relaxed(needs, sizes, 8000.0, np.inf, ERROR, settle=True)
    warm = knapsack.relaxed(
        needs * 1.001, sizes, 8000.0, np.inf, ERROR, settle=True, near=(cold.inside, cold.outside)
    )
    fresh = knapsack.relaxed(needs * 1.001, sizes, 8000.0, np.inf, ERROR, settle=True)
    assert warm.price == pytest.approx(fresh.price, rel=1e-9)
    assert warm.passes < fresh.passes


def test_it_gives_up_rather_than_fill_the_memory(monkeypatch):
    rng = np.random.default_rng(3)
    needs, sizes = rng.random((30, 4)), np.array([900.0, 533.0, 271.0, 0.0])
    monkeypatch.setattr(knapsack, "MOST_STATES", 50)
    answer = knapsack.least_need(needs, sizes, 9000.0, 30.0, ERROR, 0.0)
    assert answer.gave_up
    assert answer.columns is None
