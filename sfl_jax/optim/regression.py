"""The paper's first step: curves fitted to the costs of cuts, so that the cut becomes a continuous variable.

For each quantity (client work, model, smashed data) several families are fitted by least squares over the
cuts. The family with the least AICc is taken. The alternation then runs on the fitted curves. They are
sampled at every 16th of a unit and are straight between samples, so the best continuous cut is a sample.
Last, each client takes the allowed cut just below or just above its continuous cut: the one that needs the
smaller share to end with the round (rounding "need"), or the nearest one ("nearest").
"""

import functools
import warnings
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from sfl_jax.errors import BadInput
from sfl_jax.optim.alternating import alternating
from sfl_jax.optim.costs import Floats, Latency, Terms
from sfl_jax.optim.plan import Chosen
from sfl_jax.optim.table import FEW, least, table

SAMPLES_PER_UNIT = 16
_NO_SHARE = 1e30  # times seconds: larger than any share
QUANTITIES = ("forward_flop", "backward_flop", "model_bits", "smashed_bits")
MEASURED = ("forward_s", "backward_s")  # more quantities, of each device


class Fit(NamedTuple):
    """One family fitted to one quantity. Cuts are scaled to 0..1, values to a maximum of 1."""

    family: str
    parameters: tuple[float, ...]
    scale: float
    last_cut: int
    r2: float
    worst: float  # largest error at a cut, as a fraction of the largest value
    aicc: float

    def __call__(self, cuts):
        """The fitted quantity at continuous cuts."""
        x = np.asarray(cuts, np.float64) / self.last_cut
        return self.scale * FAMILIES[self.family][0](x, np.array(self.parameters))


class Curve(NamedTuple):
    """A quantity's data and all its fits, the chosen one first: enough for a table or a plot."""

    quantity: str
    cuts: Floats
    values: Floats
    fits: tuple[Fit, ...]

    @property
    def chosen(self) -> Fit:
        return self.fits[0]


def _polynomial(x, parameters):
    return np.polynomial.polynomial.polyval(x, parameters)


def _power(x, parameters):
    factor, exponent, offset = parameters
    return factor * np.power(x, np.abs(exponent)) + offset


def _exponential(x, parameters):
    factor, rate, offset = parameters
    return factor * np.exp(np.clip(rate, -50, 50) * x) + offset


def _reciprocal(x, parameters):
    factor, shift, offset = parameters
    return factor / (x + np.abs(shift) + 1e-3) + offset


def _piecewise(x, parameters):
    return np.interp(x, np.linspace(0, 1, len(parameters)), parameters)


def _pchip(x, parameters):
    from scipy import interpolate  # a slow import that only this method needs; also below

    return interpolate.PchipInterpolator(np.linspace(0, 1, len(parameters)), parameters)(x)


# Family: its formula and the starts of its search. Only the length matters if parameters are linear.
FAMILIES: dict[str, tuple[Callable, tuple[tuple[float, ...], ...]]] = {
    **{f"polynomial {degree}": (_polynomial, ((0.0,) * (degree + 1),)) for degree in range(1, 6)},
    "power": (_power, ((1.0, 2.0, 0.0), (-1.0, 0.5, 1.0))),
    "exponential": (_exponential, ((0.1, 2.0, 0.0), (1.0, -3.0, 0.0))),
    "reciprocal": (_reciprocal, ((0.1, 0.1, 0.0), (-0.1, 0.1, 1.0))),
    **{f"piecewise {knots}": (_piecewise, ((0.0,) * knots,)) for knots in (3, 4, 6, 8)},
    **{f"pchip {knots}": (_pchip, ((0.0,) * knots,)) for knots in (4, 6, 8)},
}


def fit_curves(terms: Terms) -> tuple[Curve, ...]:
    """A network's curves per sample over the cuts min_cut..max_cut, each with all fits, the best first.

    BadInput: several codecs, since their columns are not a curve; or gradients with other bits than smashed
    data, since one curve serves both.
    """
    if terms.has_codecs:
        raise BadInput("method=regression: fits one curve over the cuts; choose one codec, or another method")
    labels = (terms.up_bits - terms.down_bits)[1:-1]
    if len(labels) and np.ptp(labels) > 1e-9 * terms.up_bits.max():
        raise BadInput(
            "method=regression: smashed data and gradients take different bits; choose one codec for both"
        )
    cuts = np.flatnonzero(terms.permitted)
    values = (terms.forward_flop, terms.backward_flop, terms.model_bits, terms.down_bits)
    rows = [*zip(QUANTITIES, values, strict=True)]
    if terms.devices is not None:
        rows += [
            (f"{name} of device {row + 1}", seconds)
            for name in MEASURED
            for row, seconds in enumerate(getattr(terms.devices, name))
        ]
    return tuple(fit_curve(name, tuple(cuts.tolist()), tuple(value[cuts].tolist())) for name, value in rows)


# Cached because a network's curves are the same every round.
@functools.lru_cache(maxsize=256)
def fit_curve(quantity: str, cuts: tuple[int, ...], values: tuple[float, ...]) -> Curve:
    """One quantity's values at its cuts, fitted by every family that has enough cuts; best first."""
    x, y = np.array(cuts, np.float64), np.array(values)
    fits = filter(None, (_fit(family, x, y) for family in FAMILIES))
    return Curve(quantity, x, y, tuple(sorted(fits, key=lambda fit: fit.aicc)) or (_straight(x, y),))


def relaxed(terms: Terms, curves: tuple[Curve, ...]) -> Terms:
    """The terms of continuous cuts: one column per 16th of a unit, with amounts from the fitted curves.

    Cuts 0 and L keep their own amounts, since what crosses the cut jumps there. Memory is interpolated.
    """
    last = terms.shape[1] - 1
    cuts = np.arange(last * SAMPLES_PER_UNIT + 1) / SAMPLES_PER_UNIT
    open_to = np.flatnonzero(terms.permitted)
    inside = np.minimum(cuts, open_to[-1])
    forward, backward, model, smashed, *measured = (np.maximum(curve.chosen(inside), 0.0) for curve in curves)
    devices, latency = terms.devices, terms.latency
    if devices is not None:
        tables = np.array(measured).reshape(2, -1, len(cuts))
        for name, table_s in zip(MEASURED, tables, strict=True):
            table_s[:, [0, -1]] = getattr(devices, name)[:, [0, -1]]
        devices = devices._replace(forward_s=tables[0], backward_s=tables[1])
    if latency is not None:
        latency = Latency(latency.rtt_s, *(_inside(counts, cuts) for counts in latency[1:]))
    label_bits = np.where(terms.up_bits > 0, terms.up_bits - terms.down_bits, 0.0)[1:last].max(initial=0.0)
    total = terms.forward_flop[-1] + terms.backward_flop[-1]
    continuous = terms._replace(
        forward_flop=forward,
        backward_flop=backward,
        work_flop=np.maximum(total - forward - backward, 0.0),
        up_bits=smashed + label_bits,
        down_bits=smashed,
        model_bits=model,
        needed_bytes=np.interp(cuts, np.arange(last + 1), terms.needed_bytes),
        server_bytes=np.interp(cuts, np.arange(last + 1), terms.server_bytes),
        permitted=(cuts >= open_to[0]) & (cuts <= open_to[-1]),
        options=None,
        devices=devices,
        latency=latency,
    )
    for name in ("forward_flop", "backward_flop", "work_flop", "up_bits", "down_bits", "model_bits"):
        for end in (0, -1):
            getattr(continuous, name)[end] = getattr(terms, name)[end]
    return continuous


def _inside(counts: Floats, cuts: Floats) -> Floats:
    """Messages at continuous cuts: those of cuts 0 and L there, and of the cuts between everywhere else."""
    between = counts[1] if len(counts) > 2 else counts[0]
    return np.where(cuts == 0, counts[0], np.where(cuts == len(counts) - 1, counts[-1], between))


def method(costs, server_flops, present, options):
    """Alternation on the fitted curves; then continuous cuts become whole."""
    starts = {"starts": options.starts, "key": options.key, "recall": options.recall}
    rest = alternating(options.curves, server_flops, present, **starts)
    return Chosen(rounded(costs, rest.cuts, rest.round_s, options.rounding), rest.iterations)


def rounded(terms, samples, round_s, rounding: str):
    """Each client's whole cut (K,) int32.

    samples: (K,) continuous cuts in 16ths of a unit.  round_s: () s, the round of these continuous cuts.
    rounding: one of ROUNDINGS.
    """
    wanted, swept, shape = samples / SAMPLES_PER_UNIT, table(terms), terms.shape

    def nearest(among):
        """(distance, cut) of the nearest allowed cut for which among(cut, wanted) is true."""

        def distance(cut, column):
            return jnp.where(column[2] & among(cut, wanted), jnp.abs(wanted - cut), jnp.inf)

        return least(swept, shape, distance, FEW)

    if rounding == "nearest":
        return nearest(lambda cut, wanted: True)[1]
    below, above = nearest(jnp.less_equal), nearest(jnp.greater_equal)
    needs = [_need(terms, distance, cuts, round_s) for distance, cuts in (below, above)]
    return jnp.where(needs[1] < needs[0], above[1], below[1])


def _need(terms, distance, cuts, round_s):
    """The share (K,) with which these cuts end by round_s; inf where there is no such cut.

    If no share is enough, the cut with less time off the server counts as the one that needs less.
    """
    fixed_s, work, _ = terms.at(cuts)
    left_s = round_s - fixed_s
    in_time = jnp.where(work > 0, left_s > 0, left_s >= 0)
    share = jnp.where(in_time, work / jnp.where(left_s > 0, left_s, 1.0), _NO_SHARE * fixed_s)
    return jnp.where(distance < jnp.inf, share, jnp.inf)


def _fit(family: str, cuts: Floats, values: Floats) -> Fit | None:
    """The least-squares fit of one family; None if there are too few cuts."""
    from scipy import optimize

    formula, starts = FAMILIES[family]
    count, free = len(values), len(starts[0])
    if count < free + 3:
        return None
    scale = float(np.abs(values).max()) or 1.0
    last = int(cuts[-1])
    x, y = cuts / last, values / scale
    if formula in (_polynomial, _piecewise):
        basis = np.stack([formula(x, unit) for unit in np.eye(free)], axis=1)
        found = [np.linalg.lstsq(basis, y)[0]]
    else:
        if formula is _pchip:
            starts = (np.interp(np.linspace(0, 1, free), x, y),)
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")  # a family that does not suit the quantity may overflow
            searches = [optimize.least_squares(lambda p: formula(x, p) - y, start) for start in starts]
        found = [search.x for search in searches]
    parameters = min(found, key=lambda p: float(np.sum((formula(x, p) - y) ** 2)))
    return _judged(family, tuple(map(float, parameters)), scale, last, x, y, formula)


def _judged(family, parameters, scale, last, x, y, formula) -> Fit:
    errors = formula(x, np.array(parameters)) - y
    squares, spread = float(errors @ errors), float(np.sum((y - y.mean()) ** 2))
    count, free = len(y), len(parameters) + 1  # the variance is estimated too
    # Bounded: an exact fit would have an AICc of minus infinity, however many parameters it has.
    per_point = max(squares / count, 1e-24)
    aicc = count * np.log(per_point) + 2 * free + 2 * free * (free + 1) / max(count - free - 1, 1)
    r2 = 1 - squares / spread if spread > 0 else 1.0
    return Fit(family, parameters, scale, last, r2, float(np.abs(errors).max()), float(aicc))


def _straight(cuts: Floats, values: Floats) -> Fit:
    """A straight line, for a chain that is too short for any family."""
    scale, last = float(np.abs(values).max()) or 1.0, int(max(cuts[-1], 1))
    x, y = cuts / last, values / scale
    line = np.polyfit(x, y, 1) if len(x) > 1 else np.array([0.0, y[0]])
    return _judged("polynomial 1", (float(line[1]), float(line[0])), scale, last, x, y, _polynomial)
