"""The plan on a frontier of time against energy or bytes: what the terminal, files and picture tell."""

import functools
from typing import Any, BinaryIO

import numpy as np

from sfl_jax import __version__, planning
from sfl_jax.commands import parts, words
from sfl_jax.commands.config import Config
from sfl_jax.commands.plan_clients import clients_table
from sfl_jax.commands.plan_kinds import Told
from sfl_jax.commands.plan_summary import ASSUMPTIONS, CONVENTION, MEMORY, settings
from sfl_jax.digests import digest_of_columns
from sfl_jax.errors import BadInput
from sfl_jax.files import PNG_METADATA
from sfl_jax.fleet import Fleet
from sfl_jax.planning.frontier import ENERGY, FrontierPlanned, plan_frontier

_ASKED = ("model", "image_size", "barrier", "method", "server_flops", "frontier", "round_s", "budget")
_COLUMN = {"energy": "energy_j", "bytes": "bytes"}
_LEAST = {"energy": "least energy", "bytes": "fewest bytes"}
_UNIT = {"energy": "J", "bytes": "B"}
_SHOWN = 7  # rows of the frontier in the terminal
_ENERGY = "energy is that of the clients' processors and of sending; receiving and idling are not counted"


def told(config: Config, file: Fleet | None, say: Any) -> Told:
    """Plans the fleet of `config` (`file`: its fleet file, read already) and finds the frontier."""
    fleet, profile, terms = parts.read_terms(config, file)
    say(f"finding the {_LEAST[config.frontier]} for each round time")
    try:
        made = plan_frontier(
            parts.planner(config), profile, fleet, terms, config.frontier, config.round_s, config.budget
        )
    except BadInput as error:
        text = str(error)
        raise BadInput(
            text if text.startswith(("round_s=", "budget=")) else f"--frontier={config.frontier}: {text}"
        ) from error
    table = {**planning.table(made.planned), _COLUMN[config.frontier]: made.amounts}
    name, curve = _COLUMN[config.frontier], made.frontier
    rows = {"round_at_most_s": curve.times_s, name: curve.amounts, f"bound_{name}": curve.bounds}
    draw = functools.partial(_draw, config=config, made=made)
    return Told(_head(config, made), table, _summary(config, made), fleet, draw, rows)


def _head(config: Config, made: FrontierPlanned) -> dict[str, Any]:
    plan, name = made.planned.plan, _COLUMN[config.frontier]
    asked = {key: getattr(config, key) for key in _ASKED}
    asked["round_at_most_s"] = asked.pop("round_s") or made.limit_s
    return {
        **asked,
        "round_s": plan.round_s,
        "bound_s": plan.bound_s,
        name: float(made.amounts.sum()),
        f"bound_{name}": made.bound,
        "shortest_round_s": made.shortest_s,
        **settings(config),
        "fleet": config.fleet,
        "fleet_sha256": digest_of_columns(made.planned.fleet.columns()),
        "seed": config.seed,
        "sfl_jax": __version__,
        "convention": CONVENTION,
        "assumptions": (
            *(line for line in ASSUMPTIONS if "work_conserving" not in line), MEMORY,
            *([_ENERGY] if config.frontier == ENERGY else []),
        ),
    }  # fmt: skip


def _summary(config: Config, made: FrontierPlanned) -> str:
    plan, curve, amount = made.planned.plan, made.frontier, float(np.sum(made.amounts))
    network = f"{config.model} at {config.image_size}x{config.image_size}"
    cuts = f"{plan.cuts.min()} to {plan.cuts.max()} of 0 to {len(made.planned.profile.names)}"
    if config.budget:
        gap = f"optimal to {plan.gap:.0e}" if plan.gap < 1e-6 else f"at most {plan.gap:.2%} above it"
        bound = f"{plan.bound_s:.5g} s, proven for all plans within {_said(config, config.budget)}; this one"
        bound = f"{bound} is {gap}"
    else:
        bound = (
            f"{_said(config, made.bound)}, proven for all plans that end by {made.limit_s:.5g} s; this one"
        )
        bound = f"{bound} takes {_above(amount, made.bound)}"
    given = plan.shares.sum() / config.server_flops
    worst = max(range(len(curve.bounds)), key=lambda n: curve.amounts[n] - curve.bounds[n])
    lines = [
        ("plan", f"{_LEAST[config.frontier]}, {network}, {len(made.planned.fleet)} clients"),
        *(("units", doubt) for doubt in planning.doubts(made.planned.fleet)),
        ("round", f"{plan.round_s:.5g} s; the shortest of any plan is {made.shortest_s:.5g} s"),
        (config.frontier, f"{_said(config, amount)} in a round, of all clients together"),
        ("bound", bound),
        ("server", f"{config.server_flops:.4g} FLOP/s, {given:.1%} of it given"),
        ("cuts", cuts),
        ("frontier", f"the {_LEAST[config.frontier]} for each round time; every row takes"
         f" {_above(curve.amounts[worst], curve.bounds[worst])}"),
        *(("", f"{time_s:>12.5g} s  {_said(config, part):>12}") for time_s, part in _some(curve)),
        ("convention", CONVENTION),
    ]  # fmt: skip
    text = "\n".join(f"{name:<11} {text}" for name, text in lines)
    return f"{text}\n\n{clients_table(made.planned)}\n"


def _said(config: Config, amount: float) -> str:
    return words.amount(float(amount), _UNIT[config.frontier])


def _above(amount: float, bound: float) -> str:
    gap = amount / bound - 1 if bound > 0 else 0.0
    return f"the least, to {max(gap, 1e-12):.0e}" if gap < 1e-6 else f"at most {gap:.2%} more than the least"


def _some(curve):
    places = np.unique(np.linspace(0, len(curve.times_s) - 1, _SHOWN).round().astype(int))
    return [(float(curve.times_s[n]), float(curve.amounts[n])) for n in places]


def _draw(out: BinaryIO, config: Config, made: FrontierPlanned) -> None:
    """The frontier, what is proven of it, and the plan."""
    from matplotlib.figure import Figure

    curve = made.frontier
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.plot(
        curve.times_s, curve.amounts, marker="o", markersize=4, label=f"{_LEAST[config.frontier]} found"
    )
    axes.plot(curve.times_s, curve.bounds, color="black", linestyle=":", linewidth=1, label="proven bound")
    axes.plot(
        [made.planned.plan.round_s],
        [made.amounts.sum()],
        "*",
        color="#e6550d",
        markersize=13,
        label="the plan",
    )
    axes.set(
        title=f"{config.model}, {len(made.planned.fleet)} clients, server {config.server_flops:.3g} FLOP/s",
        xlabel="round, seconds", ylim=(0, None),
        ylabel=f"{config.frontier} of all clients in a round, {_UNIT[config.frontier]}",
    )  # fmt: skip
    axes.legend(frameon=False)
    figure.savefig(out, format="png", dpi=120, metadata=PNG_METADATA)
