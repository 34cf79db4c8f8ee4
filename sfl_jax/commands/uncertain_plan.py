"""The plan for uncertain rates: what the terminal, plan.json and the picture tell."""

import functools
from typing import Any, BinaryIO

import numpy as np

from sfl_jax import __version__, optim, planning
from sfl_jax.commands import parts, plan_kind_rules
from sfl_jax.commands.config import Config
from sfl_jax.commands.plan_clients import clients_table
from sfl_jax.commands.plan_kinds import Told
from sfl_jax.commands.plan_summary import ASSUMPTIONS, CONVENTION, MEMORY, settings
from sfl_jax.digests import digest_of_columns
from sfl_jax.errors import BadInput
from sfl_jax.files import PNG_METADATA
from sfl_jax.fleet import Fleet, read_traces
from sfl_jax.planning.uncertain import (
    MEANS,
    OWN,
    SAMPLES,
    TESTS,
    WORST,
    UncertainPlanned,
    drawn_rates,
    plan_uncertain,
)

_ASKED = ("model", "image_size", "barrier", "method", "server_flops", "traces", "interval", "quantile")
# Lines of plans that often lie upon each other.
_LINES = {
    OWN: {"linewidth": 3, "alpha": 0.5}, MEANS: {"linestyle": "--"}, WORST: {"linestyle": ":", "linewidth": 2}
}  # fmt: skip
_WIDE = 10  # times whose ratio is larger have a logarithmic axis
_OWN = (
    "the rates of a round are known when its shares are given out: cuts stay, shares follow",
    "a client's energy for one FLOP does not depend on its speed",
)


def told(config: Config, file: Fleet | None, say: Any) -> Told:
    """Plans the fleet of `config` (`file`: its fleet file, read already) for its traces or intervals."""
    fleet, profile, terms = parts.read_terms(config, file)
    lowest, doubts = None, planning.doubts(fleet)
    if config.traces:
        try:
            traces = read_traces(config.traces, fleet)
        except BadInput as error:
            raise BadInput(f"--traces: {error}") from error
        sampled, test = optim.Rates(traces.flops, traces.uplink_bps, traces.downlink_bps), None
        doubts += _doubts(config, fleet, sampled)
    else:
        low, high = plan_kind_rules.factors(config)
        sampled = drawn_rates(terms, low, high, SAMPLES, config.seed)
        test = drawn_rates(terms, low, high, TESTS, config.seed, test=True)
        lowest = optim.Rates(low * terms.flops, low * terms.uplink_bps, low * terms.downlink_bps)
    say(f"planning for {sampled.samples} rounds of changing rates")
    flag = "traces" if config.traces else "interval"
    try:
        made = plan_uncertain(
            parts.planner(config), profile, fleet, terms, sampled, test, config.quantile, lowest
        )
    except BadInput as error:
        raise BadInput(f"--{flag}={getattr(config, flag)}: {error}") from error
    table = planning.table(made.planned)
    return Told(
        _head(config, made),
        table,
        _summary(config, made, doubts),
        fleet,
        functools.partial(_draw, config=config, made=made),
        {},
    )


def _part(quantile: float) -> float:
    """The quantile at which plans are compared: for the worst case the longest test round."""
    return quantile or 1.0


def _rows(made: UncertainPlanned) -> list[dict[str, Any]]:
    return [
        {"plan": one.name, "quantile_round_s": optim.quantile_s(one.rounds_s, _part(made.quantile)),
         "mean_round_s": float(one.rounds_s.mean()), "longest_round_s": float(one.rounds_s.max())}
        for one in made.tested
    ]  # fmt: skip


def _head(config: Config, made: UncertainPlanned) -> dict[str, Any]:
    plan = made.planned.plan
    return {
        **{name: getattr(config, name) for name in _ASKED},
        "round_s": plan.round_s,
        "bound_s": plan.bound_s,
        "iterations": plan.iterations,
        "tested_on_rounds": len(made.tested[0].rounds_s),
        "compared_plans_made_on_rounds": made.samples,
        "tested": _rows(made),
        **settings(config),
        "fleet": config.fleet,
        "fleet_sha256": digest_of_columns(made.planned.fleet.columns()),
        "seed": config.seed,
        "sfl_jax": __version__,
        "convention": CONVENTION,
        "assumptions": (*(line for line in ASSUMPTIONS if "work_conserving" not in line), MEMORY, *_OWN),
    }


def _doubts(config: Config, fleet: Fleet, sampled: optim.Rates) -> list[str]:
    """Which rates of the traces look as if they had another unit, even in each client's best round."""
    best = {name: values.max(axis=0) for name, values in sampled._asdict().items()}
    own = {name: values for name, values in best.items() if not np.array_equal(values, getattr(fleet, name))}
    return [f"{config.traces}: {doubt}" for doubt in planning.rate_doubts(own, fleet.client)]


def _summary(config: Config, made: UncertainPlanned, doubts: list[str]) -> str:
    plan, tests = made.planned.plan, len(made.tested[0].rounds_s)
    where = config.traces or f"rates times {config.interval.replace(',', ' to ')}"
    gap = f"optimal to {plan.gap:.0e}" if plan.gap < 1e-6 else f"at most {plan.gap:.2%} above it"
    if made.quantile:
        what = f"{made.quantile:.0%} of the sampled rounds last at most {plan.round_s:.5g} s"
        of = "all cuts, with the best shares in every round"
    else:
        what, of = f"at most {plan.round_s:.5g} s, at the least rates", "all cuts and shares"
    cuts = f"{plan.cuts.min()} to {plan.cuts.max()} of 0 to {len(made.planned.profile.names)}"
    lines = [
        ("plan", f"for {'a quantile' if made.quantile else 'the worst case'}, {where}, {config.model} at "
         f"{config.image_size}x{config.image_size}, {len(made.planned.fleet)} clients"),
        *(("units", doubt) for doubt in doubts),
        ("round", what),
        ("bound", f"{plan.bound_s:.5g} s, proven for {of}; this plan is {gap}"),
        ("server", f"{config.server_flops:.4g} FLOP/s; its shares follow the rates of each round"),
        ("cuts", cuts),
        ("tested", f"in {tests} other rounds, by plans made on {made.samples} rounds:"),
        *(("", line) for line in _table(made)),
        ("convention", CONVENTION),
    ]  # fmt: skip
    text = "\n".join(f"{name:<11} {text}".rstrip() for name, text in lines)
    rates = (
        f"in the sampled round at the quantile {made.quantile:g}" if made.quantile else "at the least rates"
    )
    return f"{text}\n\nThe clients {rates}:\n\n{clients_table(made.planned)}\n"


def _table(made: UncertainPlanned) -> list[str]:
    width = max(len(one.name) for one in made.tested)
    part = f"{made.quantile:.0%} end by" if 0 < made.quantile < 1 else ""
    head = f"{'':<{width}}  {part:>12}{'mean':>12}{'longest':>12}"
    rows = [head]
    for row in _rows(made):
        own = f"{row['quantile_round_s']:.4g} s" if part else ""
        mean, longest = (f"{row[name]:.4g} s" for name in ("mean_round_s", "longest_round_s"))
        rows.append(f"{row['plan']:<{width}}  {own:>12}{mean:>12}{longest:>12}")
    return rows


def _draw(out: BinaryIO, config: Config, made: UncertainPlanned) -> None:
    """What part of the test rounds has ended by each time, for each way to plan."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for one in made.tested:
        ends_s, lines = np.sort(one.rounds_s), _LINES.get(one.name, {"linestyle": "-"})
        axes.step(ends_s, np.arange(1, len(ends_s) + 1) / len(ends_s), where="post", label=one.name, **lines)
    every_s = np.concatenate([one.rounds_s for one in made.tested])
    if made.quantile:
        axes.axhline(made.quantile, color="black", linewidth=1, linestyle=":", label="wanted part")
    axes.axvline(made.planned.plan.round_s, color="black", linewidth=1, label="promised")
    axes.set(
        title=f"{config.model}, {len(made.planned.fleet)} clients: rounds that were not planned on",
        xlabel="round, seconds", ylabel="part of the rounds that have ended",
        xscale="log" if every_s.max() > _WIDE * every_s.min() else "linear",
    )  # fmt: skip
    axes.legend(frameon=False)
    figure.savefig(out, format="png", dpi=120, metadata=PNG_METADATA)
