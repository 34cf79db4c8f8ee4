"""A run as one page of HTML with its pictures. It needs no other file and no network."""

import html
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sfl_jax.commands import parts, totals, words
from sfl_jax.commands.compare_plot import draw_bytes, draw_clocks
from sfl_jax.commands.config import Config, settings
from sfl_jax.run.clocks import Clock
from sfl_jax.run.metrics import Round, attendance
from sfl_jax.run.recording import MARKS, PAGE

_STYLE = """
:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h1, h2 { font-weight: 600; overflow-wrap: anywhere } code { font-size: 13px; overflow-wrap: anywhere }
.wide { overflow-x: auto } .wide svg { display: block; width: 100%; min-width: 44rem; height: auto }
table { border-collapse: collapse; margin-bottom: 1rem }
td, th { padding: .15rem 1.5rem .15rem 0; border-bottom: 1px solid #8884 }
th { text-align: right; font-weight: 600 } th:first-child { text-align: left }
td.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums }
.columns { columns: 3 18rem }
/* Black becomes white, and hues stay. */
@media (prefers-color-scheme: dark) { svg { filter: invert(1) hue-rotate(180deg) } }
"""


def page(
    config: Config,
    environment: Mapping[str, Any],
    lines: Sequence[Round],
    clocks: Mapping[str, Clock],
    note: str = "",
) -> str:
    """The page. `note` says which clocks are left out.

    clocks: of each method, the run's own first.
    """
    title = f"{config.model} on {config.dataset}"
    last, own = lines[-1], next(iter(clocks.values()))
    cohort = attendance(config.cohort_size, config.clients, [line.clients for line in lines])
    done = f"{last.round} of {config.rounds} rounds, each of {cohort}"
    return "\n".join([
        "<!doctype html>", '<html lang="en">', '<meta charset="utf-8">', MARKS[PAGE].decode(),
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(title)}</title>", f"<style>{_STYLE}</style>",
        f"<h1>{html.escape(title)}</h1>", f"<p>{html.escape(done)}</p>",
        _table(_results(lines)),
        "<h2>Simulated time</h2>",
        "<p>How long training would have taken on this fleet, by the method that chooses cuts and shares;",
        f"{words.whose_accuracy(config.deadline_factor, parts.cuts_matter(config))}.</p>",
        _table(_times(clocks)), *([f"<p>{html.escape(note)}</p>"] if note else []),
        _wide(_pictures(config, lines, clocks)),
        "<h2>Bytes, work and memory</h2>",
        "<p>Of all rounds together, counted in closed form. Memory is the most of any round.</p>",
        _table(totals.run_rows(own)),
        _grid(totals.method_rows(clocks)),
        _grid(totals.accuracy_rows(clocks, [line.test_accuracy for line in lines])),
        "<h2>Settings</h2>", _columns(settings(config, "train")),
        "<h2>Made with</h2>", _columns(environment),
        "</html>", "",
    ])  # fmt: skip


def _results(lines: Sequence[Round]) -> list[tuple[str, str]]:
    last = lines[-1]
    tested = [(line.round, line.test_accuracy) for line in lines if line.test_accuracy is not None]
    rows = [(f"test accuracy after round {round}", words.percent(part)) for round, part in tested[-1:]]
    failed = sum(line.clients == 0 for line in lines)
    if failed:
        rows.append(("failed rounds, without a client", str(failed)))
    rows.append(("wall time", f"{last.wall_s:,.1f} s"))
    gaps = [line.round_s / line.bound_s - 1 for line in lines if line.round_s and line.bound_s]
    if gaps:
        rows.append(("largest gap of a round to its proven bound", f"{max(gaps):.2e}"))
    return rows


def _times(clocks: Mapping[str, Clock]) -> list[tuple[str, ...]]:
    own, *_ = clocks
    rows = []
    for name, (seconds, _) in clocks.items():
        label = name + (" (this plan)" if name == own else "")
        if math.isfinite(seconds[-1]):
            rows.append(
                (
                    label,
                    f"{seconds[-1]:,.1f} s",
                    words.beside(seconds[-1], clocks[own].seconds[-1]) if name != own else "",
                )
            )
        else:
            rows.append((label, "not possible", ""))
    return rows


def _table(rows: Iterable[Sequence[str]]) -> str:
    cells = (
        f'<td>{html.escape(name)}<td class="number">{html.escape(value)}'
        + "".join(f"<td>{html.escape(word)}" for word in more)
        for name, value, *more in rows
    )
    return _wide("<table>\n" + "\n".join(f"<tr>{row}" for row in cells) + "\n</table>")


def _grid(rows: Iterable[Sequence[str]]) -> str:
    """A table of numbers below a row of titles."""
    (corner, *titles), *numbers = rows
    head = f"<tr><th>{html.escape(corner)}" + "".join(f"<th>{html.escape(title)}" for title in titles)
    body = (
        f"<tr><td>{html.escape(name)}" + "".join(f'<td class="number">{html.escape(cell)}' for cell in cells)
        for name, *cells in numbers
    )
    return _wide("<table>\n" + "\n".join([head, *body]) + "\n</table>")


def _wide(inside: str) -> str:
    """A part of the page that scrolls by itself if the page is narrower."""
    return f'<div class="wide">\n{inside}\n</div>'


def _columns(values: Mapping[str, Any]) -> str:
    entries = (f"<code>{html.escape(f'{name}={value}')}</code><br>" for name, value in values.items())
    return '<p class="columns">\n' + "\n".join(entries) + "\n</p>"


def _pictures(config: Config, lines: Sequence[Round], clocks: Mapping[str, Clock]) -> str:
    """One picture as SVG: accuracy against time and bytes, losses, and each round's time beside its bound."""
    figure = Figure(figsize=(11, 13), layout="constrained")
    wide, sent, losses, times = figure.subplot_mosaic(
        [["clocks", "clocks"], ["bytes", "bytes"], ["losses", "times"]]
    ).values()
    accuracies = [line.test_accuracy for line in lines]
    draw_clocks(wide, accuracies, clocks, config)
    draw_bytes(sent, accuracies, clocks)
    rounds = [line.round for line in lines]
    _draw(losses, rounds, {"training": _numbers(lines, "train_loss"), "test": _numbers(lines, "test_loss")})
    losses.set(title="Cross-entropy", xlabel="round")
    _draw(times, rounds, {"round": _numbers(lines, "round_s"), "proven bound": _numbers(lines, "bound_s")})
    times.set(title="Simulated time of a round, s", xlabel="round")
    if times.dataLim.y1 > 0:
        times.set_ylim(0, 1.1 * times.dataLim.y1)  # from 0, so that a flat line is inside of the frame
    text = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "sfl_jax"}):
        figure.savefig(text, format="svg", metadata={"Date": None}, transparent=True)
    return text.getvalue()[text.getvalue().index("<svg") :]


def _draw(axes: Axes, rounds: Sequence[int], curves: Mapping[str, np.ndarray]) -> None:
    for (name, values), dashes in zip(curves.items(), ("-", "--"), strict=True):
        known = np.isfinite(values)
        axes.plot(np.array(rounds)[known], values[known], dashes, marker=".", markersize=3, label=name)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=9)


def _numbers(lines: Sequence[Round], name: str) -> np.ndarray:
    return np.array([getattr(line, name) for line in lines], float)  # NaN for None
