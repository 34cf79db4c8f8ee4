"""Paths and texts as users type them in flags and flag files, which no shell expands."""

import os
import re

from sfl_jax.errors import BadInput

_ELSEWHERE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_LEAVE, _WRITE = "leave them out", "write the values themselves"
# What a shell replaces and flag files do not, with the remedy. A single quote inside a name may be an
# apostrophe.
_OF_SHELLS = {
    "comments after a value": (re.compile(r"(?s).*\s#.*"), _LEAVE),
    "commands inside a value": (re.compile(r"(?s).*(\$\(|`).*"), _WRITE),
    "variables": (re.compile(r"(?s).*(\$[\w{$]|%\w+%).*"), _WRITE),
    "quotes": (re.compile(r"""(?s).*".*|(.*[/$])?'.*|.*'"""), _LEAVE),
    "backslashes before blanks or at the end of a line": (re.compile(r"(?s).*\\(\s.*)?"), _LEAVE),
}


def expand(flag: str, value: str) -> str:
    """The path of flag=value: expands a leading ~ and ignores blanks around it.

    BadInput if the home directory is not known.
    """
    path = os.path.expanduser(value.strip())
    if path.startswith("~"):
        raise BadInput(f"{flag}={value}: the home directory ~ is not known here; write the full path")
    return path


def for_a_shell(value: str) -> str:
    """What is wrong with a text that was written for a shell; "" if it was not."""
    for what, (pattern, remedy) in _OF_SHELLS.items():
        if pattern.fullmatch(value):
            return f"flags and flag files do not support {what}; {remedy}"
    return ""


def check_text(flag: str, value: str) -> None:
    """BadInput if a text was written for a shell."""
    if wrong := for_a_shell(value):
        raise BadInput(f"{flag}={value}: {wrong}")


def check_path(flag: str, value: str) -> None:
    """BadInput if a path is not on this machine."""
    if _ELSEWHERE.match(value):
        raise BadInput(
            f"{flag}={value}: must be a path on this machine; mount remote storage, e.g. with gcsfuse"
        )
