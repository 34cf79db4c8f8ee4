"""Rules between settings. Each refusal names the flag, its value and what is allowed."""

import pathlib
import re
import sys
from collections.abc import Collection
from typing import Any

from sfl_jax import plan_rules
from sfl_jax.commands import plan_kind_rules
from sfl_jax.commands.fields import LARGEST_INT
from sfl_jax.errors import BadInput, did_you_mean
from sfl_jax.registry import CODECS, STARTS

ALTERNATING = ("alternating", "regression")
RANDOM, CLIENTS = "random", 100  # the fleet without a file, and its number of clients without --clients
EXAMPLE = "example"  # the fleet in the package, see `fleet.read_fleet`

# Flags that only plans take, and why training needs none.
_SAID = "the dataset says it"
_IN_TRAINING = {
    "image_channels": _SAID, "num_classes": _SAID, "samples_per_client": _SAID, "stored_size": _SAID,
    "bits_per_float": "it is 32",
}  # fmt: skip

# Flags that need one of these values of another flag.
_NEEDS = {
    "dirichlet_alpha": ("partition", ("dirichlet", "quantity")),
    "shards_per_client": ("partition", ("shards",)),
    "server_order": ("scheme", ("sfl_v2",)),
    "server_batch": ("scheme", ("psl",)),
    "keep_server_state": ("scheme", ("sfl_v2", "psl", "sl")),
    "decay_rate": ("learning_rate_schedule", ("exponential", "step")),
    "decay_rounds": ("learning_rate_schedule", ("exponential", "step")),
    "server_epsilon": ("server_optimizer", ("adam", "yogi")),
}


def check(config: Any, command: str, taken: Collection[str]) -> None:
    """Raises BadInput for settings that do not fit together, among the flags that the command takes.

    What a scheme allows is checked by `run.suiting`.
    """
    default = type(config)
    known = config.clients or (CLIENTS if config.fleet == RANDOM else 0)  # a file is not read here
    in_cohorts = "cohort_size" in taken and not config.plan_only
    # `division.settle` lowers the default for smaller fleets.
    in_cohorts = in_cohorts and config.cohort_size != default.cohort_size
    if in_cohorts and 0 < known < config.cohort_size:
        raise BadInput(f"--cohort_size={config.cohort_size}: must be at most --clients={known}")
    for name, (other, values) in _NEEDS.items():
        value = getattr(config, name)
        if other in taken and value != getattr(default, name) and getattr(config, other) not in values:
            needed = " or ".join(f"--{other}={known}" for known in values)
            raise BadInput(f"--{name}={value}: needs {needed}")
    coded = (config.codec, config.codec_down) != ("float32", "")
    if coded and config.bits_per_float != default.bits_per_float:
        raise BadInput(
            f"--bits_per_float={config.bits_per_float}: must be {default.bits_per_float} with"
            f" --codec={config.codec}, which decides the bits"
        )
    for name in ("codec", "codec_down"):
        text = getattr(config, name)
        if text and not all(part.partition(":")[0] in CODECS for part in text.split("+")):
            near = did_you_mean(text, CODECS)
            raise BadInput(f"--{name}={text}: must be of {', '.join(CODECS)}; several with + between{near}")
    _check_plan(config)
    if config.max_cut >= 0 and config.scheme == "fl":
        raise BadInput(f"--max_cut={config.max_cut}: --scheme=fl has no cut")
    if "process_id" in taken and config.process_id >= (config.num_processes or LARGEST_INT):
        raise BadInput(
            f"--process_id={config.process_id}: must be below --num_processes={config.num_processes}"
        )
    if config.coordinator_address and not re.fullmatch(r"\S+:\d{1,5}", config.coordinator_address):
        raise BadInput(f"--coordinator_address={config.coordinator_address}: must be host:port")
    if 0 < config.deadline_factor < 1:
        raise BadInput(f"--deadline_factor={config.deadline_factor:g}: must be 0, or at least 1")
    # `run.parts.cosine` shortens the default for shorter runs.
    if "warmup_rounds" in taken and config.rounds < config.warmup_rounds != default.warmup_rounds:
        raise BadInput(f"--warmup_rounds={config.warmup_rounds}: must be at most --rounds={config.rounds}")
    if (
        "fleet" in taken
        and config.fleet not in (RANDOM, EXAMPLE)
        and not pathlib.Path(config.fleet).is_file()
    ):
        raise BadInput(
            f"--fleet={config.fleet}: no such file; give the path of a fleet.csv, {RANDOM} or {EXAMPLE}"
        )
    if config.fleet != RANDOM and config.samples_per_client != default.samples_per_client:
        raise BadInput(
            f"--samples_per_client={config.samples_per_client}: needs --fleet={RANDOM};"
            f" --fleet={config.fleet} has the samples of each client"
        )
    if "availability" in taken and config.availability and not pathlib.Path(config.availability).is_file():
        raise BadInput(f"--availability={config.availability}: no such file; give the path of a CSV file")
    if "output" in taken and pathlib.Path(config.output).suffix != ".json":
        raise BadInput(f"--output={config.output}: must end in .json")
    if (
        "target_round_s" in taken
        and config.target_round_s
        and (config.method, config.barrier, config.band) != ("exact", "session", "fixed")
    ):
        raise BadInput(
            f"--target_round_s={config.target_round_s:g}: needs"
            " --method=exact, --barrier=session and --band=fixed"
        )
    if "target_round_s" in taken and config.target_round_s and config.server_memory_bytes:
        raise BadInput(f"--target_round_s={config.target_round_s:g}: needs --server_memory_bytes=0")
    if not set(config.starts.split(",")) <= set(STARTS):
        raise BadInput(f"--starts={config.starts}: must be some of {', '.join(STARTS)}, with commas between")
    if config.starts != default.starts and config.method not in ALTERNATING:
        raise BadInput(f"--starts={config.starts}: needs --method=alternating or --method=regression")
    if config.recall and config.method not in ALTERNATING:
        raise BadInput("--recall=true: needs --method=alternating or --method=regression")
    if config.coherence_s and config.links != "fading":
        raise BadInput(f"--coherence_s={config.coherence_s:g}: needs --links=fading")
    if config.rounding != default.rounding and config.method != "regression":
        raise BadInput(f"--rounding={config.rounding}: needs --method=regression")
    if config.plan_only and config.band != "fixed":
        raise BadInput(f"--band={config.band}: must be fixed with --plan_only, which compares every method")
    for name, holds in _IN_TRAINING.items():
        value, training = getattr(config, name), command == "compare" and not config.plan_only
        if training and value != getattr(default, name):
            raise BadInput(f"--{name}={value}: needs --plan_only; in training {holds}")
    _check_measured(config)
    if config.broadcast_bps and config.scheme == "sl":
        raise BadInput(
            f"--broadcast_bps={config.broadcast_bps:g}: needs another scheme than sl, where the model goes"
            " from client to client"
        )
    for name, kind in (("seeds", int), ("learning_rates", float)):
        if name in taken and getattr(config, name):
            several(config, name, kind)
    plan_kind_rules.check(config, command)
    for name in ("dataset", "workdir"):
        if name in taken and not getattr(config, name).strip():
            raise BadInput(f"--{name}=: must not be empty")


def several(config: Any, name: str, kind: type) -> list[Any]:
    """The numbers of --seeds or --learning_rates. BadInput if one is not allowed, or is there twice."""
    text = getattr(config, name)
    try:
        numbers = [kind(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    most = LARGEST_INT if kind is int else sys.float_info.max  # as for a single one
    good = numbers and all(0 <= number <= most and (number or kind is int) for number in numbers)
    if not good or len(set(numbers)) < len(numbers):
        allowed = "integers, at least 0" if kind is int else "numbers above 0"
        raise BadInput(f"--{name}={text}: must be {allowed}, each once, with commas between")
    return numbers


def _check_plan(config: Any) -> None:
    """The rules of a planner, which name arguments, with the flags of these."""
    try:
        plan_rules.check(config, config.max_cut if config.max_cut >= 0 else None)
    except BadInput as error:
        raise BadInput(re.sub(r"\b(\w+)=", r"--\1=", str(error))) from error


def _check_measured(config: Any) -> None:
    """Raises BadInput for settings under which no rates can be fitted to measured rounds."""
    if not config.measured:
        return
    said = f"--measured={config.measured}"
    if config.fleet == RANDOM:
        raise BadInput(f"{said}: needs --fleet, a file with the clients that were measured")
    for name, why in (("links", "rates come from distances"), ("band", "rates follow from parts of a band")):
        if getattr(config, name) != "fixed":
            raise BadInput(f"{said}: needs --{name}=fixed; with {getattr(config, name)} {why}")
    if not pathlib.Path(config.measured).is_file():
        raise BadInput(f"{said}: no such file; give the path of a CSV file")
