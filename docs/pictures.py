"""Draws the pictures of the docs: python docs/pictures.py [runs/compare/clocks.csv]

round.svg and curve.svg are made from plans. result.svg is made from the clocks.csv of a comparison:

    python -m launch.compare --preset=quick --eval_every=2 --workdir=runs/compare
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
STEPS = {
    "model_down": ("model down", "#9ecae1"),
    "client_forward": ("client, forward", "#a1d99b"),
    "smashed_up": ("smashed data up", "#e6550d"),
    "server": ("server", "#756bb1"),
    "gradient_down": ("gradient down", "#fdae6b"),
    "client_backward": ("client, backward", "#31a354"),
    "model_up": ("model up", "#3182bd"),
}


def main(clocks: str = "") -> None:
    """Draws result.svg if `clocks` names a clocks.csv, and always the other two."""
    mpl.rcParams.update({"svg.hashsalt": "sfl_jax", "font.size": 9})
    if clocks:
        save(result(Path(clocks)), "result.svg")
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
