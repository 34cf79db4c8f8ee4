"""A run: every round it plans, trains a cohort, evaluates, and keeps its clocks."""

from sfl_jax.run.loop import Diverged
from sfl_jax.run.parts import Parts
from sfl_jax.run.run import Evaluated, Line, Run
from sfl_jax.run.state import State

__all__ = ["Diverged", "Evaluated", "Line", "Parts", "Run", "State"]
