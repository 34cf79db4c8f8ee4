"""Shows on stderr, while a person waits, what a command is doing, its rounds, and warnings."""

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from sfl_jax.commands import words
from sfl_jax.commands.config import Config, as_flags
from sfl_jax.commands.rules import CLIENTS, RANDOM

TICK_S = 1.0  # seconds between two looks at the clock
SILENT_S = 4.0  # without a terminal, the line is repeated after these seconds
RANKS = ("SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "TPU_WORKER_ID", "JOB_COMPLETION_INDEX", "JAX_PROCESS_ID")


class Screen:
    """Shows a line when it is called. Until the next line it shows that the work goes on.

    On a terminal a clock runs below the line. Elsewhere a further line comes every few seconds. So nobody
    thinks that the command hangs. Results are printed on stdout, after `settle`.

    speaks: False in a process that leaves this to another.
    """

    def __init__(self, speaks: bool = True, stream: Any = None, clock: Callable[[], float] = time.monotonic):
        self.speaks = speaks
        self.stream, self._clock = stream or sys.stderr, clock
        self.is_terminal = self.stream.isatty()
        self._lock = threading.RLock()
        self._doing, self._begun, self._said_at, self._ticked = "", 0.0, 0.0, ""
        self._bar: Any = None

    def __call__(self, doing: str) -> None:
        """Begins some work; `doing` describes it."""
        with self._lock:
            self.settle()
            self._write(doing + "\n")
            self._doing, self._begun = doing, self._clock()
            self._said_at = self._begun

    def settle(self) -> None:
        """Ends the work that was begun, so that others may print."""
        with self._lock:
            self._clear()
            self._doing = ""
            if self._bar is not None:
                self._bar.close()  # also ends the bar's line
                self._bar = None

    def result(self, text: str) -> None:
        """Prints on stdout, below the earlier lines."""
        self.settle()
        if self.speaks:
            print(as_flags(text), flush=True)

    def aside(self, line: str) -> None:
        """Prints a line between others, such as a warning or an error."""
        line = as_flags(line)
        with self._lock:
            self._clear()
            if self._bar is None:
                self._write(line + "\n")
            elif self.speaks:
                self._bar.write(line, file=self.stream)

    def tick(self) -> None:
        """Shows that the work goes on, if it is time to."""
        with self._lock:
            if self._bar is not None:
                self._bar.refresh()
            elif self._doing:
                self._go_on(self._clock())

    @contextlib.contextmanager
    def bar(self, bar: Any) -> Iterator[None]:
        """Shows this bar of tqdm on a terminal, until the block ends."""
        self.settle()
        self._bar = bar if self.is_terminal else None
        try:
            yield
        finally:
            self.settle()

    def _go_on(self, now: float) -> None:
        took_s = now - self._begun
        if self.is_terminal:
            self._clear()
            self._ticked = f"  {took_s:.0f} s"
            self._write(self._ticked)
        elif now - self._said_at >= SILENT_S:
            self._said_at = now
            self._write(f"  {took_s:.0f} s: {self._doing.partition(' (')[0]}\n")

    def _clear(self) -> None:
        if self._ticked:
            self._write(f"\r{' ' * len(self._ticked)}\r")
            self._ticked = ""

    def _write(self, text: str) -> None:
        if self.speaks:
            with contextlib.suppress(OSError, ValueError):  # stderr is closed, which must not end a run
                self.stream.write(text)
                self.stream.flush()


class _Warnings(logging.Handler):
    """Shows warnings as lines of a screen."""

    def __init__(self, screen: Screen):
        super().__init__(logging.WARNING)
        self.screen = screen

    def emit(self, record: logging.LogRecord) -> None:
        self.screen.aside(f"{record.levelname.lower()}: {record.getMessage()}")


@contextlib.contextmanager
def screen(first: str, speaks: bool = True) -> Iterator[Screen]:
    """A screen that shows `first` at once, and logged warnings until the block ends."""
    own, over = Screen(speaks), threading.Event()

    def watch():
        while not over.wait(TICK_S):
            own.tick()

    ticking, warnings = threading.Thread(target=watch, daemon=True), _Warnings(own)
    own(first)
    ticking.start()
    logging.root.addHandler(warnings)
    try:
        yield own
    finally:
        logging.root.removeHandler(warnings)
        over.set()
        ticking.join()
        own.settle()


def first_line(config: Config) -> str:
    """What the run will be, from its flags."""
    size = config.image_size
    who = f"{_clients(config)}, {config.cohort_size} a round, {_count(config.rounds, 'round')}"
    return f"{who}: {config.model} at {size}x{size} on {config.dataset}"


def first_line_of_plan(config: Config) -> str:
    """What the plan will be, from its flags."""
    size = config.image_size
    if config.servers:
        server = f"servers of {config.servers}"
    elif config.target_round_s:
        server = f"the smallest server for a round of {config.target_round_s:g} s"
    else:
        server = f"server of {words.amount(config.server_flops, 'FLOP/s')}"
    return f"{_clients(config)}, {config.model} at {size}x{size}, {server}"


def _clients(config):
    number = config.clients or (CLIENTS if config.fleet == RANDOM else 0)
    return _count(number, "client") if number else f"clients of {config.fleet}"


def _count(number, noun):
    return f"{number} {noun}{'' if number == 1 else 's'}"


def is_perhaps_first(config: Config) -> bool:
    """Whether this process will be the one that prints, judging by flags and environment variables."""
    if config.process_id >= 0:
        return config.process_id == 0
    return all(os.environ.get(name, "0") == "0" for name in RANKS)
