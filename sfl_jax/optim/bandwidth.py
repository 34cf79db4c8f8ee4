"""Cuts, compute and bandwidth together: the clients share several budgets at once.

Client k at cut l takes c + sum_i r_i / x_i seconds with x_i of budget i. A budget is compute (FLOP/s) or a
band (Hz, at the client's own spectral efficiency). Give budget i of size B_i a price p_i, with sum_i p_i B_i
= 1. The cheapest way to end by T costs (sum_i sqrt(p_i r_i))^2 / (T - c). This is the session problem with
that square as work and a server of 1, so its proven bound holds here for any prices (weak duality). The
search raises the prices of scarce budgets, which tightens the bound. Integer cuts leave a gap that shrinks
with K.

An energy budget limits how long a client may send: r / x <= (budget - joules of compute) / watts. So each cut
needs a least part of the uplink band. A plan keeps these limits: a client below its least part is raised to
it, and the others share the rest. The bound ignores the limits, except for cuts that no part of the band
allows.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpy.typing import ArrayLike

from sfl_jax.errors import BadInput
from sfl_jax.optim.costs import Costs, Cuts, Energy, Floats, Terms
from sfl_jax.optim.exact import exact
from sfl_jax.optim.infeasible import why_infeasible
from sfl_jax.optim.shares import SLACK, end_s, rounding

_ROUNDS = 150  # price updates
_LAST = 8  # the last price updates, whose cuts are polished
_POLISH = 60  # price updates with the cuts fixed
_EQUAL = 1 - 1e-9  # fraction of an equal part: least parts up to it fit together after rounding


class BandPlan(NamedTuple):
    """Cuts, compute shares and bands of one round; NumPy. Shares and bands sum to at most their budgets."""

    cuts: Cuts  # (K,)
    shares: Floats  # (K,) FLOP/s
    uplink_hz: Floats  # (K,)
    downlink_hz: Floats  # (K,), the same as uplink_hz if the band is pooled
    client_s: Floats  # (K,)
    round_s: float
    bound_s: float  # proven: no cuts, shares and bands end a round by this time
    iterations: int
    codecs: Cuts  # (K,) index among the codec names

    @property
    def gap(self) -> float:
        """round_s / bound_s - 1: the round is at most this far above the optimum, relative."""
        return self.round_s / self.bound_s - 1 if self.bound_s > 0 else float(self.round_s > 0) * np.inf


def solve_bandwidth(
    terms: Terms,
    server_flops: float,
    band_hz: float | tuple[float, float],
    *,
    reference_hz: float | tuple[float, float],
    present: ArrayLike | None = None,
) -> BandPlan:
    """Cuts, compute shares and bands with the shortest round, under the session barrier.

    server_flops: the server's FLOP/s.  band_hz: one band pooled for both directions, or (up, down).
    reference_hz: the bandwidth at which the terms' uplink_bps and downlink_bps hold, one or (up, down). A
    client's rate is proportional to its band.  present: (K,) bool; absent clients cost nothing.

    Infeasible names the clients without a usable cut. BadInput: a budget that is not above 0 and finite, or
    energy budgets that together need more than the whole band.
    """
    bands = np.atleast_1d(np.asarray(band_hz, np.float64))
    budgets = np.concatenate([[server_flops], bands])
    for name, value in [
        ("server_flops", server_flops),
        ("reference_hz", np.min(reference_hz)),
        ("band_hz", bands.min()),
    ]:
        if not 0 < value < np.inf:
            raise BadInput(f"{name}={value}: it must be above 0 and finite")
    clients, _ = terms.shape
    here = np.ones(clients, bool) if present is None else np.asarray(present, bool)
    up_hz, down_hz = np.broadcast_to(reference_hz, 2).tolist()
    fixed_s, amounts, allowed = demands(terms, (up_hz, down_hz), pooled=len(bands) == 1)
    amounts = amounts / budgets[:, None, None]
    least = None if terms.energy is None else _least_parts(terms, terms.energy, up_hz / bands[0])
    open_to = allowed if least is None else allowed & (least <= 1)
    if (here & ~open_to.any(axis=1)).any():
        whole = terms._replace(uplink_bps=terms.uplink_bps * bands[0] / up_hz)
        raise why_infeasible(whole, server_flops, here)
    cpu = jax.local_devices(backend="cpu")[0]
    with jax.enable_x64(True), jax.default_device(cpu):
        found = jax.tree.map(np.asarray, _compiled(fixed_s, amounts, open_to, here, least))
        if least is not None:
            # Cuts that need at most an equal part of the band always fit together.
            safe = allowed & (least <= _EQUAL / max(here.sum(), 1))
            if (safe.any(axis=1) | ~here).all():
                other = jax.tree.map(np.asarray, _compiled(fixed_s, amounts, safe, here, least))
                found = (*(other if other[3] < found[3] else found)[:4], found[4])
    cuts, parts, ends, round_s, bound_s = found
    if not np.isfinite(round_s):
        raise BadInput(
            "no plan serves every client: their energy budgets together need more than the whole uplink band"
        )
    shares, *hz = parts * budgets[:, None]
    cuts, codecs = terms.chosen(cuts)
    return BandPlan(cuts, shares, hz[0], hz[-1], ends, float(round_s), float(bound_s), _ROUNDS, codecs)


def _least_parts(terms: Terms, energy: Energy, reference: float) -> Floats:
    """The least part (K, C) of the uplink band that keeps a client's energy budget; inf where none does.

    reference: the part at which the terms' uplink_bps hold.
    """
    cuts, nothing = range(terms.shape[1]), np.zeros(terms.shape[0])
    silent = terms._replace(energy=energy._replace(transmit_w=nothing))
    devices = terms.devices and terms.devices._replace(compute_w=nothing)
    idle = terms._replace(energy=energy._replace(j_per_flop=nothing), devices=devices)
    compute_j, sending_j = (np.stack([some.joules(cut) for cut in cuts], axis=1) for some in (silent, idle))
    left_j, sending_j = energy.budget_j[:, None] - compute_j, reference * sending_j
    with np.errstate(divide="ignore", invalid="ignore"):
        least = np.where(sending_j > 0, sending_j / left_j, 0.0)
    return np.where((left_j > 0) | ((left_j == 0) & (sending_j <= 0)), least, np.inf)


def demands(terms: Terms, reference_hz: tuple[float, float], *, pooled: bool):
    """Seconds off all budgets (K, C), FLOP or Hz s of each budget (I, K, C), allowed (K, C) energy aside.

    BadInput: a broadcast, since it is not sent in a client's part of the band.
    """
    if terms.broadcast_bps is not None:
        raise BadInput("broadcast_bps: cannot be planned with a shared band; choose band=fixed")
    clients, count = terms.shape
    ones = np.ones(clients)
    travel_s = np.stack([terms.travel_s(cut) for cut in range(count)], axis=1)
    terms = terms._replace(latency=None)  # no band shortens it
    rows = [terms.seconds(np.full(clients, cut), ones) for cut in range(count)]
    up, down = (
        np.stack([hz * (getattr(row, first) + getattr(row, second)) for row in rows], axis=1)
        for hz, first, second in (
            (reference_hz[0], "smashed_up", "model_up"), (reference_hz[1], "model_down", "gradient_down"),
        )
    )  # fmt: skip
    fixed_s = np.stack([row.client_forward + row.client_backward for row in rows], axis=1) + travel_s
    flop = np.stack([row.server for row in rows], axis=1)
    free = terms._replace(energy=None)
    allowed = np.stack([free.at(np.full(clients, cut))[2] for cut in range(count)], axis=1)
    return fixed_s, np.stack([flop, up + down] if pooled else [flop, up, down]), allowed


def joint(fixed_s, amounts, allowed, present, least=None):
    """Cuts (K,), parts of each budget (I, K), ends (K,), round () and bound () for budgets of 1. Pure.

    fixed_s: (K, C) s.  amounts: (I, K, C) seconds at the whole budget.  allowed: (K, C).  present: (K,).
    least: (K, C) least parts of the uplink band, which is budget i = 1, or None. The round is inf if these
    parts do not fit together.
    """
    budgets, clients, _ = amounts.shape

    def chosen(cuts):
        rows = jnp.arange(clients)
        return fixed_s[rows, cuts], jnp.where(present, amounts[:, rows, cuts], 0.0)

    def reprice(step, state):
        prices, bound_s, last = state
        # Rounded down to keep the bound valid.
        optimum = exact(Costs(fixed_s, _squares(prices, amounts) * (1 - 4 * SLACK), allowed), 1.0, present)
        used = jnp.sum(_parts(prices, *chosen(optimum.cuts), present), axis=1)
        prices = _normal(prices * jnp.clip(used, 1e-3, 1e3) ** (1 / (1 + step / 10)))
        return prices, jnp.maximum(bound_s, optimum.bound_s), last.at[step % _LAST].set(optimum.cuts)

    start = jnp.full(budgets, 1 / budgets), jnp.zeros(()), jnp.zeros((_LAST, clients), jnp.int32)
    prices, bound_s, last = lax.fori_loop(0, _ROUNDS, reprice, start)

    def polish(cuts):
        mine = chosen(cuts)
        parts = _settled(prices, *mine, present)
        if least is None:
            return _fitted(parts, *mine, present)
        floors = jnp.where(present, least[jnp.arange(clients), cuts], 0.0)
        parts, ends, round_s = _fitted(_raised(parts, floors), *mine, present)
        return parts, ends, jnp.where((parts[1] >= floors).all(), round_s, jnp.inf)

    parts, ends, rounds_s = lax.map(polish, last)
    best = jnp.argmin(rounds_s)
    return last[best], parts[best], ends[best], rounds_s[best], bound_s


_compiled = jax.jit(joint)


@jax.jit
def plan_at(prices, fixed_s, amounts, present):
    """Fixed columns: what they use of each budget (I,) at these prices, and their plan at settled ones.

    The plan is parts (I, K), ends (K,) and round (). fixed_s: (K,) s.  amounts: (I, K).  present: (K,).
    """
    used = jnp.sum(_parts(prices, fixed_s, amounts, present), axis=1)
    return used, _fitted(_settled(prices, fixed_s, amounts, present), fixed_s, amounts, present)


def _settled(prices, fixed_s, amounts, present):
    """The parts (I, K) of fixed columns at prices under which each budget is used up."""

    def reprice(_, prices):
        return _normal(prices * jnp.sum(_parts(prices, fixed_s, amounts, present), axis=1))

    return _parts(lax.fori_loop(0, _POLISH, reprice, prices), fixed_s, amounts, present)


def _squares(prices, amounts) -> Any:
    """(sum_i sqrt(p_i r_i))^2: the price of a client's work per 1 / (T - c)."""
    return jnp.sum(jnp.sqrt(prices.reshape(-1, *[1] * (amounts.ndim - 1)) * amounts), axis=0) ** 2


def _parts(prices, fixed_s, amounts, present):
    """The cheapest parts (I, K) at these prices with which all end as soon as a budget of 1 allows."""
    squares = _squares(prices, amounts)
    idle_s = jnp.max(jnp.where(present & (squares <= 0), fixed_s, 0.0))
    time_s = jnp.maximum(end_s(fixed_s, squares, 1.0), idle_s)
    left_s = jnp.where(squares > 0, time_s - fixed_s, 1.0)
    return jnp.sqrt(amounts / prices[:, None]) * (jnp.sqrt(squares) / left_s)


def _raised(parts, floors):
    """The parts with those of the uplink band raised to `floors` (K,); the others keep their proportions."""
    floors, room = floors * (1 + 4 * SLACK), 1 - 2 * rounding(parts.shape[1])
    part = parts[1] * (room / jnp.maximum(jnp.sum(parts[1]), jnp.finfo(float).tiny))

    def halve(_, bracket):
        low, high = bracket
        middle = 0.5 * (low + high)
        fits = jnp.sum(jnp.maximum(middle * part, floors)) <= room
        return jnp.where(fits, middle, low), jnp.where(fits, high, middle)

    scale = lax.fori_loop(0, 60, halve, (jnp.zeros(()), jnp.ones(())))[0]
    return parts.at[1].set(jnp.where(jnp.any(floors > part), jnp.maximum(scale * part, floors), part))


def _fitted(parts, fixed_s, amounts, present):
    """Parts scaled to fill each budget without exceeding it; the resulting ends (K,) s and round () s."""
    used = jnp.sum(parts, axis=1, keepdims=True)
    parts = parts * jnp.where(used > 0, (1 - 2 * rounding(parts.shape[1])) / used, 1.0)
    waits_s = jnp.where(amounts > 0, amounts / jnp.where(amounts > 0, parts, 1.0), 0.0)
    ends = jnp.where(present, (fixed_s + jnp.sum(waits_s, axis=0)) * (1 + SLACK), 0.0)
    return parts, ends, jnp.max(ends)


def _normal(prices):
    prices = jnp.maximum(prices, 1e-30)
    return prices / jnp.sum(prices)
