"""The training-latency minimisation problem: from costs to a plan with a proven bound."""

from sfl_jax.optim.band_memory import solve_band_memory
from sfl_jax.optim.bandwidth import BandPlan, solve_bandwidth
from sfl_jax.optim.clocks import CLOCKS, round_seconds
from sfl_jax.optim.clocks import METHODS as STAGED_METHODS
from sfl_jax.optim.costs import Costs, CutsAndCodecs, Seconds, Terms
from sfl_jax.optim.infeasible import servable
from sfl_jax.optim.inverse import Sensitivity, Server, sensitivity, smallest_server
from sfl_jax.optim.memory import check_fits, solve_memory
from sfl_jax.optim.plan import Infeasible, Plan, Solution
from sfl_jax.optim.regression import Curve, Fit, fit_curves, relaxed
from sfl_jax.optim.replay import at_bands, session_ends_s, slower
from sfl_jax.optim.servers import Servers, ServersPlan, solve_servers
from sfl_jax.optim.serving import any_schedule_bound_s, solve_serving
from sfl_jax.optim.solve import METHODS, solve, solve_arrays
from sfl_jax.optim.staged_memory import solve_staged_memory
from sfl_jax.optim.work import UnitBytes, Wire, Work, samples_processed, terms, unit_bytes
from sfl_jax.registry import BARRIERS, ROUNDINGS, STARTS

__all__ = [
    "BARRIERS",
    "CLOCKS",
    "METHODS",
    "ROUNDINGS",
    "STAGED_METHODS",
    "STARTS",
    "BandPlan",
    "Costs",
    "Curve",
    "CutsAndCodecs",
    "Fit",
    "Infeasible",
    "Plan",
    "Seconds",
    "Sensitivity",
    "Server",
    "Servers",
    "ServersPlan",
    "Solution",
    "Terms",
    "UnitBytes",
    "Wire",
    "Work",
    "any_schedule_bound_s",
    "at_bands",
    "check_fits",
    "fit_curves",
    "relaxed",
    "round_seconds",
    "samples_processed",
    "sensitivity",
    "servable",
    "session_ends_s",
    "slower",
    "smallest_server",
    "solve",
    "solve_arrays",
    "solve_band_memory",
    "solve_bandwidth",
    "solve_memory",
    "solve_servers",
    "solve_serving",
    "solve_staged_memory",
    "terms",
    "unit_bytes",
]
