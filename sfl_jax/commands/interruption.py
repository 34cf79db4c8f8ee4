"""Ctrl-C and SIGTERM as a wish to stop, which a run grants once its round is done and saved."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator


class Stop:
    """asked: whether the run was asked to stop."""

    asked = False

    def ask(self, number: int, _: object) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True
        # Not print: a handler may have interrupted one.
        os.write(2, b"\nstopping after this round, which is saved; Ctrl-C stops at once\n")


@contextlib.contextmanager
def interruption() -> Iterator[Stop]:
    """While this lasts, SIGINT and SIGTERM only ask to stop; a second SIGINT is KeyboardInterrupt."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread can hear signals
        return
    before = {number: signal.signal(number, stop.ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
