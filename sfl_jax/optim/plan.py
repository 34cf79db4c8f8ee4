"""The answer: cuts, shares, the round's time, and a proven lower bound on it."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sfl_jax.errors import BadInput


class Plan(NamedTuple):
    """Cuts and shares of one round; NumPy throughout.

    True in exact arithmetic, not only up to rounding: the shares add up to at most the server's
    FLOP/s, every session with its share ends by `client_s` <= `round_s`, and no cuts and shares
    whatever end a round by `bound_s`.
    """

    cuts: NDArray[np.int32]  # (K,); of absent clients: L
    shares: NDArray[np.float64]  # (K,) FLOP/s, 0 where nothing is on the server; NaN except for sessions
    client_s: NDArray[np.float64]  # (K,) whole session, 0 of absent clients
    round_s: float
    bound_s: float
    iterations: int
    codecs: NDArray[np.int32] = np.zeros(0, np.int32)  # (K,) place among the names; solvers always say it

    @property
    def gap(self) -> float:
        """How far above the optimum the round can be at most, relative."""
        return self.round_s / self.bound_s - 1 if self.bound_s > 0 else float(self.round_s > 0) * np.inf


class Solution(NamedTuple):
    """What `solve_arrays` returns: a Plan's fields as traced arrays, and whether they are a plan at all."""

    cuts: object  # (K,) int32
    shares: object  # (K,)
    client_s: object  # (K,)
    round_s: object  # ()
    bound_s: object  # ()
    iterations: object  # ()
    feasible: object  # () bool


class Options(NamedTuple):
    """What some methods ask for besides costs and server: see `solve`. curves: of the regression."""

    key: Any = None
    starts: tuple[str, ...] = ("equal",)
    recall: bool = False
    rounding: str = "need"
    curves: Any = None


class Chosen(NamedTuple):
    """What a method chooses; traced arrays. Shares are optimal for the cuts, unless they are all equal."""

    cuts: Any  # (K,) int32
    steps: Any = 1
    has_equal_shares: bool = False


class Infeasible(BadInput):
    """No plan serves every client. `clients` are those that cannot be served, `reasons` one for each."""

    def __init__(self, clients: tuple[int, ...], reasons: tuple[str, ...]):
        self.clients, self.reasons = clients, reasons
        shown = "; ".join(
            f"client {client}: {reason}" for client, reason in zip(clients[:3], reasons, strict=False)
        )
        rest = f"; and {len(clients) - 3} more" if len(clients) > 3 else ""
        super().__init__(f"no plan serves every client: {shown}{rest}")

    def __reduce__(self):
        return type(self), (self.clients, self.reasons)
