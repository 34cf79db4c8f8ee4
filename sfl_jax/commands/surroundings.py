"""What a command finds around it, and does not rely on: streams that are closed, letters that cannot be
written, a window system.
"""

import contextlib
import io
import os
import sys
from collections.abc import Iterator

STREAMS = (("stdin", "r"), ("stdout", "w"), ("stderr", "w"))
BACKEND = "MPLBACKEND"


@contextlib.contextmanager
def mended() -> Iterator[None]:
    """While this lasts, whatever is printed can be, and pictures are drawn without a window."""
    for name, mode in STREAMS:
        # Else the next file that is opened would take the number of the stream, and what libraries print.
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 it stays open
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")
    asked = os.environ.get(BACKEND, "")
    if asked and not asked.startswith("module:"):  # as a notebook's own
        os.environ[BACKEND] = "agg"
    try:
        yield
    finally:
        if asked:
            os.environ[BACKEND] = asked
