"""The method of the source by itself, regression with alternation: python -m benchmarks.paper_method

Prints tables: the curves that are fitted to the costs of cuts, the rounds of its plans over the proven
optimum for random fleets, and the time of a plan as the fleet grows. Writes the curves to a CSV for the
picture of docs/claim.md. Runs on the CPU.
"""

import argparse
import csv
import functools
import time

import jax
import numpy as np

from sfl_jax import fleet as fleets
from sfl_jax import models, optim
from sfl_jax.optim import regression

NETWORKS = {"B0": "efficientnetv2-b0", "S": "efficientnetv2-s"}
CLIENTS = (10, 30, 100, 300, 1000)
SERVERS = {"scarce": 0.01, "medium": 0.1, "rich": 1.0}  # FLOP/s over those of all clients together
LINKS = {"slow": 1 / 8, "as drawn": 1.0, "fast": 8.0}  # factors on both links
GROWTH = (10, 100, 1000, 10_000, 100_000)
PAPER, TABLE = "regression", "alternating"


@functools.cache
def profile(name):
    return models.profile(models.create(NETWORKS[name], 10, 1), (32, 32, 1))


def terms_of(name, clients, seed, links=1.0):
    """The costs of a random fleet with 600 samples a client."""
    fleet = fleets.random_fleet(clients, seed=seed).with_samples(np.full(clients, 600))
    return optim.terms(profile(name), fleet, optim.Work()).faster(uplink=links, downlink=links)


def table(header, rows):
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |")
    print()


def fits(path):
    """The chosen curve of each quantity, and its points beside the counted ones in a CSV."""
    rows, points = [], []
    for name in NETWORKS:
        for curve in optim.regression.fit_curves(terms_of(name, 10, 0)):
            fit, next_best = curve.fits[:2]
            quality = f"{fit.r2:.4f}", f"{100 * fit.worst:.1f} %", next_best.family
            rows.append([name, curve.quantity, fit.family, *quality])
            fine = np.arange(curve.cuts[0], curve.cuts[-1] + 1e-9, 1 / regression.SAMPLES_PER_UNIT)
            for kind, x, y in (("counted", curve.cuts, curve.values), (fit.family, fine, fit(fine))):
                points += [(name, curve.quantity, kind, *pair) for pair in zip(x, y, strict=True)]
    table(["network", "quantity over the cut", "chosen", "R²", "largest error", "next best"], rows)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("network", "quantity", "kind", "cut", "value"))
        writer.writerows(points)


def gaps(name, draws):
    """The rounds of the method over the optimum, by server, links and clients."""
    rows = []
    for clients in CLIENTS:
        for server, part in SERVERS.items():
            for links, factor in LINKS.items():
                found = [plans(terms_of(name, clients, seed, factor), part) for seed in range(draws)]
                rows.append((clients, server, links, *map(np.array, zip(*found, strict=True))))
    for axis, title in ((0, "clients"), (1, "server"), (2, "links")):
        print(f"{name}, {draws} fleets a case: round over the proven bound, mean (worst), by {title}\n")
        groups = {}
        for row in rows:
            groups.setdefault(row[axis], []).append(row)
        table(
            [title, PAPER, TABLE, "iterations, mean (most)"],
            [
                [key, cell(cat(own, 3)), cell(cat(own, 4)), f"{cat(own, 5).mean():.1f} ({cat(own, 5).max()})"]
                for key, own in groups.items()
            ],
        )
    print(f"{name}: by server and clients, mean (worst)\n")
    table(
        ["clients", *SERVERS],
        [[n, *(cell(cat([r for r in rows if r[:2] == (n, s)], 3)) for s in SERVERS)] for n in CLIENTS],
    )
    ratios = cat(rows, 3)
    optimal, near = (ratios < 1 + 1e-6).mean(), (ratios < 1.01).mean()
    print(f"all {len(ratios)}: mean {ratios.mean():.3f}, median {np.median(ratios):.3f}, ", end="")
    print(f"optimal to 1e-6 in {optimal:.0%}, within 1 % in {near:.0%}\n")


def plans(terms, part):
    """(round of the method over the bound, that of alternation on the table, iterations of the method)."""
    flops = part * float(terms.flops.sum())
    best, paper, plain = (optim.solve(terms, flops, method) for method in ("exact", PAPER, TABLE))
    return paper.round_s / best.bound_s, plain.round_s / best.bound_s, paper.iterations


def cell(ratios):
    return f"{ratios.mean():.3f} ({ratios.max():.3f})"


def cat(rows, column):
    return np.concatenate([row[column] for row in rows])


def growth(name, repeats):
    """Seconds of CPU time of a compiled plan, and iterations, by clients; and the exponent of K."""
    rows, seconds = [], []
    for clients in GROWTH:
        terms = terms_of(name, clients, 0)
        flops = SERVERS["medium"] * float(terms.flops.sum())
        taken, plans = {}, {}
        for method in (PAPER, TABLE, "exact"):
            optim.solve(terms, flops, method)  # compiles
            times = []
            for _ in range(repeats):
                start = time.process_time()
                plans[method] = optim.solve(terms, flops, method)
                times.append(time.process_time() - start)
            taken[method] = min(times)
        seconds.append(taken[PAPER])
        rows.append([f"{clients:,}", *(f"{1e3 * taken[m]:.2f}" for m in taken), plans[PAPER].iterations])
    table(["clients", *(f"{m}, ms" for m in (PAPER, TABLE, "exact")), "iterations"], rows)
    slope = np.polyfit(np.log(GROWTH[2:]), np.log(seconds[2:]), 1)[0]
    print(f"from {GROWTH[2]:,} clients on the time grows with the power {slope:.2f} of their number\n")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--draws", type=int, default=20, help="fleets of each case")
    parser.add_argument("--repeats", type=int, default=5, help="plans of which the fastest is told")
    parser.add_argument("--curves", default="runs/curves.csv", help="file of the fitted curves")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    fits(options.curves)
    for name in NETWORKS:
        gaps(name, options.draws)
    growth("S", options.repeats)


if __name__ == "__main__":
    main()
