"""What is proven of each planning problem, and how long a plan takes: python -m benchmarks.planning_problems

EfficientNetV2-S at 32x32 and random fleets. The server has 1 %, 10 % or 100 % of the FLOP/s of all clients. A
row has the largest gap and the range of the CPU seconds over these three, for K clients. Seconds are those of
a second call, unless the first took more than ten; then they include compiling. The table is written as it
stands in docs/log/planning.md.
"""

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.plan_speed import REGIMES, drawn
from sfl_jax import fleet as fleets
from sfl_jax import optim, planning
from sfl_jax.commands import parts
from sfl_jax.commands.config import Config
from sfl_jax.planning.frontier import plan_frontier

OPTIMAL = 1e-6  # a smaller gap is called optimal
LONG_S = 10.0


@functools.cache
def fleet_of(clients: int, energy: bool = False) -> fleets.Fleet:
    """A random fleet; with energy, processors of 1 to 30 J for 100 GFLOP and no budget."""
    fleet = fleets.random_fleet(clients, seed=0).with_samples(np.full(clients, 600))
    if energy:
        per_flop = 10.0 ** np.random.default_rng(0).uniform(-11, -9.5, clients)
        cycles = np.full(clients, 1e9)
        fleet = dataclasses.replace(fleet, cycles_per_s=cycles, kappa=per_flop * fleet.flops / cycles**3)
    return fleet


@functools.cache
def known(clients: int, energy: bool = False, **flags: Any):
    """(fleet, profile, terms) under some flags."""
    return parts.read_terms(
        Config(model="efficientnetv2-s", clients=clients, **flags), fleet_of(clients, energy)
    )


def server(clients: int, regime: str) -> float:
    """FLOP/s of the server."""
    return REGIMES[regime] * float(fleet_of(clients).flops.sum())


def plain(clients: int, regime: str, **flags: Any) -> Callable[[], float]:
    """The gap of a plan under some flags."""
    fleet, _, terms = known(clients, **flags)
    config = Config(model="efficientnetv2-s", server_flops=server(clients, regime), **flags)
    return lambda: planning.solve(parts.planner(config), fleet, terms).gap


def budgets(clients: int, regime: str) -> Callable[[], float]:
    """Each client may take half of the energy between its least and its most."""
    fleet, _, terms = known(clients, energy=True)
    joules = optim.joules(planning.frontier.with_energy(terms, fleet))
    limited = dataclasses.replace(fleet, energy_j=0.5 * (joules.min(axis=1) + joules.max(axis=1)))
    terms = terms._replace(energy=optim.energy(limited))
    return lambda: optim.solve(terms, server(clients, regime)).gap


def memory(clients: int, regime: str, barrier: str = "session") -> Callable[[], float]:
    """The server's memory is half of what the plan without a limit takes."""
    fleet, _, terms = known(clients)
    planner = planning.Planner(server_flops=server(clients, regime), barrier=barrier)
    free = planning.solve(planner, fleet, terms)
    limit = float(int(0.5 * terms.server_bytes[free.cuts].sum()))
    planner = dataclasses.replace(planner, server_memory_bytes=limit)
    return lambda: planning.solve(planner, fleet, terms).gap


def several(clients: int, regime: str, limited: bool = False) -> Callable[[], float]:
    """Three servers with 50 %, 30 % and 20 % of the compute; limited: to half of the memory they take."""
    _, _, terms = known(clients)
    rng = np.random.default_rng(1)
    rates = [part[:, None] * np.exp(0.5 * rng.normal(size=(clients, 3)))
             for part in (terms.uplink_bps, terms.downlink_bps)]  # fmt: skip
    flops = server(clients, regime) * np.array([0.5, 0.3, 0.2])
    servers = optim.Servers(flops, np.full(3, np.inf), *rates)
    if limited:
        plan = optim.solve_servers(terms, servers)
        taken = np.bincount(plan.servers, terms.server_bytes[plan.cuts], 3)
        servers = servers._replace(memory_bytes=np.floor(0.5 * taken))
    return lambda: optim.solve_servers(terms, servers).gap


def changing(clients: int, regime: str, quantile: float) -> Callable[[], float]:
    """A quantile of sampled rounds (100, or 20 of very many clients); 0: the worst case of these."""
    _, _, terms = known(clients)
    sampled, flops = drawn(terms, 100 if clients <= 1000 else 20, 1), server(clients, regime)
    if not quantile:
        return lambda: optim.solve(optim.at_rates(terms, sampled.least()), flops).gap
    return lambda: optim.solve_quantile(terms, sampled, flops, quantile).plan.gap


def each_round(clients: int, regime: str) -> Callable[[], float]:
    """Full recourse: the cuts and shares of one round, at its rates."""
    _, _, terms = known(clients)
    rates = drawn(terms, 1, 1).of(0)
    return lambda: optim.solve(optim.at_rates(terms, rates), server(clients, regime)).gap


def on_frontier(clients: int, regime: str, of: str) -> Callable[[], float]:
    """The plan on a frontier, and its 25 points; the gap is the largest of these."""
    fleet, profile, terms = known(clients, energy=of == "energy")
    planner = planning.Planner(server_flops=server(clients, regime))

    def gap() -> float:
        curve = plan_frontier(planner, profile, fleet, terms, of).frontier
        return float(np.max(curve.amounts / curve.bounds - 1))

    return gap


def smallest(clients: int, regime: str) -> Callable[[], float]:
    """The smallest server for the shortest round of this server, above this server."""
    _, _, terms = known(clients)
    flops = server(clients, regime)
    target_s = optim.solve(terms, flops).round_s
    return lambda: max(optim.smallest_server(terms, target_s).server_flops / flops - 1, 0.0)


def flags(**given: Any) -> Callable[[int, str], Callable[[], float]]:
    """A problem that flags describe."""
    return functools.partial(plain, **given)


PROBLEMS = {
    "cuts and shares": flags(),
    "the smallest server for a round": smallest,
    "`--barrier=staged`": flags(barrier="staged"),
    "`--method=regression`, cuts rounded by need": flags(method="regression"),
    "`--method=regression`, cuts rounded to the nearest": flags(method="regression", rounding="nearest"),
    "`--method=work_conserving`, for all schedules": flags(method="work_conserving"),
    "`--codec=float32+int8+int4`": flags(codec="float32+int8+int4"),
    "`--tail_units=1`": flags(tail_units=1),
    "energy budget of each client": budgets,
    "`--frontier=energy`, 25 points": functools.partial(on_frontier, of="energy"),
    "`--frontier=bytes`, 25 points": functools.partial(on_frontier, of="bytes"),
    "`--server_memory_bytes`": memory,
    "`--server_memory_bytes`, staged": functools.partial(memory, barrier="staged"),
    "three servers": several,
    "three servers with limited memories": functools.partial(several, limited=True),
    "worst case of intervals or traces": functools.partial(changing, quantile=0.0),
    "`--quantile=0.5`, cuts stay, shares follow": functools.partial(changing, quantile=0.5),
    "`--quantile=0.9`, cuts stay, shares follow": functools.partial(changing, quantile=0.9),
    "`--quantile=1`, cuts stay, shares follow": functools.partial(changing, quantile=1.0),
    "cuts and shares follow each round": each_round,
    "`--rtt_s=0.05`": flags(rtt_s=0.05),
    "`--broadcast_bps=6M`": flags(broadcast_bps=6e6),
    "`--band=airtime`, half-duplex": flags(band="airtime"),
    "`--band=pooled`": flags(band="pooled"),
    "`--band=separate`": flags(band="separate"),
    "`--scheme=sfl_v2`": flags(scheme="sfl_v2"),
    "`--scheme=psl`": flags(scheme="psl"),
    "`--scheme=sl`": flags(scheme="sl"),
}  # fmt: skip


def measured(problem: Callable[[int, str], Callable[[], float]], clients: int) -> tuple[str, str]:
    """(optimal or the largest gap, the range of CPU seconds) over all servers."""
    gaps, seconds = [], []
    for regime in REGIMES:
        call = problem(clients, regime)
        for _ in range(2):
            start = time.process_time()
            gap = call()
            cpu_s = time.process_time() - start
            if cpu_s > LONG_S:
                break
        gaps.append(gap)
        seconds.append(cpu_s)
    worst, ends = max(gaps), [f"{part:.2g}" for part in (min(seconds), max(seconds))]
    said = f"optimal to {max(worst, 1e-16):.0e}" if worst < OPTIMAL else f"gap {100 * worst:.2g} %"
    return said, " - ".join(dict.fromkeys(ends))


def main():
    """Prints the table, row by row."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", default="100,10000", help="sizes of the fleets, with commas between")
    parser.add_argument("--only", default="", help="only problems whose name has this text")
    options = parser.parse_args()
    sizes = [int(part) for part in options.clients.split(",")]
    heads = [f"K = {size:,}" for size in sizes]
    print("| problem |", " | ".join(f"{head} | CPU, s" for head in heads), "|")
    print("|---|" + "---|---|" * len(sizes))
    for name, problem in PROBLEMS.items():
        if options.only in name:
            cells = [cell for size in sizes for cell in measured(problem, size)]
            print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
