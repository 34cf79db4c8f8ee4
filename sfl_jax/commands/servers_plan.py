"""The plan of several servers: what the terminal and plan.json tell of it."""

import functools
from typing import Any, BinaryIO

import numpy as np

from sfl_jax import __version__, planning
from sfl_jax.commands import parts
from sfl_jax.commands.config import Config
from sfl_jax.commands.plan_clients import several_clients_table
from sfl_jax.commands.plan_kinds import Told
from sfl_jax.commands.plan_summary import (
    ASSUMPTIONS,
    CONVENTION,
    MEMORY,
    WITHIN_MEMORY,
    WORDS,
    of_links,
    settings,
)
from sfl_jax.digests import digest_of_columns
from sfl_jax.errors import BadInput
from sfl_jax.fleet import Fleet, read_servers
from sfl_jax.planning import SeveralPlanned

_MOST_GAINS = 5  # servers for which 10 % more compute is tried
_SHOWN = 3  # how many clients are named that hold the round up
_ASKED = ("model", "image_size", "barrier", "method", "links", "band", "servers", "server_links")
_OWN = (
    "each client has one server for the whole round, with its links to that server",
    "the servers average their models at the end of the round, in no time",
)


def told(config: Config, file: Fleet | None, say: Any) -> Told:
    """Plans the fleet of `config` (`file`: its fleet file, read already) for the servers of its file."""
    fleet, profile, terms = parts.read_terms(config, file)
    say(f"assigning {len(fleet)} clients to servers")
    try:
        servers = read_servers(config.servers, fleet, config.server_links or None)
    except BadInput as error:
        flag = (
            "server_links"
            if config.server_links and f"{error}".startswith(config.server_links)
            else "servers"
        )
        raise BadInput(f"--{flag}: {error}") from error
    try:
        planned = planning.plan_servers(profile, fleet, terms, servers)
    except BadInput as error:
        raise BadInput(f"--servers={config.servers}: {error}") from error
    table, text = planning.several_table(planned), _summary(config, planned, terms)
    draw = functools.partial(_draw, config=config, planned=planned)
    return Told(_head(config, planned), table, text, fleet, draw, {})


def _head(config: Config, planned: SeveralPlanned) -> dict[str, Any]:
    plan, servers = planned.plan, planned.servers
    by_server = zip(servers.server.tolist(), *(part.tolist() for part in _by_server(planned)), strict=True)
    memory = WITHIN_MEMORY if np.isfinite(servers.memory_bytes).any() else MEMORY
    return {
        **{name: getattr(config, name) for name in _ASKED},
        "round_s": plan.round_s,
        "bound_s": plan.bound_s,
        "iterations": plan.iterations,
        "of_servers": [
            {"server": name, "flops": flops, "memory_bytes": limit if np.isfinite(limit) else None,
             "clients": clients, "share_flops": given, "server_bytes": taken}
            for name, flops, limit, clients, given, taken in by_server
        ],
        **settings(config),
        "fleet": config.fleet,
        "fleet_sha256": digest_of_columns(planned.fleet.contents()),
        "seed": config.seed,
        "sfl_jax": __version__,
        "convention": CONVENTION,
        "assumptions": (*(line for line in ASSUMPTIONS if "work_conserving" not in line),
                        *of_links(config, planned.fleet), memory, *_OWN),
    }  # fmt: skip


def _by_server(planned: SeveralPlanned):
    """FLOP/s, memory, clients, shares given and bytes taken; (E,) each."""
    plan, servers = planned.plan, planned.servers
    served = plan.servers[plan.shares > 0]
    sums = (
        np.bincount(plan.servers, part, len(servers))
        for part in (plan.shares, planning.several_bytes(planned))
    )
    return servers.flops, servers.memory_bytes, np.bincount(served, minlength=len(servers)), *sums


def _summary(config: Config, planned: SeveralPlanned, terms) -> str:
    plan, servers = planned.plan, planned.servers
    gap = f"optimal to {plan.gap:.0e}" if plan.gap < 1e-6 else f"at most {plan.gap:.2%} above it"
    lines = [
        ("plan", f"exact, session barrier, the links of each server, {config.model} at {config.image_size}x"
         f"{config.image_size}, {len(planned.fleet)} clients, {len(servers)} servers"),
        *(("units", doubt) for doubt in _doubts(config, planned)),
        ("round", f"{plan.round_s:.5g} s"),
        ("bound", f"{plan.bound_s:.5g} s, proven for all assignments, cuts and constant shares; this plan is"
         f" {gap}"),
        *(("server", line) for line in _of_servers(planned)),
        ("cuts", f"{plan.cuts.min()} to {plan.cuts.max()} of 0 to {len(planned.profile.names)}"),
        *(("held up by", line) for line in _held_up(planned)),
        *_gains(planned, terms),
        ("convention", CONVENTION),
    ]  # fmt: skip
    text = "\n".join(f"{name:<11} {text}" for name, text in lines)
    return f"{text}\n\n{several_clients_table(planned)}\n"


def _doubts(config: Config, planned: SeveralPlanned) -> list[str]:
    """What looks as if it had another unit: in the fleet, the servers and their links."""
    servers = planned.servers
    fleet = planning.doubts(planned.fleet)
    if config.server_links:  # which replace the fleet's rates; 0 is no link
        rates = {"uplink_bps": servers.uplink_bps, "downlink_bps": servers.downlink_bps}
        slowest = {name: np.where(values > 0, values, np.inf).min(axis=1) for name, values in rates.items()}
        own = planning.rate_doubts(slowest, planned.fleet.client)
        fleet += [f"{config.server_links}: {doubt}" for doubt in own]
    own = planning.rate_doubts({"flops": servers.flops}, servers.server, "server")
    return [*fleet, *(f"{config.servers}: {doubt}" for doubt in own)]


def _of_servers(planned: SeveralPlanned):
    """A line for each server: what of its compute and memory is used, and by how many clients."""
    plan = planned.plan
    for e, (flops, limit, clients, given, taken) in enumerate(zip(*_by_server(planned), strict=True)):
        name, own_s = planned.servers.server[e], plan.client_s[(plan.servers == e) & (plan.shares > 0)]
        memory = f"; {taken / 1e9:.4g} of {limit / 1e9:.4g} GB taken" if np.isfinite(limit) else ""
        count = f"{clients} client{'' if clients == 1 else 's'}"
        ends = f", done after {own_s.max():.5g} s" if clients else ""
        yield f"{name}: {flops:.4g} FLOP/s, {given / flops:.1%} of it given to {count}{ends}{memory}"


def _gains(planned: SeveralPlanned, terms) -> list[tuple[str, str]]:
    """What the servers bring together, and what more of one would."""
    round_s, lines = planned.plan.round_s, []
    if alone := planning.best_alone(planned, terms):
        name, alone_s = planned.servers.server[alone[0]], alone[1]
        lines.append(("one alone", f"{alone_s:.5g} s with {name} alone, the best of them"))
    if len(planned.servers) <= _MOST_GAINS:
        gains = zip(planned.servers.server, planning.server_gains_s(planned, terms), strict=True)
        for name, gain_s in sorted(gains, key=lambda pair: -pair[1]):
            is_gain = gain_s > planning.TOGETHER * round_s
            change = f"{gain_s:.3g} s shorter ({gain_s / round_s:.1%})" if is_gain else "no change"
            lines.append(("+10 %", f"of server {name}: {change}"))
    return lines


def _held_up(planned: SeveralPlanned):
    """A line for each server on which the round ends."""
    names, parts = planned.fleet.client, planning.several_seconds(planned)._asdict()
    for e, who in planning.several_binding(planned).items():
        named = []
        for client, pull in zip(who.clients[:_SHOWN].tolist(), who.pull, strict=False):
            longest = max(parts, key=lambda term: parts[term][client])
            where = f"longest: {WORDS[longest]} {parts[longest][client]:.3g} s"
            named.append(f"{names[client]} (pull {pull:.0%}, {where})")
        count, server = len(who.clients), f"server {planned.servers.server[e]}"
        if who.together:
            where = f"full {server}: {count} client{'s end together, first' if count > 1 else ':'} "
        elif planned.plan.shares[who.clients[0]]:
            where = f"{server}: "
        else:
            where = f"{count} that train{'' if count > 1 else 's'} alone: "
        yield where + ", ".join(named)


def _draw(out: BinaryIO, config: Config, planned: SeveralPlanned) -> None:
    from sfl_jax.commands.plan_plot import write_servers_plot

    write_servers_plot(out, config, planned)
