"""Describes a plan: in a few lines for a person, and in a few values at the head of plan.json."""

from typing import Any

import numpy as np
from jaxtyping import Float64

from sfl_jax import __version__, optim
from sfl_jax.commands.config import Config
from sfl_jax.commands.division import idle_columns
from sfl_jax.commands.plan_clients import clients_table
from sfl_jax.commands.rules import ALTERNATING, RANDOM
from sfl_jax.digests import digest_of_columns
from sfl_jax.fleet import Fleet
from sfl_jax.planning import (
    TOGETHER,
    Gains,
    Planned,
    any_schedule_bound_s,
    binding,
    doubts,
    floor,
    memory_gain_s,
    seconds,
    server_bytes,
)

ASSUMPTIONS = (
    "the parts of a session run one after the other, without overlap; so a client never sends and receives at"
    " once, and half-duplex links lose nothing",
    "a share of the server is constant over the round, and speed is proportional to it (not with "
    "work_conserving)",
    "transfers start at once, at one rate for the whole round",
    "averaging takes no time",
    "at cut 0 the stored images go up in every epoch",
)
MEMORY = "the server has memory for a copy of its half for every client"
WITHIN_MEMORY = (
    "a copy of the server's half takes its parameters, their gradients, optimiser state and statistics, and"
    " activations of a batch"
)
CONVENTION = "FLOP = 2 x multiply-accumulates, backward work counted from the trace"
_ASKED = ("model", "image_size", "barrier", "method", "links", "band", "server_flops")
_SETTINGS = (
    "stored_size",
    "image_channels",
    "num_classes",
    "min_cut",
    "max_cut",
    "tail_units",
    "scheme",
    "codec",
    "codec_down",
    "local_epochs",
    "batch_size",
    "bits_per_float",
    "optimizer",
    "momentum",
)
_LATER = ("rtt_s", "broadcast_bps", "measured")  # written only where they are given
_LINKS = {"fixed": "the fleet's links", "shannon": "Shannon links", "fading": "Shannon links as in round 0"}
_SHOWN = 3  # how many clients and cuts are named
_NEARLY = 0.95  # a client that needs this part of the round with any server holds the round up alone
WORDS = {  # readable names of terms
    "model_down": "model down", "client_forward": "client forward", "smashed_up": "smashed data up",
    "server": "server", "gradient_down": "gradient down", "client_backward": "client backward",
    "model_up": "model up",
}  # fmt: skip


def head(config: Config, planned: Planned, cohorts_s: Float64[np.ndarray, " R"]) -> dict[str, Any]:
    """The values of plan.json before its clients. cohorts_s: from `planning.cohort_rounds_s`."""
    plan = planned.plan
    return {
        **{name: getattr(config, name) for name in _ASKED},
        "round_s": plan.round_s,
        "bound_s": plan.bound_s,
        "any_schedule_bound_s": any_schedule_bound_s(planned),
        "iterations": plan.iterations,
        **({"cohorts": _of_cohorts(config, cohorts_s)} if len(cohorts_s) else {}),
        **({"starts": config.starts, "recall": config.recall} if config.method in ALTERNATING else {}),
        **({"fits": fits(planned)} if config.method == "regression" else {}),
        **({"server_memory_bytes": config.server_memory_bytes} if config.server_memory_bytes else {}),
        **({"target_round_s": config.target_round_s} if config.target_round_s else {}),
        **settings(config),
        "fleet": config.fleet,
        "fleet_sha256": digest_of_columns(planned.fleet.contents()),
        "seed": config.seed,
        "sfl_jax": __version__,
        "convention": CONVENTION,
        "assumptions": (
            *ASSUMPTIONS,
            *of_links(config, planned.fleet),
            WITHIN_MEMORY if config.server_memory_bytes else MEMORY,
        ),
    }


def settings(config: Config) -> dict[str, Any]:
    """The settings that every kind of plan takes, for plan.json."""
    given = {name: value for name in _LATER if (value := getattr(config, name))}
    return {**given, **{name: getattr(config, name) for name in _SETTINGS}}


def of_links(config: Config, fleet: Fleet) -> tuple[str, ...]:
    """What is assumed about round-trip times, the way of the model, and measured devices."""
    trips = "each message travels half of its client's round-trip time; each step sends one up and one down"
    lines = [
        "messages travel in no time: there is no round-trip time" if fleet.rtt_s is None else trips,
        f"the server sends the model once to all clients, at {config.broadcast_bps:g} bit/s, and each client"
        " starts as soon as its half has come"
        if config.broadcast_bps
        else "the model is sent to each client separately",
    ]
    if fleet.device is not None:
        lines.append("a client with a device computes as fast as the device file says, times its slowdown")
    if config.band == "airtime":
        lines.append("one client at a time sends or receives, at its rates of the fleet")
    return tuple(lines)


def _of_cohorts(config, cohorts_s):
    low, median, high = np.quantile(cohorts_s, (0.1, 0.5, 0.9)).tolist()
    return {
        "cohort_size": config.cohort_size, "rounds": len(cohorts_s), "mean_round_s": float(cohorts_s.mean()),
        "p10_round_s": low, "median_round_s": median, "p90_round_s": high,
        "longest_round_s": float(cohorts_s.max()),
    }  # fmt: skip


def fits(planned: Planned) -> list[dict[str, Any]]:
    """The curve that the regression chose for each quantity, and how well it fits.

    The curve is `scale` times the family's formula of cut / last_cut.
    """
    curves = optim.fit_curves(planned.terms)
    return [
        {"quantity": curve.quantity, "family": curve.chosen.family, "parameters": curve.chosen.parameters,
         "scale": curve.chosen.scale, "last_cut": curve.chosen.last_cut,
         "r2": curve.chosen.r2, "worst_error": curve.chosen.worst}
        for curve in curves
    ]  # fmt: skip


def summary(config: Config, planned: Planned, gains: Gains, cohorts_s: Float64[np.ndarray, " R"]) -> str:
    """The plan in lines of a name and a text."""
    plan = planned.plan
    clients = _count(len(planned.fleet), "client")
    method = config.method + (f" from {config.starts}" if config.starts != Config.starts else "")
    method += " with recall" if config.recall else ""
    network = f"{config.model} at {config.image_size}x{config.image_size}"
    more = [
        ("+10 %", "of server", gains.server_s), ("+10 %", "of uplink for all", gains.uplink_s),
        ("+10 %", "of downlink for all", gains.downlink_s),
        ("+10 %", "of compute for all clients", gains.compute_s),
    ]  # fmt: skip
    if config.server_memory_bytes:
        more.append(("+10 %", "of memory of the server", memory_gain_s(planned)))
    more.sort(key=lambda each: -each[2])
    lines = [
        ("plan", f"{method}, {config.barrier} barrier, {_LINKS[config.links]}, {network}, {clients}"),
        *(("units", doubt) for doubt in doubts(planned.fleet)),
        *(("columns", line) for line in idle_columns(config, planned.fleet) if config.fleet != RANDOM),
        ("round", f"{plan.round_s:.5g} s"),
        *_bounds(planned),
        *([("in cohorts", _in_cohorts(config, cohorts_s))] if len(cohorts_s) else []),
        ("server", _server(planned, config.target_round_s)),
        *([("memory", _memory(planned))] if config.server_memory_bytes else []),
        *([("band", _band(planned.plan))] if isinstance(planned.plan, optim.BandPlan) else []),
        ("cuts", _cuts(planned)),
        ("time", _time(planned)),
        ("held up by", _held_up(planned)),
        *((name, f"{what}: {_change(gain_s, plan.round_s, config.method)}") for name, what, gain_s in more),
        ("convention", CONVENTION),
    ]
    text = "\n".join(f"{name:<11} {text}" for name, text in lines)
    return f"{text}\n\n{clients_table(planned)}\n"


def _in_cohorts(config, cohorts_s):
    of = _of_cohorts(config, cohorts_s)
    return (
        f"of {config.cohort_size} (--cohort_size), like in training: {of['median_round_s']:.4g} s in the "
        f"median of {len(cohorts_s)} rounds, {of['p10_round_s']:.4g} to {of['p90_round_s']:.4g} s in four of "
        "five"
    )


def _gap(gap: float) -> str:
    return f"this plan is optimal to {gap:.0e}" if gap < 1e-6 else f"this plan is at most {gap:.2%} above it"


def _bounds(planned: Planned) -> list[tuple[str, str]]:
    """The proven bounds, and for which servers they hold."""
    plan, whatever_s = planned.plan, any_schedule_bound_s(planned)
    if planned.planner.method == "work_conserving":
        return [("bound", f"{plan.bound_s:.5g} s, proven for all cuts and every schedule; {_gap(plan.gap)}")]
    cuts = "all cuts that fit the memory" if planned.planner.server_memory_bytes else "all cuts"
    lines = [("bound", f"{plan.bound_s:.5g} s, proven for {cuts} and constant shares; {_gap(plan.gap)}")]
    if whatever_s is not None:
        lines.append(("", f"{whatever_s:.5g} s, proven for every schedule: see --method=work_conserving"))
    return lines


def _server(planned: Planned, target_round_s: float) -> str:
    shares, flops = planned.plan.shares, planned.planner.server_flops
    if planned.planner.method == "work_conserving":
        return f"{flops:.4g} FLOP/s, all of it for the waiting client with the most time left to go"
    if np.isnan(shares).any():
        return f"{flops:.4g} FLOP/s, all of it for one client after the other"
    if not flops:
        return "none: all clients can train alone"
    target_s, served = target_round_s, int(np.count_nonzero(shares))
    smallest = f", the smallest for {target_s:g} s" if target_s else ""
    given = f"{shares.sum() / flops:.1%} of it given to {_count(served, 'client')}"
    alone = f"; {_count(len(shares) - served, 'client')} without a share" if served < len(shares) else ""
    return f"{flops:.4g} FLOP/s{smallest}, {given}{alone}"


def _memory(planned: Planned) -> str:
    taken, limit = server_bytes(planned), planned.planner.server_memory_bytes
    copies = (
        "copy of the server's half"
        if (count := np.count_nonzero(taken)) == 1
        else "copies of the server's half"
    )
    return f"{taken.sum() / 1e9:.4g} of {limit / 1e9:.4g} GB, taken by {count} {copies}"


def _band(plan: optim.BandPlan) -> str:
    ways = {"up": plan.uplink_hz, "down": plan.downlink_hz}
    parts = (f"{parts.min():.3g} to {parts.max():.3g} equal parts {way}" for way, parts in ways.items())
    return f"{', '.join(parts)} of a client"


def _cuts(planned: Planned) -> str:
    counts = np.bincount(planned.plan.cuts)
    used = np.flatnonzero(counts)
    most = used[np.argsort(-counts[used], kind="stable")][:_SHOWN]
    shown = [f"{cut} (after {planned.profile.names[cut - 1]})" if cut else "0 (images go up)" for cut in most]
    return f"{used[0]} to {used[-1]} of 0 to {len(planned.profile.names)}, most often {', '.join(shown)}"


def _time(planned: Planned) -> str:
    parts = seconds(planned)
    means = {name: values.mean() for name, values in parts._asdict().items()}
    total = sum(means.values())
    largest = sorted((name for name in means if means[name] > 0), key=means.__getitem__, reverse=True)
    said = [f"{WORDS[name]} {means[name] / total:.0%}" + _whole_server(planned, name) for name in largest]
    return f"of all clients: {', '.join(said)}"


def _whole_server(planned: Planned, name: str) -> str:
    """How long a client's server work would take on the whole server, because a share makes it longer."""
    if name == "server" and planned.planner.method == "work_conserving":
        return " (waiting included)"
    if name != "server" or np.isnan(planned.plan.shares).any():
        return ""
    _, work, _ = planned.terms.at(planned.terms.columns(planned.plan.cuts, planned.plan.codecs))
    return f" (on its share; {work.mean() / planned.planner.server_flops:.2g} s on the whole server)"


def _held_up(planned: Planned) -> str:
    who, round_s = binding(planned), planned.plan.round_s
    names, parts = planned.fleet.client, seconds(planned)._asdict()
    for client in who.clients[:_SHOWN]:
        own = floor(planned, int(client))
        if not isinstance(planned.plan, optim.BandPlan) and own.least_s >= _NEARLY * round_s:
            return (
                f"client {names[client]} alone: it needs {own.least_s:.4g} of these {round_s:.4g} s with any"
                f" server, {own.resource_s:.4g} s of them for its {own.resource}"
            )
    named = []
    for client, pull in zip(who.clients[:_SHOWN], who.pull, strict=False):
        longest = max(parts, key=lambda name: parts[name][client])
        where = f"longest: {WORDS[longest]} {parts[longest][client]:.3g} s"
        named.append(f"{names[client]} (pull {pull:.0%}, {where})")
    shared = "a full band" if isinstance(planned.plan, optim.BandPlan) else "a full server"
    together = f"{shared}: {_count(len(who.clients), 'client')} end together, first "
    return (together if who.together else "") + ", ".join(named)


def _change(gain_s: float, round_s: float, method: str) -> str:
    if abs(gain_s) <= TOGETHER * round_s:
        return "no change"
    if gain_s < 0:
        return f"{-gain_s:.3g} s longer ({-gain_s / round_s:.1%}): {method} finds a worse plan there"
    return f"{gain_s:.3g} s shorter ({gain_s / round_s:.1%})"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
