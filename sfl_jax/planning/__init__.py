"""Plans for a fleet and a network's costs: what a plan tells, and how methods compare."""

from sfl_jax.plan_rules import WITHIN_MEMORY
from sfl_jax.planning.insight import (
    COHORTS,
    TOGETHER,
    Binding,
    Floor,
    Gains,
    Help,
    Planned,
    any_schedule_bound_s,
    binding,
    cohort_rounds_s,
    doubts,
    floor,
    gains,
    help_of,
    helps,
    memory_gain_s,
    pulls,
    rate_doubts,
    seconds,
    server_bytes,
    share_percent,
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
from sfl_jax.planning.several import (
    SeveralPlanned,
    best_alone,
    plan_servers,
    server_gains_s,
    several_binding,
    several_bytes,
    several_pulls,
    several_seconds,
    several_share_percent,
    several_table,
)
from sfl_jax.planning.turnout import Turnout, turnout

__all__ = [
    "COHORTS", "METHODS", "PLAN", "TOGETHER", "TRAINING", "WITHIN_MEMORY", "Binding", "Floor", "Gains",
    "Help", "Planned", "Planner", "Served", "SeveralPlanned", "Turnout", "any_schedule_bound_s",
    "best_alone", "binding", "check_links", "check_rounds", "cohort_rounds_s", "doubts", "floor", "gains",
    "help_of", "helps", "linked", "memory_gain_s", "plan_servers", "pulls", "rate_doubts", "round_key",
    "seconds", "serve", "server_bytes", "server_gains_s", "several_binding", "several_bytes", "several_pulls",
    "several_seconds", "several_share_percent", "several_table", "share_percent", "smallest_server", "solve",
    "table", "turnout",
]  # fmt: skip
