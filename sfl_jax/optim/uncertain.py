"""Cuts for rates that change from round to round: the cuts stay, the server's shares follow.

Rates are known as N samples. The round of sample n under some cuts is its round with the best shares for its
rates. Wanted are cuts with the least q-quantile of these N rounds: the least T such that at least ceil(q N)
samples end by T. The other samples, the late ones, are at most `late` = N - ceil(q N).

The bound holds for all cuts. Split the samples into late + 1 groups. By the quantile all samples of at least
one group end, since there are more groups than late samples. A group can end by T only if for all weights v
of its samples

  sum_k min_l sum_n v_n w_k(l) / (T - a_nk(l)) <= F sum_n v_n,

because each sample by itself needs no more than F, and the cuts are the same for all. Weights for which this
fails prove that the group cannot end by T. They are found by raising the weights of samples that need more
than F. The least over the groups of the times so proven is the bound. With one-sample groups it would be the
quantile of the samples' own optima; the largest of these are spread over the groups, so it is never less.

The cuts come from the same weights, then from moves of one client at a time. Many clients do not matter to
the quantile of these samples, but may to that of later rounds. In the end each client takes the cut that
needs least at shorter times too, as long as the quantile stays within `spare` of the least that was found.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sfl_jax.errors import BadInput
from sfl_jax.optim.costs import Cuts, Floats, Terms
from sfl_jax.optim.infeasible import why_infeasible
from sfl_jax.optim.plan import Plan
from sfl_jax.optim.shares import SLACK, end_s, optimal_shares, rounding
from sfl_jax.optim.solve import solve

NAMES = ("flops", "uplink_bps", "downlink_bps")
_WEIGHINGS = 60  # passes that change weights, for the bound and again for the cuts
_MOST_MOVED = 2_000_000  # largest samples x clients x columns whose single moves are tried
_MOVES = 200
_EQUAL = 1e-9  # relative: rounds that differ by less are equal
_FINEST = 1e-6  # relative: moves that shorten the quantile by less are not looked for
_SHORTER = (1.0, 0.9, 0.8, 0.7, 0.6)  # parts of the quantile at which a client should need little too
_SETTLINGS, _WORTH = 4, 1e-3  # how often clients settle, while the quantile shrinks by this part
_BLOCK = 2_000_000  # samples x clients x columns at once


class Rates(NamedTuple):
    """The rates of K clients in N sampled rounds; (N, K) each, above 0."""

    flops: Floats  # FLOP/s
    uplink_bps: Floats  # bit/s
    downlink_bps: Floats  # bit/s

    @property
    def samples(self) -> int:
        """N."""
        return len(self.flops)

    def of(self, samples) -> "Rates":
        """The rates of some samples (indices, a slice or a mask)."""
        return Rates(*(np.asarray(part)[samples] for part in self))

    def least(self) -> "Rates":
        """Each rate of each client at its least; (K,) each."""
        return Rates(*(part.min(axis=0) for part in self))

    def mean(self) -> "Rates":
        """Each rate of each client at its mean; (K,) each."""
        return Rates(*(part.mean(axis=0) for part in self))


class QuantilePlan(NamedTuple):
    """Cuts for sampled rounds.

    plan: the cuts, with shares and ends of the sample whose round is the quantile. round_s is the quantile,
      bound_s is a proven bound on the quantile of all cuts.
    rounds_s: (N,) the round of each sample with its own best shares.
    sample: the sample whose round is the quantile.
    """

    plan: Plan
    rounds_s: Floats
    sample: int


def at_rates(terms: Terms, rates: Rates) -> Terms:
    """The terms at rates of (K,), for example those of one sample.

    The energy of a FLOP stays, that of a bit follows the uplink.
    """
    return terms._replace(**rates._asdict())


def solve_quantile(
    terms: Terms, rates: Rates, server_flops: float, quantile: float, spare: float = 0.01
) -> QuantilePlan:
    """Cuts with a small quantile of the sampled rounds, and a proven bound on that of all cuts.

    Session barrier. quantile: above 0, at most 1; 1 is the longest of the sampled rounds. spare: what the
    quantile of these samples may be longer, relative, for rounds that are not among them. A cut must keep the
    client's energy budget in every sample. Infeasible names the clients that no cut serves. BadInput names
    rates, a quantile or a spare part that are not allowed.
    """
    _check(terms, rates, quantile, spare)
    number = at_quantile(rates.samples, quantile)
    allowed = _always_allowed(terms, rates)
    if not allowed.any(axis=1).all():
        raise why_infeasible(at_rates(terms, rates.least()), server_flops, np.ones(len(allowed), bool))
    own = [solve(at_rates(terms, rates.of(n)), server_flops) for n in range(rates.samples)]
    search = _Search(terms, rates, server_flops, number, allowed)
    low_s = search.bound_s(np.array([plan.bound_s for plan in own]))
    for plan in (own[0], own[len(own) // 2], solve(at_rates(terms, rates.mean()), server_flops)):
        search.offer(terms.columns(plan.cuts, plan.codecs))
    search.offer(terms.columns(*_chosen(solve(at_rates(terms, rates.least()), server_flops))))
    search.weigh(low_s)
    for _ in range(_SETTLINGS):
        before_s = search.quantile_s
        search.settle(before_s)
        if search.quantile_s > before_s * (1 - _WORTH):
            break
    search.move(low_s)
    search.settle(search.quantile_s * (1 + spare))
    return _planned(terms, rates, server_flops, search, low_s)


def rounds_s(terms: Terms, rates: Rates, server_flops: float, columns: Cuts) -> Floats:
    """The round (N,) s of each sample where each client takes its column (K,), with the best shares."""
    fixed_s = np.stack([at_rates(terms, rates.of(n)).at(columns)[0] for n in range(rates.samples)])
    work = terms.at(columns)[1]
    cpu = jax.local_devices(backend="cpu")[0]
    with jax.enable_x64(True), jax.default_device(cpu):
        return np.asarray(_ends(fixed_s, work, np.float64(server_flops)))


def at_quantile(samples: int, quantile: float) -> int:
    """How many of the sampled rounds must end by the quantile: ceil(quantile x samples), at least 1."""
    return max(int(np.ceil(quantile * samples - 1e-9)), 1)


def quantile_s(rounds_s: Floats, quantile: float) -> float:
    """The least time by which a part `quantile` of these rounds (N,) end."""
    return float(
        np.partition(rounds_s, at_quantile(len(rounds_s), quantile) - 1)[
            at_quantile(len(rounds_s), quantile) - 1
        ]
    )


@jax.jit
def _ends(fixed_s, work, server_flops):
    idle_s = jnp.max(jnp.where(work > 0, -jnp.inf, fixed_s), axis=1)
    busy_s = jax.vmap(lambda own: end_s(own, work, server_flops))(fixed_s)
    return jnp.maximum(busy_s, idle_s)


class _Table(NamedTuple):
    """What a pass needs of terms and rates: seconds off the server are linear in the inverse rates."""

    inverse: Any  # (G, n, 3, K) of each sample of each group: s per FLOP, per bit up, per bit down
    amounts: Any  # (4, K, C): FLOP, bits up, bits down, and seconds that no rate changes
    work: Any  # (C,) FLOP on the server per sample of data
    data: Any  # (K,) samples of data
    allowed: Any  # (K, C)


def _fixed_s(inverse, amounts):
    """Seconds off the server, from (3, K) and (4, K, ...) with an axis of columns or none."""
    each = inverse.reshape(inverse.shape + (1,) * (amounts.ndim - 2))
    return amounts[0] * each[0] + amounts[1] * each[1] + amounts[2] * each[2] + amounts[3]


def _needs(table: _Table, inverse, time_s):
    """The share (K, C) of each column in one sample; inf where it cannot end by time_s."""
    fixed_s = jnp.where(table.allowed, _fixed_s(inverse, table.amounts), jnp.inf)
    left_s = (time_s - fixed_s) + SLACK * time_s
    needs = jnp.where(table.work > 0, table.data[:, None] * table.work / left_s, 0.0)
    return jnp.where((left_s > 0) | ((left_s >= 0) & (table.work <= 0)), needs, jnp.inf)


@jax.jit
def _weighed(table: _Table, weights, times_s):
    """For each group: the columns (G, K) with the least weighted need, that need (G,), and the need of each
    sample at these columns (G, n).

    weights: (G, n).  times_s: (G,) s.
    """

    def group(inverse, weights, time_s):
        def add(total, sample):
            own, weight = sample
            needs = _needs(table, own, time_s)
            return total + jnp.where(weight > 0, weight * jnp.where(weight > 0, needs, 0.0), 0.0), None

        total, _ = lax.scan(add, jnp.zeros(table.allowed.shape), (inverse, weights))
        total = jnp.where(table.allowed, total, jnp.inf)
        columns = jnp.argmin(total, axis=1)
        rows = jnp.arange(len(columns))
        amounts, work = table.amounts[:, rows, columns], table.data * table.work[columns]

        def load(own):
            left_s = (time_s - _fixed_s(own, amounts)) + SLACK * time_s
            needs = jnp.where(work > 0, work / left_s, 0.0)
            return jnp.sum(jnp.where((left_s > 0) | ((left_s >= 0) & (work <= 0)), needs, jnp.inf))

        return columns, jnp.sum(jnp.min(total, axis=1)), lax.map(load, inverse)

    return lax.map(lambda each: group(*each), (table.inverse, weights, times_s))


class _Search:
    """The best columns so far, and how their quantile is lowered."""

    def __init__(self, terms: Terms, rates: Rates, server_flops, number, allowed):
        self.terms, self.rates, self.server_flops, self.number = terms, rates, float(server_flops), number
        usable = allowed & ((terms.work_flop <= 0) | (server_flops > 0))
        self.allowed, self.error = usable, 8 * rounding(len(usable)) + rates.samples * 2.0**-52
        self.inverse = np.stack([1 / part for part in rates], axis=1)  # (N, 3, K)
        self.amounts = _amounts(terms)
        self.columns = np.full(len(usable), usable.shape[1] - 1, np.int32)
        self.quantile_s, self.passes = np.inf, 0

    def offer(self, columns) -> bool:
        """Keeps the columns (K,) if their quantile is the least so far."""
        columns = np.asarray(columns, np.int32)
        if not self.allowed[np.arange(len(columns)), columns].all():
            return False
        ends_s = rounds_s(self.terms, self.rates, self.server_flops, columns)
        reached_s = float(np.partition(ends_s, self.number - 1)[self.number - 1])
        if reached_s >= self.quantile_s:
            return False
        self.columns, self.quantile_s = columns.copy(), reached_s
        return True

    def weighed(self, groups, weights, times_s):
        """`_weighed` for groups of samples (G, n)."""
        cpu = jax.local_devices(backend="cpu")[0]
        self.passes += 1
        with jax.enable_x64(True), jax.default_device(cpu):
            table = _Table(
                self.inverse[groups],
                self.amounts,
                self.terms.work_flop,
                self.terms.samples,
                self.allowed,
            )
            return [np.asarray(part) for part in _weighed(table, weights, np.asarray(times_s))]

    def bound_s(self, own_bounds_s: Floats) -> float:
        """A time that no columns' quantile is below. own_bounds_s: (N,) bounds of the samples' own rounds."""
        late = self.rates.samples - self.number
        order = np.argsort(-own_bounds_s, kind="stable")
        size = -(-len(order) // (late + 1))
        # Padded with samples without weight. Row g has the samples g, g + late + 1, ... of the order.
        places = np.arange(size * (late + 1)).reshape(size, late + 1).T
        weights = np.where(places < len(order), 1.0, 0.0)
        groups = order[np.minimum(places, len(order) - 1)]
        low_s = own_bounds_s[groups[:, 0]].copy()
        if size == 1:
            return float(low_s.min())
        step = np.full(len(low_s), 1e-2)
        for _ in range(_WEIGHINGS):
            times_s = low_s * (1 + step)
            _, needs, loads = self.weighed(groups, weights, times_s)
            is_proven = needs * (1 - self.error) > self.server_flops * weights.sum(axis=1)
            low_s = np.where(is_proven, times_s, low_s)
            step = np.where(is_proven, 1.5 * step, 0.7 * step)
            weights = _heavier(weights, loads / max(self.server_flops, 1e-300))
        return float((low_s * (1 - self.error)).min())

    def weigh(self, low_s: float) -> None:
        """Tries the columns with the least weighted need, at weights that follow the samples' needs."""
        every = np.arange(self.rates.samples)[None]
        weights = np.ones((1, self.rates.samples))
        for turn in range(_WEIGHINGS // 2):
            goal_s = self.quantile_s if np.isfinite(self.quantile_s) else 2 * low_s
            time_s = low_s + (goal_s - low_s) * (0.9 if turn % 2 else 0.5)
            columns, _, loads = self.weighed(every, weights, [time_s])
            self.offer(columns[0])
            # The samples that need most may be late: they have no say.
            ranks = np.argsort(np.argsort(loads[0], kind="stable"), kind="stable")
            weights = _heavier(np.maximum(weights, 1e-6), loads / max(self.server_flops, 1e-300))
            weights = np.where(ranks < self.number, weights, 0.0)

    def move(self, low_s: float) -> None:
        """Moves one client at a time, as long as this lowers what the quantile's sample needs."""
        clients, count = self.allowed.shape
        if self.rates.samples * clients * count > _MOST_MOVED or not np.isfinite(self.quantile_s):
            return
        moves = 0
        while self.quantile_s > low_s * (1 + _FINEST) and moves < _MOVES:
            needs = self._all_needs(self.quantile_s * (1 - _FINEST), slice(None))
            columns, made = _moved(needs, self.columns, self.number, self.server_flops, _MOVES - moves)
            moves += made + 1
            if columns is None or not self.offer(columns):
                return

    def settle(self, time_s: float) -> None:
        """Gives clients cuts that need less at shorter times, if enough samples still end by time_s."""
        rows = np.arange(len(self.allowed))
        blocks = np.array_split(rows, max(self.rates.samples * self.allowed.size // _BLOCK, 1))
        columns = self.columns.copy()
        load, stuck = np.zeros(self.rates.samples), np.zeros(self.rates.samples, int)
        for own in blocks:
            needs = self._all_needs(time_s, own)[:, np.arange(len(own)), columns[own]]
            load += np.where(np.isinf(needs), 0.0, needs).sum(axis=1)
            stuck += np.isinf(needs).sum(axis=1)
        for own in blocks:
            needs, costs = self._all_needs(time_s, own), self._at_shorter_times(time_s, own)
            late, needs = np.isinf(needs), np.where(np.isinf(needs), 0.0, needs)
            for at, client in enumerate(own):
                now = columns[client]
                for column in np.argsort(costs[at], kind="stable"):
                    if not costs[at, column] < costs[at, now]:
                        break
                    loaded = load - needs[:, at, now] + needs[:, at, column]
                    left = stuck - late[:, at, now] + late[:, at, column]
                    if np.count_nonzero((loaded <= self.server_flops) & (left == 0)) >= self.number:
                        load, stuck, columns[client] = loaded, left, column
                        break
        ends_s = rounds_s(self.terms, self.rates, self.server_flops, columns)
        reached_s = float(np.partition(ends_s, self.number - 1)[self.number - 1])
        if reached_s <= time_s * (1 + _EQUAL):
            self.columns, self.quantile_s = columns, reached_s

    def _at_shorter_times(self, time_s, own):
        """What columns (k, C) of some clients need, in the mean over samples and over parts of time_s.

        A need counts as ten equal shares at most, so that a column that is too slow in a few samples may win.
        """
        most, total = 10 * self.server_flops / len(self.allowed), 0.0
        for part in _SHORTER:
            total = total + np.minimum(self._all_needs(part * time_s, own), most).mean(axis=0)
        return np.where(self.allowed[own], total, np.inf)

    def _all_needs(self, time_s, own):
        """The shares (N, k, C) of all columns of some clients in all samples."""
        amounts, inverse = self.amounts[:, own], self.inverse[:, :, own, None]
        fixed_s = inverse[:, 0] * amounts[0] + inverse[:, 1] * amounts[1] + inverse[:, 2] * amounts[2]
        fixed_s += amounts[3]
        left_s = np.where(self.allowed[own], time_s - fixed_s, -1.0)
        work = self.terms.samples[own][:, None] * self.terms.work_flop
        with np.errstate(divide="ignore", invalid="ignore"):
            needs = np.where(work > 0, work / left_s, 0.0)
        return np.where((left_s > 0) | ((left_s >= 0) & (work <= 0)), needs, np.inf)


def _moved(needs, columns, number, room, most):
    """Columns whose `number`-th least need over samples is at most the room, and the moves made; None if
    single moves do not lead there.

    needs: (N, K, C).
    """
    columns, rows = columns.copy(), np.arange(len(columns))
    endless = np.isinf(needs)
    finite = np.where(endless, 0.0, needs)
    for made in range(most):
        own, own_endless = finite[:, rows, columns], endless[:, rows, columns]
        load, stuck = own.sum(axis=1), own_endless.sum(axis=1)
        now = np.partition(np.where(stuck, np.inf, load), number - 1)[number - 1]
        if now <= room:
            return columns, made
        after = finite + (load[:, None] - own)[:, :, None]
        after[(endless + (stuck[:, None] - own_endless)[:, :, None]) > 0] = np.inf
        scores = np.partition(after, number - 1, axis=0)[number - 1]
        client, column = np.unravel_index(scores.argmin(), scores.shape)
        if not scores[client, column] < now * (1 - 1e-12):
            return None, made
        columns[client] = column
    return None, most


def _heavier(weights, loads):
    """Weights (G, n) that follow the loads, in parts of the server; each group's sum to 1."""
    raised = weights * np.clip(np.where(np.isfinite(loads), loads, np.inf), 0.1, 10.0)
    return raised / raised.sum(axis=1, keepdims=True)


def _amounts(terms: Terms) -> Floats:
    """FLOP, bits up, bits down, and seconds that no rate changes, of each client and column (4, K, C)."""
    clients, count = terms.shape

    def seconds(flops, up, down):
        rates = Rates(*(np.full(clients, rate) for rate in (flops, up, down)))
        return np.stack([at_rates(terms, rates).column(one)[0] for one in range(count)], axis=1)

    rest = seconds(np.inf, np.inf, np.inf)
    ones = seconds(1.0, np.inf, np.inf), seconds(np.inf, 1.0, np.inf), seconds(np.inf, np.inf, 1.0)
    return np.stack([*(np.maximum(one - rest, 0.0) for one in ones), rest])


def _always_allowed(terms: Terms, rates: Rates):
    """The columns (K, C) that a client may take in every sample: an energy budget depends on the uplink."""
    least = at_rates(terms, rates.least())
    return np.stack([least.column(column)[2] for column in range(terms.shape[1])], axis=1)


def _chosen(plan):
    return plan.cuts, plan.codecs


def _planned(terms, rates, server_flops, search, low_s) -> QuantilePlan:
    ends_s = rounds_s(terms, rates, server_flops, search.columns)
    sample = int(np.argsort(ends_s, kind="stable")[search.number - 1])
    fixed_s, work, _ = at_rates(terms, rates.of(sample)).at(search.columns)
    cpu = jax.local_devices(backend="cpu")[0]
    with jax.enable_x64(True), jax.default_device(cpu):
        best = _shares(fixed_s, work, np.float64(server_flops), np.ones(len(work), bool))
        shares, client_s, round_s = (np.asarray(part) for part in best)
    cuts, codecs = terms.chosen(search.columns)
    plan = Plan(cuts, shares, client_s, float(round_s), low_s, search.passes, codecs)
    return QuantilePlan(plan, ends_s, sample)


_shares = jax.jit(optimal_shares)


def _check(terms: Terms, rates: Rates, quantile: float, spare: float) -> None:
    if terms.devices is not None:
        raise BadInput("device: measured seconds are not known to plans for rates that change; give flops")
    if not 0 < quantile <= 1:
        raise BadInput(f"quantile={quantile}: must be above 0 and at most 1")
    if not 0 <= spare < np.inf:
        raise BadInput(f"spare={spare}: must be a finite number, 0 or more")
    shapes = {np.shape(part) for part in rates}
    if len(shapes) > 1 or len(next(iter(shapes))) != 2 or next(iter(shapes))[1] != terms.shape[0]:
        raise BadInput(f"rates: shapes {sorted(shapes)}; must be (samples, {terms.shape[0]}), all three")
    if not rates.samples:
        raise BadInput("rates: no samples; give one at least")
    for name, values in rates._asdict().items():
        if not ((values > 0) & (values < np.inf)).all():
            raise BadInput(f"rates.{name}: must be finite numbers above 0")
