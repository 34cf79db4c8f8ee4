"""Turns a command line into a validated Config, and a refusal into one line and exit code 2."""

import dataclasses
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags

from sfl_jax import __version__, paths
from sfl_jax.commands import helping, preset, surroundings
from sfl_jax.commands.config import PLANS_WORKDIR, Config, as_flags, fields_of
from sfl_jax.commands.fields import allowed
from sfl_jax.commands.interruption import INTERRUPTED, interruption
from sfl_jax.errors import BadInput

BAD_INPUT, NO_READER = 2, 141
# Names of our flags in other programs.
SYNONYMS = {
    "lr": "learning_rate", "wd": "weight_decay", "epochs": "local_epochs, or --rounds", "opt": "optimizer",
    "bs": "batch_size", "batch": "batch_size", "num_rounds": "rounds", "global_rounds": "rounds",
    "num_clients": "clients", "num_users": "clients", "clients_per_round": "cohort_size",
    "fraction_fit": "cohort_size", "frac": "cohort_size", "local_ep": "local_epochs",
    "local_bs": "batch_size", "alpha": "dirichlet_alpha", "iid": "partition", "arch": "model",
    "network": "model", "data": "dataset",
    "output_dir": "workdir", "logdir": "workdir", "log_dir": "workdir", "save_dir": "workdir",
    "gpus": "devices", "gpu": "devices", "device": "devices", "num_gpus": "devices", "dtype": "compute_dtype",
    "scheduler": "learning_rate_schedule",
    "lr_schedule": "learning_rate_schedule", "warmup": "warmup_rounds", "pretrained": "init_from",
}  # fmt: skip
# Flags of other programs or commands, and what to do here.
_GOES_ON = "is not a flag; the same command goes on with its run"
INSTEAD = {
    "cut": "is not a flag; --min_cut=2 --max_cut=2 gives every client the cut 2",
    "preset": f"is a flag of {', '.join(preset.COMMANDS)} and study alone", "resume": _GOES_ON,
    "continue": _GOES_ON,
}  # fmt: skip
SUFFIXES = {"k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}


def run(
    main: Callable[[Config], int | None],
    command: str,
    about: str,
    argv: Sequence[str] | None = None,
) -> int:
    """Parses and validates the flags of `command`, calls `main(config)` and returns the exit code.

    Bad input and refusals of the disk become one line on stderr and exit code 2. Ctrl-C becomes 130 and a
    closed pipe 141, like in a shell. `main` imports heavy modules itself, so that help and refusals are
    instant.

    Args:
      main: the command. It returns its exit code, or None for 0.
      command: "train", "plan", …: which fields of Config are its flags.
      about: the first text of --help.
      argv: the arguments without the program's name; None means those of this process.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    with surroundings.mended():
        return coded(lambda: _run(main, command, about, arguments))


def _run(main, command, about, arguments) -> int | None:
    if (helping.SHORT | helping.FULL) & set(arguments):
        print(helping.help_text(command, about, arguments))
    elif "--version" in arguments:
        print("sfl_jax", __version__)
    else:
        return main(parse(arguments, command))


def coded(work: Callable[[], int | None]) -> int:
    """The exit code of `work`: its own, 0 for None, or that of its error."""
    try:
        with interruption():
            code = work() or 0
            sys.stdout.flush()
            return code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output is gone (for example `| head`). Python's flush at exit would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return NO_READER
    except (BadInput, OSError) as error:  # an OSError names the file that cannot be read or written
        print("error:", as_flags(_line(error)), file=sys.stderr)
        return BAD_INPUT
    except MemoryError as error:  # NumPy's message says how much was asked for
        print(f"error: too little memory ({_line(error)}); ask for less", file=sys.stderr)
        return BAD_INPUT


def parse(arguments: Sequence[str], command: str) -> Config:
    """The validated Config of a command line. Raises BadInput for anything that is not a valid flag."""
    values = flags.FlagValues()
    values.set_gnu_getopt(True)
    taken = fields_of(command)
    for field in taken:
        boolean = isinstance(field.default, bool)
        flags.DEFINE(_Parser(field), field.name, field.default, None, values, boolean=boolean)
    try:
        _, *strays = values(["", *(preset.expand(arguments) if command in preset.COMMANDS else arguments)])
    except UnicodeDecodeError as error:
        raise BadInput(f"--flagfile: must be a text file ({error})") from error
    except BadInput:
        raise
    except flags.CantOpenFlagFileError as error:
        raise BadInput(_unopened(error)) from error
    except flags.UnrecognizedFlagError as error:
        raise BadInput(_unknown(error, [field.name for field in taken])) from error
    except (flags.Error, ValueError) as error:
        raise BadInput(str(error).removeprefix("flag ").removeprefix("ERROR:: ")) from error
    if strays:
        remedy = "a comment needs its own line, without blanks before its #"
        setting = f"write each setting as --name=value, such as {_example(command, strays[0])}"
        raise BadInput(f"{strays[0]!r} is not a flag; {remedy if strays[0].startswith('#') else setting}")
    given = {field.name: values[field.name].value for field in taken}
    typed = _typed(arguments)
    return Config.from_dict(given | _shorter(given, typed) | _apart(given, typed), command)


def _example(command: str, stray: str) -> str:
    """A flag as it is written. It has the stray text as its value where that is likely to be meant."""
    if stray in preset.names() and command in preset.COMMANDS:
        return f"--preset={stray}"
    if command == "report":
        return f"--workdir={stray}"
    return f"--fleet={stray}" if stray.endswith(".csv") else "--model=cnn"


def _typed(arguments: Sequence[str]) -> set[str]:
    """The flags on the command line itself, without those of files."""
    return {argument.lstrip("-").partition("=")[0] for argument in arguments if argument.startswith("-")}


def _shorter(given: dict[str, Any], typed: set[str]) -> dict[str, Any]:
    """Shortens a warm-up that comes from a file, and says so, if --rounds was typed and is less."""
    rounds, warmup = given.get("rounds", 0), given.get("warmup_rounds", 0)
    may_give_way = "rounds" in typed and "warmup_rounds" not in typed and warmup != Config.warmup_rounds
    if not may_give_way or not 1 <= rounds < warmup:
        return {}
    print(f"--warmup_rounds={rounds}, instead of {warmup}: no more than --rounds={rounds}", file=sys.stderr)
    return {"warmup_rounds": rounds}


def _apart(given: dict[str, Any], typed: set[str]) -> dict[str, Any]:
    """Plans that are compared without training have a directory of their own, unless the user names one."""
    if not given.get("plan_only"):
        return {}
    named = "workdir" in typed or ("flagfile" in typed and given["workdir"] != Config.workdir)
    return {} if named else {"workdir": PLANS_WORKDIR}


def _unopened(error: flags.CantOpenFlagFileError) -> str:
    """The refusal of a flag file that cannot be read."""
    cause = error.__context__
    if not isinstance(cause, OSError) or not isinstance(cause.filename, str):
        return str(error).removeprefix("ERROR:: ")
    wrong = paths.for_a_shell(cause.filename)
    return f"--flagfile={cause.filename}: {wrong or f'cannot be read ({cause.strerror})'}"


def _unknown(error: flags.UnrecognizedFlagError, names: Sequence[str]) -> str:
    """The refusal of an unknown flag, with the name that was perhaps meant."""
    if wrong := paths.for_a_shell(error.flagname) or INSTEAD.get(error.flagname, ""):
        return f"--{error.flagname}: {wrong}"
    meant = SYNONYMS.get(error.flagname.lower().replace("-", "_"), "")
    if meant.partition(",")[0] in names:
        return f"--{error.flagname}: is not a flag; the name here is --{meant}"
    return str(error)


class _Parser(flags.ArgumentParser):
    """Reads a text in the type of a field's default."""

    def __init__(self, field: dataclasses.Field[Any]):
        self.field = field
        self.convert = flags.BooleanParser().parse if isinstance(field.default, bool) else type(field.default)
        if field.name.endswith(("_flops", "_bytes", "_bps")):
            self.convert = _number

    def parse(self, argument: Any) -> Any:
        try:
            return self.convert(argument)
        except ValueError:
            wrong = paths.for_a_shell(argument) if isinstance(argument, str) else ""
            more = ", such as 2e10 or 20G" if self.convert is _number else ""
            raise ValueError(wrong or f"must be {allowed(self.field)}{more}") from None


def _number(argument: Any) -> float:
    """A number, with an optional k, M, G, T or P behind it."""
    found = re.fullmatch(r"(.*[\d.])\s*([kKMGTP])", argument.strip()) if isinstance(argument, str) else None
    return float(found[1]) * SUFFIXES[found[2]] if found else float(argument)


def _line(error: Exception) -> str:
    """The words of a text in one line. Characters that would control a terminal are escaped."""
    words = " ".join(str(error).split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in words)
