"""Fits the rates of clients to measured rounds: how much longer than predicted their compute and links take.

Each client has three factors: its compute, its uplink and its downlink take that many times the predicted
seconds. They come from least squares on relative errors, that is measured over predicted seconds. A row with
terms gives one equation for each resource. A row with the total alone gives one equation for all three; the
server's seconds and trips of messages are subtracted first. From totals, factors can be told apart only where
a client had different cuts. The links hardly ever can, since up and down carry nearly the same at every cut.
Where an interval would be wider than its factor, both links get one factor, and else all three resources.

Intervals have 95 %, by Student's t. They assume that relative errors are independent and alike: for each
resource where there are terms, for each client where there are totals.
"""

import dataclasses
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64, Shaped

from sfl_jax import fleet as fleets
from sfl_jax import optim
from sfl_jax.errors import BadInput
from sfl_jax.fleet import MeasuredRounds

RESOURCES = ("compute", "uplink", "downlink")
CONFIDENCE = 0.95
BY_TERM, NOT_MEASURED = "by term", "not measured"
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
    seconds and its interval (3,), NaN if unknown.
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
    for client in np.unique(measured.client).tolist():
        own = seen.client == client
        fit = _fit(seen.left[own], seen.right[own])
        if fit is not None:
            factor[client], low[client], high[client], how[client] = fit
    known = np.where(np.isnan(factor), 1.0, factor)[seen.client]
    rows = len(measured.client)
    measured_s, predicted_s, fitted_s = (
        np.bincount(seen.row, part, rows) + seen.known_s
        for part in (seen.right * seen.scale_s, seen.scale_s, (seen.left * known).sum(axis=1) * seen.scale_s)
    )
    return Calibration(
        factor, low, high, np.bincount(measured.client, minlength=clients), how, measured_s, predicted_s,
        fitted_s, _server(terms, measured),
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
    """left (N, 3) · factors = right (N,), in relative seconds.

    scale_s: (N,) the predicted seconds that both sides were divided by. row: (N,) of the file. known_s: (R,)
    what was subtracted of each row.
    """

    client: Int64[np.ndarray, " N"]
    row: Int64[np.ndarray, " N"]
    left: Float64[np.ndarray, "N 3"]
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
        found.append((rows, left, spent[rows, resource] / scale_s, scale_s))
    totals = np.flatnonzero(~has_terms & ~np.isnan(measured.total_s))
    known_s[totals] = (travel_s + _server_s(own, columns, measured, totals, where))[totals]
    scale_s = every[totals].sum(axis=1)
    some = scale_s > 0
    totals, scale_s = totals[some], scale_s[some]
    right = (measured.total_s - known_s)[totals] / scale_s
    found.append((totals, every[totals] / scale_s[:, None], right, scale_s))
    row, left, right, scale_s = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return _Equations(measured.client[row], row, left, right, scale_s, known_s)


def _server_s(own, columns, measured, totals, where) -> Float64[np.ndarray, " R"]:
    """The server's seconds (R,) of each row: measured, or its work over the share; 0 without work."""
    work = own.samples * own.work_flop[columns]
    with np.errstate(divide="ignore", invalid="ignore"):
        by_share = work / measured.share_flops
    server_s = np.where(np.isnan(measured.seconds["server"]), by_share, measured.seconds["server"])
    server_s = np.where(work > 0, server_s, 0.0)
    unknown = totals[~np.isfinite(server_s[totals])]
    if len(unknown):
        raise BadInput(
            f"{where}:{measured.line[unknown[0]]}: client_s at cut {measured.cut[unknown[0]]} includes the"
            " server; must have server_s or share_flops as well"
        )
    return server_s


def _fit(left: Float64[np.ndarray, "N 3"], right: Float64[np.ndarray, " N"]):
    """(factors, low, high, how) of one client's equations; None where there are none."""
    used = np.asarray(left.any(axis=0))
    if not used.any():
        return None
    if (np.count_nonzero(left, axis=1) == 1).all():  # terms: each resource by itself, with its own errors
        factor, low, high = np.full((3, 3), np.nan)
        for resource in np.flatnonzero(used):
            mine = left[:, resource] > 0
            factor[resource], low[resource], high[resource] = _mean(right[mine])
        return (factor, low, high, BY_TERM) if np.all(factor[used] > 0) else None
    for how, groups in _GROUPS.items():
        groups = [[resource for resource in group if used[resource]] for group in groups]
        groups = [group for group in groups if group]
        parts = _least_squares(np.stack([left[:, group].sum(axis=1) for group in groups], axis=1), right)
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


def _least_squares(left, right):
    """(factors, low, high) of least squares, (P,) each; None if the columns cannot be told apart."""
    from scipy import special  # imported here: only a calibration needs it

    found, _, rank, _ = np.linalg.lstsq(left, right)
    count, free = left.shape
    if rank < free:
        return None
    spare = count - free
    if not spare:
        nothing = np.full(free, np.nan)
        return found, nothing, nothing
    errors = right - left @ found
    spread = np.sqrt(np.diag(np.linalg.inv(left.T @ left)) * float(errors @ errors) / spare)
    wide = special.stdtrit(spare, 0.5 + CONFIDENCE / 2) * spread
    return found, found - wide, found + wide


def _server(terms: optim.Terms, measured: MeasuredRounds) -> Float64[np.ndarray, " 3"]:
    """The factor on the server's seconds and its interval, from rows with server_s and share_flops."""
    own = terms.take(measured.client)
    work = own.samples * own.work_flop[own.columns(measured.cut)]
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = measured.seconds["server"] * measured.share_flops / work
    ratio = ratio[np.isfinite(ratio) & (work > 0)]
    if not len(ratio):
        return np.full(3, np.nan)
    return np.array(_mean(ratio))
