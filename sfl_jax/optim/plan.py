"""What solvers return: plans with a proven lower bound, or the error Infeasible."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sfl_jax.errors import BadInput


class Plan(NamedTuple):
    """Cuts and shares of one round; NumPy throughout.

    Three things hold in exact arithmetic, not only up to rounding. The shares sum to at most the server's
    FLOP/s. Every session with its share ends by `client_s` <= `round_s`. No cuts and shares end a round by
    `bound_s`.
    """

    cuts: NDArray[np.int32]  # (K,); L for absent clients
    shares: NDArray[np.float64]  # (K,) FLOP/s, 0 where nothing is on the server; NaN if no client has a share
    client_s: NDArray[np.float64]  # (K,) whole session, 0 for absent clients
    round_s: float
    bound_s: float
    iterations: int
    codecs: NDArray[np.int32] = np.zeros(0, np.int32)  # (K,) index among the codec names; solvers set it

    @property
    def gap(self) -> float:
        """round_s / bound_s - 1: the round is at most this far above the optimum, relative."""
        return self.round_s / self.bound_s - 1 if self.bound_s > 0 else float(self.round_s > 0) * np.inf


class Solution(NamedTuple):
    """What `solve_arrays` returns: a Plan's fields as traced arrays, and whether the plan is feasible."""

    cuts: object  # (K,) int32
    shares: object  # (K,)
    client_s: object  # (K,)
    round_s: object  # ()
    bound_s: object  # ()
    iterations: object  # ()
    feasible: object  # () bool


class Options(NamedTuple):
    """Arguments that only some methods use, see `solve`. curves: the fitted curves of regression."""

    key: Any = None
    starts: tuple[str, ...] = ("equal",)
    recall: bool = False
    rounding: str = "need"
    curves: Any = None


class Chosen(NamedTuple):
    """What a method chooses; traced arrays. The shares are optimal for the cuts unless has_equal_shares."""

    cuts: Any  # (K,) int32
    steps: Any = 1
    has_equal_shares: bool = False


class Infeasible(BadInput):
    """No plan serves every client. `clients` cannot be served; `reasons` has one text for each of them."""

    def __init__(self, clients: tuple[int, ...], reasons: tuple[str, ...]):
        self.clients, self.reasons = clients, reasons
        shown = "; ".join(
            f"client {client}: {reason}" for client, reason in zip(clients[:3], reasons, strict=False)
        )
        rest = f"; and {len(clients) - 3} more" if len(clients) > 3 else ""
        super().__init__(f"no plan serves every client: {shown}{rest}")

    def __reduce__(self):
        return type(self), (self.clients, self.reasons)
