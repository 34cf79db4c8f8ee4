"""The error for wrong input by the user."""


class BadInput(ValueError):
    """Input refused before any work. The message is one line: name or place, value, what is allowed."""
