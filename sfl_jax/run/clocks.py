"""The simulated clock of every planning method over the rounds of a run."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64

from sfl_jax import planning
from sfl_jax.planning import Planner, comparison
from sfl_jax.run.parts import Parts
from sfl_jax.run.rounds import cohort


def own_method(planner: Planner) -> str:
    """What the method of a run is called beside the others."""
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


def clocks(
    parts: Parts, rounds: int, rivals: Sequence[str] | None = None
) -> dict[str, Float64[np.ndarray, " R"]]:
    """Simulated seconds at the end of each of a run's rounds, by method; the run's own plan comes first, and
    then `rivals`, or all.

    Without deadlines training is the same under every method, so its plans are all that a clock needs. With
    them it is not, since who comes in time depends on the plan: these are the clocks alone then.
    """
    planner, factor = parts.planner, parts.faults.deadline_factor
    name = own_method(planner)
    others = comparison.methods(planner.barrier) if rivals is None else rivals
    names = [name, *(method for method in others if method != name)]
    rounds_s = np.full((len(names), rounds), np.inf)
    for round in range(rounds):
        ids, clients, terms = cohort(parts, round)
        key, delayed = planning.round_key(planner.seed, round), parts.faults.delays(parts.seed, round, ids)
        own, present, _ = planning.serve(planner, clients, terms, round)
        plans: list[Any] = [own]
        for method in names[1:]:
            plans.append(
                comparison.plan_of(method, terms, planner.server_flops, planner.barrier, key, present)
            )
        for index, plan in enumerate(plans):
            if plan is not None:
                done = planning.turnout(planner, factor, terms, plan, delayed, present)
                rounds_s[index, round] = done.round_s
    return dict(zip(names, np.cumsum(rounds_s, axis=1), strict=True))
