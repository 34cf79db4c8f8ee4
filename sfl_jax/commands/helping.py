"""The texts of --help: the flags for a first hour, or all with --helpfull."""

import copy
import dataclasses
import re
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from sfl_jax.commands import preset
from sfl_jax.commands.config import PLANS_WORKDIR, fields_of
from sfl_jax.commands.fields import bounds, said
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
        "fleet", "model", "image_size", "server_flops", "target_round_s", "batch_size", "local_epochs",
        "output", "plot", "report",
    ),
    "compare": (
        "plan_only", "dataset", "model", "clients", "cohort_size", "fleet", "server_flops", "method",
        "rounds", "workdir",
    ),
    "report": ("workdir",),
    "profile_device": ("model", "image_size", "batch_size", "repetitions", "device_file"),
    "certify": ("model", "image_size", "batch_size", "tail_units", "certificate"),
    "study": (),
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
    "certify": (
        ("--model=cnn --image_size=28 --batch_size=4", "a small network, every cut"),
        (
            "--model=efficientnetv2-s --batch_size=4 --tail_units=1",
            "a U-shape, which keeps labels at the client",
        ),
    ),
    "study": (
        ("--preset=quick --vary=codec=float32,int8", "two codecs, about two minutes"),
        (
            "--vary=scheme=sfl,sfl_v2,psl,sl --vary=cut=1,2 --model=cnn --rounds=20",
            "every scheme at two cuts",
        ),
        ("--vary=seed=0,1,2 --vary=codec=float32,int8 --preset=quick", "means over three seeds"),
    ),
}


def help_text(command: str, about: str, arguments: Sequence[str] = ()) -> str:
    """The text of --help: about, usage, examples, and flags with default, meaning and limits.

    `arguments` say whether all flags are wanted, and in which of its two uses `compare` is called.
    """
    width, own = _width(), _that_apply(command, "--plan_only" in arguments)
    usage = "[--preset=NAME] " if command in preset.COMMANDS else ""
    lines = _beginning(command, about, f"{usage}[--flagfile=FILE] [--NAME=VALUE ...]", width)
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


def study_text(about: str, flags: Mapping[str, str]) -> str:
    """The text of --help of a study, which has flags of its own: the written flag and its meaning."""
    width = _width()
    lines = _beginning("study", about, "--vary=NAME=VALUE,VALUE [flags of training]", width)
    lines += ["", "flags", *(line for pair in flags.items() for line in _entry(*pair, width)), ""]
    lines += _indented(f"all other flags are those of {program('train')}, and hold in all runs", width)
    return "\n".join(lines)


def _width() -> int:
    return min(max(shutil.get_terminal_size().columns - 1, LEAST_WIDTH), MOST_WIDTH)


def _beginning(command: str, about: str, usage: str, width: int) -> list[str]:
    """What a command does, how it is called, examples, and the presets it takes."""
    name = program(command)
    lines = [*textwrap.wrap(" ".join(about.split()), width), "", *_indented(f"usage: {name} {usage}", width)]
    lines += ["", "examples"]
    for flags, meaning in EXAMPLES[command]:
        lines += [*_indented(f"  {name} {flags}", width), f"      {meaning}"]
    if command in (*preset.COMMANDS, "study"):
        lines += ["", "presets (flags that you give come before those of a preset)"]
        lines += [line for each in preset.names() for line in _entry(each, preset.about(each), width)]
    return lines


def _that_apply(command: str, plans_only: bool) -> list[dataclasses.Field[Any]]:
    """The flags of `command`. `compare` has some for training only and some for plans only."""
    fields = fields_of(command)
    if command != "compare":
        return fields
    always = {"workdir", "plan_only"}
    apply = {field.name for field in fields_of("plan" if plans_only else "train")} | always
    return [_of_plans(f) if plans_only and f.name == "workdir" else f for f in fields if f.name in apply]


def _of_plans(workdir: dataclasses.Field[Any]) -> dataclasses.Field[Any]:
    """The flag --workdir as `compare --plan_only` has it."""
    field = copy.copy(workdir)
    field.default = PLANS_WORKDIR
    field.metadata = MappingProxyType({**workdir.metadata, "help": "directory of the comparison"})
    return field


def _flags(fields, width):
    for field in fields:
        meaning = field.metadata["help"] + _limits(field)
        yield from _entry(f"--{field.name}={said(field.name, field.default)}", meaning, width)


def _entry(name: str, meaning: str, width: int) -> Iterator[str]:
    """A name and, from COLUMN on, its meaning."""
    lines = textwrap.wrap(meaning, width - COLUMN, break_on_hyphens=False)
    if len(name) + 2 < COLUMN:
        yield f"  {name:<{COLUMN - 2}}{lines.pop(0)}"
    else:
        yield f"  {name}"
    yield from (" " * COLUMN + line for line in lines)


def _limits(field) -> str:
    """The choices that the meaning does not name, or the bounds if they are not obvious."""
    choices, meaning = field.metadata.get("choices", ()), field.metadata["help"]
    if choices and all(re.search(rf"\b{re.escape(each)}\b", meaning) for each in choices):
        return ""
    limits = ", ".join(choices) or bounds(field)
    return "" if limits in ("", "at least 0", "at least 1", "at least -1", "above 0") else f" ({limits})"


def _indented(text, width):
    return textwrap.wrap(
        text, width, subsequent_indent="      ", break_on_hyphens=False, break_long_words=False
    )
