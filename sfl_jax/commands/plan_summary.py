"""A plan in a few lines for a person, and in a few values at the head of plan.json."""

from typing import Any

import numpy as np

from sfl_jax.planning import Gains, Planned, binding, seconds

CONVENTION = "FLOP = 2 x multiply-accumulates, backward work counted from the trace"
_ASKED = ("model", "image_size", "barrier", "method", "server_flops")
_SETTINGS = (
    "image_channels",
    "num_classes",
    "min_cut",
    "local_epochs",
    "batch_size",
    "optimizer",
    "momentum",
)
_SHOWN = 3  # clients and cuts that are named


def head(planned: Planned) -> dict[str, Any]:
    """What plan.json says before the clients."""
    config, plan = planned.config, planned.plan
    return {
        **{name: getattr(config, name) for name in _ASKED},
        "round_s": plan.round_s,
        "bound_s": plan.bound_s,
        **({"target_round_s": config.target_round_s} if config.target_round_s else {}),
        **{name: getattr(config, name) for name in _SETTINGS},
        "convention": CONVENTION,
    }


def summary(planned: Planned, gains: Gains) -> str:
    """The plan in lines of a name and a text."""
    config, plan = planned.config, planned.plan
    clients = _count(len(planned.fleet), "client")
    network = f"{config.model} at {config.image_size}x{config.image_size}"
    lines = {
        "plan": f"{config.method}, {config.barrier} barrier, {network}, {clients}",
        "round": f"{plan.round_s:.5g} s",
        "bound": f"{plan.bound_s:.5g} s, proven for every method; {_gap(plan.gap)}",
        "server": _server(planned),
        "cuts": _cuts(planned),
        "time": _time(planned),
        "held up by": _held_up(planned),
        "+1 TFLOP/s": f"of server: {_change(gains.server_s, plan.round_s)}",
        "+10 %": f"of uplink for all: {_change(gains.uplink_s, plan.round_s)}",
        "convention": CONVENTION,
    }
    return "\n".join(f"{name:<11} {text}" for name, text in lines.items())


def _gap(gap: float) -> str:
    return f"this plan is optimal to {gap:.0e}" if gap < 1e-6 else f"this plan is at most {gap:.2%} above it"


def _server(planned: Planned) -> str:
    shares, flops = planned.plan.shares, planned.config.server_flops
    if np.isnan(shares).any():
        return f"{flops:.4g} FLOP/s, all of it for one client after the other"
    if not flops:
        return "none: all clients can train alone"
    target_s, served = planned.config.target_round_s, int(np.count_nonzero(shares))
    smallest = f", the smallest for {target_s:g} s" if target_s else ""
    given = f"{shares.sum() / flops:.1%} of it given to {_count(served, 'client')}"
    alone = f"; {_count(len(shares) - served, 'client')} without" if served < len(shares) else ""
    return f"{flops:.4g} FLOP/s{smallest}, {given}{alone}"


def _cuts(planned: Planned) -> str:
    counts = np.bincount(planned.plan.cuts)
    used = np.flatnonzero(counts)
    most = used[np.argsort(-counts[used], kind="stable")][:_SHOWN]
    shown = [f"{cut} (after {planned.profile.names[cut - 1]})" if cut else "0 (images go up)" for cut in most]
    return f"{used[0]} to {used[-1]} of 0 to {len(planned.profile.names)}, most often {', '.join(shown)}"


def _time(planned: Planned) -> str:
    means = {name: values.mean() for name, values in seconds(planned)._asdict().items()}
    total = sum(means.values())
    largest = sorted((name for name in means if means[name] > 0), key=means.__getitem__, reverse=True)
    return f"of all clients: {', '.join(f'{name} {means[name] / total:.0%}' for name in largest)}"


def _held_up(planned: Planned) -> str:
    who = binding(planned)
    parts = seconds(planned)._asdict()
    named = []
    for client, pull in zip(who.clients[:_SHOWN], who.pull, strict=False):
        longest = max(parts, key=lambda name: parts[name][client])
        where = f"longest {longest} {parts[longest][client]:.3g} s"
        named.append(f"{planned.fleet.client[client]} (pull {pull:.0%}, {where})")
    together = f"a full server: {_count(len(who.clients), 'client')} end together, first "
    return (together if who.server_is_full else "") + ", ".join(named)


def _change(gain_s: float, round_s: float) -> str:
    return f"{gain_s:.3g} s shorter ({gain_s / round_s:.1%})"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
