"""The least energy, or the fewest bytes, of a round that ends by a given time; and all such pairs.

By a time T client k with column l needs the share w / (T - a), and costs an amount: joules, or bytes. So the
least amount of all clients by T is one column for each client, with the least amount in all, whose shares fit
the server. That is the knapsack of `knapsack.py` with amounts as needs and shares as sizes. A price of a
FLOP/s bounds it from below. Dynamic programming over the few clients with a choice left finds the optimum, or
gives up, and then the bound says how far it can be.

The least amount never rises with T. So between two times of a frontier it is between the two amounts.
"""

from typing import NamedTuple

import numpy as np

from sfl_jax.errors import BadInput
from sfl_jax.optim.costs import Costs, Floats, Terms
from sfl_jax.optim.knapsack import Columns, least_need, relaxed
from sfl_jax.optim.memory import best_columns, mixed_end_s
from sfl_jax.optim.shares import SLACK, rounding

TOLERANCE = 1e-9  # relative: columns that cost less by less than this are not looked for
_NEAREST = 1e-3  # the second time of a frontier, as a part of the way from the first to the last


class Cheapest(NamedTuple):
    """The columns (K,) that cost least by a time, what they cost, and what none cost less than."""

    columns: Columns
    amount: float
    bound: float

    @property
    def gap(self) -> float:
        """amount / bound - 1: the columns cost at most this much more than the least, relative."""
        return self.amount / self.bound - 1 if self.bound > 0 else float(self.amount > 0) * np.inf


class Frontier(NamedTuple):
    """The least amounts of rounds that end by some times; (N,) each, amounts never rise.

    times_s: s.  amounts, bounds: in J or bytes, found and proven.  columns: (N, K).
    """

    times_s: Floats
    amounts: Floats
    bounds: Floats
    columns: Columns


class Shortest(NamedTuple):
    """Columns (K,) within a budget that end soonest, and a time by which none within it end."""

    columns: Columns
    bound_s: float


def joules(terms: Terms) -> Floats:
    """The energy (K, C) that each client spends in a round at each column. BadInput without known powers."""
    if terms.energy is None:
        raise BadInput("energy: is not known; the fleet needs cycles_per_s, kappa and transmit_w")
    return np.stack([terms.joules(column) for column in range(terms.shape[1])], axis=1)


def sent_bytes(terms: Terms) -> Floats:
    """The bytes (K, C) between each client and the server in a round, up and down, at each column."""
    both_ways = terms.samples[:, None] * (terms.up_bits + terms.down_bits) + 2 * terms.model_bits
    return both_ways / 8


def least_amount(costs: Costs, amounts: Floats, server_flops: float, time_s: float) -> Cheapest | None:
    """The columns with the least amount in all whose round ends by time_s; None if no round does.

    amounts: (K, C), finite and at least 0. The columns end by time_s, or later only by rounding.
    """
    clients = len(amounts)
    error, rows = 4 * rounding(clients), np.arange(clients)
    shares = _shares(costs, server_flops, time_s)
    reaches = np.isfinite(shares)
    if not reaches.any(axis=1).all():
        return None
    needs, shares = np.where(reaches, amounts, np.inf), np.where(reaches, shares, 0.0)
    room = server_flops * (1 + error)
    best = relaxed(needs, shares, room, np.inf, error, settle=True)
    if best.is_too_much:
        return None
    columns = _cheaper(needs, shares, room, best.inside)
    bound = (needs + best.price * shares).min(axis=1).sum() * (1 - error) - best.price * room
    amount = needs[rows, columns].sum()
    if amount * (1 - TOLERANCE) > bound:
        found = least_need(needs, shares, room, amount * (1 - TOLERANCE), error, best.price)
        if found.columns is not None:
            columns = found.columns
            amount = needs[rows, columns].sum()
        if not found.gave_up:
            bound = amount * (1 - 2 * TOLERANCE)
    return Cheapest(columns, float(amount), float(max(min(bound, amount), 0.0)))


def frontier(
    costs: Costs, amounts: Floats, server_flops: float, shortest_s: float, points: int = 25
) -> Frontier:
    """The least amounts from the shortest round to the time at which the least amount of all is reached.

    shortest_s: a time by which a round ends. The times lie closer to each other near it.
    """
    usable = _usable(costs, server_flops)
    last = np.where(usable, amounts, np.inf)
    cheapest = last.min(axis=1, keepdims=True)
    alone_s = np.where(last == cheapest, costs.fixed_s, np.inf)
    columns, rows = alone_s.argmin(axis=1), np.arange(len(last))
    last_s = mixed_end_s(costs.fixed_s[rows, columns], costs.server_flop[rows, columns], server_flops)
    parts = np.append(0.0, np.geomspace(_NEAREST, 1.0, max(points - 1, 1)))
    times_s = shortest_s + np.unique(parts * max(last_s * (1 + TOLERANCE) - shortest_s, 0.0))
    found = [(time_s, least_amount(costs, amounts, server_flops, time_s)) for time_s in times_s]
    kept = [(time_s, each) for time_s, each in found if each is not None]
    amount, bound = (np.array([getattr(each, name) for _, each in kept]) for name in ("amount", "bound"))
    # What is found for a shorter round serves a longer one, and what bounds a longer one bounds a shorter.
    best = [int(amount[: n + 1].argmin()) for n in range(len(kept))]
    return Frontier(
        np.array([time_s for time_s, _ in kept]),
        amount[best],
        np.maximum.accumulate(bound[::-1])[::-1],
        np.stack([kept[n][1].columns for n in best]),
    )


def shortest_within(
    costs: Costs, amounts: Floats, server_flops: float, budget: float, low_s: float
) -> Shortest:
    """The columns that end soonest and cost at most the budget in all.

    low_s: a time (s) by which no round ends. BadInput says how much the budget is short of the least amount.
    """
    least = float(np.where(_usable(costs, server_flops), amounts, np.inf).min(axis=1).sum())
    if least > budget:
        raise BadInput(f"budget={budget:g}: must be at least {least:.6g}, the least of any cuts")
    found = best_columns(costs, amounts, server_flops, budget, low_s)
    return Shortest(found.columns, found.low_s)


def _usable(costs: Costs, server_flops: float):
    return costs.allowed & ((costs.server_flop <= 0) | (server_flops > 0))


def _shares(costs: Costs, server_flops: float, time_s: float) -> Floats:
    """The share of each column (K, C), rounded down; inf where it cannot end by then."""
    left_s = (time_s - costs.fixed_s) + SLACK * time_s
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = np.where(costs.server_flop > 0, costs.server_flop / left_s, 0.0)
    ends = (left_s > 0) | ((left_s >= 0) & (costs.server_flop <= 0))
    return np.where(ends & _usable(costs, server_flops), shares, np.inf)


def _cheaper(needs: Floats, shares: Floats, room: float, columns: Columns) -> Columns:
    """Columns that cost less with what the server has left, one client after the other, most saved first."""
    columns, rows = columns.copy(), np.arange(len(columns))
    left = room - shares[rows, columns].sum()
    saved = needs[rows, columns] - np.where(
        shares <= shares[rows, columns][:, None] + left, needs, np.inf
    ).min(axis=1)
    for client in np.argsort(-saved, kind="stable"):
        if saved[client] <= 0:
            break
        fits = shares[client] <= shares[client, columns[client]] + left
        best = int(np.where(fits, needs[client], np.inf).argmin())
        left -= shares[client, best] - shares[client, columns[client]]
        columns[client] = best
    return columns
