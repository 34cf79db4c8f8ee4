import itertools
from fractions import Fraction

import numpy as np
import pytest

from sfl_jax.optim import maxima
from sfl_jax.optim.maxima import Maximum

SECONDS = np.array([0.0, 0.5, 1.0, 1.0, 2.0, 3.0, 7.0, 1e-6, 1e6])


def instance(seed):
    """Tables with ties, zeros, forbidden columns and zero weights; every client has an allowed column."""
    rng = np.random.default_rng(seed)
    clients, count = int(rng.integers(1, 5)), int(rng.integers(1, 6))

    def table(shape):
        return np.where(rng.random(shape) < 0.5, rng.choice(SECONDS, shape), rng.uniform(0.01, 10.0, shape))

    forbidden = rng.random((clients, count)) < 0.4
    forbidden[np.arange(clients), rng.integers(0, count, clients)] = False
    kinds = []
    for _ in range(int(rng.integers(1, 4))):
        weights = rng.choice([0.0, 1.0, 2.0, 5.0], (int(rng.integers(1, 4)), clients))
        kinds.append(Maximum(np.where(forbidden, np.inf, table((clients, count))), weights))
    return kinds, np.where(forbidden, np.inf, table((clients, count)))


def round_of(kinds, alone_s, columns, number=float):
    rows = range(len(columns))
    total = sum(number(float(alone_s[k, columns[k]])) for k in rows)
    for of in kinds:
        mine = [number(float(of.seconds[k, columns[k]])) for k in rows]
        total += sum(max(number(float(w)) * x for w, x in zip(row, mine, strict=True)) for row in of.weights)
    return total


def solved(kinds, alone_s):
    start = alone_s.argmin(axis=1)
    return maxima.least(kinds, alone_s, [start], lambda columns: round_of(kinds, alone_s, columns))


def optimum(kinds, alone_s):
    choices = itertools.product(*(np.flatnonzero(np.isfinite(row)) for row in alone_s))
    return min(round_of(kinds, alone_s, columns, Fraction) for columns in choices)


@pytest.mark.parametrize("looks", [1, 1 << 26])
def test_the_optimum_is_that_of_enumeration_and_the_bound_holds_exactly(looks, monkeypatch):
    monkeypatch.setattr(maxima, "_ELEMENTS", looks)
    unsolved = 0
    for seed in range(300):
        kinds, alone_s = instance(seed)
        best, found = optimum(kinds, alone_s), solved(kinds, alone_s)
        assert Fraction(found.bound_s) <= best <= Fraction(found.round_s) * (1 + Fraction(1, 10**15))
        assert found.round_s == round_of(kinds, alone_s, found.columns)
        if looks > 1:
            assert found.round_s == pytest.approx(float(best), rel=2e-9, abs=1e-300)
            assert found.bound_s == pytest.approx(float(best), rel=2e-9, abs=1e-300)
        unsolved += found.bound_s < float(best) * (1 - 1e-6)
    assert (unsolved > 0) == (looks == 1)


def test_a_wrong_floor_would_be_noticed(monkeypatch):
    """Floors that are slightly too high drop the optimum, and enumeration notices."""
    largest = maxima._Search.largest
    monkeypatch.setattr(maxima._Search, "largest", lambda self, of_kinds: largest(self, of_kinds) * 1.2)
    wrong = 0
    for seed in range(100):
        kinds, alone_s = instance(seed)
        wrong += solved(kinds, alone_s).bound_s > float(optimum(kinds, alone_s)) * (1 + 1e-6)
    assert wrong
