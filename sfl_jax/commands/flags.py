"""From a command line to a validated Config, and from a refusal to one line and exit code 2."""

import dataclasses
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags

from sfl_jax.commands.interruption import INTERRUPTED, interruption
from sfl_jax.config import Config, allowed, bounds, fields_of
from sfl_jax.errors import BadInput

BAD_INPUT, NO_READER = 2, 141
WIDTH = 110


def run(
    main: Callable[[Config], int | None],
    command: str,
    about: str,
    argv: Sequence[str] | None = None,
) -> int:
    """Parse and validate the flags of `command`, call `main(config)`, return the exit code.

    Bad input, seen here or raised by `main`, and what the disk refuses become one line on stderr and 2;
    Ctrl-C becomes 130 and a closed pipe 141, as in a shell. `main` imports what is heavy by itself, so that
    help and refusals are instant.

    Args:
      main: the command; returns its exit code, None for 0.
      command: "train", "plan", …: which fields of Config are its flags.
      about: what --help says first.
      argv: the arguments without the program's name; None for those of this process.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if {"--help", "-help", "-h"} & set(arguments):
        print(help_text(command, about))
        return 0
    try:
        with interruption():
            code = main(parse(arguments, command)) or 0
            sys.stdout.flush()
            return code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has gone (say, `| head`); Python's own flush at exit would complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return NO_READER
    except (BadInput, OSError) as error:  # an OSError names the file that cannot be read or written
        print("error:", _line(error), file=sys.stderr)
        return BAD_INPUT
    except MemoryError as error:  # what is asked for in one piece; NumPy says how much
        print(f"error: too little memory ({_line(error)}); ask for less", file=sys.stderr)
        return BAD_INPUT


def parse(arguments: Sequence[str], command: str) -> Config:
    """The validated Config of a command line; raises BadInput for anything that is not a good flag."""
    values = flags.FlagValues()
    values.set_gnu_getopt(True)
    taken = fields_of(command)
    for field in taken:
        boolean = isinstance(field.default, bool)
        flags.DEFINE(_Parser(field), field.name, field.default, None, values, boolean=boolean)
    try:
        _, *strays = values(["", *arguments])
    except UnicodeDecodeError as error:
        raise BadInput(f"--flagfile: must be a text file ({error})") from error
    except (flags.Error, ValueError) as error:
        raise BadInput(str(error).removeprefix("flag ").removeprefix("ERROR:: ")) from error
    if strays:
        raise BadInput(f"{strays[0]!r} is no flag; write every setting as --name=value")
    return Config.from_dict({field.name: values[field.name].value for field in taken}, command)


def help_text(command: str, about: str) -> str:
    """The flags of a command by heading, each with its default, its meaning and what it may hold."""
    lines = [about, "", f"python -m launch.{command} [--flagfile=FILE] [--name=value ...]"]
    heading = None
    for field in fields_of(command):
        if field.metadata["group"] != heading:
            heading = field.metadata["group"]
            lines += ["", heading]
        flag = f"  --{field.name}={_written(field.default)}"
        limits = ", ".join(field.metadata.get("choices", ())) or bounds(field)
        meaning = field.metadata["help"] + (f" ({limits})" if limits else "")
        lines += textwrap.wrap(
            f"{flag:<37} {meaning}", WIDTH, subsequent_indent=" " * 38, break_on_hyphens=False
        )
    return "\n".join(lines)


class _Parser(flags.ArgumentParser):
    """Reads a text as the type of a field's default."""

    def __init__(self, field: dataclasses.Field[Any]):
        self.field = field
        self.convert = flags.BooleanParser().parse if isinstance(field.default, bool) else type(field.default)

    def parse(self, argument: Any) -> Any:
        try:
            return self.convert(argument)
        except ValueError:
            raise ValueError(f"must be {allowed(self.field)}") from None


def _written(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _line(error: Exception) -> str:
    """Its words in one line; what would steer a terminal is spelt out."""
    words = " ".join(str(error).split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in words)
