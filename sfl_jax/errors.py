"""The one error that means: the user's input is wrong, and here is how to mend it."""


class BadInput(ValueError):
    """Input refused before any work. The message is one line: flag or place, value, what is allowed."""
