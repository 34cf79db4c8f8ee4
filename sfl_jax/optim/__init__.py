"""The training-latency minimisation problem: from costs to a plan with a proven bound."""

from sfl_jax.optim.costs import Costs, Seconds, Terms, Work, samples_processed, terms
from sfl_jax.optim.plan import Infeasible, Plan, Solution
from sfl_jax.optim.solve import BARRIERS, METHODS, solve, solve_arrays

__all__ = [
    "BARRIERS",
    "METHODS",
    "Costs",
    "Infeasible",
    "Plan",
    "Seconds",
    "Solution",
    "Terms",
    "Work",
    "samples_processed",
    "solve",
    "solve_arrays",
    "terms",
]
