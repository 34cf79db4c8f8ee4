"""Bandwidth shared as well as compute, and the server's memory limited.

Under prices of the budgets, the cheapest way to end by T at a column costs a square over T - c. Work costs as
much on a server of 1, see `bandwidth.py`. So at any prices the bound of `memory.py` holds here, with the
squares for work. Prices rise for budgets that its columns would overdraw. Each answer's columns get the parts
of every budget that are best for them. The best of these plans is taken, and its gap to the bound is told.
"""

import jax
import numpy as np
from numpy.typing import ArrayLike

from sfl_jax.errors import BadInput
from sfl_jax.optim import bandwidth
from sfl_jax.optim.bandwidth import BandPlan, solve_bandwidth
from sfl_jax.optim.costs import Costs, Terms
from sfl_jax.optim.memory import best_columns, check_fits, check_memory
from sfl_jax.optim.shares import SLACK

_ROUNDS = 40  # of prices, at most
_ENOUGH = 1e-7  # gap at which no other prices are tried


def solve_band_memory(
    terms: Terms,
    server_flops: float,
    band_hz: float | tuple[float, float],
    server_memory_bytes: float,
    *,
    reference_hz: float | tuple[float, float],
    present: ArrayLike | None = None,
) -> BandPlan:
    """Cuts, compute and bandwidth that end a round soonest among cuts whose server halves fit the memory.

    The other arguments are those of `solve_bandwidth`. Infeasible names the clients that no cut serves.
    BadInput says how many bytes are missing, and refuses energy budgets.
    """
    check_memory(server_memory_bytes)
    if terms.energy is not None:
        raise BadInput(
            f"server_memory_bytes={server_memory_bytes:g}: cannot be planned with a shared band and energy"
            " budgets"
        )
    clients, count = terms.shape
    here = np.ones(clients, bool) if present is None else np.asarray(present, bool)
    plain = solve_bandwidth(terms, server_flops, band_hz, reference_hz=reference_hz, present=here)
    columns = terms.columns(plain.cuts, plain.codecs)
    if terms.server_bytes[columns][here].sum() <= server_memory_bytes:
        return plain
    check_fits(terms, server_flops, server_memory_bytes, here)
    bands = np.atleast_1d(np.asarray(band_hz, np.float64))
    budgets = np.concatenate([[server_flops], bands])
    up_hz, down_hz = np.broadcast_to(reference_hz, 2).tolist()
    fixed_s, amounts, allowed = bandwidth.demands(terms.take(here), (up_hz, down_hz), pooled=len(bands) == 1)
    amounts = amounts / budgets[:, None, None]
    cpu = jax.local_devices(backend="cpu")[0]
    with jax.enable_x64(True), jax.default_device(cpu):
        found = _search(fixed_s, amounts, allowed, terms.server_bytes, server_memory_bytes)
    chosen, (parts, ends_s, round_s), bound_s = found
    columns, client_s, shared = (
        np.full(clients, count - 1, np.int32),
        np.zeros(clients),
        np.zeros((3, clients)),
    )
    columns[here], client_s[here], shared[: len(budgets), here] = chosen, ends_s, parts * budgets[:, None]
    cuts, codecs = terms.chosen(columns)
    hz = shared[1 : len(budgets)]
    return BandPlan(
        cuts, shared[0], hz[0], hz[-1], client_s, float(round_s), max(bound_s, plain.bound_s), _ROUNDS, codecs
    )


def _search(fixed_s, amounts, allowed, sizes, memory_bytes):
    """The best columns (K,) found, their parts, ends and round, and the bound."""
    budgets, clients, _ = amounts.shape
    rows, present = np.arange(clients), np.ones(clients, bool)
    prices, bound_s, best = np.full(budgets, 1 / budgets), 0.0, None
    for step in range(_ROUNDS):
        squares = np.sum(np.sqrt(prices[:, None, None] * amounts), axis=0) ** 2 * (1 - 4 * SLACK)
        found = best_columns(Costs(fixed_s, squares, allowed), sizes, 1.0, memory_bytes, bound_s)
        bound_s = max(bound_s, found.low_s)
        mine = fixed_s[rows, found.columns], amounts[:, rows, found.columns]
        used, planned = jax.tree.map(np.asarray, bandwidth.plan_at(prices, *mine, present))
        if best is None or planned[2] < best[1][2]:
            best = found.columns, planned
        if best[1][2] <= bound_s * (1 + _ENOUGH):
            break
        prices = prices * np.clip(used, 1e-3, 1e3) ** (1 / (1 + step / 10))
        prices = np.maximum(prices, 1e-30) / prices.sum()
    assert best is not None
    return *best, bound_s
