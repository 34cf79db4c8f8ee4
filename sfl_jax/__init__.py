"""Split federated learning in JAX: vmapped clients, optimal cuts, proven bounds."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sfl_jax import codecs, datasets, fleet, models, optim, planning, schemes
    from sfl_jax.federated.execution import Execution
    from sfl_jax.fleet import Faults
    from sfl_jax.models import Chain
    from sfl_jax.planning import Planner
    from sfl_jax.run import Run, Together

__version__ = "0.1.0"
__all__ = [
    "Chain",
    "Execution",
    "Faults",
    "Planner",
    "Run",
    "Together",
    "codecs",
    "datasets",
    "fleet",
    "models",
    "optim",
    "planning",
    "schemes",
]

# Imported on first use: JAX takes a second to import, and help and refusals do not need it.
_PARTS = {
    "Chain": "models",
    "Execution": "federated.execution",
    "Faults": "fleet",
    "Planner": "planning",
    "Run": "run",
    "Together": "run",
}


def __getattr__(name: str) -> Any:
    if name in _PARTS:
        return getattr(importlib.import_module(f"sfl_jax.{_PARTS[name]}"), name)
    if name in __all__:
        return importlib.import_module(f"sfl_jax.{name}")
    raise AttributeError(f"module 'sfl_jax' has no attribute {name!r}")
