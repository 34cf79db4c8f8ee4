"""Shows on stderr how far another process has come: the newest line of its log."""

import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sfl_jax.commands.progress import LINE_S

TICK_S = 1.0  # between two looks on a terminal
_TAIL_BYTES = 4096


class Following:
    """Shows the newest line of a log whenever `look` is called and it is time to.

    On a terminal one line is written over and over, until `clear`. Elsewhere a line comes every `LINE_S`
    seconds.
    """

    def __init__(self, log: Path, stream: Any = None, clock: Callable[[], float] = time.monotonic):
        self._log, self._stream, self._clock = log, stream or sys.stderr, clock
        self._is_terminal = self._stream.isatty()
        self._pause_s = TICK_S if self._is_terminal else LINE_S
        self._looked_at, self._shown = clock(), ""

    def look(self) -> None:
        """Shows the newest line if it is new and the last look is long enough ago."""
        now = self._clock()
        if now - self._looked_at < self._pause_s:
            return
        self._looked_at = now
        line = newest_line(self._log)
        if line and line != self._shown:
            self.clear()
            self._shown = line
            if self._is_terminal:
                line = line[: shutil.get_terminal_size().columns - 3]
            self._write(f"  {line}" + ("" if self._is_terminal else "\n"))

    def clear(self) -> None:
        """Removes the line from a terminal."""
        if self._is_terminal and self._shown:
            self._write("\r\033[K")
        self._shown = ""

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def newest_line(path: Path) -> str:
    """The last whole line of a text file that has more than blanks; "" if there is none."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _TAIL_BYTES))
        text = file.read().decode(errors="replace")
    lines = [line.strip() for line in text[: text.rfind("\n") + 1].splitlines()]
    return next(filter(None, reversed(lines)), "")
