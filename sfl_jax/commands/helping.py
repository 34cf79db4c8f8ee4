"""The texts of --help: the flags for a first hour, or all with --helpfull."""

import dataclasses
import shutil
import textwrap
from collections.abc import Sequence
from typing import Any

from sfl_jax.commands import preset
from sfl_jax.commands.config import fields_of
from sfl_jax.commands.fields import bounds
from sfl_jax.commands.program import program

SHORT, FULL = {"--help", "-help", "-h", "--helpshort"}, {"--helpfull", "-helpfull"}
MOST_WIDTH, LEAST_WIDTH, COLUMN = 100, 60, 30
# The flags for a first hour, in the order in which a user meets them.
FIRST = {
    "train": (
        "dataset", "model", "clients", "cohort_size", "partition", "fleet", "server_flops", "method",
        "rounds", "workdir",
    ),
    "plan": (
        "fleet", "model", "image_size", "server_flops", "method", "target_round_s", "batch_size",
        "local_epochs", "output", "plot",
    ),
    "compare": (
        "plan_only", "dataset", "model", "clients", "cohort_size", "fleet", "server_flops", "method",
        "rounds", "workdir",
    ),
    "report": ("workdir",),
    "profile_device": ("model", "image_size", "batch_size", "repetitions", "device_file"),
}  # fmt: skip
EXAMPLES = {
    "train": (
        ("--preset=quick", "a first look, about a minute"),
        ("--preset=mnist --rounds=10 --workdir=runs/short", "a preset with other settings"),
        ("--fleet=fleet.csv --method=no_split", "your own clients, no split"),
    ),
    "plan": (
        ("--server_flops=100G", "100 random clients"),
        ("--fleet=fleet.csv --output=plan.json --plot", "your own clients, and a picture"),
        ("--fleet=fleet.csv --target_round_s=20", "the smallest server for this round"),
    ),
    "compare": (
        ("--plan_only", "the plans of all methods, no training"),
        ("--preset=quick --workdir=runs/compare", "one training, the clocks of all methods"),
    ),
    "report": (("--workdir=runs/demo", "a finished or a running run"),),
    "profile_device": (("--model=efficientnetv2-b0 --device_file=pi.json", "this machine, for a fleet.csv"),),
}


def help_text(command: str, about: str, arguments: Sequence[str] = ()) -> str:
    """The text of --help: about, usage, examples, and flags with default, meaning and limits.

    `arguments` say whether all flags are wanted, and in which of its two uses `compare` is called.
    """
    width = min(max(shutil.get_terminal_size().columns - 1, LEAST_WIDTH), MOST_WIDTH)
    name, own = program(command), _that_apply(command, "--plan_only" in arguments)
    presets = " [--preset=NAME]" if command in preset.COMMANDS else ""
    usage = f"usage: {name}{presets} [--flagfile=FILE] [--NAME=VALUE ...]"
    lines = [*textwrap.wrap(" ".join(about.split()), width), "", *_indented(usage, width), "", "examples"]
    for flags, meaning in EXAMPLES[command]:
        lines += [*_indented(f"  {name} {flags}", width), f"      {meaning}"]
    if command in preset.COMMANDS:
        there = f"presets: {', '.join(preset.names())}; other flags override those of a preset"
        lines += ["", *_indented(there, width)]
    if FULL & set(arguments):
        for heading in dict.fromkeys(field.metadata["group"] for field in own):
            lines += ["", heading]
            lines += _flags((f for f in own if f.metadata["group"] == heading), width)
    else:
        by_name = {field.name: field for field in own}
        first = [by_name[each] for each in FIRST[command] if each in by_name]
        lines += ["", "flags", *_flags(first, width), ""]
        rest = len(own) - len(first)
        more = f"--helpfull lists {rest} more; " if rest else ""
        lines += _indented(f"{more}--version prints the release", width)
    return "\n".join(lines)


def _that_apply(command: str, plans_only: bool) -> list[dataclasses.Field[Any]]:
    """The flags of `command`. `compare` has some for training only and some for plans only."""
    fields = fields_of(command)
    if command != "compare":
        return fields
    always = {"workdir", "plan_only"}
    apply = {field.name for field in fields_of("plan" if plans_only else "train")} | always
    return [field for field in fields if field.name in apply]


def _flags(fields, width):
    for field in fields:
        meaning = field.metadata["help"] + _limits(field)
        flag = f"  --{field.name}={_written(field)}"
        room = width - COLUMN
        if len(flag) < COLUMN:
            first, *others = textwrap.wrap(meaning, room, break_on_hyphens=False)
            yield f"{flag:<{COLUMN}}{first}"
        else:
            yield flag
            others = textwrap.wrap(meaning, room, break_on_hyphens=False)
        yield from (" " * COLUMN + line for line in others)


def _limits(field) -> str:
    """The choices, or the bounds if they are not obvious."""
    limits = ", ".join(field.metadata.get("choices", ())) or bounds(field)
    return "" if limits in ("", "at least 0", "at least 1", "at least -1", "above 0") else f" ({limits})"


def _written(field) -> str:
    value = field.default
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _indented(text, width):
    return textwrap.wrap(
        text, width, subsequent_indent="      ", break_on_hyphens=False, break_long_words=False
    )
