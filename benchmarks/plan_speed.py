"""The speed and quality of plans by each method: python -m benchmarks.plan_speed [speed ...]

EfficientNetV2-S at 32x32 (C = 44 cuts) and random fleets, on the CPU, compiled and warm. The server is
scarce, medium or rich: a multiple of the FLOP/s of all clients together. Times are minima over repeats,
measured in turns if they are compared. On a shared machine they are upper bounds.
"""

import argparse
import functools
import os
import resource
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

from sfl_jax import fleet as fleets
from sfl_jax import models, optim
from sfl_jax.planning import comparison
from tests.optim import highs

# The server's FLOP/s divided by those of all clients together.
REGIMES = {"scarce": 0.01, "medium": 0.1, "rich": 1.0}
KEY = jax.random.key(0)


@functools.cache
def profile():
    chain = models.create("efficientnetv2-s", num_classes=10, in_channels=1)
    return models.profile(chain, image_shape=(32, 32, 1))


def instance(clients, regime, seed=0, spread=1.0):
    """The terms of a random fleet and the server's FLOP/s. spread 0: clients with equal rates."""
    fleet = fleets.random_fleet(clients, seed=seed).with_samples(np.full(clients, 600))
    terms = optim.terms(profile(), fleet, optim.Work())
    return comparison.spread(terms, spread), REGIMES[regime] * terms.flops.sum()


def seconds(*calls, repeats):
    """The least wall time of each call, taken in turns; the first turn compiles."""
    best = [np.inf] * len(calls)
    for turn in range(repeats + 1):
        for index, call in enumerate(calls):
            start = time.perf_counter()
            call()
            if turn:
                best[index] = min(best[index], time.perf_counter() - start)
    return best


def show(title, header, rows):
    table = [header, *([str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    print(f"\n{title}")
    for row in table:
        print(
            "  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)), flush=True
        )


def float32_bisection(terms, server_flops):
    """A plain alternative: 24 halvings in float32 on the dense table, without a proof."""
    costs = terms.costs()
    table = [jnp.asarray(part, jnp.float32) for part in (costs.fixed_s, costs.server_flop)]
    allowed, high_s = jnp.asarray(costs.allowed), float(optim.solve(terms, server_flops, "no_split").round_s)

    @jax.jit
    def run(fixed_s, work, allowed):
        def halve(_, bracket):
            low, high = bracket
            middle = 0.5 * (low + high)
            shares = jnp.where(allowed & (fixed_s < middle), work / (middle - fixed_s), jnp.inf)
            fits = jnp.sum(jnp.min(shares, axis=1)) <= server_flops
            return jnp.where(fits, low, middle), jnp.where(fits, middle, high)

        return jax.lax.fori_loop(0, 24, halve, (jnp.float32(0.0), jnp.float32(high_s)))

    return lambda: jax.block_until_ready(run(*table, allowed))


def speed(quick):
    """The exact plan of one round, compared with a plain bisection."""
    rows = []
    for clients in (100, 10_000) if quick else (100, 10_000, 1_000_000):
        for regime in REGIMES:
            for spread in (1.0, 0.0):
                terms, server_flops = instance(clients, regime, spread=spread)
                exact = functools.partial(optim.solve, terms, server_flops)
                plain = float32_bisection(terms, server_flops)
                exact_s, plain_s = seconds(exact, plain, repeats=max(3, 20_000 // clients))
                plan = exact()
                rows.append(
                    [clients, regime, f"{spread:g}", f"{1e3 * exact_s:.3f}", plan.iterations,
                     f"{plan.gap:.0e}", f"{1e3 * plain_s:.3f}", f"{plain_s / exact_s:.2f}"]
                )  # fmt: skip
    header = ["K", "server", "spread", "ms", "passes", "proven gap", "float32 bisection, ms", "ratio"]
    show("exact, session barrier, float64, C = 44", header, rows)


def memory(quick):
    """Peak memory before and after a plan of very many clients, and the size of their dense table."""
    clients = 100_000 if quick else 1_000_000
    terms, server_flops = instance(clients, "medium")
    optim.solve(terms.take(np.arange(100)), server_flops)

    def peak_gib():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    before = peak_gib()
    optim.solve(terms, server_flops)
    dense = 2.25 * 8 * np.prod(terms.shape) / 2**30
    print(f"\nK = {clients}: peak memory {before:.2f} GiB before the plan, {peak_gib():.2f} after;")
    print(f"the table of all clients and cuts would be {dense:.2f} GiB")


def command(quick):
    """The whole process launch.plan: reads a large fleet file, plans, and writes."""
    clients, rows = (100_000 if quick else 1_000_000), []
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "fleet.csv")
        fleets.write_fleet(path, fleets.random_fleet(clients, seed=0).with_samples(np.full(clients, 600)))
        for model in ("efficientnetv2-b0", "efficientnetv2-s"):
            flags = [f"--fleet={path}", f"--model={model}", f"--server_flops={1e9 * clients}"]
            whole = [sys.executable, "-m", "launch.plan", *flags, f"--output={folder}/plan.json"]
            for compiled in ("nothing", "kept"):
                before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
                environment = os.environ | {"XDG_CACHE_HOME": os.path.join(folder, model)}
                subprocess.run(whole, env=environment, stdout=subprocess.DEVNULL, check=True)
                wall_s, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
                cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
                peak_gib = after.ru_maxrss / 2**20  # the largest process so far
                rows.append([model, compiled, f"{wall_s:.1f}", f"{cpu_s:.1f}", f"{peak_gib:.2f}"])
    header = ["network", "compiled before", "wall, s", "CPU, s", "peak, GiB"]
    load = f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    show(f"launch.plan, the whole process, {clients} clients; {load}", header, rows)


def rounds(quick):
    """Many rounds in one vmapped call of solve_arrays."""
    count = 100 if quick else 1000
    instances = [instance(100, "medium", seed) for seed in range(count)]
    with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
        terms = jax.tree.map(lambda *parts: np.stack(parts), *(terms for terms, _ in instances))
        flops = np.array([server_flops for _, server_flops in instances])
        solve = jax.jit(jax.vmap(optim.solve_arrays))
        (wall_s,) = seconds(lambda: jax.block_until_ready(solve(terms, flops)), repeats=5)
        found = solve(terms, flops)
        worst = float(jnp.max(found.round_s / found.bound_s)) - 1
    print(f"\n{count} rounds of K = 100 in one vmapped call: {1e3 * wall_s:.0f} ms; worst gap {worst:.0e}")


def quality(quick):
    """Each method's distance from the optimum, and its time."""
    seeds, rows = range(4 if quick else 20), []
    for clients in (20, 100):
        for regime in REGIMES:
            instances = [instance(clients, regime, seed) for seed in seeds]
            bests_s = [optim.solve(*each).round_s for each in instances]
            for scheme in comparison.methods("session"):
                plans = [comparison.plan_of(scheme, *each, "session", KEY) for each in instances]
                ratios = np.array(
                    [p.round_s / s if p else np.inf for p, s in zip(plans, bests_s, strict=True)]
                )
                call = functools.partial(comparison.plan_of, scheme, *instances[0], "session", KEY)
                (wall_s,) = seconds(call, repeats=5)
                rows.append(
                    [clients, regime, scheme, f"{ratios.mean():.3f}", f"{ratios.max():.3f}",
                     f"{np.mean(ratios < 1 + 1e-6):.0%}", f"{1e3 * wall_s:.2f}"]
                )  # fmt: skip
    header = ["K", "server", "method", "mean", "worst", "optimal in", "ms"]
    show(f"round over the optimum, {len(seeds)} random fleets each", header, rows)


def problems(quick):
    """The staged barrier, and shared bandwidth (medium server)."""
    seeds, rows = range(4 if quick else 20), []
    for clients in (20, 100):
        equal = float(clients)
        calls = {"staged barrier": lambda terms, flops: optim.solve(terms, flops, barrier="staged")}
        for name, band in (("one band", equal), ("two bands", (equal, equal))):
            calls[name] = functools.partial(_shared, band=band)
        for name, call in calls.items():
            instances = [instance(clients, "medium", seed) for seed in seeds]
            gaps = [call(*each).gap for each in instances]
            (wall_s,) = seconds(functools.partial(call, *instances[0]), repeats=3)
            rows.append(
                [clients, name, f"{1e3 * wall_s:.1f}", f"{np.quantile(gaps, 0.95):.0e}", f"{max(gaps):.0e}"]
            )
    show("other problems, medium server", ["K", "problem", "ms", "gap, 95 %", "worst"], rows)


def _shared(terms, flops, band):
    return optim.solve_bandwidth(terms, flops, band, reference_hz=1.0)


def server_memory(quick):
    """The server's memory limited to a part of what the plan without a limit takes."""
    rows = []
    for clients in (100,) if quick else (100, 10_000):
        for regime in REGIMES:
            terms, server_flops = instance(clients, regime)
            free = optim.solve(terms, server_flops)
            taken = terms.server_bytes[free.cuts].sum()
            for part in (0.7, 0.3, 0.05):
                limit = float(int(part * taken))
                staged = optim.solve(terms, server_flops, barrier="staged") if clients == 100 else None
                calls = {"session": functools.partial(optim.solve_memory, terms, server_flops, limit)}
                if staged is not None:
                    calls["staged"] = functools.partial(optim.solve_staged_memory, terms, server_flops, limit)
                for barrier, call in calls.items():
                    plan, (wall_s,) = call(), seconds(call, repeats=max(1, 300 // clients))
                    least_s = (free if barrier == "session" else staged).round_s
                    rows.append(
                        [clients, regime, f"{taken / 1e9:.3g}", f"{part:.0%}", barrier, f"{1e3 * wall_s:.0f}",
                         f"{plan.gap:.0e}", f"{plan.round_s / least_s:.3f}"]
                    )  # fmt: skip
    header = ["K", "server", "GB taken", "limit", "barrier", "ms", "proven gap", "round / without limit"]
    show("the server's memory limited", header, rows)


def several_servers(quick):
    """Servers with their own links, with and without a memory that binds. The first has half the compute."""
    rows = []
    for clients in (100,) if quick else (100, 10_000):
        for regime in REGIMES:
            for count, limited in ((2, False), (3, False), (3, True)):
                terms, server_flops = instance(clients, regime)
                rng = np.random.default_rng(1)
                rates = [part[:, None] * np.exp(0.5 * rng.normal(size=(clients, count)))
                         for part in (terms.uplink_bps, terms.downlink_bps)]  # fmt: skip
                flops = server_flops * np.array([0.5, 0.3, 0.2])[:count]
                servers = optim.Servers(flops, np.full(count, np.inf), *rates)
                call = functools.partial(optim.solve_servers, terms, servers)
                plan = call()
                if limited:  # to half of what the plan takes of each without
                    taken = np.bincount(plan.servers, terms.server_bytes[plan.cuts], count)
                    servers = servers._replace(memory_bytes=np.floor(0.5 * taken))
                    call = functools.partial(optim.solve_servers, terms, servers)
                (wall_s,) = seconds(call, repeats=1)
                plan, alone = call(), optim.solve(servers.terms(terms, 0), flops[0])
                rows.append(
                    [clients, regime, count, "half" if limited else "no limit", f"{wall_s:.2f}",
                     f"{plan.gap:.0e}", f"{plan.round_s / alone.round_s:.3f}"]
                )  # fmt: skip
    header = ["K", "server", "servers", "memory", "s", "proven gap", "round / first server alone"]
    show("several servers", header, rows)


def drawn(terms, samples, seed, sigma=0.3):
    """Rates of sampled rounds: each rate times a log-normal factor, independent by client and round."""
    rng = np.random.default_rng(seed)
    shape = samples, len(terms.samples)
    return optim.Rates(
        *(getattr(terms, name) * np.exp(sigma * rng.normal(size=shape)) for name in optim.Rates._fields)
    )


def changing_rates(quick):
    """Plans for a quantile of sampled rounds, tested on 400 others (100 with very many clients)."""
    rows = []
    for clients in (100,) if quick else (100, 10_000):
        samples, tests = (100, 400) if clients == 100 else (20, 100)
        for regime in REGIMES:
            terms, server_flops = instance(clients, regime)
            sampled, others = drawn(terms, samples, 1), drawn(terms, tests, 2)
            means = optim.solve(optim.at_rates(terms, sampled.mean()), server_flops)
            worst = optim.solve(optim.at_rates(terms, sampled.least()), server_flops)
            for quantile in (0.5, 0.9, 1.0):
                start = time.process_time()
                plan = optim.solve_quantile(terms, sampled, server_flops, quantile).plan
                cpu_s = time.process_time() - start
                reached = [
                    optim.quantile_s(optim.rounds_s(terms, others, server_flops, each.cuts), quantile)
                    for each in (plan, means, worst)
                ]
                rows.append(
                    [clients, samples, regime, f"{quantile:g}", f"{cpu_s:.1f}", f"{plan.gap:.1%}",
                     f"{reached[1] / reached[0]:.2f}", f"{reached[2] / reached[0]:.2f}"]
                )  # fmt: skip
    header = [
        "K",
        "rounds",
        "server",
        "quantile",
        "CPU, s",
        "proven gap",
        "means / this",
        "worst case / this",
    ]
    show("rates that change: the quantile of rounds that were not planned on", header, rows)


def frontiers(quick):
    """The least energy and the fewest bytes for 25 round times."""
    rows = []
    for clients in (100,) if quick else (100, 10_000):
        for regime in REGIMES:
            terms, server_flops = instance(clients, regime)
            rng = np.random.default_rng(0)  # 0.01 to 0.3 J for a GFLOP, and 0.2 W to send
            power = 10.0 ** rng.uniform(-11, -9.5, clients), np.full(clients, 0.2), np.full(clients, np.inf)
            terms = terms._replace(energy=optim.costs.Energy(*power))
            costs, plan = terms.costs(), optim.solve(terms, server_flops)
            for name, amounts in (("J", optim.joules(terms)), ("bytes", optim.sent_bytes(terms))):
                start = time.process_time()
                curve = optim.frontier(costs, amounts, server_flops, plan.round_s * (1 + 1e-9))
                cpu_s, gaps = time.process_time() - start, curve.amounts / curve.bounds - 1
                rows.append(
                    [clients, regime, name, f"{cpu_s:.2f}", f"{np.median(gaps):.0e}", f"{gaps.max():.0e}",
                     f"{curve.times_s[-1] / curve.times_s[0]:.2f}",
                     f"{curve.amounts[-1] / curve.amounts[0]:.2f}"]
                )  # fmt: skip
    header = [
        "K",
        "server",
        "of",
        "CPU, s",
        "gap, median",
        "worst",
        "longest / shortest",
        "least / at shortest",
    ]
    show("25 points of the frontier of time against energy or bytes", header, rows)


def against_highs(quick):
    """The same problem as two mixed-integer programs, which bound it from below and from above."""
    clients, limit_s, rows = (10 if quick else 50), (5.0 if quick else 20.0), []
    for regime in REGIMES:
        terms, server_flops = instance(clients, regime)
        costs, call = terms.costs(), functools.partial(optim.solve, terms, server_flops)
        (wall_s,) = seconds(call, repeats=200)
        plan = call()
        for form in (highs.tangent, highs.discretised):
            found = form(costs, server_flops, plan.round_s, limit_s)
            rows.append(
                [clients, regime, form.__name__, f"{found.round_s / plan.round_s:.4f}", f"{found.wall_s:.2f}",
                 f"{1e3 * wall_s:.3f}", f"{found.wall_s / wall_s:.0f}"]
            )  # fmt: skip
    header = ["K", "server", "form", "its value / exact", "HiGHS, s", "exact, ms", "ratio"]
    show(f"HiGHS (stopped after {limit_s:g} s): bounds from below and from above", header, rows)


PARTS = {
    part.__name__: part
    for part in (
        memory,
        command,
        speed,
        rounds,
        quality,
        problems,
        server_memory,
        several_servers,
        changing_rates,
        frontiers,
        against_highs,
    )
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="which parts to run; default: all")
    parser.add_argument("--quick", action="store_true", help="fewer clients, rounds and fleets")
    options = parser.parse_args()
    for name in options.parts or PARTS:
        PARTS[name](options.quick)


if __name__ == "__main__":
    main()
