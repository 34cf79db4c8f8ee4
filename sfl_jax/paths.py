"""Values as people type them on a command line and in flag files, where no shell takes them apart."""

import os
import re

from sfl_jax.errors import BadInput

_ELSEWHERE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
# What a shell would have replaced, and flag files do not.
_OF_SHELLS = {
    "quotes around a value": re.compile(r"""(?s)['"].*|.*\""""),
    "comments behind a value": re.compile(r"(?s).*\s#.*"),
    "variables": re.compile(r"(?s).*(\$(\w|\{)|%\w+%).*"),
    "commands inside a value": re.compile(r"(?s).*(\$\(|`.*`).*"),
}


def expand(flag: str, value: str) -> str:
    """The path that --flag=value means: a leading ~ is a home directory, and blanks around it do not count.

    BadInput where no such home is known.
    """
    path = os.path.expanduser(value.strip())
    if path.startswith("~"):
        raise BadInput(f"--{flag}={value}: the home directory of ~ is not known here; write the path out")
    return path


def for_a_shell(value: str) -> str:
    """What is wrong with a text that was written for a shell; empty where it was not."""
    for what, pattern in _OF_SHELLS.items():
        if pattern.fullmatch(value):
            return f"flags and flag files know no {what}; leave them out"
    return ""


def check_text(flag: str, value: str) -> None:
    """BadInput for a text that was written for a shell."""
    if wrong := for_a_shell(value):
        raise BadInput(f"--{flag}={value}: {wrong}")


def check_path(flag: str, value: str) -> None:
    """BadInput for a path that is not of this machine."""
    if _ELSEWHERE.match(value):
        raise BadInput(
            f"--{flag}={value}: must be a path of this machine; mount what is elsewhere, e.g. with gcsfuse"
        )
