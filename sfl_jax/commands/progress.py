"""Shows rounds when they end: a bar on a terminal, lines elsewhere."""

import contextlib
import os
import time
from collections.abc import Iterable, Iterator
from typing import Any

from sfl_jax.commands.screen import Screen
from sfl_jax.commands.words import clock, percent

LINE_S = 10.0  # seconds after which the next round gets a line
# What a line of a terminal shows, by its least number of columns.
_FORMATS = {
    105: "{n_fmt}/{total_fmt} |{bar}| {elapsed}<{remaining}, {rate_fmt}{postfix}",
    90: "{n_fmt}/{total_fmt} {elapsed}<{remaining}, {rate_fmt}{postfix}",
    0: "{n_fmt}/{total_fmt} {elapsed}<{remaining}{postfix}",
}


def with_progress(
    rounds: Iterable[Any], done: int, total: int, screen: Screen, beside: str = ""
) -> Iterator[Any]:
    """The rounds, each shown in a bar on a terminal: with the time that is left, and the seconds of a round.

    Elsewhere a line on stdout is shown for the first round, each evaluation, the last round, and after
    `LINE_S` seconds. The seconds of a round are a mean without the first round, which may compile.

    beside: what else the first round does, for the line that announces it.
    """
    from tqdm import tqdm

    shown = screen.is_terminal and screen.speaks
    columns = _columns(screen.stream) if shown else 0
    bar = tqdm(
        initial=done, total=total, unit="round", disable=not shown, dynamic_ncols=True, file=screen.stream,
        bar_format=next(text for least, text in _FORMATS.items() if columns >= least),
    )  # fmt: skip
    tested, begun_at, said_at, counted = "", time.monotonic(), time.monotonic(), done
    if not shown:
        screen(f"computing round {done + 1} of {total}{beside}")
    with screen.bar(bar) if shown else contextlib.nullcontext():
        for last in rounds:
            is_new = last.test_accuracy is not None
            if is_new:
                tested = f", accuracy {percent(last.test_accuracy)}"
            bar.set_postfix_str(note(last, tested), refresh=False)
            bar.update(last.round - bar.n)
            now, is_first = time.monotonic(), last.round == done + 1
            if not shown and (is_first or is_new or last.round == total or now - said_at >= LINE_S):
                said_at = now
                said = note(last, tested if is_new else "")
                pace = _pace(last, counted, total, now - begun_at)
                screen.result(f"round {last.round}/{total}: {said}; {pace}")
            if is_first:
                begun_at, counted = now, last.round
            yield last


def _columns(stream) -> int:
    """How wide the terminal is; wide if it does not say."""
    try:
        return os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):
        return max(_FORMATS)


def note(last: Any, tested: str = "") -> str:
    """A round's loss, `tested`, the simulated time so far, and the mean cut."""
    return f"loss {last.train_loss:.3f}{tested}, simulated {clock(last.simulated_s)}, cut {last.mean_cut:.1f}"


def _pace(last, counted, total, took_s) -> str:
    """The seconds since the start of the run, of a round, and that are left.

    took_s: of the rounds after round `counted`.
    """
    round_s = took_s / max(last.round - counted, 1)
    left = "" if last.round == total else f", {duration(round_s * (total - last.round))} left"
    return f"{duration(last.wall_s)} in all, {clock(round_s)} a round{left}"


def duration(seconds: float) -> str:
    """Seconds of this machine, for example "5 s", "3 min" or "2.5 h"."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
