"""Makes printing and drawing work anywhere: with closed streams, odd encodings, or no window system."""

import contextlib
import io
import os
import sys
from collections.abc import Iterator

STREAMS = (("stdin", "r"), ("stdout", "w"), ("stderr", "w"))
BACKEND = "MPLBACKEND"


@contextlib.contextmanager
def mended() -> Iterator[None]:
    """In this block everything can be printed, and pictures are drawn without a window."""
    for name, mode in STREAMS:
        # Otherwise the next opened file would get the stream's number, and with it what libraries print.
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 it stays open
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")
    asked = os.environ.get(BACKEND, "")
    if asked and not asked.startswith("module:"):  # such as a notebook's own
        os.environ[BACKEND] = "agg"
    try:
        yield
    finally:
        if asked:
            os.environ[BACKEND] = asked
