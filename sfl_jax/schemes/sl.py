"""`sl`: one copy of the network goes from client to client."""

import dataclasses
from typing import Any

from sfl_jax.federated.packing import PackedVariables
from sfl_jax.federated.session import Training
from sfl_jax.models import Variables
from sfl_jax.schemes import turns
from sfl_jax.schemes.copies import states
from sfl_jax.schemes.scheme import Scheme


@dataclasses.dataclass(frozen=True)
class Sl(Scheme):
    """Split learning (Gupta and Raskar, arXiv 1810.06060): each client starts where the last one ended.

    A client hands its half on, with the optimiser state. With an identity codec the numbers are those of
    sequential SGD over the clients' data, for any cuts.

    Attributes:
      keeps_state: whether the optimiser state is kept for the next round.
    """

    keeps_state: bool = True

    name = "sl"
    cuts_matter = False
    has_order = True
    hands_on = True

    @property
    def clock(self) -> str:
        return "handover"

    def shared_units(self, units: int) -> range:
        return range(units)

    @property
    def serves_together(self) -> bool:
        return False

    def start(self, training: Training, variables: Variables) -> Any:
        return states(training, PackedVariables.of(variables)) if self.keeps_state else ()

    def run_round(
        self, training, size, axis_name, model, samples, work, round_key, rate, previous=None
    ) -> Any:
        """Like `federated.round.run_round`, for one device. Memory: two models."""
        return turns.run_round(
            training, model, samples, work, round_key, rate, previous, has_own=False, keeps=self.keeps_state
        )
