"""Shows rounds when they end: a bar on a terminal, lines elsewhere."""

import contextlib
import time
from collections.abc import Iterable, Iterator
from typing import Any

from sfl_jax.commands.screen import Screen
from sfl_jax.commands.words import percent

LINE_S = 10.0  # seconds after which the next round gets a line


def with_progress(rounds: Iterable[Any], done: int, total: int, screen: Screen) -> Iterator[Any]:
    """The rounds, each shown in a bar on a terminal.

    Elsewhere a line on stdout is shown for each evaluation, for the last round, and after `LINE_S` seconds.
    """
    from tqdm import tqdm

    shown = screen.is_terminal and screen.speaks
    bar = tqdm(
        initial=done, total=total, unit="round", disable=not shown, dynamic_ncols=True, file=screen.stream
    )
    tested, said_at = "", time.monotonic()
    if not shown:
        screen(f"computing round {done + 1} of {total}")
    with screen.bar(bar) if shown else contextlib.nullcontext():
        for last in rounds:
            is_new = last.test_accuracy is not None
            if is_new:
                tested = f", test accuracy {percent(last.test_accuracy)}"
            bar.set_postfix_str(note(last) + tested, refresh=False)
            bar.update(last.round - bar.n)
            if not shown and (is_new or last.round == total or time.monotonic() - said_at >= LINE_S):
                said_at = time.monotonic()
                accuracy = tested if is_new else ""
                screen.result(f"round {last.round}/{total}: {note(last)}{accuracy}, {last.wall_s:.0f} s")
            yield last


def note(last: Any) -> str:
    """A round's loss, simulated time and mean cut."""
    return f"loss {last.train_loss:.3f}, simulated {last.simulated_s:.4g} s, mean cut {last.mean_cut:.1f}"
