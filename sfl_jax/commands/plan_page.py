"""A plan as one page of HTML: the round, its bound, each client's time, cut and share, and other servers."""

from pathlib import Path

import numpy as np

from sfl_jax import planning
from sfl_jax.commands import page, pictures, software, words
from sfl_jax.commands.config import Config
from sfl_jax.commands.page import Mark
from sfl_jax.commands.pictures import Bar, Curve
from sfl_jax.commands.plan_plot import other_servers
from sfl_jax.commands.plan_summary import WORDS
from sfl_jax.commands.report_page import OPTIMAL, made_with_card, settings_card
from sfl_jax.planning import Gains, Planned
from sfl_jax.run import history

MOST_CLIENTS = 120  # in the picture of clients, evenly spaced in their order
LISTED = 100  # clients in the table
_RICHER = {
    "server_s": "server", "uplink_s": "uplink for all", "downlink_s": "downlink for all",
    "compute_s": "compute for all clients",
}  # fmt: skip
_HELD = "The part of the round that a client holds up: what the round would gain from it."


def page_of(config: Config, planned: Planned, gains: Gains, summary: str) -> str:
    """The page. summary: what the terminal shows."""
    fleet = "a random fleet" if config.fleet == "random" else Path(config.fleet).name
    title = f"Plan of a round: {config.model} at {config.image_size}x{config.image_size}"
    below = (
        f"{len(planned.fleet)} clients of {fleet}, method {config.method}, {config.barrier} barrier, server"
        f" {words.amount(planned.planner.server_flops, 'FLOP/s')}"
    )
    told = history.of_plan(planned)
    shares = pictures.shares(told)
    return page.document(title, [
        page.heading(title, below),
        page.tiles(_headline(planned, gains)),
        page.section("Clients"),
        page.cards([
            _clients(planned), _cuts(told), *([shares] if shares else []), pictures.holders(told, _HELD),
            _gains(planned, gains), _servers(planned),
        ]),
        page.card("Each client", page.details(_table_title(planned), _table(planned))),
        page.card("As on the terminal", page.code(summary)),
        page.section("Settings and software"),
        page.cards(
            [settings_card(config, "plan"), made_with_card({"packages": software.packages()})], "tables"
        ),
    ])  # fmt: skip


def _headline(planned, gains):
    plan = planned.plan
    yield "Round", words.clock(plan.round_s), "simulated seconds"
    bound = f"proven bound {words.clock(plan.bound_s)}"
    if plan.gap < OPTIMAL:
        yield "Proven gap", "optimal", f"within {max(plan.gap, 0):.0e} of its bound; {bound}"
    else:
        yield "Proven gap", words.percent(plan.gap), f"at most above the optimum; {bound}"
    served = int((plan.cuts < len(planned.profile.names)).sum())
    yield "On the server", f"{served} of {len(plan.cuts)}", "clients that do not train alone"
    name = max(_RICHER, key=lambda name: getattr(gains, name))
    part = getattr(gains, name) / plan.round_s if plan.round_s else 0.0
    yield (
        "What helps most",
        f"-{words.percent(part, 1)}" if part > 0 else "nothing",
        f"of the round, with 10 % more {_RICHER[name]}",
    )


def _clients(planned) -> str:
    seconds, plan = np.stack(planning.seconds(planned)), planned.plan
    order = np.lexsort((-plan.client_s, -seconds[3]))
    shown = order[np.unique(np.linspace(0, len(order) - 1, MOST_CLIENTS).astype(int))]
    units = ["images", *planned.profile.names]

    def text(k):
        terms = zip(history.TERMS, seconds[:, k], strict=True)
        first = f"{planned.fleet.client[k]}: {words.clock(plan.client_s[k])}"
        cut = f"cut {plan.cuts[k]} ({units[plan.cuts[k]]})"
        return "\n".join([first, cut, *(f"{WORDS[name]}: {words.clock(s)}" for name, s in terms)])

    caption = "Longest on the server first."
    caption += f" {len(shown)} of {len(order)} clients." if len(shown) < len(order) else ""
    names = [str(planned.fleet.client[k]) for k in shown]
    return pictures.clients_by_term(names, seconds[:, shown], [text(k) for k in shown], caption)


def _cuts(told) -> str:
    counts = told.cuts[0]
    rows = [
        Bar(
            f"{pictures.unit_name(told, cut)} {cut}", float(counts[cut]), f"{counts[cut]}",
            f"{counts[cut]} clients cut after {pictures.unit_name(told, cut)}", "blue",
        )
        for cut in np.flatnonzero(counts)
    ]  # fmt: skip
    return pictures.bars("Cuts", "How many clients have which last unit.", rows)


def _gains(planned, gains) -> str:
    rows = []
    for name, label in _RICHER.items():
        gain_s = getattr(gains, name)
        part = max(0.0, gain_s / planned.plan.round_s if planned.plan.round_s else 0.0)
        said = words.percent(part, 1)
        rows.append(
            Bar(label, part, said, f"10 % more {label}:\n{words.clock(max(gain_s, 0))} shorter", "green")
        )
    rows.sort(key=lambda row: -row.value)
    return pictures.bars("What 10 % more would save", "In percent of the round, after a new plan.", rows)


def _servers(planned) -> str:
    flops, rounds_s, bounds_s = other_servers(planned)

    def said(label, values):
        return lambda i: (
            f"{label}: {words.clock(values[i])}\nserver {words.amount(float(flops[i]), 'FLOP/s')}"
        )

    drawn = [
        Curve(flops, bounds_s, said("proven bound", bounds_s), "ink", "2 3"),
        Curve(flops, rounds_s, said("round", rounds_s), "blue", "", 2.5),
    ]
    marks = [Mark("round", "blue"), Mark("proven bound", "ink", "2 3")]
    caption = "The round of the same fleet with other servers."
    return pictures.curves(
        "A smaller or larger server",
        caption,
        drawn,
        "server, FLOP/s",
        "seconds",
        log=True,
        bottom=0.0,
        marks=marks,
    )


def _table_title(planned) -> str:
    count = len(planned.fleet)
    return f"{count} clients" if count <= LISTED else f"The first {LISTED} of {count} clients"


def _table(planned) -> str:
    plan, flops = planned.plan, planned.planner.server_flops
    units, seconds = ["images", *planned.profile.names], planning.seconds(planned)._asdict()
    rows = [("client", "cut", "after unit", "share", "seconds", *(WORDS[name] for name in seconds))]
    for k, name in enumerate(planned.fleet.client[:LISTED]):
        share = words.NONE if not flops or np.isnan(plan.shares[k]) else words.percent(plan.shares[k] / flops)
        terms = (f"{values[k]:.4g}" for values in seconds.values())
        rows.append(
            (str(name), f"{plan.cuts[k]}", units[plan.cuts[k]], share, f"{plan.client_s[k]:.4g}", *terms)
        )
    return page.grid(rows)
