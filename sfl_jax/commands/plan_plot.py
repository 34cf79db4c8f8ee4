"""Draws a plan: where each client's time goes, the cuts, and what a larger server would bring.

For the regression it also draws the data and the fitted curves.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from jaxtyping import Float64, Int, Shaped
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sfl_jax import optim
from sfl_jax.commands.config import Config
from sfl_jax.commands.plan_summary import WORDS
from sfl_jax.commands.words import shortened
from sfl_jax.files import PNG_METADATA
from sfl_jax.planning import Planned, SeveralPlanned, seconds, several_seconds, solve

# The two directions of one thing share a hue.
_COLOURS = {
    "model_down": "#9ecae1",
    "client_forward": "#a1d99b",
    "smashed_up": "#e6550d",
    "server": "#756bb1",
    "gradient_down": "#fdae6b",
    "client_backward": "#31a354",
    "model_up": "#3182bd",
}
_MOST_BARS = 400  # of more clients, only evenly spaced ones are drawn: there are not more pixels
_NAMED_BARS = 40  # up to this many clients, names fit under the bars
_NAMED_GROUP = 0.05  # the least part of all bars in a group that has its name above
_MOST_LETTERS, _LETTER_PT = 18, 8  # of a name under a bar, and its size in points
_SERVERS = 2.0 ** np.linspace(-4, 4, 17)
_A_SERVER = 1e12  # FLOP/s, the middle of the axis if a plan needs no server


def write_plot(file: BinaryIO, config: Config, planned: Planned) -> None:
    """Draws the plan into an open PNG file."""
    curves = optim.fit_curves(planned.terms) if planned.planner.method == "regression" else ()
    rows: list[Any] = [["clients"] * 4, ["cuts", "cuts", "servers", "servers"]]
    rows += [[curve.quantity for curve in curves]] if curves else []
    figure = Figure(figsize=(11, 5 * len(rows)), layout="constrained")
    fleet = config.fleet
    figure.suptitle(
        f"{config.model} at {config.image_size}x{config.image_size}, {len(planned.fleet)} clients"
        f" ({'random fleet' if fleet == 'random' else Path(fleet).name}), {config.method},"
        f" server {config.server_flops:.3g} FLOP/s"
    )
    axes = figure.subplot_mosaic(rows)
    for curve in curves:
        _draw_fit(axes[curve.quantity], curve)
    plan = planned.plan
    bars = _Bars(seconds(planned), planned.fleet.client, plan.round_s, plan.bound_s, plan.client_s)
    _draw_clients(axes["clients"], bars, "longest on the server first")
    _draw_cuts(axes["cuts"], planned)
    _draw_servers(axes["servers"], planned)
    figure.savefig(file, format="png", dpi=120, metadata=PNG_METADATA)


def write_servers_plot(file: BinaryIO, config: Config, planned: SeveralPlanned) -> None:
    """Draws the plan of several servers: each client's time, the cuts, and what each server gives."""
    plan, servers = planned.plan, planned.servers
    figure = Figure(figsize=(11, 10), layout="constrained")
    count = len(servers)
    figure.suptitle(
        f"{config.model} at {config.image_size}x{config.image_size}, {len(planned.fleet)} clients, {count}"
        f" server{'s' if count > 1 else ''} ({Path(config.servers).name})"
    )
    axes = figure.subplot_mosaic([["clients"] * 2, ["cuts", "servers"]])
    bars = _Bars(
        several_seconds(planned), planned.fleet.client, plan.round_s, plan.bound_s, plan.client_s,
        np.where(plan.shares > 0, plan.servers, count), (*map(str, range(1, count + 1)), "alone"),
    )  # fmt: skip
    _draw_clients(axes["clients"], bars, "by server, whose number is above; longest on it first")
    _draw_cuts(axes["cuts"], planned)
    served = np.bincount(plan.servers[plan.shares > 0], minlength=count)
    axes["servers"].bar(np.arange(count), served, color=_COLOURS["server"])
    axes["servers"].set(title="Clients that each server works for", xlabel="server", ylabel="clients")
    _name_bars(axes["servers"], [f"{e} {name}" for e, name in enumerate(servers.server.tolist(), 1)])
    axes["servers"].yaxis.set_major_locator(MaxNLocator(integer=True))
    figure.savefig(file, format="png", dpi=120, metadata=PNG_METADATA)


class _Bars(NamedTuple):
    """What is drawn of K clients.

    group: clients of one group stand side by side; None for one group. groups: what stands above each group.
    """

    seconds: optim.Seconds
    names: Shaped[np.ndarray, " K"]
    round_s: float
    bound_s: float
    client_s: Float64[np.ndarray, " K"]
    group: Int[np.ndarray, " K"] | None = None
    groups: Sequence[str] = ()


def _draw_clients(axes: Axes, bars: _Bars, order_text: str) -> None:
    parts, named = bars.seconds._asdict(), len(bars.names) <= _NAMED_BARS
    keys = (-bars.client_s, -parts["server"]) + (() if bars.group is None else (bars.group,))
    order = np.lexsort(keys)
    shown = order[np.linspace(0, len(order) - 1, min(len(order), _MOST_BARS)).astype(int)]
    bottom = np.zeros(len(shown))
    for name, colour in _COLOURS.items():
        axes.bar(
            np.arange(len(shown)), parts[name][shown], bottom=bottom, width=0.8 if named else 1.0,
            color=colour, label=WORDS[name],
        )  # fmt: skip
        bottom += parts[name][shown]
    if bars.group is not None:
        _draw_groups(axes, bars.group[shown], bars.groups)
    axes.axhline(bars.round_s, color="black", linewidth=1, label="round")
    axes.axhline(bars.bound_s, color="black", linewidth=1, linestyle=":", label="proven bound")
    few = len(order) == len(shown)
    axes.set(
        title="Where each client's time goes",
        xlabel=f"clients, {order_text}" + ("" if few else f" ({len(shown)} of {len(order)} shown)"),
        ylabel="seconds",
        xlim=(-0.5, len(shown) - 0.5),
    )
    if named:
        _name_bars(axes, bars.names[shown].tolist())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)


def _draw_groups(axes: Axes, group: Int[np.ndarray, " N"], names: Sequence[str]) -> None:
    """Lines between groups of bars, and the short name of each above them, where there is room."""
    starts = np.flatnonzero(np.diff(group, prepend=-1))
    ends = np.append(starts[1:], len(group))
    for start in starts[1:]:
        axes.axvline(start - 0.5, color="black", linewidth=0.8, linestyle="--")
    wide = ends - starts >= _NAMED_GROUP * len(group)
    above = axes.secondary_xaxis("top")
    above.set_xticks(((starts + ends - 1) / 2)[wide], [names[n] for n in group[starts[wide]].tolist()])
    above.tick_params(length=0)


def _draw_cuts(axes: Axes, planned: Planned | SeveralPlanned) -> None:
    names = ["images", *planned.profile.names]
    used, counts = np.unique(planned.plan.cuts, return_counts=True)
    axes.bar(np.arange(len(used)), counts, color=_COLOURS["server"])
    axes.set(title="Cuts that are used", xlabel="last unit on the client", ylabel="clients")
    _name_bars(axes, [names[cut] for cut in used])
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))


def _name_bars(axes: Axes, names: Sequence[str]) -> None:
    """Names under bars: upright, shortened, and only every n-th where there are too many to read."""
    step = -(-len(names) // _NAMED_BARS)
    short = [shortened(name, _MOST_LETTERS) for name in names]
    axes.set_xticks(np.arange(len(names))[::step], short[::step], rotation=90, fontsize=_LETTER_PT)


def _draw_fit(axes: Axes, curve: optim.Curve) -> None:
    fit, continuous = curve.chosen, np.linspace(curve.cuts[0], curve.cuts[-1], 300)
    axes.plot(curve.cuts, curve.values, ".", color="black", markersize=4, label="traced")
    axes.plot(continuous, fit(continuous), color=_COLOURS["server"], label=fit.family)
    axes.set(
        title=curve.quantity, xlabel=f"cut; R² {fit.r2:.4f}, worst error {fit.worst:.1%}", ylim=(0, None)
    )
    # A fixed place: searching for the best takes seconds on a busy machine, and matplotlib warns then.
    rises = curve.values[-1] > curve.values[0]
    axes.legend(loc="upper left" if rises else "upper right", frameon=False, fontsize=8)


class Servers(NamedTuple):
    """Rounds of smaller and larger servers: the servers (FLOP/s), the rounds (s) and their bounds (s)."""

    flops: Float64[np.ndarray, " N"]
    rounds_s: Float64[np.ndarray, " N"]
    bounds_s: Float64[np.ndarray, " N"]


def other_servers(planned: Planned) -> Servers:
    """Plans the same fleet for smaller and larger servers."""
    planner, _, fleet, terms, _ = planned
    servers = (planner.server_flops or _A_SERVER) * _SERVERS
    plans = [solve(dataclasses.replace(planner, server_flops=flops), fleet, terms) for flops in servers]
    return Servers(
        servers, np.array([each.round_s for each in plans]), np.array([each.bound_s for each in plans])
    )


def _draw_servers(axes: Axes, planned: Planned) -> None:
    planner, plan = planned.planner, planned.plan
    servers, rounds_s, bounds_s = other_servers(planned)
    axes.plot(servers, rounds_s, color=_COLOURS["model_up"], label=planner.method)
    axes.plot(servers, bounds_s, color="black", linestyle=":", label="proven bound")
    if planner.server_flops:  # a logarithmic axis cannot show 0
        axes.plot(planner.server_flops, plan.round_s, "o", color="black", label="this plan")
    axes.set(
        title="A smaller or larger server",
        xlabel="server, FLOP/s",
        ylabel="round, seconds",
        xscale="log",
        ylim=(0, 1.1 * rounds_s.max()),  # from 0, so that a flat line is inside of the frame
    )
    axes.legend(loc="lower left" if rounds_s.min() > rounds_s.max() / 2 else "upper right", frameon=False)
