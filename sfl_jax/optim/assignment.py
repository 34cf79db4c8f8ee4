"""Clients assigned to several servers at a fixed time: which server each takes, and with which column.

At a time T a client has options. An option takes a part of one server's compute and a part of its memory,
both of
1. All options of all clients fit together or not: a generalised assignment problem.

`relaxed` prices the budgets. Each client takes the option that is cheapest at these prices. If they cost more
together than all budgets do, nothing fits, whatever the prices. The best prices come from a small linear
program over the choices seen so far, whose best mixture is the relaxation from the other side.

`repaired` looks for whole choices. It starts from the cheapest options and moves one client, or two at once,
as long as that lessens what is over the budgets.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int

from sfl_jax.optim.costs import Floats

_MOST_STEPS = 100  # of prices
_FLAT, _SETTLED = 1 - 1e-8, 1 - 1e-7  # what counts as no better, relative; where a mixture fits already
_REPAIRS = 100  # of a choice, at most
_MOVES = 300  # that a repair chooses from, alone and in pairs

Choice = Int[np.ndarray, " K"]


class Options(NamedTuple):
    """What clients can choose at a time, for each a place in O; parts of budgets of 1.

    server: which server (O,).  share: part of its compute, inf where it cannot be had.  memory: part of its
    memory, 0 where that is not limited.  column: the column of the costs.
    """

    server: Int[np.ndarray, " O"]
    share: Float64[np.ndarray, "K O"]
    memory: Float64[np.ndarray, "K O"]
    column: Int[np.ndarray, "K O"]

    @property
    def servers(self) -> int:
        return int(self.server.max()) + 1

    def loads(self, choice: Choice) -> Floats:
        """What a choice takes of every budget (2 E,): compute of all servers, then memory."""
        rows = np.arange(len(choice))
        taken = (part[rows, choice] for part in (self.share, self.memory))
        loads = [np.bincount(self.server[choice], part, self.servers) for part in taken]
        return np.concatenate(loads).astype(np.float64)

    def usage(self, clients, places) -> Floats:
        """What some clients' options (M,) take of every budget (M, 2 E)."""
        usage, rows, server = (
            np.zeros((len(clients), 2 * self.servers)),
            np.arange(len(clients)),
            self.server[places],
        )
        usage[rows, server] = self.share[clients, places]
        usage[rows, self.servers + server] = self.memory[clients, places]
        return usage

    def costs(self, prices: Floats) -> Floats:
        """The price of every option (K, O), of prices (2 E,)."""
        compute, memory = prices[: self.servers], prices[self.servers :]
        possible = np.isfinite(self.share)
        costs = np.where(possible, np.where(possible, self.share, 0.0) * compute[self.server], np.inf)
        return costs + self.memory * memory[self.server] if memory.any() else costs


class Relaxed(NamedTuple):
    """is_too_much: proven that no options fit together.  prices: (2 E,) of the budgets, which add up to 1.

    parts, choices: a mixture of whole choices, which fits unless it is too much.
    """

    is_too_much: bool
    prices: Floats
    parts: Floats
    choices: list[Choice]
    passes: int


def relaxed(options: Options, error: float, pool: list[Choice], *, settle: bool = False) -> Relaxed:
    """Whether a mixture of choices fits all budgets, by the best prices.

    pool: choices to begin with, all possible, say those of a time near by.  error: what sums can be off by.
    settle: find the best prices, even where a mixture is known to fit.
    """
    budgets = 2 * options.servers
    if not np.isfinite(options.share).any(axis=1).all():
        return Relaxed(True, np.full(budgets, 1 / budgets), np.ones(0), [], 1)
    prices = np.repeat([1.0, 0.0], options.servers) / options.servers
    pool = pool or [options.costs(prices).argmin(axis=1)]
    loads = [options.loads(choice) for choice in pool]
    parts, passes = np.ones(1), 0
    for passes in range(1, _MOST_STEPS):
        fullest, prices, parts = _mixture(np.array(loads))
        if fullest <= 1 and not settle:
            return Relaxed(False, prices, parts, pool, passes)
        costs = options.costs(prices)
        choice = costs.argmin(axis=1)
        cheapest = costs[np.arange(len(choice)), choice].sum()
        if cheapest * (1 - error) > prices.sum():
            return Relaxed(True, prices, parts, pool, passes)
        if cheapest >= fullest * (_SETTLED if fullest <= 1 else _FLAT):
            break
        pool, loads = [*pool, choice], [*loads, options.loads(choice)]
    return Relaxed(False, prices, parts, pool[: len(parts)], passes)


def _mixture(loads: Floats) -> tuple[float, Floats, Floats]:
    """The mixture of rows (J, R) whose fullest budget is least full: how full, prices (R,), parts (J,)."""
    from scipy import optimize  # imported here: it takes long, and only several servers need it

    count, budgets = loads.shape
    rows = np.concatenate([loads.T, -np.ones((budgets, 1))], axis=1)
    found = optimize.linprog(
        np.append(np.zeros(count), 1.0), A_ub=rows, b_ub=np.zeros(budgets),
        A_eq=np.append(np.ones(count), 0.0)[None], b_eq=[1.0], bounds=[(0, None)] * count + [(None, None)],
    )  # fmt: skip
    prices = np.maximum(-found.ineqlin.marginals, 0.0)
    return float(found.fun), prices / prices.sum(), np.maximum(found.x[:-1], 0.0)


def repaired(options: Options, choice: Choice, costs: Floats) -> Choice | None:
    """Whole options that fit, by moves from a choice; None where no move, or pair of moves, gets nearer.

    costs: (K, O) of the options at prices; the moves that are tried are those that cost least more.
    """
    choice, loads = choice.copy(), options.loads(choice)
    regret = costs - costs.min(axis=1, keepdims=True)
    moves = np.argsort(regret, axis=None, kind="stable")[: _MOVES + len(choice)]
    clients, places = np.unravel_index(moves[np.isfinite(regret.ravel()[moves])], regret.shape)
    gains = options.usage(clients, places)
    for _ in range(_REPAIRS):
        excess = np.maximum(loads - 1, 0.0).sum()
        if excess <= 0:
            return choice
        changes = gains - options.usage(clients, choice[clients])
        after = np.maximum(loads + changes - 1, 0.0).sum(axis=1)
        best, pair = after.argmin(), _best_pair(loads, changes, clients, places != choice[clients])
        if pair is not None and pair[0] < min(after[best], excess * _FLAT):
            chosen = list(pair[1:])
        elif after[best] < excess * _FLAT:
            chosen = [best]
        else:
            return None
        choice[clients[chosen]] = places[chosen]
        loads = options.loads(choice)
    return None


def _best_pair(loads, changes, clients, is_change) -> tuple[float, int, int] | None:
    """What is least over the budgets after two moves of two clients, and these moves."""
    some = np.flatnonzero(is_change)[:_MOVES]
    if len(some) < 2:
        return None
    total = np.zeros((len(some), len(some)))
    for load, change in zip(loads, changes[some].T, strict=True):
        if load == 0 and not change.any():
            continue
        total += np.maximum(change[:, None] + (change + (load - 1)), 0.0)
    total[clients[some][:, None] == clients[some]] = np.inf
    first, second = np.unravel_index(total.argmin(), total.shape)
    return float(total[first, second]), int(some[first]), int(some[second])
