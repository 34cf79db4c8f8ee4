"""Draws the pictures of the docs: python docs/pictures.py [FILE.csv ...]

round.svg and curve.svg are made from plans. The others are made from the files that are given:

    result.svg: runs/compare/clocks.csv, of
        python -m launch.compare --preset=quick --eval_every=2 --workdir=runs/compare
    claim_time.svg: docs/claim.csv, of python -m benchmarks.claim tables
    claim_fits.svg: runs/curves.csv, of python -m benchmarks.paper_method
"""

import csv
import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from sfl_jax import fleet, models, optim

HERE = Path(__file__).parent
SERVER_FLOPS = 2e10
METHODS = {
    "exact": ("this project's optimum", "#000000", "-"),
    "regression": ("the paper's method", "#d95f02", "--"),
    "common_cut": ("best common cut", "#7570b3", "-"),
    "no_split": ("no split", "#1f78b4", "-"),
}
PANELS = {  # of claim_time.svg
    "b0_100_iid": "B0, 100 clients, IID", "b0_20_iid": "B0, 20 clients, IID",
    "s_100_iid": "S, 100 clients, IID", "s_20_iid": "S, 20 clients, IID",
}  # fmt: skip
QUANTITIES = {
    "forward_flop": ("work of the forward pass, MFLOP", 1e6),
    "model_bits": ("model below the cut, Mbit", 1e6),
    "smashed_bits": ("smashed data of a sample, kbit", 1e3),
}
STEPS = {
    "model_down": ("model down", "#9ecae1"),
    "client_forward": ("client, forward", "#a1d99b"),
    "smashed_up": ("smashed data up", "#e6550d"),
    "server": ("server", "#756bb1"),
    "gradient_down": ("gradient down", "#fdae6b"),
    "client_backward": ("client, backward", "#31a354"),
    "model_up": ("model up", "#3182bd"),
}


def main(*files: str) -> None:
    """Draws round.svg and curve.svg, and the picture of each file."""
    mpl.rcParams.update({"svg.hashsalt": "sfl_jax", "font.size": 9})
    drawn = {
        "round": (result, "result.svg"),
        "setting": (claim, "claim_time.svg"),
        "network": (fits, "claim_fits.svg"),
    }
    for file in map(Path, files):
        draw, name = drawn[file.read_text().partition(",")[0]]
        save(draw(file), name)
    chain = models.create("efficientnetv2-b0", num_classes=10, in_channels=1)
    profile = models.profile(chain, image_shape=(32, 32, 1))
    clients = fleet.random_fleet(10, seed=3).with_samples([600] * 10)
    terms = optim.terms(profile, clients, optim.Work())
    save(rounds(terms), "round.svg")
    save(curve(terms), "curve.svg")


def result(clocks: Path) -> Figure:
    """Test accuracy over simulated time, one line for each method."""
    with clocks.open() as file:
        rows = [row for row in csv.DictReader(file) if row["test_accuracy"]]
    accuracy = [100 * float(row["test_accuracy"]) for row in rows]
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axes = figure.subplots()
    for method, (name, colour, style) in METHODS.items():
        seconds = [float(row[f"{method}_s"]) for row in rows]
        axes.plot(seconds, accuracy, style, color=colour, label=f"{name}: {seconds[-1]:.1f} s")
    axes.set(xlabel="simulated seconds of the fleet", ylabel="test accuracy, %", xlim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", frameon=False)
    return figure


def claim(clocks: Path) -> Figure:
    """Test accuracy over simulated time by method, a panel for each setting. Of several seeds, the first."""
    with clocks.open() as file:
        rows = [row for row in csv.DictReader(file) if row["test_accuracy"]]
    first = {row["setting"]: row["seed"] for row in reversed(rows)}
    rows = [row for row in rows if row["seed"] == first[row["setting"]]]
    there = [name for name in PANELS if any(row["setting"] == name for row in rows)]
    figure = Figure(figsize=(8.5, 2.6 * -(-len(there) // 2)), layout="constrained")
    plots = figure.subplots(-(-len(there) // 2), 2, squeeze=False).flat
    for axes, name in zip(plots, there, strict=False):
        own = [row for row in rows if row["setting"] == name]
        accuracy = [100 * float(row["test_accuracy"]) for row in own]
        for method, (label, colour, style) in METHODS.items():
            axes.plot([float(row[method]) for row in own], accuracy, style, color=colour, label=label)
        axes.set(title=PANELS[name], xlabel="simulated seconds", xlim=(0, None), ylim=(90, 100))
        axes.grid(alpha=0.3)
    for axes in plots[len(there) :]:
        axes.set_axis_off()
    plots[0].set_ylabel("test accuracy, %")
    figure.legend(*plots[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def fits(curves: Path) -> Figure:
    """What is counted at each cut, and the curve that is fitted to it, for two networks."""
    with curves.open() as file:
        rows = list(csv.DictReader(file))
    networks = list(dict.fromkeys(row["network"] for row in rows))
    figure = Figure(figsize=(9, 2.5 * len(networks)), layout="constrained")
    plots = figure.subplots(len(networks), len(QUANTITIES), squeeze=False)
    for line, network in zip(plots, networks, strict=True):
        for axes, (quantity, (title, unit)) in zip(line, QUANTITIES.items(), strict=True):
            own = [row for row in rows if (row["network"], row["quantity"]) == (network, quantity)]
            for kind in dict.fromkeys(row["kind"] for row in own):
                points = [
                    (float(row["cut"]), float(row["value"]) / unit) for row in own if row["kind"] == kind
                ]
                style = {"marker": "o", "markersize": 3, "linestyle": ":"} if kind == "counted" else {}
                axes.plot(
                    *zip(*points, strict=True), label=kind, color="#756bb1" if style else "#d95f02", **style
                )
            axes.set(title=f"{network}: {title}", xlabel="cut", ylim=(0, None))
            axes.legend(frameon=False)
    return figure


def rounds(terms: optim.Terms) -> Figure:
    """The seconds of ten clients in one round, under three plans."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    plots = figure.subplots(1, 3, sharey=True)
    for axes, method in zip(plots, ("no_split", "common_cut", "exact"), strict=True):
        plan = optim.solve(terms, SERVER_FLOPS, method)
        parts, bottom = terms.seconds(plan.cuts, plan.shares)._asdict(), np.zeros(len(plan.cuts))
        for name, (label, colour) in STEPS.items():
            axes.bar(np.arange(len(bottom)), parts[name], bottom=bottom, color=colour, label=label)
            bottom += parts[name]
        axes.axhline(plan.round_s, color="black", linewidth=1)
        axes.set(title=f"{METHODS[method][0]}: {plan.round_s:.1f} s", xlabel="clients")
        axes.set_xticks([])
    plots[0].set_ylabel("seconds of a session")
    figure.legend(*plots[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    return figure


def curve(terms: optim.Terms) -> Figure:
    """The FLOP/s that a round of T seconds needs, over T. It falls, so one T is the shortest round."""
    plan = optim.solve(terms, SERVER_FLOPS)
    costs = terms.costs()
    times = np.linspace(0.6, 1.6, 200) * plan.round_s
    needed = [_needed(costs, time) for time in times]
    figure = Figure(figsize=(6.4, 3.0), layout="constrained")
    axes = figure.subplots()
    axes.plot(times, np.array(needed) / 1e9, color="#756bb1", label="what all clients need together")
    axes.axhline(SERVER_FLOPS / 1e9, color="black", linewidth=1, label="what the server has")
    axes.axvline(plan.round_s, color="#d95f02", linewidth=1, linestyle="--")
    axes.plot(
        plan.round_s, SERVER_FLOPS / 1e9, "o", color="#d95f02", label=f"shortest round: {plan.round_s:.1f} s"
    )
    axes.set(xlabel="time T in which the round shall end, s", ylabel="GFLOP/s", ylim=(0, 80))
    axes.legend(frameon=False)
    return figure


def _needed(costs: optim.Costs, time: float) -> float:
    """The sum of the clients' least shares. Infinite if a client cannot end by `time` at any cut."""
    left = time - costs.fixed_s
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = np.where(costs.server_flop > 0, costs.server_flop / left, 0.0)
    return np.where(costs.allowed & (left > 0), shares, np.inf).min(axis=1).sum()


def save(figure: Figure, name: str) -> None:
    """Writes the figure as SVG, without a date."""
    figure.savefig(HERE / name, metadata={"Date": None})
    print("written:", HERE / name)


if __name__ == "__main__":
    main(*sys.argv[1:])
