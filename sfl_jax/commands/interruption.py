"""Ctrl-C and SIGTERM. A command ends at once if nothing is lost. A run ends after its round is saved.

Python's own handlers wait for native code to return, and compiling takes seconds to minutes. So a thread
listens and ends the process itself.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator

from sfl_jax import files

INTERRUPTED, SAVED = 130, 75  # exit codes: nothing is saved; a saved round to go on from
SIGNALS = (signal.SIGINT, signal.SIGTERM)
FLUSHED_S = 1.0  # the longest wait for a slow reader of the output
AGAIN = "press Ctrl-C again to stop now"


class Stop:
    """What a signal does at this point of a command.

    asked: whether the run was asked to stop. It stops once it has saved.
    """

    def __init__(self):
        self.asked = False
        self._others_wait = False
        self._now: tuple[int, str] | str = (INTERRUPTED, "stopped")
        self._kept = (INTERRUPTED, "nothing was trained yet")

    def keep(self, saved: str) -> None:
        """From now on there is a saved round. `saved` is printed if a signal ends the run at once."""
        self._kept = SAVED, saved

    def wait_for_others(self) -> None:
        """From now on no process ends before the others do."""
        self._others_wait = True

    def may_end(self, doing: str) -> None:
        """From now on nothing is lost if the process ends at once."""
        code, kept = self._kept
        self._now = doing if self._others_wait else (code, f"stopped while {doing}; {kept}")

    def must_end_well(self, doing: str) -> None:
        """From now on a first signal only asks the run to stop. The run goes on with what it is `doing`."""
        self._now = doing

    def hear(self, number: int) -> int | None:
        """Says what a signal does. Returns the exit code if the process must end."""
        now, again = self._now, self.asked and number == signal.SIGINT
        self.asked = True
        if isinstance(now, str):
            code, line = (INTERRUPTED, "stopped") if again else (None, f"stopping after {now}; {AGAIN}")
        else:
            code, line = now
        with contextlib.suppress(OSError):  # not print, because the signal may have interrupted a print
            os.write(2, f"\n{line}\n".encode())
        return code


@contextlib.contextmanager
def interruption() -> Iterator[Stop]:
    """In this block, SIGINT and SIGTERM do what the Stop says.

    In an interactive session, a signal that ends the command raises KeyboardInterrupt instead.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may install handlers
        return

    def interrupt(number: int, _: object) -> None:
        if stop.hear(number) is not None:
            raise KeyboardInterrupt

    with contextlib.ExitStack() as stack:
        interactive = hasattr(sys, "ps1")
        if not interactive:
            stack.enter_context(_listening(stop))
        for number in SIGNALS:
            before = signal.signal(number, interrupt if interactive else lambda *_: None)
            stack.callback(signal.signal, number, before)
        yield stop


@contextlib.contextmanager
def _listening(stop):
    """A thread hears every signal that Python handles as soon as it arrives."""
    heard, told = os.pipe()
    os.set_blocking(told, False)  # Python requires this

    def listen():
        while number := os.read(heard, 1):
            code = stop.hear(number[0]) if number[0] in SIGNALS else None
            if code is not None:
                end(code)

    listener = threading.Thread(target=listen, daemon=True, name="signals")
    listener.start()
    before = signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(told)
        listener.join()
        os.close(heard)


def end(code: int) -> None:
    """Ends this process now, whatever its other threads do.

    Printed lines are flushed, and no file is left half written.
    """
    flushing = threading.Thread(target=_flush, daemon=True)
    flushing.start()
    flushing.join(FLUSHED_S)
    files.remove_unfinished()
    os._exit(code)


def _flush():
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed or missing
            stream.flush()
