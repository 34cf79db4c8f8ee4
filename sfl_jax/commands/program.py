"""How this program was started, as a person types it: help and messages name commands that exist there."""

import sys
from pathlib import Path

COMMANDS = ("train", "plan", "compare", "report", "study")


def program(command: str) -> str:
    """What starts `command` in the way in which this process was started.

    That is `sfl-report` where `sfl-train` runs, and `.venv/bin/python -m launch.report` where
    `.venv/bin/python -m launch.train` does.
    """
    name = Path(sys.argv[0]).name
    if name.removeprefix("sfl-") in COMMANDS and name.startswith("sfl-"):
        return f"sfl-{command}"
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    package, _, module = (spec.name if spec else "").rpartition(".")
    package = package if module in COMMANDS else "sfl_jax.commands"
    python = sys.orig_argv[0] if sys.orig_argv else "python"
    return f"{python} -m {package}.{command}"
