"""Plans for a fleet and a network's costs: what a plan tells, and how methods compare."""

from sfl_jax.planning.insight import (
    COHORTS,
    TOGETHER,
    Binding,
    Floor,
    Gains,
    Planned,
    any_schedule_bound_s,
    binding,
    cohort_rounds_s,
    doubts,
    floor,
    gains,
    seconds,
    table,
)
from sfl_jax.planning.planner import (
    METHODS,
    PLAN,
    TRAINING,
    Planner,
    Served,
    check_links,
    check_rounds,
    linked,
    round_key,
    serve,
    smallest_server,
    solve,
)
from sfl_jax.planning.turnout import Turnout, turnout

__all__ = [
    "COHORTS", "METHODS", "PLAN", "TOGETHER", "TRAINING", "Binding", "Floor", "Gains", "Planned", "Planner",
    "Served", "Turnout", "any_schedule_bound_s", "binding", "check_links", "check_rounds", "cohort_rounds_s",
    "doubts", "floor", "gains", "linked", "round_key", "seconds", "serve", "smallest_server", "solve",
    "table", "turnout",
]  # fmt: skip
