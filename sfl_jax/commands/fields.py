"""A flag: a field of `Config` with its help, its limits and the commands that take it."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

# The commands that take a flag, and the headings of --help.
TRAINING = ("train", "compare")
RUNNING = (*TRAINING, "report")
PLANNING = (*TRAINING, "plan")
DATALESS = ("plan", "compare")  # compare with --plan_only, where no dataset says so
PROFILING = ("profile_device",)  # which times a network on a machine
CERTIFYING = ("certify",)  # which compares a network in two parts with the whole
ALONE = (*PROFILING, *CERTIFYING)  # a network without data, clients and server
NETWORK, DATA, FLEET, LEARNING = "network", "data", "clients and server", "learning"
SCHEME = "scheme"
MACHINE, PROCESSES, FILES = "machine", "several hosts", "files"
HARMLESS = (MACHINE, PROCESSES, FILES)

LARGEST_INT = 2**31 - 1


def flag(default: Any, group: str, commands: tuple[str, ...], text: str, **limits: Any) -> Any:
    """A field of `Config` with what its flag needs.

    limits: choices, at_least, at_most, above, below. open: the value that leaves the choice to the run.
    hints: a remedy for some wrong values. harmless: whether a run may go on with another value. It may if
    only rounding changes, as under some headings, or if the value names a file whose contents are compared.
    """
    metadata = {"group": group, "commands": commands, "help": text, "harmless": group in HARMLESS}
    return dataclasses.field(default=default, metadata=metadata | limits)


def allowed(field: dataclasses.Field[Any]) -> str:
    """What a field may hold, in words, for example "an integer, at least 1"."""
    if "choices" in field.metadata:
        return f"one of {', '.join(field.metadata['choices'])}"
    kind = {int: "an integer", float: "a finite number", bool: "true or false", str: "a text"}
    return ", ".join(filter(None, [kind[type(field.default)], bounds(field)]))


def bounds(field: dataclasses.Field[Any]) -> str:
    """The bounds of a number in words, for example "at least 8 and at most 4096". Empty without bounds."""
    words = {"at_least": "at least", "above": "above", "below": "below", "at_most": "at most"}
    return " and ".join(
        f"{words[key]} {_plain(field.metadata[key])}" for key in words if key in field.metadata
    )


def said(name: str, value: Any) -> str:
    """A value as a flag takes it, and as --help writes it."""
    is_number = has_type(value, float)
    if name.endswith("_flops") and is_number and value % 1e9 == 0:
        return f"{value / 1e9:g}G"
    if isinstance(value, bool):
        return str(value).lower()
    short = f"{value:g}" if is_number else ""
    return short if short and float(short) == value else str(value)


def _plain(number: float) -> str:
    """For example 1,000,000 and 0.5."""
    return f"{int(number):,}" if number == int(number) else f"{number:g}"


def is_path(field: dataclasses.Field[Any]) -> bool:
    """Whether the field holds a path."""
    return field.metadata.get("path", False)


def has_type(value: Any, kind: type) -> bool:
    """Whether a value has the type of a setting. An integer is also a number; a bool is not an integer."""
    return type(value) is kind or (kind is float and type(value) is int)


def is_within(value: Any, limits: Mapping[str, Any]) -> bool:
    """Whether a value is within these limits."""
    if "choices" in limits:
        return value in limits["choices"]
    if isinstance(value, str | bool):
        return True
    return (
        math.isfinite(value)
        and limits.get("at_least", -math.inf) <= value <= limits.get("at_most", math.inf)
        and limits.get("above", -math.inf) < value < limits.get("below", math.inf)
    )
