"""Plans within the server's memory: which there are, and whether the cohorts of a training fit."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64

from sfl_jax import optim
from sfl_jax.errors import BadInput

BARRIERS = ("session", "staged")


def check_bytes(planner: Any) -> None:
    """BadInput for a memory that is no number of bytes."""
    limit = planner.server_memory_bytes
    if not 0 <= limit < np.inf:
        raise BadInput(f"server_memory_bytes={limit}: must be a finite number of bytes, or 0 for no limit")


def check_barrier(planner: Any) -> None:
    """BadInput for a barrier that does not know the limit."""
    limit = planner.server_memory_bytes
    if limit and planner.barrier not in BARRIERS:
        raise BadInput(
            f"server_memory_bytes={limit:g}: needs barrier=session or barrier=staged, not {planner.barrier}"
        )


def limits(planner: Any) -> bool:
    """Whether the server's memory limits the planner's choice."""
    return planner.server_memory_bytes > 0 and planner.method == "exact"


def solve(
    planner: Any, terms: optim.Terms, present: Bool[np.ndarray, " K"] | None = None
) -> optim.Plan | optim.BandPlan:
    """The plan within the memory, under the planner's barrier and band."""
    asked = terms, planner.server_flops
    if planner.band != "fixed":
        equal = float(len(terms.samples))
        band = (equal, equal) if planner.band == "separate" else equal
        return optim.solve_band_memory(
            *asked, band, planner.server_memory_bytes, reference_hz=1.0, present=present
        )
    within = optim.solve_staged_memory if planner.barrier == "staged" else optim.solve_memory
    return within(*asked, planner.server_memory_bytes, present)


def check_cohorts(
    planner: Any,
    terms: optim.Terms,
    usable: Bool[np.ndarray, "K C"],
    cohorts: Iterable[tuple[int, Int64[np.ndarray, " N"]]],
) -> None:
    """BadInput names the first round whose cohort does not fit the memory, whatever its cuts."""
    least = np.where(usable, terms.server_bytes, np.inf).min(axis=1)
    for round, ids in cohorts:
        if least[ids].sum() > planner.server_memory_bytes:
            try:
                own = terms.take(ids)
                optim.check_fits(
                    own, planner.server_flops, planner.server_memory_bytes, np.ones(len(ids), bool)
                )
            except BadInput as error:
                raise BadInput(f"round {round + 1}: {error}") from error
