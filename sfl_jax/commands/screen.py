"""What a command says on stderr while a person waits: what it is doing, its rounds, and warnings."""

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from sfl_jax.commands.config import Config, as_flags
from sfl_jax.commands.rules import CLIENTS, RANDOM

TICK_S = 1.0  # between two looks at the clock
SILENT_S = 4.0  # what is going on is said again after it, where there is no terminal
RANKS = ("SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "TPU_WORKER_ID", "JOB_COMPLETION_INDEX", "JAX_PROCESS_ID")


class Screen:
    """Says a line when it is called and then, until the next, that it goes on: on a terminal by a clock below
    the line, elsewhere by a further line every few seconds. Nobody shall take a command for hung.

    Results are no part of it: they are printed on stdout, after `settle`.

    speaks: false in a process that leaves speaking to another.
    """

    def __init__(self, speaks: bool = True, stream: Any = None, clock: Callable[[], float] = time.monotonic):
        self.speaks = speaks
        self.stream, self._clock = stream or sys.stderr, clock
        self.is_terminal = self.stream.isatty()
        self._lock = threading.RLock()
        self._doing, self._begun, self._said_at, self._ticked = "", 0.0, 0.0, ""
        self._bar: Any = None

    def __call__(self, doing: str) -> None:
        """Begin something: `doing` says what."""
        with self._lock:
            self.settle()
            self._write(doing + "\n")
            self._doing, self._begun = doing, self._clock()
            self._said_at = self._begun

    def settle(self) -> None:
        """What was begun is done; others may print."""
        with self._lock:
            self._clear()
            self._doing = ""
            if self._bar is not None:
                self._bar.close()  # which ends its line
                self._bar = None

    def result(self, text: str) -> None:
        """Print on stdout, below what was said."""
        self.settle()
        if self.speaks:
            print(as_flags(text), flush=True)

    def aside(self, line: str) -> None:
        """A line between others, as a warning or an error."""
        line = as_flags(line)
        with self._lock:
            self._clear()
            if self._bar is None:
                self._write(line + "\n")
            elif self.speaks:
                self._bar.write(line, file=self.stream)

    def tick(self) -> None:
        """Say that it goes on, if it is time to."""
        with self._lock:
            if self._bar is not None:
                self._bar.refresh()
            elif self._doing:
                self._go_on(self._clock())

    @contextlib.contextmanager
    def bar(self, bar: Any) -> Iterator[None]:
        """While it lasts, a terminal shows this bar of tqdm."""
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
            with contextlib.suppress(OSError, ValueError):  # nobody listens; that ends no run
                self.stream.write(text)
                self.stream.flush()


class _Warnings(logging.Handler):
    """Warnings as lines of a screen."""

    def __init__(self, screen: Screen):
        super().__init__(logging.WARNING)
        self.screen = screen

    def emit(self, record: logging.LogRecord) -> None:
        self.screen.aside(f"{record.levelname.lower()}: {record.getMessage()}")


@contextlib.contextmanager
def screen(first: str, speaks: bool = True) -> Iterator[Screen]:
    """A screen that says `first` at once, and what is logged as a warning while it lasts."""
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
    """What a run will be, as far as the flags say it."""
    size = config.image_size
    who = f"{_clients(config)}, {config.cohort_size} a round, {_count(config.rounds, 'round')}"
    return f"{who}: {config.model} at {size}x{size} on {config.dataset}"


def first_line_of_plan(config: Config) -> str:
    """What a plan will be, as far as the flags say it."""
    size = config.image_size
    return f"{_clients(config)}, {config.model} at {size}x{size}, server {config.server_flops:g} FLOP/s"


def _clients(config):
    number = config.clients or (CLIENTS if config.fleet == RANDOM else 0)
    return _count(number, "client") if number else f"clients of {config.fleet}"


def _count(number, noun):
    return f"{number} {noun}{'' if number == 1 else 's'}"


def is_perhaps_first(config: Config) -> bool:
    """Whether this process is the one of several that speaks, as far as can be told before they meet."""
    if config.process_id >= 0:
        return config.process_id == 0
    return all(os.environ.get(name, "0") == "0" for name in RANKS)
