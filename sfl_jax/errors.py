"""The error for wrong input by the user, and what its message may add."""

import difflib
from collections.abc import Iterable


class BadInput(ValueError):
    """Input refused before any work. The message is one line: name or place, value, what is allowed."""


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """The end of a message that refuses a name: "; did you mean X?", or "" if no known name is like it."""
    known = {one.lower(): one for one in names}
    near = difflib.get_close_matches(name.lower(), known, 1, 0.75)
    return f"; did you mean {known[near[0]]}?" if near else ""
