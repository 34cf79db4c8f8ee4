"""A plan by measured rounds: the fitted rates, their intervals, the residuals, and what the plan becomes."""

import csv
import dataclasses
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from sfl_jax import optim
from sfl_jax.commands import parts
from sfl_jax.commands.config import Config
from sfl_jax.commands.plan_clients import FIRST, LISTED
from sfl_jax.errors import BadInput
from sfl_jax.files import PNG_MARK, PNG_METADATA, whole_file
from sfl_jax.fleet import Fleet, MeasuredRounds, read_measured
from sfl_jax.planning import Planned
from sfl_jax.planning.calibration import (
    NOT_TOLD,
    RESOURCES,
    UNSURE,
    Calibration,
    calibrate,
    fitted_fleet,
)
from sfl_jax.planning.insight import SLOWEST

RATES, RESIDUALS, PICTURE = ".rates.csv", ".residuals.csv", ".residuals.png"
# A text that each file contains, by the end of its name.
MARKS = {
    RATES: b"client,rows,fit,compute_factor",
    RESIDUALS: b"round,client,cut,measured_s",
    PICTURE: PNG_MARK,
}
_MANY_TIMES = 300  # the predicted seconds: more is likely milliseconds
_RATE_OF = {"compute": "flops", "uplink": "uplink_bps", "downlink": "downlink_bps"}


class Calibrated(NamedTuple):
    """A plan for the fitted rates, and what it comes from.

    config: with the server of the plan, at its fitted speed. before: the plan for the rates of the fleet
    file.
    """

    config: Config
    planned: Planned
    before: Planned
    found: Calibration
    measured: MeasuredRounds


def files(config: Config) -> list[Path]:
    """The files that a calibration writes beside the plan."""
    names = MARKS if config.plot else (RATES, RESIDUALS)
    return [Path(config.output).with_suffix(name) for name in names]


def calibrated(config: Config, file: Fleet, before: Planned) -> Calibrated:
    """Fits the rates of a fleet file to --measured, and plans again. before: the plan for its own rates."""
    try:
        rounds = read_measured(config.measured, before.fleet.client.tolist(), len(before.profile.names))
        found = calibrate(before.terms, rounds, config.measured)
    except BadInput as error:
        raise BadInput(f"--measured: {error}") from error
    if np.isnan(found.factor).all():
        raise BadInput(f"--measured={config.measured}: no client has rows with seconds that can be fitted")
    config = dataclasses.replace(config, server_flops=config.server_flops / _times(found))
    config, planned = parts.planned(config, fitted_fleet(file, found))
    return Calibrated(config, planned, before, found, rounds)


def told(made: Calibrated) -> str:
    """The calibration in lines for the terminal, and a row for each client."""
    config, found, before = made.config, made.found, made.before
    seen = int(np.count_nonzero(found.rows))
    errors = [_errors(found, name) for name in ("predicted_s", "fitted_s")]
    rms = [np.sqrt(np.nanmean(error**2)) for error in errors]
    worst = int(np.nanargmax(np.abs(errors[1])))
    rounds = made.measured
    name = before.fleet.client[rounds.client[worst]]
    slower = before.plan._replace(shares=before.plan.shares / _times(found))
    flops = before.planner.server_flops / _times(found)
    kept_s = float(optim.session_ends_s(made.planned.terms, slower, flops, before.planner.barrier).max())
    moved = int(np.count_nonzero(before.plan.cuts != made.planned.plan.cuts))
    lines = [
        ("measured", f"{len(rounds.client)} rows of {seen} of {len(before.fleet)} clients in"
         f" {config.measured}"),
        *(("units", doubt) for doubt in _doubts(made)),
        ("residuals", f"measured and predicted seconds differ by {rms[0]:.1%} (RMS) at the rates of"
         f" {config.fleet}, by {rms[1]:.1%} at the fitted ones"),
        ("", f"largest: {errors[1][worst]:+.1%}, client {name} in round {rounds.round[worst]} at cut"
         f" {rounds.cut[worst]} (line {rounds.line[worst]})"),
        ("as planned", f"{before.plan.round_s:.5g} s by the rates of {config.fleet}; that plan would last"
         f" {kept_s:.5g} s at the fitted rates"),
        ("now", f"{made.planned.plan.round_s:.5g} s with a plan for the fitted rates; {moved} of"
         f" {len(before.fleet)} clients cut elsewhere"),
        ("server", _server(made)),
    ]  # fmt: skip
    text = "\n".join(f"{name:<11} {text}" for name, text in lines)
    return f"{text}\n\n{_table(made)}\n"


def _doubts(made: Calibrated) -> list[str]:
    """A sentence for each column of the rounds that looks as if it had another unit."""
    found, shares = [], made.measured.share_flops[~np.isnan(made.measured.share_flops)]
    if len(shares) and shares.max() < SLOWEST["flops"][0]:
        found.append(f"share_flops is {shares.max():.4g} FLOP/s at most; are the numbers in GFLOP/s?")
    times = np.nanmedian(_errors(made.found, "predicted_s")) + 1
    if times > _MANY_TIMES:
        found.append(f"the rounds took {times:.3g} times the predicted seconds; are they in milliseconds?")
    return found


def write(made: Calibrated) -> None:
    """Writes the fitted rates and the residuals, and the picture if it was asked for."""
    rates, residuals, *picture = files(made.config)
    _write_csv(rates, *_rates(made))
    _write_csv(residuals, *_residuals(made))
    for path in picture:
        with whole_file(path) as image:
            draw(image, made)


def draw(image: BinaryIO, made: Calibrated) -> None:
    """Measured against predicted seconds before and after the fit, and how far the fit is off by cut."""
    from matplotlib.figure import Figure  # imported here: only --plot needs it
    from matplotlib.ticker import MaxNLocator

    found = made.found
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    rates = f"rates of {Path(made.config.fleet).name}"
    for name, colour, label in (("predicted_s", "#e6550d", rates), ("fitted_s", "#3182bd", "fitted")):
        left.plot(getattr(found, name), found.measured_s, ".", color=colour, label=label)
    known = found.measured_s[found.measured_s > 0]
    if len(known):
        ends = [known.min(), known.max()]
        left.plot(ends, ends, color="black", linewidth=1)
        left.set(xscale="log", yscale="log")
    left.set(title="Measured rounds", xlabel="predicted, seconds", ylabel="measured, seconds")
    left.legend(frameon=False, loc="upper left")
    right.plot(made.measured.cut, 100 * _errors(found, "fitted_s"), ".", color="#3182bd")
    right.axhline(0, color="black", linewidth=1)
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    right.set(title="Residuals of the fit", xlabel="cut", ylabel="measured over fitted, %")
    figure.savefig(image, format="png", dpi=120, metadata=PNG_METADATA)


def _errors(found: Calibration, name: str):
    """Relative errors (R,) of a prediction; NaN for rows that were not used."""
    predicted_s = getattr(found, name)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(predicted_s > 0, found.measured_s / predicted_s - 1, np.nan)


def head(made: Calibrated) -> dict[str, Any]:
    """What plan.json says of the server's factor, if it was fitted."""
    numbers = [float(number) if np.isfinite(number) else None for number in made.found.server]
    if numbers[0] is None:
        return {}
    return {"server_factor": dict(zip(("factor", "low", "high"), numbers, strict=True))}


def _times(found: Calibration) -> float:
    """The factor on the server's seconds, 1 if it is unknown."""
    return 1.0 if np.isnan(found.server[0]) else float(found.server[0])


def _server(made: Calibrated) -> str:
    found, flops = made.found, made.config.server_flops
    factor, low, high = found.server
    if np.isnan(factor):
        if found.server_how == NOT_TOLD:
            return (
                "keeps its speed: other speeds of the clients fit these rounds as well; rounds of a client at"
                " one cut with other shares would tell"
            )
        if found.server_how == UNSURE:
            return (
                "keeps its speed: its factor would have an interval wider than itself; more rounds would tell"
            )
        return "keeps its speed: no row says it; server_s or client_s, with share_flops, would"
    between = f" ({low:.3g} to {high:.3g} with 95 %)" if np.isfinite(low) else ""
    said = f"takes {factor:.3g} times the predicted seconds{between}, {found.server_how}"
    return f"{said}; planned with {flops:.4g} FLOP/s, rated {flops * factor:.4g}"


def _table(made: Calibrated) -> str:
    """A row for each client, or for those whose factors differ most from 1, with 95 % intervals."""
    found, count = made.found, len(made.before.fleet)
    by = np.nan_to_num(np.abs(np.log(np.where(found.factor > 0, found.factor, np.nan)))).max(axis=1)
    shown = np.arange(count) if count <= LISTED else np.argsort(-by, kind="stable")[:FIRST]
    errors = _errors(found, "fitted_s")
    rows = [("client", "rows", "fit", *(f"{name}, times" for name in RESOURCES), "RMS, %")]
    for k in shown.tolist():
        own = errors[made.measured.client == k]
        own = own[~np.isnan(own)]
        rms = f"{100 * np.sqrt(np.mean(own**2)):.2g}" if len(own) else "-"
        rows.append((
            str(made.before.fleet.client[k]), str(found.rows[k]), str(found.how[k]),
            *(_interval(found, k, resource) for resource in range(3)), rms,
        ))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if at in (1, 6) else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    some = f"the {FIRST} of {count} clients whose factors are farthest from 1; {RATES} has all\n"
    legend = "times: the predicted seconds, with the 95 % interval; RMS: of relative residuals"
    return (some if count > LISTED else "") + "\n".join(lines) + f"\n\n{legend}"


def _interval(found: Calibration, client: int, resource: int) -> str:
    factor, low, high = (part[client, resource] for part in (found.factor, found.low, found.high))
    if np.isnan(factor):
        return "-"
    return f"{factor:.3f}" + ("" if np.isnan(low) else f" ({low:.3f} to {high:.3f})")


def _rates(made: Calibrated):
    """The head and the rows of the file of fitted rates."""
    head = ["client", "rows", "fit"]
    head += [f"{name}_{what}" for name in RESOURCES for what in ("factor", "factor_low", "factor_high")]
    head += [name for rate in _RATE_OF.values() for name in (rate, f"{rate}_low", f"{rate}_high")]
    found, fleet = made.found, made.before.fleet
    triples = np.stack([found.factor, found.low, found.high], axis=2)  # (K, 3, 3)
    above_0 = np.where(triples > 0, triples, np.nan)
    rates = np.stack([getattr(fleet, name) for name in _RATE_OF.values()], axis=1)
    rows = []
    for k in range(len(fleet)):
        fitted = [
            rates[k, resource] / above_0[k, resource, place] for resource in range(3) for place in (0, 2, 1)
        ]
        rows.append([fleet.client[k], found.rows[k], found.how[k], *triples[k].ravel(), *fitted])
    return head, rows


def _residuals(made: Calibrated):
    """The head and the rows of the file of residuals."""
    found, rounds = made.found, made.measured
    names, percent = made.before.fleet.client[rounds.client], 100 * _errors(found, "fitted_s")
    seconds = found.measured_s, found.predicted_s, found.fitted_s
    columns = rounds.round, names, rounds.cut, *seconds, percent
    head = ["round", "client", "cut", "measured_s", "predicted_s", "fitted_s", "residual_percent"]
    return head, zip(*columns, strict=True)


def _write_csv(path: Path, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Writes a table; numbers that are not finite are empty."""
    with whole_file(path) as file:
        text = io.TextIOWrapper(file, "utf-8", newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(head)
        for row in rows:
            writer.writerow(
                ["" if isinstance(cell, float) and not np.isfinite(cell) else cell for cell in row]
            )
        text.detach()
