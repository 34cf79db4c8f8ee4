"""Oracles for the optimiser's tests: enumeration, exact fractions, small random instances."""

import itertools
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
from hypothesis import strategies as st

from sfl_jax import optim

# Most instances have ties, zeros and ratios of 1e12. The shapes are few, so that little is compiled.
NUMBERS = st.sampled_from([0.0, 0.0, 1e-6, 0.25, 0.5, 1.0, 1.0, 1.5, 3.0, 7.0, 1e6]) | st.floats(1e-3, 1e3)
SHAPES = [(1, 1), (1, 4), (3, 1), (3, 4), (4, 3)]


@st.composite
def instances(draw, local: bool | None = None, shapes=tuple(SHAPES)):
    """(Costs, server FLOP/s). local: whether cut L has no server work; None draws it."""
    clients, cuts = draw(st.sampled_from(shapes))
    size = clients * cuts

    def table(values):
        return np.array(draw(st.lists(values, min_size=size, max_size=size))).reshape(clients, cuts)

    fixed_s, work = table(NUMBERS), table(NUMBERS)
    allowed = table(st.sampled_from([True, True, True, False]))
    if draw(st.booleans()) if local is None else local:
        work[:, -1] = 0.0
    if draw(st.integers(0, 3)):
        allowed[:, draw(st.integers(0, cuts - 1))] = True
    return optim.Costs(fixed_s, work, allowed), draw(st.sampled_from([0.0, 1e-3, 0.5, 2.0, 10.0, 1e6]))


def best_round_s(costs: optim.Costs, server_flops: float) -> float:
    """The optimum by enumeration of all cuts and bisection on the time; inf if a client cannot be served."""
    return cut_rounds_s(costs, server_flops)[0]


def cut_rounds_s(costs: optim.Costs, server_flops: float) -> tuple[float, dict[tuple[int, ...], float]]:
    """The least round over all vectors of allowed cuts, and the round of each with its best shares."""
    clients = np.arange(costs.fixed_s.shape[0])
    choices = list(itertools.product(*(np.flatnonzero(row) for row in costs.allowed)))
    if not choices:
        return np.inf, {}
    cuts = np.array(choices)
    fixed_s, work = costs.fixed_s[clients, cuts], costs.server_flop[clients, cuts]
    rounds_s = least_times_s(fixed_s, work, server_flops)
    return rounds_s.min(), dict(zip(map(tuple, cuts.tolist()), rounds_s.tolist(), strict=True))


def least_time_s(fixed_s, work, server_flops: float) -> float:
    """The least round of fixed cuts (K,), by bisection."""
    return float(least_times_s(fixed_s[None], work[None], server_flops)[0])


def least_times_s(fixed_s, work, server_flops: float) -> np.ndarray:
    """The least round (N,) of each of several vectors of fixed cuts (N, K), by bisection."""
    busy = work > 0
    works = busy.any(axis=1)
    low = fixed_s.max(axis=1)
    if server_flops == 0:
        return np.where(works, np.inf, low)
    high = np.maximum(low, (fixed_s + work * work.shape[1] / server_flops).max(axis=1))
    high = np.where(works, high, low)
    for _ in range(200):
        middle = low + 0.5 * (high - low)
        left = middle[:, None] - fixed_s
        has_time = left > 0
        needed = np.divide(work, left, out=np.zeros(work.shape), where=busy & has_time).sum(axis=1)
        fits = (has_time | ~busy).all(axis=1) & (needed <= server_flops)
        before, (low, high) = (low, high), (np.where(fits, low, middle), np.where(fits, middle, high))
        if np.array_equal(before, (low, high)):
            break  # no number lies between
    return high


def least_need(costs: optim.Costs, time_s: float, present=None) -> Fraction | None:
    """The exact FLOP/s needed to end by time_s; None if a client cannot with any server."""
    total, time = Fraction(0), Fraction(time_s)
    for client in np.flatnonzero(np.ones(len(costs.fixed_s), bool) if present is None else present):
        shares = []
        for cut in np.flatnonzero(costs.allowed[client]):
            left = time - Fraction(costs.fixed_s[client, cut])
            work = Fraction(costs.server_flop[client, cut])
            if work == 0 and left >= 0:
                shares.append(Fraction(0))
            elif work > 0 and left > 0:
                shares.append(work / left)
        if not shares:
            return None
        total += min(shares)
    return total


def cannot_be_met(costs: optim.Costs, time_s: float, server_flops: float, present=None) -> bool:
    """Whether no cuts and shares end by time_s, in exact arithmetic."""
    need = least_need(costs, time_s, present)
    return need is None or need > Fraction(server_flops)


def assert_sound(costs: optim.Costs, server_flops: float, plan: optim.Plan, present=None) -> None:
    """Checks everything a Plan promises, in exact fractions."""
    here = np.ones(len(plan.cuts), bool) if present is None else present
    clients = np.arange(len(plan.cuts))
    assert costs.allowed[clients, plan.cuts][here].all()
    assert (plan.shares >= 0).all()
    assert sum(map(Fraction, plan.shares.tolist())) <= Fraction(server_flops)
    for client in clients:
        share, end_s = Fraction(plan.shares[client]), Fraction(plan.client_s[client])
        if not here[client]:
            assert share == end_s == 0
            continue
        work = Fraction(costs.server_flop[client, plan.cuts[client]])
        assert (work > 0) == (share > 0)
        serving = work / share if share else Fraction(0)
        assert Fraction(costs.fixed_s[client, plan.cuts[client]]) + serving <= end_s <= Fraction(plan.round_s)
    assert plan.bound_s <= plan.round_s
    if plan.bound_s > 0:
        assert cannot_be_met(costs, plan.bound_s, server_flops, here)


def profile(units: int = 4, seed: int = 0) -> SimpleNamespace:
    """A made-up chain whose smashed data shrink along it."""
    rng = np.random.default_rng(seed)
    forward = rng.integers(1_000, 9_000, units) * 100
    smashed = np.sort(rng.integers(50, 2_000, units - 1))[::-1] if units > 1 else np.array([], int)
    return SimpleNamespace(
        forward_macs=forward,
        backward_macs=forward * 2 - np.eye(1, units, dtype=np.int64)[0] * forward[0],
        parameters=np.sort(rng.integers(100, 90_000, units)),
        state=rng.integers(0, 50, units),
        activations=rng.integers(1_000, 5_000, units),
        smashed=np.concatenate([[1024], smashed, [0]]).astype(np.int64),
    )


def fleet(clients: int = 3, seed: int = 0, spread: float = 1.0, **columns) -> SimpleNamespace:
    """A made-up fleet: log-normal rates around a small board's, ample memory; `columns` replace these."""
    rng = np.random.default_rng(seed)

    def around(value):
        return value * np.exp(spread * rng.normal(size=clients))

    made = {
        "flops": around(1e8),
        "uplink_bps": around(1e7),
        "downlink_bps": around(3e7),
        "memory_bytes": np.full(clients, 1e12),
        "samples": rng.integers(40, 600, clients),
        "cycles_per_s": None,
        "kappa": None,
        "transmit_w": None,
        "energy_j": None,
        "rtt_s": None,
        "device": None,
        "slowdown": None,
        "devices": {},
    }
    return SimpleNamespace(**made | columns)
