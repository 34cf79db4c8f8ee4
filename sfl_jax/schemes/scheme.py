"""What a scheme declares of itself, and what all schemes share."""

import dataclasses
from typing import Any, ClassVar

from jaxtyping import Array, Int

from sfl_jax.errors import BadInput
from sfl_jax.federated.session import Training
from sfl_jax.models import Variables

# What a scheme may allow.
DEADLINE, SEVERAL_DEVICES, CHUNKS = "deadline", "several_devices", "chunks"


@dataclasses.dataclass(frozen=True)
class Scheme:
    """Who holds, updates and averages which half, and who waits for whom. Static under jit.

    Attributes:
      tail_units: the last units that the client holds too (a U-shape), so that labels never leave it.
      has_order: whether clients are served one after the other, in an order drawn every round.
    """

    tail_units: int = 0

    name: ClassVar[str] = ""
    has_order: ClassVar[bool] = False

    @property
    def clock(self) -> str:
        """The barrier of `optim.solve` that is the scheme's clock."""
        raise NotImplementedError

    @property
    def allows(self) -> frozenset[str]:
        """What may be asked of the scheme. DEADLINE: a client that comes too late is left out.
        SEVERAL_DEVICES: they share the clients of a round. CHUNKS: a device computes several clients at once.
        """
        return frozenset()

    @property
    def needs_equal_steps(self) -> bool:
        """Whether all clients of a round must be there and take the same number of steps."""
        return False

    def check(self, units: int) -> None:
        """BadInput where the scheme does not suit a network of so many units."""
        if not 0 <= self.tail_units < units:
            raise BadInput(
                f"tail_units={self.tail_units}: must be 0 to {units - 1}, less than the units of the network"
            )

    def max_cut(self, units: int) -> int:
        """The largest cut that a plan may choose."""
        return units

    def engine(self) -> Any:
        """What `Training.scheme` takes: the scheme itself, or None for sessions that run together."""
        return self

    def start(self, training: Training, variables: Variables) -> Any:
        """What survives a round beside the variables, before the first."""
        return ()


def is_own(training: Training, cut: Int[Array, "*K"], unit: int) -> Array:
    """Whether the client holds the unit: below its cut, or in the tail."""
    return (unit < cut) | (unit >= training.tail)
