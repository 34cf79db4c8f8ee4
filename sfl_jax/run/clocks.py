"""What every planning method makes of the rounds of a run: its simulated clock and its ledger."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64

from sfl_jax import planning
from sfl_jax.planning import Planner, comparison
from sfl_jax.run import closing
from sfl_jax.run.ledger import Ledger, columns, ledger
from sfl_jax.run.parts import Parts
from sfl_jax.run.rounds import cohort
from sfl_jax.run.suiting import rivals_for


class Clock(NamedTuple):
    """The rounds of a run under one method.

    seconds: the simulated time at the end of each round. ledger: each field of `Ledger`, with a number for
    each round. It is NaN where a line lacks it, and where the method cannot serve the round.
    """

    seconds: Float64[np.ndarray, " R"]
    ledger: dict[str, Float64[np.ndarray, " R"]]


def own_method(planner: Planner) -> str:
    """The name of the run's own method beside the others, with the options that are not the default."""
    name = planner.method
    if planner.band != "fixed":
        name += f", {planner.band} band"
    if planner.starts != Planner.starts:
        name += f", starts {','.join(planner.starts)}"
    if planner.recall:
        name += ", recall"
    if planner.rounding != Planner.rounding:
        name += f", {planner.rounding}"
    return name


def own_clock(planner: Planner, lines: Sequence[Any]) -> dict[str, Clock]:
    """That of a run's own method, as its lines have it."""
    seconds = np.array([line.simulated_s for line in lines], float)
    return {own_method(planner): Clock(seconds, columns(lines))}


def clocks(
    parts: Parts,
    rounds: int,
    rivals: Sequence[str] | None = None,
    see: Callable[..., None] | None = None,
) -> dict[str, Clock]:
    """The clock of each method over a run's rounds. The run's own method comes first, then `rivals`, or every
    method if `rivals` is None. With a limited memory of the server, only methods that keep the limit are
    among them.

    Without deadlines, training is the same under every method, so these clocks compare whole trainings. With
    deadlines the plan decides who comes in time, so each method would train differently. Then only the clocks
    can be compared.

    see: called with the run's own plan of each round, see `history.Builder.add`.
    """
    planner, factor = parts.planner, parts.faults.deadline_factor
    name = own_method(planner)
    others = rivals_for(planner, comparison.methods(planner.barrier) if rivals is None else rivals)
    names = [name, *(method for method in others if method != name)]
    rounds_s = np.full((len(names), rounds), np.inf)
    ledgers: list[list[Ledger | None]] = [[None] * rounds for _ in names]
    for round in range(rounds):
        ids, clients, terms, available = cohort(parts, round)
        key, delayed = planning.round_key(planner.seed, round), parts.faults.delays(parts.seed, round, ids)
        own, present, _ = planning.serve(planner, clients, terms, round, available)
        if see:
            see(round, ids, clients, terms, own, present)
        plans: list[Any] = [own]
        for method in names[1:]:
            plans.append(
                comparison.plan_of(method, terms, planner.server_flops, planner.barrier, key, present)
            )
        for index, plan in enumerate(plans):
            if plan is not None:
                done = planning.turnout(planner, factor, terms, plan, delayed, present)
                plan, done = closing.added(parts, terms, plan, done, delayed.slowdown)
                rounds_s[index, round] = done.round_s
                ledgers[index][round] = ledger(parts, terms, plan, done.came)
    made = map(Clock, np.cumsum(rounds_s, axis=1), map(columns, ledgers))
    return dict(zip(names, made, strict=True))
