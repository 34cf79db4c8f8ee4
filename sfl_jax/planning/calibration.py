"""Fits rates to measured rounds: how much longer than predicted compute, links and the server take.

Each client has three factors: its compute, its uplink and its downlink take that many times the predicted
seconds. They come from least squares on relative errors, that is measured over predicted seconds. A row with
terms gives one equation for each resource. A row with the total alone gives one equation for all three; trips
of messages, and measured seconds of the server, are subtracted first. From totals, factors can be told apart
only where a client had different cuts. The links hardly ever can, since up and down carry nearly the same at
every cut. Where an interval would be wider than its factor, both links get one factor, and else all three
resources.

All clients share the factor of the server. Rows with its seconds and the share say it directly. A total with
a share has the server's seconds too, as one more column of the client's equations. What the client's own
three columns say of that column, and of the right side, is taken off (Frisch, Waugh and Lovell). What is left
of all clients together is least squares in one unknown. It is identified where a client had different shares
at one cut, or more cuts than its own columns explain. Else, and where the interval would be wider than the
factor, the given speed stays. The error of this factor adds to those of the clients.

Intervals have 95 %, by Student's t. They assume that relative errors are independent and alike: for each
resource where there are terms, for each client where there are totals, and for all of these clients in the
factor of the server.
"""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64, Shaped

from sfl_jax import fleet as fleets
from sfl_jax import optim
from sfl_jax.errors import BadInput
from sfl_jax.fleet import MeasuredRounds

RESOURCES = ("compute", "uplink", "downlink")
CONFIDENCE = 0.95
_NOTHING = 1e-9  # relative: less is rounding
BY_TERM, NOT_MEASURED = "by term", "not measured"
# Of the server: totals that the clients' own factors explain as well; an interval wider than the factor.
NOT_TOLD, UNSURE = "not told apart", "unsure"
# What is fitted to totals, from the finest to the coarsest: which resources share a factor.
_GROUPS = {
    "from totals": ([0], [1], [2]), "links together": ([0], [1, 2]), "one for all": ([0, 1, 2],)
}  # fmt: skip
SEPARATE, LINKS, TOGETHER = _GROUPS
_OF_TERM = {
    "model_down": 2, "client_forward": 0, "smashed_up": 1, "gradient_down": 2, "client_backward": 0,
    "model_up": 1,
}  # fmt: skip


class Calibration(NamedTuple):
    """Factors on the predicted seconds of each client; NaN where nothing was measured.

    factor, low, high: (K, 3) by resource, in the order of RESOURCES, with a 95 % interval, which is NaN where
    there is no measurement to spare. rows: (K,) how many rows each client has. how: (K,) one of BY_TERM,
    SEPARATE, LINKS, TOGETHER and NOT_MEASURED. measured_s, predicted_s, fitted_s: (R,) what of each row was
    compared, under the rates of the fleet and under the fitted ones. server: the factor on the server's
    seconds and its interval (3,), NaN if unknown. server_how: BY_TERM, SEPARATE, NOT_TOLD, UNSURE or
    NOT_MEASURED.
    """

    factor: Float64[np.ndarray, "K 3"]
    low: Float64[np.ndarray, "K 3"]
    high: Float64[np.ndarray, "K 3"]
    rows: Int64[np.ndarray, " K"]
    how: Shaped[np.ndarray, " K"]
    measured_s: Float64[np.ndarray, " R"]
    predicted_s: Float64[np.ndarray, " R"]
    fitted_s: Float64[np.ndarray, " R"]
    server: Float64[np.ndarray, " 3"]
    server_how: str


def calibrate(terms: optim.Terms, measured: MeasuredRounds, where: str = "measured") -> Calibration:
    """The fit of every client with measured rows.

    terms: of the fleet, with the rates that were assumed. where: the file, for errors.

    Raises:
      BadInput: several codecs, since a row has no codec; or a total whose server seconds are not known.
    """
    if terms.has_codecs:
        raise BadInput(f"{where}: measured rounds have no codec; choose one")
    seen = _equations(terms, measured, where)
    clients = terms.shape[0]
    factor, low, high = (np.full((clients, 3), np.nan) for _ in range(3))
    how = np.full(clients, NOT_MEASURED, "U16")
    server = _server(terms, measured, seen)
    for client, own in _by_client(seen):
        fit = _fit(seen.left[own], seen.right[own], seen.server[own], server)
        if fit is not None:
            factor[client], low[client], high[client], how[client] = fit
    known = np.where(np.isnan(factor), 1.0, factor)[seen.client]
    rows = len(measured.client)
    measured_s, predicted_s, fitted_s = (
        np.bincount(seen.row, part, rows) + seen.known_s
        for part in (
            seen.right * seen.scale_s,
            seen.scale_s,
            ((seen.left * known).sum(axis=1) + server.factor * seen.server) * seen.scale_s,
        )
    )
    return Calibration(
        factor, low, high, np.bincount(measured.client, minlength=clients), how, measured_s, predicted_s,
        fitted_s, server.interval, server.how,
    )  # fmt: skip


def fitted_fleet(fleet: fleets.Fleet, found: Calibration) -> fleets.Fleet:
    """The fleet with the fitted rates; clients and resources that were not measured keep theirs."""
    compute, up, down = np.where(np.isnan(found.factor), 1.0, found.factor).T
    changed = {"flops": fleet.flops / compute, "uplink_bps": fleet.uplink_bps / up}
    changed["downlink_bps"] = fleet.downlink_bps / down
    if fleet.device is not None:
        slowdown = np.ones(len(fleet)) if fleet.slowdown is None else fleet.slowdown
        changed["slowdown"] = slowdown * np.where(fleet.device != "", compute, 1.0)
    return dataclasses.replace(fleet, **changed)


class _Equations(NamedTuple):
    """left (N, 3) · factors + server (N,) · factor of the server = right (N,), in relative seconds.

    scale_s: (N,) the predicted seconds that both sides were divided by. row: (N,) of the file. known_s: (R,)
    what was subtracted of each row.
    """

    client: Int64[np.ndarray, " N"]
    row: Int64[np.ndarray, " N"]
    left: Float64[np.ndarray, "N 3"]
    server: Float64[np.ndarray, " N"]
    right: Float64[np.ndarray, " N"]
    scale_s: Float64[np.ndarray, " N"]
    known_s: Float64[np.ndarray, " R"]


def _equations(terms: optim.Terms, measured: MeasuredRounds, where: str) -> _Equations:
    """One equation for each resource of a row with terms, one for a row with its total alone."""
    own = terms.take(measured.client)
    columns = own.columns(measured.cut)
    ones = np.ones(len(columns))
    whole, air = own.seconds(columns, ones), own._replace(latency=None).seconds(columns, ones)
    predicted, spent = np.zeros((len(columns), 3)), np.zeros((len(columns), 3))
    known_s, has_terms = np.zeros(len(columns)), np.zeros(len(columns), bool)
    every, travel_s = np.zeros((len(columns), 3)), np.zeros(len(columns))
    for name, resource in _OF_TERM.items():
        moving_s = getattr(air, name)
        travels_s = getattr(whole, name) - moving_s
        if name == "model_down" and terms.broadcast_bps is not None:  # no rate of the client says it
            travels_s, moving_s = travels_s + moving_s, np.zeros(len(columns))
        every[:, resource] += moving_s
        travel_s += travels_s
        given = ~np.isnan(measured.seconds[name]) & (moving_s > 0)
        has_terms |= given
        predicted[given, resource] += moving_s[given]
        spent[given, resource] += (measured.seconds[name] - travels_s)[given]
    found = []
    for resource in range(3):
        rows = np.flatnonzero(predicted[:, resource] > 0)
        left = np.zeros((len(rows), 3))
        left[:, resource] = 1.0
        scale_s = predicted[rows, resource]
        found.append((rows, left, np.zeros(len(rows)), spent[rows, resource] / scale_s, scale_s))
    totals = np.flatnonzero(~has_terms & ~np.isnan(measured.total_s))
    known_server_s, by_share_s = _server_s(own, columns, measured, totals, where)
    known_s[totals] = (travel_s + known_server_s)[totals]
    scale_s = every[totals].sum(axis=1) + by_share_s[totals]
    some = scale_s > 0
    totals, scale_s = totals[some], scale_s[some]
    right = (measured.total_s - known_s)[totals] / scale_s
    found.append((totals, every[totals] / scale_s[:, None], by_share_s[totals] / scale_s, right, scale_s))
    row, left, server, right, scale_s = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return _Equations(measured.client[row], row, left, server, right, scale_s, known_s)


def _server_s(own, columns, measured, totals, where):
    """The server's seconds (R,) of each row: measured ones, and by work over share where there are none."""
    work, measured_s = own.samples * own.work_flop[columns], measured.seconds["server"]
    with np.errstate(divide="ignore", invalid="ignore"):
        by_share_s = np.where((work > 0) & np.isnan(measured_s), work / measured.share_flops, 0.0)
    unknown = totals[~np.isfinite(by_share_s[totals])]
    if len(unknown):
        raise BadInput(
            f"{where}:{measured.line[unknown[0]]}: client_s at cut {measured.cut[unknown[0]]} includes the"
            " server; must have server_s or share_flops as well"
        )
    return np.where((work > 0) & ~np.isnan(measured_s), measured_s, 0.0), by_share_s


def _by_client(seen: _Equations) -> Iterator[tuple[int, Int64[np.ndarray, " n"]]]:
    """Each client that has equations, and where they are."""
    order = np.argsort(seen.client, kind="stable")
    clients, starts = np.unique(seen.client[order], return_index=True)
    yield from zip(clients.tolist(), np.split(order, starts[1:]), strict=True)


class _Server(NamedTuple):
    """The factor of the server.

    factor: 1 where it is unknown. error: its standard error. seen: what of the server's column is left beside
    the clients' own columns, squared and summed; 0 if the factor is not from totals. interval: (3,) factor,
    low and high; NaN if unknown.
    """

    how: str
    factor: float = 1.0
    error: float = 0.0
    seen: float = 0.0
    interval: Float64[np.ndarray, " 3"] = np.full(3, np.nan)


def _fit(left, right, server, shared: _Server):
    """(factors, low, high, how) of one client's equations; None where there are none.

    left: (N, 3); right: (N,); server: (N,) its column. shared: its factor, which all clients share.
    """
    used = np.asarray(left.any(axis=0))
    if not used.any():
        return None
    right = right - shared.factor * server
    if (np.count_nonzero(left, axis=1) == 1).all() and not server.any():
        # Terms: each resource by itself, with its own errors.
        factor, low, high = np.full((3, 3), np.nan)
        for resource in np.flatnonzero(used):
            mine = left[:, resource] > 0
            factor[resource], low[resource], high[resource] = _mean(right[mine])
        return (factor, low, high, BY_TERM) if np.all(factor[used] > 0) else None
    for how, groups in _GROUPS.items():
        groups = [[resource for resource in group if used[resource]] for group in groups]
        groups = [group for group in groups if group]
        own = np.stack([left[:, group].sum(axis=1) for group in groups], axis=1)
        parts = _least_squares(own, right, server, shared)
        if parts is None or not np.all(parts[0] > 0):
            continue
        if how == TOGETHER or np.all(parts[2] - parts[1] <= parts[0]):
            found = np.full((3, 3), np.nan)
            for place, group in enumerate(groups):
                found[:, group] = np.array(parts)[:, [place]]
            return *found, how
    return None


def _mean(ratios: Float64[np.ndarray, " N"]) -> tuple[float, float, float]:
    """One factor and its interval."""
    parts = _least_squares(np.ones((len(ratios), 1)), ratios)
    assert parts is not None
    (factor,), (low,), (high,) = parts
    return float(factor), float(low), float(high)


def _least_squares(left, right, server=None, shared: _Server | None = None):
    """(factors, low, high) of least squares, (P,) each; None if the columns cannot be told apart.

    server: (N,) the column of the server; `right` is without its part. The inverse of all columns together
    has the error of its factor in those of the others.
    """
    found, _, rank, _ = np.linalg.lstsq(left, right)
    count, free = left.shape
    if rank < free:
        return None
    spare, more = float(count - free), np.zeros(free)
    if shared is not None and server is not None and server.any():
        carried, *_ = np.linalg.lstsq(left, server)
        more = (carried * shared.error) ** 2
        if shared.seen:  # what these rows told of the server
            spare -= float(np.sum((server - left @ carried) ** 2)) / shared.seen
    if spare < _NOTHING:
        nothing = np.full(free, np.nan)
        return found, nothing, nothing
    errors = right - left @ found
    spread = np.sqrt(np.diag(np.linalg.inv(left.T @ left)) * float(errors @ errors) / spare + more)
    wide = _wide(spare) * spread
    return found, found - wide, found + wide


def _wide(spare: float) -> float:
    """How many standard errors the interval reaches to each side."""
    from scipy import special  # imported here: only a calibration needs it

    return float(special.stdtrit(spare, 0.5 + CONFIDENCE / 2))


def _server(terms: optim.Terms, measured: MeasuredRounds, seen: _Equations) -> _Server:
    """The factor of the server: by rows with its seconds and shares, else from totals with shares."""
    ratios = _server_ratios(terms, measured)
    if ratios.any():
        factor, low, high = _mean(ratios)
        if high - low > factor:
            return _Server(UNSURE)
        error = (high - low) / 2 / _wide(len(ratios) - 1.0) if len(ratios) > 1 else np.nan
        return _Server(BY_TERM, factor, error, 0.0, np.array([factor, low, high]))
    if not seen.server.any():
        return _Server(NOT_MEASURED)
    columns, rights, spare = [], [], -1.0
    for _, own in _by_client(seen):
        if not seen.server[own].any():
            continue
        column, right, rank = _beside(seen.left[own], seen.server[own], seen.right[own])
        columns.append(column)
        rights.append(right)
        spare += len(own) - rank
    column, right = np.concatenate(columns), np.concatenate(rights)
    across = float(column @ column)
    if not across or spare < 1:
        return _Server(NOT_TOLD)
    factor = float(column @ right) / across
    errors = right - factor * column
    error = float(np.sqrt(errors @ errors / spare / across))
    low, high = factor - _wide(spare) * error, factor + _wide(spare) * error
    if not (factor > 0 and high - low <= factor):
        return _Server(UNSURE)
    return _Server(SEPARATE, factor, error, across, np.array([factor, low, high]))


def _beside(left, column, right):
    """(column, right, rank of left), both (N,) without what the columns of left (N, P) say of them."""
    basis, sizes, _ = np.linalg.svd(left, full_matrices=False)
    basis = basis[:, sizes > sizes.max(initial=0.0) * len(left) * np.finfo(np.float64).eps]
    left_over, right = (part - basis @ (basis.T @ part) for part in (column, right))
    if np.linalg.norm(left_over) <= _NOTHING * np.linalg.norm(column):
        left_over = np.zeros(len(column))
    return left_over, right, basis.shape[1]


def _server_ratios(terms: optim.Terms, measured: MeasuredRounds) -> Float64[np.ndarray, " N"]:
    """Measured over predicted seconds of the server, of the rows with server_s and share_flops."""
    own = terms.take(measured.client)
    work = own.samples * own.work_flop[own.columns(measured.cut)]
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = measured.seconds["server"] * measured.share_flops / work
    return ratio[np.isfinite(ratio) & (work > 0)]
