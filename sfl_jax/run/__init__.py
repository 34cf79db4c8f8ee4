"""A run plans each round, trains a cohort, evaluates the model and keeps its clocks."""

from sfl_jax.run.loop import Diverged
from sfl_jax.run.parts import Parts
from sfl_jax.run.run import Evaluated, Line, Run
from sfl_jax.run.state import State
from sfl_jax.run.together import Together

__all__ = ["Diverged", "Evaluated", "Line", "Parts", "Run", "State", "Together"]
