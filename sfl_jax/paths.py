"""Values as people type them on a command line and in flag files, where no shell takes them apart."""

import os
import re

from sfl_jax.errors import BadInput

_ELSEWHERE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_LEAVE, _WRITE = "leave them out", "write out what they stand for"
# What a shell would have replaced, and flag files do not; what to write instead. A single quote inside of a
# name may be an apostrophe.
_OF_SHELLS = {
    "comments behind a value": (re.compile(r"(?s).*\s#.*"), _LEAVE),
    "commands inside a value": (re.compile(r"(?s).*(\$\(|`).*"), _WRITE),
    "variables": (re.compile(r"(?s).*(\$[\w{$]|%\w+%).*"), _WRITE),
    "quotes": (re.compile(r"""(?s).*".*|(.*[/$])?'.*|.*'"""), _LEAVE),
    "backslashes before blanks or at the end of a line": (re.compile(r"(?s).*\\(\s.*)?"), _LEAVE),
}


def expand(flag: str, value: str) -> str:
    """The path that flag=value means: a leading ~ is a home directory, and blanks around it do not count.

    BadInput where no such home is known.
    """
    path = os.path.expanduser(value.strip())
    if path.startswith("~"):
        raise BadInput(f"{flag}={value}: the home directory of ~ is not known here; write the path out")
    return path


def for_a_shell(value: str) -> str:
    """What is wrong with a text that was written for a shell; empty where it was not."""
    for what, (pattern, remedy) in _OF_SHELLS.items():
        if pattern.fullmatch(value):
            return f"flags and flag files know no {what}; {remedy}"
    return ""


def check_text(flag: str, value: str) -> None:
    """BadInput for a text that was written for a shell."""
    if wrong := for_a_shell(value):
        raise BadInput(f"{flag}={value}: {wrong}")


def check_path(flag: str, value: str) -> None:
    """BadInput for a path that is not of this machine."""
    if _ELSEWHERE.match(value):
        raise BadInput(
            f"{flag}={value}: must be a path of this machine; mount what is elsewhere, e.g. with gcsfuse"
        )
