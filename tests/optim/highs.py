"""The TLMP as mixed-integer programs for HiGHS: one gives a lower bound, one an upper bound.

Variables: the round T, z (client, cut) in {0, 1}, and the server's part in either form.
"""

import time
from typing import NamedTuple

import numpy as np
from scipy import optimize, sparse

TANGENTS, LEVELS = 24, 40


class Answer(NamedTuple):
    round_s: float  # the proven bound of the tangents, or the best round of the discretised shares
    wall_s: float


def tangent(costs, server_flops: float, near_s: float, seconds: float = 60.0) -> Answer:
    """A lower bound: w z^2 / s (w / s where z = 1) replaced by its tangents w (2 z / s0 - s / s0^2)."""
    clients, cuts = np.nonzero(costs.allowed)
    fixed_s, work = costs.fixed_s[clients, cuts], costs.server_flop[clients, cuts] / server_flops
    pairs, total = len(clients), len(costs.fixed_s)
    rows = _Rows(1 + 3 * pairs)  # T, z, s (of the server), serving seconds
    end, chosen, share, serving = 0, 1, 1 + pairs, 1 + 2 * pairs
    for client in range(total):
        mine = np.flatnonzero(clients == client)
        rows.add(chosen + mine, 1.0, 1.0, 1.0)
        rows.add(
            [end, *(chosen + mine), *(serving + mine)],
            [1.0, *-fixed_s[mine], *[-1.0] * len(mine)],
            0.0,
            np.inf,
        )
    rows.add(share + np.arange(pairs), 1.0, -np.inf, 1.0)
    for pair in np.flatnonzero(work > 0):
        rows.add([share + pair, chosen + pair], [1.0, -1.0], -np.inf, 0.0)
        # Tangents at the share that this cut needs at the optimum, and around it.
        for about in np.geomspace(work[pair] / near_s / 4, 1.0, TANGENTS):
            slope = work[pair] / about
            rows.add(
                [serving + pair, chosen + pair, share + pair], [1.0, -2 * slope, slope / about], 0.0, np.inf
            )
    integral = np.zeros(rows.width)
    integral[chosen : chosen + pairs] = 1
    found, wall_s = rows.minimise(end, integral, seconds)
    # None if the time is up before there is a bound; 0 is always a lower bound.
    return Answer(found.mip_dual_bound or 0.0, wall_s)


def discretised(costs, server_flops: float, near_s: float, seconds: float = 60.0) -> Answer:
    """An upper bound: every share is one of LEVELS fractions of the server."""
    clients, cuts = np.nonzero(costs.allowed)
    options = []
    for client, cut in zip(clients, cuts, strict=True):
        work = costs.server_flop[client, cut] / server_flops
        levels = np.geomspace(work / near_s / 2, 1.0, LEVELS) if work > 0 else [0.0]
        options += [
            (client, level, costs.fixed_s[client, cut] + (work / level if level else 0)) for level in levels
        ]
    owner, level, end_s = (np.array(column) for column in zip(*options, strict=True))
    # A cut that cannot end by twice the optimum is never chosen.
    keep = end_s <= 2 * near_s
    owner, level, end_s = owner[keep], level[keep], end_s[keep]
    rows = _Rows(1 + len(owner))
    for client in range(len(costs.fixed_s)):
        mine = np.flatnonzero(owner == client)
        rows.add(1 + mine, 1.0, 1.0, 1.0)
        rows.add([0, *(1 + mine)], [1.0, *-end_s[mine]], 0.0, np.inf)
    rows.add(1 + np.arange(len(owner)), level, -np.inf, 1.0)
    found, wall_s = rows.minimise(0, np.r_[0, np.ones(len(owner))], seconds)
    return Answer(found.fun if found.x is not None else np.inf, wall_s)


class _Rows:
    """Linear constraints, added row by row."""

    def __init__(self, width: int):
        self.width, self.matrix, self.low, self.high = width, [], [], []

    def add(self, columns, values, low: float, high: float) -> None:
        columns = np.asarray(columns, int)
        values = np.broadcast_to(np.asarray(values, float), columns.shape)
        self.matrix.append(
            sparse.csr_array((values, (np.zeros(len(columns), int), columns)), (1, self.width))
        )
        self.low.append(low)
        self.high.append(high)

    def minimise(self, column: int, integral, seconds: float):
        goal = np.zeros(self.width)
        goal[column] = 1.0
        upper = np.where(integral == 1, 1.0, np.inf)
        constraints = optimize.LinearConstraint(sparse.vstack(self.matrix), self.low, self.high)
        start = time.perf_counter()
        found = optimize.milp(
            goal,
            integrality=integral,
            bounds=optimize.Bounds(0.0, upper),
            constraints=constraints,
            options={"time_limit": seconds},
        )
        return found, time.perf_counter() - start


def lockstep_s(table, steps):
    """The shortest lockstep round (s), as a mixed-integer program without chains: a wait for every step."""
    clients, count = table[0].shape
    rows, parts = [], [table.model_down_s, table.model_up_s]
    waits = [(part, None) for part in parts]
    per_step = [part / steps[:, None] for part in (table.forward_s, table.tail_s, table.backward_s)]
    waits += [(part, step) for part in per_step for step in range(int(steps.max()))]
    size = clients * count
    costs = np.append(np.nan_to_num(table.serving_s, posinf=0.0).ravel(), np.ones(len(waits)))
    for wait, (part, step) in enumerate(waits):
        for client in range(clients):
            if step is None or step < steps[client]:
                row = np.zeros(len(costs))
                row[client * count : (client + 1) * count] = np.nan_to_num(part[client], posinf=0.0)
                row[size + wait] = -1.0
                rows.append(row)
    one_each = np.zeros((clients, len(costs)))
    for client in range(clients):
        one_each[client, client * count : (client + 1) * count] = 1.0
    most = np.append(np.isfinite(table.serving_s).ravel().astype(float), np.full(len(waits), np.inf))
    found = optimize.milp(
        costs, integrality=np.append(np.ones(size), np.zeros(len(waits))), bounds=optimize.Bounds(0, most),
        constraints=[
            optimize.LinearConstraint(np.array(rows), -np.inf, 0), optimize.LinearConstraint(one_each, 1, 1)
        ],
    )  # fmt: skip
    return found.fun
