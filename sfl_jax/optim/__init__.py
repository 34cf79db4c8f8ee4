"""The training-latency minimisation problem: from costs to a plan with a proven bound."""

from sfl_jax.optim.band_memory import solve_band_memory
from sfl_jax.optim.bandwidth import BandPlan, solve_bandwidth
from sfl_jax.optim.clocks import CLOCKS, round_seconds
from sfl_jax.optim.clocks import METHODS as STAGED_METHODS
from sfl_jax.optim.costs import Costs, CutsAndCodecs, Seconds, Terms
from sfl_jax.optim.estimation import Estimation, estimation
from sfl_jax.optim.frontier import (
    Cheapest,
    Frontier,
    Shortest,
    frontier,
    joules,
    least_amount,
    sent_bytes,
    shortest_within,
)
from sfl_jax.optim.infeasible import servable
from sfl_jax.optim.inverse import Sensitivity, Server, sensitivity, smallest_server
from sfl_jax.optim.memory import check_fits, planned, solve_memory
from sfl_jax.optim.plan import Infeasible, Plan, Solution
from sfl_jax.optim.regression import Curve, Fit, fit_curves, relaxed
from sfl_jax.optim.replay import at_bands, session_ends_s, slower
from sfl_jax.optim.servers import Servers, ServersPlan, solve_servers
from sfl_jax.optim.serving import any_schedule_bound_s, solve_serving
from sfl_jax.optim.solve import METHODS, solve, solve_arrays
from sfl_jax.optim.staged_memory import solve_staged_memory
from sfl_jax.optim.uncertain import (
    QuantilePlan,
    Rates,
    at_quantile,
    at_rates,
    quantile_s,
    rounds_s,
    solve_quantile,
)
from sfl_jax.optim.work import (
    PROXIMAL_FLOP,
    UnitBytes,
    Wire,
    Work,
    energy,
    proximal_flop,
    samples_processed,
    terms,
    unit_bytes,
)
from sfl_jax.registry import BARRIERS, ROUNDINGS, STARTS

__all__ = [
    "BARRIERS",
    "CLOCKS",
    "METHODS",
    "PROXIMAL_FLOP",
    "ROUNDINGS",
    "STAGED_METHODS",
    "STARTS",
    "BandPlan",
    "Cheapest",
    "Costs",
    "Curve",
    "CutsAndCodecs",
    "Estimation",
    "Fit",
    "Frontier",
    "Infeasible",
    "Plan",
    "QuantilePlan",
    "Rates",
    "Seconds",
    "Sensitivity",
    "Server",
    "Servers",
    "ServersPlan",
    "Shortest",
    "Solution",
    "Terms",
    "UnitBytes",
    "Wire",
    "Work",
    "any_schedule_bound_s",
    "at_bands",
    "at_quantile",
    "at_rates",
    "check_fits",
    "energy",
    "estimation",
    "fit_curves",
    "frontier",
    "joules",
    "least_amount",
    "planned",
    "proximal_flop",
    "quantile_s",
    "relaxed",
    "round_seconds",
    "rounds_s",
    "samples_processed",
    "sensitivity",
    "sent_bytes",
    "servable",
    "session_ends_s",
    "shortest_within",
    "slower",
    "smallest_server",
    "solve",
    "solve_arrays",
    "solve_band_memory",
    "solve_bandwidth",
    "solve_memory",
    "solve_quantile",
    "solve_servers",
    "solve_serving",
    "solve_staged_memory",
    "terms",
    "unit_bytes",
]
