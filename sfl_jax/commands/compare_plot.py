"""Draws comparisons: methods over sweeps, plans on wrong costs, and accuracy on each method's clock."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure

from sfl_jax.commands import words
from sfl_jax.commands.compare_page import FLOOR, SWEEPS
from sfl_jax.commands.config import Config
from sfl_jax.files import PNG_METADATA, whole_file
from sfl_jax.planning.comparison import DRAWS, ERRORS, FOUR_STARTS, NEAREST, RECALL, Row
from sfl_jax.run.clocks import Clock
from sfl_jax.run.ledger import sent_bytes

# Okabe and Ito's colours, which colour-blind people can tell apart. A hue used twice has dashes.
_STYLES = {
    "exact": ("black", "-"),
    "regression": ("#d55e00", "-"),
    NEAREST: ("#d55e00", "--"),
    "alternating": ("#0072b2", "-"),
    FOUR_STARTS: ("#0072b2", "--"),
    RECALL: ("#0072b2", ":"),
    "greedy": ("#009e73", "-"),
    "equal_shares": ("#e69f00", "-"),
    "common_cut": ("#cc79a7", "-"),
    "random_cut": ("#999999", "-"),
    "no_split": ("#56b4e9", "-"),
}


def write_methods(path: Path, rows: Sequence[Row], config: Config) -> None:
    """Draws how far each method is above the optimum in every sweep: the mean and the range over the fleets.

    The axis is logarithmic, so that methods near the optimum can be told apart.
    """
    figure = Figure(figsize=(11, 8), layout="constrained")
    for sweep, axes in zip(SWEEPS, figure.subplots(2, 2, sharey=True).flat, strict=True):
        _draw_sweep(axes, sweep, [row for row in rows if row.sweep == sweep])
    axes = figure.axes[0]
    for left in (figure.axes[0], figure.axes[2]):
        left.set_ylabel("round above the optimum, %, logarithmic")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    figure.suptitle(
        f"{config.model} at {config.image_size}x{config.image_size}, {config.barrier} barrier,"
        f" {config.clients if config.fleet == 'random' else Path(config.fleet).name} clients,"
        f" server {words.amount(config.server_flops, 'FLOP/s')} unless swept"
    )
    _save(figure, path)


def write_errors(path: Path, rows: Sequence[Row], config: Config) -> None:
    """Draws how much longer kept plans last than plans made on the true costs, over all draws, in percent."""
    rows = [row for row in rows if row.sweep == "error"]
    methods = [name for name in _STYLES if name in {row.method for row in rows if np.isfinite(row.round_s)}]
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for error, axes in zip(ERRORS, figure.subplots(1, 2, sharey=True), strict=True):
        ratios = [
            [_above(row) for row in rows if (row.method, row.value) == (method, error)] for method in methods
        ]
        drawn = axes.boxplot(
            ratios, orientation="horizontal", whis=(5, 95), showfliers=False, patch_artist=True, widths=0.6
        )
        for box, median, method in zip(drawn["boxes"], drawn["medians"], methods, strict=True):
            box.set(facecolor=_STYLES[method][0], alpha=0.5)
            median.set(color="black")
        axes.set_yticks(np.arange(len(methods)) + 1, methods)
        axes.set_xscale("log")
        axes.set(title=f"rates wrong by up to {error:.0%}", xlabel="longer than a new plan, %, logarithmic")
        _plain(axes.xaxis)
        axes.grid(axis="x", alpha=0.3)
    figure.axes[0].invert_yaxis()  # also inverts the other, which shares it
    figure.suptitle(
        f"Plans made on nominal costs, {DRAWS} draws of the true ones (box: quartiles, line: 5-95 %)"
    )
    _save(figure, path)


def write_clocks(
    path: Path, accuracies: Sequence[float | None], clocks: Mapping[str, Clock], config: Config
) -> None:
    """Draws test accuracy against the time and the bytes of every method that can serve all clients."""
    figure = Figure(figsize=(9, 11), layout="constrained")
    upper, lower = figure.subplots(2)
    draw_clocks(upper, accuracies, clocks, config)
    draw_bytes(lower, accuracies, clocks)
    _save(figure, path)


def draw_clocks(
    axes: Axes, accuracies: Sequence[float | None], clocks: Mapping[str, Clock], config: Config
) -> None:
    """Draws test accuracy against simulated time into `axes`. The run's own clock comes first."""
    seconds = {name: clock.seconds for name, clock in clocks.items()}
    _draw_accuracy(axes, accuracies, seconds, lambda last: f"{last:,.1f} s")
    title = f"One training of {config.model} on {config.dataset}, every method's clock"
    axes.set(title=title, xlabel="simulated time, s")


def draw_bytes(axes: Axes, accuracies: Sequence[float | None], clocks: Mapping[str, Clock]) -> None:
    """Draws test accuracy against all bytes sent so far, both ways."""
    sent_mb = {name: np.cumsum(sent_bytes(clock.ledger)) / 1e6 for name, clock in clocks.items()}
    _draw_accuracy(axes, accuracies, sent_mb, lambda last_mb: words.amount(1e6 * last_mb, "B"))
    axes.set(title="The same training, every method's bytes", xlabel="sent so far, MB")


def _draw_accuracy(axes, accuracies, against: Mapping[str, np.ndarray], said) -> None:
    """A curve for each method whose numbers are known, the first of which is the run's own."""
    percent = 100 * np.array(accuracies, float)  # NaN if a round was not evaluated
    evaluated = np.isfinite(percent)
    for name, values in against.items():
        if not np.isfinite(values[-1]):
            continue
        colour, dashes = _STYLES.get(name, ("black", "-"))
        own = name == next(iter(against))
        axes.plot(
            values[evaluated], percent[evaluated],
            color=colour, linestyle=dashes, linewidth=2.5 if own else 1.5, marker=".",
            label=f"{name}, {said(values[-1])}" + (" (this plan)" if own else ""),
        )  # fmt: skip
    axes.set(ylabel="test accuracy, %", xscale="log")
    _plain(axes.xaxis)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(loc="lower right", frameon=False, fontsize=9)
    else:
        axes.text(0.5, 0.5, "not known of this run", transform=axes.transAxes, ha="center")


def _draw_sweep(axes: Axes, sweep: str, rows: Sequence[Row]) -> None:
    title, label = SWEEPS[sweep]
    for method in (name for name in _STYLES if name in {row.method for row in rows}):
        mine = [row for row in rows if row.method == method]
        values = np.unique([row.value for row in mine])
        above = np.array([[_above(row) for row in mine if row.value == value] for value in values])
        above[~np.isfinite(above)] = np.nan
        colour, dashes = _STYLES[method]
        width = 3.0 if method == "exact" else 1.5  # others lie on top of it
        axes.plot(values, above.mean(axis=1), color=colour, linestyle=dashes, linewidth=width, label=method)
        axes.fill_between(values, above.min(axis=1), above.max(axis=1), color=colour, alpha=0.1, linewidth=0)
    is_linear = sweep == "heterogeneity"
    axes.set(title=title, yscale="log", xscale="linear" if is_linear else "log")
    axes.set_xlabel(label if is_linear else f"{label}, logarithmic")
    axes.yaxis.set_major_locator(ticker.LogLocator())
    axes.yaxis.set_minor_locator(ticker.NullLocator())
    axes.yaxis.set_major_formatter(lambda x, _: f"≤{FLOOR:g}" if x == FLOOR else f"{x:g}")
    if sweep in ("clients", "uplink"):
        axes.set_xticks(np.unique([row.value for row in rows])[:: 2 if sweep == "uplink" else 1])
        axes.xaxis.set_minor_locator(ticker.NullLocator())
        axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)


def _above(row: Row) -> float:
    """Percent above the optimum, and at least FLOOR."""
    return max(FLOOR, 100 * (row.round_s / row.optimum_s - 1))


def _plain(axis: Axis) -> None:
    """A logarithmic axis with a few plain numbers."""
    axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(ticker.NullLocator())
    axis.set_major_formatter("{x:g}")


def _save(figure: Figure, path: Path) -> None:
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.08)
    with whole_file(path) as file:
        figure.savefig(file, format="png", dpi=110, metadata=PNG_METADATA)
