"""Cuts, compute and bandwidth together: several budgets shared among the clients at once.

Client k at cut l takes c + sum_i r_i / x_i seconds with x_i of budget i (compute: FLOP/s; a band: Hz,
at the client's own spectral efficiency). At prices p with sum_i p_i B_i = 1 the cheapest way to end by T
costs (sum_i sqrt(p_i r_i))^2 / (T - c), which is the session problem with that square for work and a
server of 1. So for any prices its proven bound is one here too (weak duality), and the prices that
bound best are found by raising those of budgets in short supply. What integer cuts leave of a gap
shrinks with K.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpy.typing import ArrayLike

from sfl_jax.errors import BadInput
from sfl_jax.optim.costs import Costs, Cuts, Floats, Terms
from sfl_jax.optim.exact import exact
from sfl_jax.optim.infeasible import why_infeasible
from sfl_jax.optim.shares import SLACK, end_s, rounding

_ROUNDS = 150  # of prices
_LAST = 8  # rounds whose cuts are tried
_POLISH = 60  # rounds of prices with cuts fixed


class BandPlan(NamedTuple):
    """Cuts, shares of compute and of bandwidth; NumPy. Shares and bands sum to at most their budgets."""

    cuts: Cuts  # (K,)
    shares: Floats  # (K,) FLOP/s
    uplink_hz: Floats  # (K,)
    downlink_hz: Floats  # (K,), the same band as uplink_hz where it is pooled
    client_s: Floats  # (K,)
    round_s: float
    bound_s: float  # proven: no cuts, shares and bands end a round by then
    iterations: int

    @property
    def gap(self) -> float:
        """How far above the optimum the round can be at most, relative."""
        return self.round_s / self.bound_s - 1 if self.bound_s > 0 else float(self.round_s > 0) * np.inf


def solve_bandwidth(
    terms: Terms,
    server_flops: float,
    band_hz: float | tuple[float, float],
    *,
    reference_hz: float,
    present: ArrayLike | None = None,
) -> BandPlan:
    """Cuts, compute and bandwidth that end a round soonest, session barrier.

    band_hz: one band pooled for both directions, or (up, down).  reference_hz: the bandwidth at which
    the terms' uplink_bps and downlink_bps hold; a client's rate is proportional to the band it is given.
    Infeasible names the clients without a cut; BadInput budgets that are not above 0.
    """
    bands = np.atleast_1d(np.asarray(band_hz, np.float64))
    budgets = np.concatenate([[server_flops], bands])
    for name, value in [
        ("server_flops", server_flops),
        ("reference_hz", reference_hz),
        ("band_hz", bands.min()),
    ]:
        if not 0 < value < np.inf:
            raise BadInput(f"{name}={value}: it must be above 0 and finite")
    clients, _ = terms.shape
    here = np.ones(clients, bool) if present is None else np.asarray(present, bool)
    fixed_s, amounts, allowed = _demands(terms, reference_hz, pooled=len(bands) == 1)
    if (here & ~allowed.any(axis=1)).any():
        raise why_infeasible(terms, server_flops, here)
    cpu = jax.local_devices(backend="cpu")[0]
    with jax.enable_x64(True), jax.default_device(cpu):
        found = _compiled(fixed_s, amounts / budgets[:, None, None], allowed, here)
        cuts, parts, ends, round_s, bound_s = jax.tree.map(np.asarray, found)
    shares, *hz = parts * budgets[:, None]
    return BandPlan(cuts, shares, hz[0], hz[-1], ends, float(round_s), float(bound_s), _ROUNDS)


def _demands(terms: Terms, reference_hz: float, *, pooled: bool):
    """Seconds that no budget shortens (K, C); FLOP and Hz s per budget (I, K, C); allowed (K, C)."""
    clients, count = terms.shape
    ones = np.ones(clients)
    rows = [terms.seconds(np.full(clients, cut), ones) for cut in range(count)]
    up, down = (
        np.stack([reference_hz * (getattr(row, first) + getattr(row, second)) for row in rows], axis=1)
        for first, second in (("smashed_up", "model_up"), ("model_down", "gradient_down"))
    )
    fixed_s = np.stack([row.client_forward + row.client_backward for row in rows], axis=1)
    flop = np.stack([row.server for row in rows], axis=1)
    allowed = np.stack([terms.at(np.full(clients, cut))[2] for cut in range(count)], axis=1)
    return fixed_s, np.stack([flop, up + down] if pooled else [flop, up, down]), allowed


def joint(fixed_s, amounts, allowed, present):
    """Cuts (K,), parts of every budget (I, K), ends (K,), round () and bound () for budgets of 1 each.

    fixed_s (K, C) s, amounts (I, K, C) seconds at the whole budget, allowed (K, C), present (K,). Pure.
    """
    budgets, clients, _ = amounts.shape

    def chosen(cuts):
        rows = jnp.arange(clients)
        return fixed_s[rows, cuts], jnp.where(present, amounts[:, rows, cuts], 0.0)

    def reprice(step, state):
        prices, bound_s, last = state
        # Rounded down, so that the bound stays one.
        optimum = exact(Costs(fixed_s, _squares(prices, amounts) * (1 - 4 * SLACK), allowed), 1.0, present)
        used = jnp.sum(_parts(prices, *chosen(optimum.cuts), present), axis=1)
        prices = _normal(prices * jnp.clip(used, 1e-3, 1e3) ** (1 / (1 + step / 10)))
        return prices, jnp.maximum(bound_s, optimum.bound_s), last.at[step % _LAST].set(optimum.cuts)

    start = jnp.full(budgets, 1 / budgets), jnp.zeros(()), jnp.zeros((_LAST, clients), jnp.int32)
    prices, bound_s, last = lax.fori_loop(0, _ROUNDS, reprice, start)

    def polish(cuts):
        mine = chosen(cuts)

        def reprice_fixed(_, prices):
            return _normal(prices * jnp.sum(_parts(prices, *mine, present), axis=1))

        parts = _parts(lax.fori_loop(0, _POLISH, reprice_fixed, prices), *mine, present)
        return _fitted(parts, *mine, present)

    parts, ends, rounds_s = lax.map(polish, last)
    best = jnp.argmin(rounds_s)
    return last[best], parts[best], ends[best], rounds_s[best], bound_s


_compiled = jax.jit(joint)


def _squares(prices, amounts) -> Any:
    """(sum_i sqrt(p_i r_i))^2, the price of a client's work per 1 / (T - c)."""
    return jnp.sum(jnp.sqrt(prices.reshape(-1, *[1] * (amounts.ndim - 1)) * amounts), axis=0) ** 2


def _parts(prices, fixed_s, amounts, present):
    """The cheapest parts (I, K) at these prices that let all end as soon as a budget of 1 allows."""
    squares = _squares(prices, amounts)
    idle_s = jnp.max(jnp.where(present & (squares <= 0), fixed_s, 0.0))
    time_s = jnp.maximum(end_s(fixed_s, squares, 1.0), idle_s)
    left_s = jnp.where(squares > 0, time_s - fixed_s, 1.0)
    return jnp.sqrt(amounts / prices[:, None]) * (jnp.sqrt(squares) / left_s)


def _fitted(parts, fixed_s, amounts, present):
    """Parts scaled to fill each budget and not to exceed it; the ends (K,) and the round () that follow."""
    used = jnp.sum(parts, axis=1, keepdims=True)
    parts = parts * jnp.where(used > 0, (1 - 2 * rounding(parts.shape[1])) / used, 1.0)
    waits_s = jnp.where(amounts > 0, amounts / jnp.where(amounts > 0, parts, 1.0), 0.0)
    ends = jnp.where(present, (fixed_s + jnp.sum(waits_s, axis=0)) * (1 + SLACK), 0.0)
    return parts, ends, jnp.max(ends)


def _normal(prices):
    prices = jnp.maximum(prices, 1e-30)
    return prices / jnp.sum(prices)
