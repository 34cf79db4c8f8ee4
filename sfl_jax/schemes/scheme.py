"""What a scheme declares, and what all schemes share."""

import dataclasses
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Array, Bool, Int

from sfl_jax import optim
from sfl_jax.errors import BadInput
from sfl_jax.federated.session import Training
from sfl_jax.models import Variables

# Abilities that a scheme may declare in `allows`.
DEADLINE, SEVERAL_DEVICES, CHUNKS, OWN_NORM = "deadline", "several_devices", "chunks", "own_norm"


@dataclasses.dataclass(frozen=True)
class Scheme:
    """Says who holds, updates and averages which half, and who waits for whom. Static under jit.

    Attributes:
      tail_units: how many last units the client also holds (a U-shape). Labels then never leave it.
      has_order: whether clients are served one after the other, in an order drawn each round.
    """

    tail_units: int = 0

    name: ClassVar[str] = ""
    cuts_matter: ClassVar[bool] = True  # whether other cuts give other numbers, with the identity codec
    has_order: ClassVar[bool] = False
    hands_on: ClassVar[bool] = False  # whether a client hands on its half, even if it diverged
    only_method: ClassVar[str] = ""  # the planning method to use whatever else is asked for; "": any

    @property
    def clock(self) -> str:
        """The barrier of `optim.solve` that computes the scheme's simulated seconds."""
        raise NotImplementedError

    @property
    def allows(self) -> frozenset[str]:
        """The abilities of the scheme.

        DEADLINE: a client that is late is left out. SEVERAL_DEVICES: devices share the clients of a round.
        CHUNKS: a device computes several clients at once. OWN_NORM: other normalisation than averaged.
        """
        return frozenset()

    @property
    def needs_equal_steps(self) -> bool:
        """Whether all clients of a round must take part, with the same number of steps."""
        return False

    def check(self, units: int) -> None:
        """Raises BadInput if the scheme does not suit a network of `units` units."""
        if not 0 <= self.tail_units < units:
            raise BadInput(
                f"tail_units={self.tail_units}: must be 0 to {units - 1}, less than the units of the network"
            )

    def max_cut(self, units: int) -> int:
        """The largest cut that a plan may choose."""
        return units

    def shared_units(self, units: int) -> range:
        """The units of which the server has one copy for all clients. It has a replica of the others for each
        client.
        """
        return range(0)

    def step_once(self, units: int) -> range:
        """The shared units that take one step for all clients together, and not one for each."""
        return range(0)

    @property
    def serves_together(self) -> bool:
        """Whether the server works on the batches of all clients at the same time."""
        return True

    def server_bytes(self, at_server: Bool[np.ndarray, "K L"], of_units: optim.UnitBytes) -> float:
        """The most bytes that the server holds to train. at_server: whose units are at the server."""
        units = at_server.shape[1]
        is_shared = np.isin(np.arange(units), self.shared_units(units))
        copies = np.where(is_shared, at_server.any(axis=0), at_server.sum(axis=0))
        activations = at_server @ of_units.activations
        at_once = activations.sum() if self.serves_together else activations.max(initial=0)
        return float(copies @ of_units.copies + at_once)

    def engine(self) -> Any:
        """What `Training.scheme` takes: the scheme itself, or None for independent sessions."""
        return self

    def start(self, training: Training, variables: Variables) -> Any:
        """What the scheme keeps from round to round beside the variables, before the first round."""
        return ()


def is_own(training: Training, cut: Int[Array, "*K"], unit: int) -> Array:
    """Whether the client holds the unit: it is below the cut, or in the tail."""
    return (unit < cut) | (unit >= training.tail)
