"""Barriers at which clients wait for each other: plans for them, and the round of given columns.

Client k downloads its model half in m seconds and uploads it in n, once a round. In each of S steps it takes
u seconds to compute forward and send smashed data, and d to receive gradients and compute backward. The
server works w FLOP a step for it, at full speed F. No client gets a share of the server. If the client holds
the last units too, its data visit the server twice in a step, and in between the tail takes t seconds.

- staged: max (m + S u) + sum S w / F + max (S d + n), see `staged.py`.
- in_turn: max m + sum S (u + w / F + t + d) + max n. All steps of one client, then all steps of the next.
- handover: sum m + S (u + w / F + t + d) + n. The whole session of one client, then that of the next.
- lockstep: max m + sum over steps of (max u + sum w / F + max t + max d) + max n, over clients that have a
  step left.

What is proven of `exact`: under every barrier, no columns end a round by the plan's bound. The plan of
handover is optimal. The others are optimal to about 1e-9, relative, unless the search of in_turn or lockstep
gives up, after some seconds. The plan is then the best one found, and its gap says how good it is. The first
search of lockstep puts steps into at most 32 groups. In a group a client's seconds are added before the
maximum is taken. This is never more than the sum of the steps' maxima. If that search gives up, `programs.py`
goes on with all numbers of steps. A fleet that is too large for it gets a second search with 4 groups.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool
from numpy.typing import ArrayLike, NDArray

from sfl_jax.errors import BadInput
from sfl_jax.optim import maxima, programs, staged
from sfl_jax.optim.costs import Floats, Terms
from sfl_jax.optim.infeasible import most_open_cut, why_infeasible
from sfl_jax.optim.maxima import Least, Maximum
from sfl_jax.optim.plan import Plan
from sfl_jax.optim.programs import Chain
from sfl_jax.optim.shares import SLACK, optimal_shares, rounding

METHODS = ("exact", "common_cut", "random_cut", "no_split")
_GROUPS, _FEWER_GROUPS = 32, 4  # most groups of steps in the first search, and in another of a large fleet


class Phases(NamedTuple):
    """Seconds summed over all steps: (K, C) with inf where forbidden, or (K,) at one column per client."""

    model_down_s: Floats
    forward_s: Floats  # forward on the client, then smashed data up
    serving_s: Floats  # on the server at full speed
    tail_s: Floats  # features down, the tail forward and backward on the client, their gradient up
    backward_s: Floats  # gradient down, then backward on the client
    model_up_s: Floats


class Clock(NamedTuple):
    """How a barrier counts a round.

    table: (terms, server FLOP/s) -> a NamedTuple of (K, C) seconds.
    round_s: (such a tuple of (K,), steps (K,)) -> the round in seconds.
    optimum: (table, steps (K,)) -> the best columns and the bound.
    """

    table: Callable[[Terms, float], Any]
    round_s: Callable[[Any, Floats], float]
    optimum: Callable[[Any, Floats], Least]


def solve_clock(terms: Terms, server_flops: float, method: str, barrier: str, key, present) -> Plan:
    """A plan by one of METHODS under a barrier of CLOCKS. Its cuts are columns, its shares NaN.

    key: for random_cut.  present: (K,) bool.  Infeasible names the clients that the method cannot serve.
    """
    clients, count = terms.shape
    clock = CLOCKS[barrier]
    table = clock.table(terms, server_flops)
    open_to = np.isfinite(table[0])
    if (present & ~open_to.any(axis=1)).any():
        raise why_infeasible(terms, server_flops, present)
    columns = np.full(clients, count - 1, np.int32)
    best = Least(columns, 0.0, 0.0, 0)
    if present.any():
        here, steps = type(table)(*(part[present] for part in table)), terms.steps[present]
        best = clock.optimum(here, steps)
        if method == "exact":
            columns[present] = best.columns
        elif method == "common_cut":
            columns[present] = _common(here, steps, clock)
        elif method == "random_cut":
            columns = _random(open_to, key)
    columns = np.where(present, columns, np.int32(count - 1)).astype(np.int32)
    rows = np.arange(clients)
    if (present & ~open_to[rows, columns]).any():
        column = count - 1 if method == "no_split" else most_open_cut(terms, server_flops, present)
        raise why_infeasible(terms, server_flops, present, column)
    mine = type(table)(*(np.where(present, part[rows, columns], 0.0) for part in table))
    up = 1 + 2 * rounding(clients)  # rounds a sum up
    return Plan(
        cuts=columns,
        shares=np.full(clients, np.nan),
        client_s=np.sum(mine, axis=0) * (1 + SLACK),
        round_s=float(clock.round_s(mine, np.where(present, terms.steps, 0.0))) * up,
        bound_s=float(best.bound_s),
        iterations=best.looked,
    )


def round_seconds(
    terms: Terms,
    columns: ArrayLike,
    server_flops: float,
    barrier: str,
    present: Bool[np.ndarray, " K"] | None = None,
) -> float:
    """The round in seconds if each client takes its column (K,), which is its cut if there is one codec.

    The session barrier takes the best shares for these columns. present: (K,) bool. For clients that are
    slower than planned pass `slower(terms, slowdown)`. Does not check whether a client may use its column.
    BadInput: an unknown barrier, or columns of another shape.
    """
    clients = terms.shape[0]
    columns = np.asarray(columns)
    if columns.shape != (clients,):
        raise BadInput(f"columns: shape {columns.shape}; must be ({clients},), one column per client")
    here = np.ones(clients, bool) if present is None else np.asarray(present, bool)
    if barrier == "session":
        return _session_s(terms.take(here), columns[here], server_flops)
    if barrier not in CLOCKS:
        raise BadInput(f"barrier={barrier}: choose one of session, {', '.join(CLOCKS)}")
    if not here.any():
        return 0.0
    some, mine = terms.take(here), columns[here]
    part = staged.stages_at if barrier == "staged" else phases_at
    return float(CLOCKS[barrier].round_s(part(some, mine, server_flops), some.steps))


def phases_at(terms: Terms, columns: NDArray[np.integer], server_flops: float) -> Phases:
    """The `Phases` of each client at its own column (K,)."""
    seconds = staged.at_full_speed(terms, columns, server_flops)
    forward_s = seconds.client_forward + seconds.smashed_up
    backward_s = seconds.gradient_down + seconds.client_backward
    tail_s = 0.0 * forward_s
    if (tail := terms.tail_seconds(columns)) is not None:
        before_s, after_s = tail.client_forward + tail.smashed_up, tail.gradient_down + tail.client_backward
        forward_s, backward_s = np.maximum(forward_s - before_s, 0), np.maximum(backward_s - after_s, 0)
        tail_s = before_s + after_s
    return Phases(seconds.model_down, forward_s, seconds.server, tail_s, backward_s, seconds.model_up)


def _session_s(terms, columns, server_flops):
    fixed_s, server_flop, _ = terms.at(columns)
    cpu = jax.local_devices(backend="cpu")[0]
    with jax.enable_x64(True), jax.default_device(cpu):
        present = np.ones(len(fixed_s), bool)
        return float(optimal_shares(fixed_s, server_flop, np.float64(server_flops), present)[2])


def _table(terms, server_flops):
    return staged.tabled(terms, server_flops, phases_at)


def _steps_s(parts):
    return parts.forward_s + parts.serving_s + parts.tail_s + parts.backward_s


def _in_turn_s(parts, steps):
    return parts.model_down_s.max() + _steps_s(parts).sum() + parts.model_up_s.max()


def _in_turn(table, steps):
    every = np.ones((1, len(steps)))
    ends = [Maximum(table.model_down_s, every), Maximum(table.model_up_s, every)]
    round_s = _rounds_of(table, lambda parts: _in_turn_s(parts, steps))
    return _search(table, _steps_s(table), ends, round_s)


def _handover(table, steps):
    whole_s = np.sum(table, axis=0)
    columns = whole_s.argmin(axis=1)
    round_s = float(whole_s.min(axis=1).sum())
    return Least(columns, round_s, round_s * (1 - 4 * rounding(len(steps))), 1)


def _lockstep_s(parts, steps):
    """The lockstep round. Sorted by steps, most first, the clients active at a step are a prefix."""
    order = np.argsort(-steps, kind="stable")
    in_order = steps[order]
    lasts = in_order - np.append(in_order[1:], 0.0)  # in how many steps the last active client is this one
    active = in_order > 0
    waits_s = sum(
        np.maximum.accumulate(np.divide(part[order], in_order, out=np.zeros(len(steps)), where=active))
        @ lasts
        for part in (parts.forward_s, parts.tail_s, parts.backward_s)
    )
    return parts.model_down_s.max() + waits_s + parts.serving_s.sum() + parts.model_up_s.max()


def _lockstep(table, steps):
    """The best columns and bound of a search. If it gave up, of a second one that starts from its result."""
    once, stepwise = (table.model_down_s, table.model_up_s), [table.forward_s, table.backward_s]
    if np.any(table.tail_s[np.isfinite(table.tail_s)]):
        stepwise.append(table.tail_s)
    round_s = _rounds_of(table, lambda parts: _lockstep_s(parts, steps))

    def in_groups(most):
        every, weights = np.ones((1, len(steps))), _groups(steps, most) / steps
        kinds = [*(Maximum(part, every) for part in once), *(Maximum(part, weights) for part in stepwise)]
        return _search(table, table.serving_s, kinds, round_s)

    first = in_groups(_GROUPS)
    edges, level = np.unique(steps, return_inverse=True)
    if first.bound_s >= first.round_s * (1 - 2 * maxima.TOLERANCE):
        return first
    if table.serving_s.size * (2 + len(stepwise)) <= programs.LARGEST:
        chains = [
            *(Chain(part, np.zeros(len(steps), int), np.ones(1)) for part in once),
            *(Chain(part / steps[:, None], level, np.diff(edges, prepend=0.0)) for part in stepwise),
        ]
        return programs.least(chains, table.serving_s, first, round_s)
    if len(edges) <= _FEWER_GROUPS:
        return first
    second = in_groups(_FEWER_GROUPS)
    best = min(first, second, key=lambda one: one.round_s)
    bound_s = max(first.bound_s, second.bound_s)
    return best._replace(bound_s=bound_s, looked=first.looked + second.looked)


def _rounds_of(table, round_s):
    """Gives the round of columns (K,)."""
    rows = np.arange(len(table[0]))
    return lambda columns: float(round_s(type(table)(*(part[rows, columns] for part in table))))


def _groups(steps, most: int) -> Floats:
    """Each client's steps in each group (G, K): a group per distinct number of steps (K,), at most `most`."""
    edges = np.unique(steps)
    if len(edges) > most:
        edges = edges[np.linspace(0, len(edges) - 1, most + 1).round().astype(int)[1:]]
    before = np.append(0.0, edges[:-1])
    return np.clip(steps - before[:, None], 0.0, (edges - before)[:, None])


def _search(table, alone_s, kinds, round_s) -> Least:
    """Starts from every common column and from each client's own best columns."""
    common = [np.full(len(alone_s), one) for one in np.flatnonzero(np.isfinite(alone_s).all(axis=0))]
    starts = [*common, np.sum(table, axis=0).argmin(axis=1), alone_s.argmin(axis=1)]
    return maxima.least(kinds, alone_s, starts, round_s)


def _common(table, steps, clock) -> int:
    """The best common column; the last one if none serves all clients."""
    every = [type(table)(*(part[:, one] for part in table)) for one in range(table[0].shape[1])]
    rounds_s = np.array([clock.round_s(one, steps) if np.isfinite(one[0]).all() else np.inf for one in every])
    return int(rounds_s.argmin()) if np.isfinite(rounds_s).any() else len(rounds_s) - 1


def _random(open_to, key) -> NDArray[np.int64]:
    draws = np.asarray(jax.random.uniform(key, (len(open_to),)))
    chosen = np.minimum((draws * open_to.sum(axis=1)).astype(int), open_to.sum(axis=1) - 1)
    return (np.cumsum(open_to, axis=1) == chosen[:, None] + 1).argmax(axis=1)


CLOCKS = {
    "staged": Clock(
        staged.stages,
        lambda stages, steps: staged.round_seconds(stages),
        lambda stages, steps: staged.optimum(stages),
    ),
    "in_turn": Clock(_table, _in_turn_s, _in_turn),
    "handover": Clock(_table, lambda parts, steps: np.sum(parts), _handover),
    "lockstep": Clock(_table, _lockstep_s, _lockstep),
}
