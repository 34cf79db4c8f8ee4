"""Which flags go with each kind of plan: several servers, rates that change, and a frontier."""

import dataclasses
import math
import pathlib
from typing import Any

from sfl_jax.commands.fields import FILES, FLEET, SCHEME
from sfl_jax.commands.program import program
from sfl_jax.errors import BadInput

# What these plans know, of the flags about clients, server, scheme and files.
_COMMON = {
    "clients", "fleet", "server_flops", "stored_size", "min_cut", "max_cut", "samples_per_client",
    "bits_per_float", "rtt_s", "tail_units", "codec", "codec_down", "output", "plot", "write_fleet",
    "compare_with",
}  # fmt: skip
_UNCERTAIN = ("traces", "interval", "quantile", "broadcast_bps")
_FRONTIER = ("frontier", "round_s", "budget")
# Flags that keep their default with several servers, and why.
_WITH_SERVERS = {
    "server_flops": "whose file has the compute of each",
    "server_memory_bytes": "whose file has the memory of each",
    "method": "since no other method plans for several",
    "barrier": "since no other barrier is planned for several",
    "band": "since links of several servers are fixed",
    "links": "since links of several servers are fixed",
    "broadcast_bps": "since each server would send the model by itself",
    "scheme": "since no other scheme has several",
    "target_round_s": "since no server is sought",
    "measured": "since rates are fitted for one server only",
    "report": "of which there is no page",
    "traces": "since rates that change are planned for one server",
    "interval": "since rates that change are planned for one server",
    "frontier": "since a frontier is found for one server",
}
_FACTORS = "must be two numbers, LOW,HIGH, with 0 < LOW <= HIGH"


def has_servers(config: Any) -> bool:
    """Whether the plan is for several servers."""
    return bool(config.servers)


def is_uncertain(config: Any) -> bool:
    """Whether the plan is for rates that change."""
    return bool(config.traces or config.interval)


def has_frontier(config: Any) -> bool:
    """Whether a frontier is asked for."""
    return config.frontier != "none"


def factors(config: Any) -> tuple[float, float]:
    """The lowest and the highest factor of --interval. BadInput for anything else."""
    try:
        low, high = map(float, config.interval.split(","))
    except ValueError:
        low, high = 0.0, 0.0
    if not 0 < low <= high < math.inf:
        raise BadInput(f"--interval={config.interval}: {_FACTORS}, for example 0.8,1.2")
    return low, high


def check(config: Any, command: str) -> None:
    """Raises BadInput for settings that such a plan does not take, or that need one."""
    _check_servers(config, command)
    if config.quantile and not is_uncertain(config):
        raise BadInput(f"--quantile={config.quantile:g}: needs --traces or --interval")
    for name in ("round_s", "budget"):
        if (value := getattr(config, name)) and not has_frontier(config):
            raise BadInput(f"--{name}={value:g}: needs --frontier=energy or --frontier=bytes")
    if config.round_s and config.budget:
        raise BadInput(f"--budget={config.budget:g}: leave it out with --round_s, or leave out --round_s")
    if command != "plan":
        return
    if config.traces and config.interval:
        raise BadInput(f"--interval={config.interval}: leave it out with --traces, which has the rates")
    if config.traces and not pathlib.Path(config.traces).is_file():
        raise BadInput(f"--traces={config.traces}: no such file; give the path of a CSV file")
    if config.interval:
        factors(config)
    if is_uncertain(config):
        _refuse_others(config, "--traces" if config.traces else "--interval", _UNCERTAIN)
    elif has_frontier(config):
        _refuse_others(config, f"--frontier={config.frontier}", _FRONTIER)


def _check_servers(config: Any, command: str) -> None:
    if not has_servers(config):
        if config.server_links:
            raise BadInput(f"--server_links={config.server_links}: needs --servers")
        return
    if command != "plan":
        raise BadInput(
            f"--servers={config.servers}: training has one server; {program('plan')} plans several"
        )
    for name, why in _WITH_SERVERS.items():
        if (value := getattr(config, name)) != getattr(type(config), name):
            raise BadInput(f"--{name}={value}: leave it out with --servers, {why}")
    for name in ("servers", "server_links"):
        if (path := getattr(config, name)) and not pathlib.Path(path).is_file():
            raise BadInput(f"--{name}={path}: no such file; give the path of a CSV file")


def _refuse_others(config: Any, why: str, own: tuple[str, ...]) -> None:
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), field.name
        if field.metadata["group"] not in (FLEET, SCHEME, FILES) or "plan" not in field.metadata["commands"]:
            continue
        if name not in _COMMON and name not in own and value != field.default:
            raise BadInput(f"--{name}={value}: leave it out with {why}")
