"""How the user started this program. Help and messages then name commands that exist for this user."""

import sys
from pathlib import Path

COMMANDS = ("train", "plan", "compare", "report", "study", "profile_device", "certify")


def program(command: str) -> str:
    """The text that starts `command` in the way in which this process was started.

    For example `sfl-report` if `sfl-train` runs, and `.venv/bin/python -m launch.report` if `.venv/bin/python
    -m launch.train` runs.
    """
    name = Path(sys.argv[0]).name
    if name.removeprefix("sfl-").replace("-", "_") in COMMANDS and name.startswith("sfl-"):
        return f"sfl-{command.replace('_', '-')}"
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    package, _, module = (spec.name if spec else "").rpartition(".")
    package = package if module in COMMANDS else "sfl_jax.commands"
    python = sys.orig_argv[0] if sys.orig_argv else "python"
    return f"{python} -m {package}.{command}"
