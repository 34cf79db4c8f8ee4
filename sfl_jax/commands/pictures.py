"""Pictures of pages: accuracy curves, bars, and a run's rounds by term, by cut and by client."""

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from numpy.typing import ArrayLike

from sfl_jax.commands import page, words
from sfl_jax.commands.page import TERM_COLOURS, Mark, Point, drawing, paint
from sfl_jax.commands.plan_summary import WORDS
from sfl_jax.planning.comparison import FOUR_STARTS, NEAREST, RECALL
from sfl_jax.run.history import TERMS, History

OWN = ("blue", "")
# Methods beside the run's own. A hue used twice has dashes.
METHODS = {
    "exact": ("ink", ""), "no_split": ("orange", ""), "common_cut": ("green", ""),
    "regression": ("amber", ""), NEAREST: ("amber", "6 3"), "alternating": ("violet", ""),
    FOUR_STARTS: ("violet", "6 3"), RECALL: ("violet", "2 3"), "greedy": ("pink", ""),
    "equal_shares": ("sky", ""), "random_cut": ("grey", ""),
}  # fmt: skip
# Hues for other things that are compared, then the same with dashes.
CYCLE = [
    (colour, dashes)
    for dashes in ("", "6 3", "2 3")
    for colour in ("blue", "orange", "green", "pink", "amber", "violet", "sky", "grey")
]
MOST_POINTS = 120  # of a curve
MOST_BINS = 120  # of an axis of rounds
MOST_DOTS = 400
MOST_BARS = 8
_ROW, _THICK_ROW = 25, 56  # least and largest height of a horizontal bar with its gap
_LETTER = 6.0  # width of a letter
_LEVELS = 6  # of the heat map


class Curve(NamedTuple):
    """A line of a picture. said: what the pointer shows at the place of this index."""

    x: ArrayLike
    y: ArrayLike
    said: Callable[[int], str]
    colour: str
    dashes: str = ""
    width: float = 1.8


class Bar(NamedTuple):
    """A horizontal bar. said: the text at its end. text: what the pointer shows."""

    label: str
    value: float
    said: str
    text: str
    colour: str


def style(name: str, own: str) -> tuple[str, str]:
    """(colour, dashes) of a method."""
    return OWN if name == own else METHODS.get(name, ("grey", "6 3"))


def curves(
    title: str,
    caption: str,
    lines: Sequence[Curve],
    xlabel: str,
    ylabel: str,
    *,
    rounds: bool = False,
    log: bool = False,
    marks: Sequence[Mark] = (),
    bottom: float | None = None,
    floor: float | None = None,
) -> str:
    """A card with curves.

    rounds: the horizontal axis has whole numbers. log: it is logarithmic. floor: the vertical axis is
    logarithmic, and this is its least value, where smaller ones are drawn. bottom: the least of a linear one.
    """
    with drawing(46 if floor is None else 60) as axes:
        points = []
        for line in lines:
            x, y = np.asarray(line.x, float), np.asarray(line.y, float)
            y = y if floor is None else np.maximum(y, floor)
            shown = _thinned(np.isfinite(x) & np.isfinite(y))
            dashes = (0, tuple(map(float, line.dashes.split()))) if line.dashes else "-"
            axes.plot(
                x[shown], y[shown], color=paint(line.colour), linestyle=dashes, linewidth=line.width,
                marker="o" if len(shown) <= 12 else "", markersize=3 + line.width / 2,
            )  # fmt: skip
            points += [Point(x[i], y[i], line.said(int(i))) for i in shown]
        axes.set(xlabel=xlabel, ylabel=ylabel)
        if log:
            axes.set_xscale("log")
            axes.set_xlabel(f"{xlabel}, logarithmic")
            _few_numbers(axes.xaxis)
        elif rounds:
            page.whole_numbers(axes)
        if floor is not None and points:
            axes.set(
                yscale="log", ylim=(floor / 1.3, max(10 * floor, 1.3 * max(point.y for point in points)))
            )
            _few_numbers(axes.yaxis, {floor: f"≤{floor:g}"})
        if bottom is not None and points:
            axes.set_ylim(bottom, None)
        if not points:
            return unknown(title, "not known of this run")
        return page.figure(title, caption, axes, points, marks=marks)


def _few_numbers(axis, named: Mapping[Any, str] = MappingProxyType({})):
    """Plain numbers on a logarithmic axis. named: the texts of some."""
    low, high = axis.get_view_interval()
    decades = math.log10(high / low)
    subs = (1, 2, 5) if decades < 2 else (1, 3) if decades < 3 else (1,)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda x, _: named.get(x) or words.amount(x, "").strip()))


def _thinned(known) -> np.ndarray:
    """The places of at most MOST_POINTS known values, the first and the last among them."""
    (places,) = np.nonzero(known)
    return (
        places[np.unique(np.linspace(0, len(places) - 1, MOST_POINTS).astype(int))] if len(places) else places
    )


def unknown(title: str, reason: str) -> str:
    """A card instead of a picture."""
    return page.card(title, page.paragraph(reason))


def bars(title: str, caption: str, rows: Sequence[Bar], marks: Sequence[Mark] = ()) -> str:
    """A card with horizontal bars, the first on top."""
    left = 14 + _LETTER * max(len(row.label) for row in rows)
    right = 14 + _LETTER * max(len(row.said) for row in rows)
    row = min(_THICK_ROW, max(_ROW, page.HEIGHT / len(rows)))
    height = round(row * len(rows))
    with drawing(left, right, height) as axes:
        axes.set_position((left / page.WIDTH, 0.02, 1 - (left + right) / page.WIDTH, 0.96))
        places = np.arange(len(rows))
        values = [row.value for row in rows]
        axes.barh(places, values, 0.62, color=[paint(row.colour) for row in rows])
        for place, row in zip(places, rows, strict=True):
            axes.annotate(
                row.said, (row.value, place), (6, 0), textcoords="offset points", va="center",
                color=paint("ink"), annotation_clip=False,
            )  # fmt: skip
        axes.set_yticks(places, [row.label for row in rows])
        axes.tick_params(axis="y", labelcolor=paint("ink"))
        axes.set(xticks=[], xlim=(0, max(*values, 1e-300)), ylim=(len(rows) - 0.5, -0.5))
        axes.spines["bottom"].set_visible(False)
        axes.grid(visible=False)
        points = [Point(row.value, place, row.text) for place, row in zip(places, rows, strict=True)]
        return page.figure(title, caption, axes, points, "y", marks)


def clients_by_term(names: Sequence[str], seconds: np.ndarray, texts: Sequence[str], caption: str) -> str:
    """A card with each client's seconds by term, (7, K), stacked in the order of time.

    texts: what the pointer shows of each client.
    """
    title = "Where each client's time goes"
    used = [i for i in range(len(TERMS)) if seconds[i].max(initial=0) > 0]
    edges = np.repeat(np.arange(len(names) + 1) + 0.5, 2)[1:-1]
    with drawing() as axes:
        colours = [paint(TERM_COLOURS[TERMS[i]]) for i in used]
        axes.stackplot(edges, np.repeat(seconds[used], 2, axis=1), colors=colours, linewidth=0)
        axes.set(xlim=(0.5, len(names) + 0.5), ylim=(0, None), xlabel="clients", ylabel="seconds")
        page.whole_numbers(axes)
        tops = seconds.sum(axis=0)
        points = [Point(k + 1, tops[k], text) for k, text in enumerate(texts)]
        marks = [Mark(WORDS[TERMS[i]], TERM_COLOURS[TERMS[i]], None) for i in used]
        return page.figure(title, caption, axes, points, "x", marks)


class Bins(NamedTuple):
    """Neighbouring rounds that are drawn as one. starts: their first indices. names: for the pointer."""

    starts: np.ndarray
    edges: np.ndarray
    names: list[str]

    def mean(self, values: np.ndarray) -> np.ndarray:
        """The mean of (R, ...) over the rounds of each bin."""
        counts = np.diff([*self.starts, len(values)])
        return np.add.reduceat(values, self.starts, axis=0) / counts.reshape(-1, *[1] * (values.ndim - 1))


def bins(rounds: int) -> Bins:
    """The rounds in at most MOST_BINS bins of one size."""
    size = -(-rounds // MOST_BINS)
    starts = np.arange(0, rounds, size)
    ends = np.minimum(starts + size, rounds)
    names = [
        f"round {a + 1}" if b == a + 1 else f"rounds {a + 1} to {b}, mean"
        for a, b in zip(starts, ends, strict=True)
    ]
    return Bins(starts, np.append(starts, rounds) + 0.5, names)


def seconds_by_term(
    history: History, round_s: Sequence[float], bound_s: Sequence[float], caption: str
) -> str:
    """A card with each round's seconds by term, stacked in the order of time."""
    own = bins(len(history.seconds))
    parts, lasted, bound = own.mean(history.seconds), own.mean(np.array(round_s)), own.mean(np.array(bound_s))
    used = [i for i in range(len(TERMS)) if parts[:, i].max(initial=0) > 0]
    title = "A round's seconds by term"
    if not used:
        return unknown(title, "Nobody came.")
    with drawing() as axes:
        stacked = np.repeat(parts[:, used].T, 2, axis=1)
        edges = np.repeat(own.edges, 2)[1:-1]
        axes.stackplot(edges, stacked, colors=[paint(TERM_COLOURS[TERMS[i]]) for i in used], linewidth=0)
        marks = [Mark(WORDS[TERMS[i]], TERM_COLOURS[TERMS[i]], None) for i in used]
        for name, values, dashes in (("round", lasted, ""), ("proven bound", bound, "4 3")):
            if np.isfinite(values).any() and not np.allclose(values, parts.sum(axis=1), rtol=1e-3, atol=0):
                line = (0, (4, 3)) if dashes else "-"
                axes.plot(edges, np.repeat(values, 2), color=paint("ink"), linestyle=line, linewidth=1.4)
                marks.append(Mark(name, "ink", dashes))
        axes.set(
            xlim=(own.edges[0], own.edges[-1]), ylim=(0, None), xlabel="round", ylabel="simulated seconds"
        )
        axes.margins(y=0.05)
        page.whole_numbers(axes)
        centres = (own.edges[:-1] + own.edges[1:]) / 2
        points = [
            Point(
                centres[b],
                parts[b].sum(),
                _round_text(own.names[b], history, own.starts[b], parts[b], lasted[b], used),
            )
            for b in range(len(parts))
        ]
        return page.figure(title, caption, axes, points, "x", marks)


def _round_text(name, history, start, parts, lasted_s, used) -> str:
    holder = history.holder[start]
    who = f", held up by {_name(history, holder)}" if name.startswith("round ") and holder >= 0 else ""
    terms = "\n".join(f"{WORDS[TERMS[i]]}: {words.clock(parts[i])}" for i in used)
    return f"{name}: {words.clock(lasted_s)}{who}\n{terms}"


def holders(history: History, about: str) -> str:
    """A card with the clients that held up most. about: says what a client's part is."""
    total = history.pull.sum()
    order = [i for i in np.argsort(-history.pull, kind="stable")[:MOST_BARS] if history.pull[i] > 0]
    if not order:
        return unknown("Who held rounds up", "Nobody came.")
    rows = []
    for i in order:
        term, part = TERMS[history.longest[i]], history.pull[i] / total
        often = f"{history.rounds[i]} round{'' if history.rounds[i] == 1 else 's'}"
        name, said = _name(history, i), words.percent(part, 1)
        text = f"{name}: {said} of all rounds\nwas in {often}\nlongest term: {WORDS[term]}"
        rows.append(Bar(_short(name), part, said, text, TERM_COLOURS[term]))
    terms = dict.fromkeys(TERMS[history.longest[i]] for i in order)
    marks = [Mark(f"longest: {WORDS[term]}", TERM_COLOURS[term], None) for term in terms]
    return bars("Who held rounds up", f"{about} Colour: the longest term.", rows, marks)


def _mean_cut(history, client) -> str:
    rounds, cut = history.rounds[client], history.cut[client]
    return f"cut {cut:.0f}" if rounds == 1 else f"mean cut {cut:.1f}, {rounds} rounds"


def _name(history, client) -> str:
    """The name of a client. Clients of random fleets are numbers."""
    name = str(history.names[client])
    return f"client {name}" if name.isdecimal() else name


def _short(name) -> str:
    return name if len(name) <= 18 else name[:17] + "…"


def cuts(history: History) -> str:
    """A card with how many clients had each cut in each round."""
    own = bins(len(history.cuts))
    counts = own.mean(history.cuts.astype(float))
    used = np.flatnonzero(counts.sum(axis=0))
    if not len(used):
        return unknown("Cuts over rounds", "Nobody came.")
    most = counts.max()
    labels: dict[Any, str] = {cut: f"{unit_name(history, cut)} {cut}" for cut in used}
    left = max(46, 14 + _LETTER * max(map(len, labels.values())))
    with drawing(left) as axes:
        level = np.ceil(_LEVELS * counts[:, used] / most).astype(int)
        for step in range(1, _LEVELS + 1):
            cells = np.argwhere(level == step)
            if len(cells):
                axes.add_patch(_cells(cells, own.edges, 0.15 + 0.85 * step / _LEVELS))
        axes.set(xlim=(own.edges[0], own.edges[-1]), ylim=(-0.5, len(used) - 0.5), xlabel="round")
        page.whole_numbers(axes)
        ticks = _apart(counts.sum(axis=0)[used], 1 + len(used) // 14)
        axes.set_yticks(ticks, [labels[used[tick]] for tick in ticks])
        axes.grid(visible=False)
        centres = (own.edges[:-1] + own.edges[1:]) / 2
        points = [
            Point(centre, 0, _cuts_text(name, row, labels))
            for centre, name, row in zip(centres, own.names, counts, strict=True)
        ]
        caption = (
            "Rows: the last unit on the client, and its number; only cuts that are used. The stronger the"
            f" colour, the more clients: up to {most:.3g}."
        )
        return page.figure("Cuts over rounds", caption, axes, points, "x")


def unit_name(history: History, cut: Any) -> str:
    """The last unit on a client with this cut."""
    if cut == len(history.units):
        return "all units"
    return history.units[cut - 1] if cut else "images"


def _cells(cells, edges, alpha) -> PathPatch:
    """Rectangles (bin, cut) as one path."""
    corners = [
        Path(
            [
                (edges[b], c - 0.5),
                (edges[b + 1], c - 0.5),
                (edges[b + 1], c + 0.5),
                (edges[b], c + 0.5),
                (0, 0),
            ],
            [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY],
        )
        for b, c in cells
    ]
    return PathPatch(Path.make_compound_path(*corners), facecolor=paint("blue"), alpha=alpha, linewidth=0)


def _apart(weights, distance) -> list[int]:
    """The places of the heaviest weights with at least this distance."""
    kept: list[int] = []
    for place in np.argsort(-weights, kind="stable"):
        if all(abs(place - other) >= distance for other in kept):
            kept.append(int(place))
    return sorted(kept)


def _cuts_text(name, counts, labels) -> str:
    rows = (f"{labels[cut]}: {counts[cut]:.3g}" for cut in np.flatnonzero(counts)[::-1])
    return "\n".join([f"{name}, clients by cut", *rows])


def shares(history: History) -> str | None:
    """A card with each client's mean share of the server against its compute. None if nobody has a share."""
    came = np.flatnonzero((history.rounds > 0) & np.isfinite(history.share))
    if not len(came):
        return None
    came = came[np.argsort(history.flops[came], kind="stable")]
    shown = came[np.unique(np.linspace(0, len(came) - 1, MOST_DOTS).astype(int))]
    alone = history.share[shown] == 0
    if alone.all():
        return unknown("Shares of the server", "No client needs a share: all train alone.")
    with drawing() as axes:
        for which, colour in ((~alone, "violet"), (alone, "grey")):
            own = shown[which]
            axes.scatter(
                history.flops[own], 100 * history.share[own], 22, color=paint(colour), alpha=0.7, linewidths=0
            )
        axes.set(xscale="log", xlabel="compute of the client, FLOP/s", ylabel="share of the server, %")
        axes.set_ylim(-0.03 * axes.get_ylim()[1], None)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: words.amount(x, "")))
        points = [
            Point(
                history.flops[i], 100 * history.share[i],
                f"{_name(history, i)}: {words.percent(float(history.share[i]))} of the server\n"
                f"{words.amount(float(history.flops[i]), 'FLOP/s')}\n{_mean_cut(history, i)}",
            )
            for i in shown
        ]  # fmt: skip
        marks = [Mark("with a share", "violet", None)]
        marks += [Mark("trains alone", "grey", None)] if alone.any() else []
        some = "" if len(shown) == len(came) else f" {len(shown)} of {len(came)} clients."
        mean = "" if len(history.cuts) == 1 else ", with the mean of its rounds"
        caption = f"Each dot is a client{mean}.{some}"
        return page.figure("Shares of the server", caption, axes, points, marks=marks)


def method_times(clocks: Mapping[str, Any], own: str) -> str:
    """A card with the simulated time of every method, the shortest on top."""
    times_s = {name: float(clock.seconds[-1]) for name, clock in clocks.items()}
    order = sorted((name for name in times_s if math.isfinite(times_s[name])), key=times_s.__getitem__)
    rows = []
    for name in order:
        is_own = name == own
        beside = "this plan" if is_own else words.beside(times_s[name], times_s[own])
        rows.append(
            Bar(
                name, times_s[name], words.clock(times_s[name]),
                f"{name}: {words.clock(times_s[name])}\n{beside}", "blue" if is_own else "grey",
            )
        )  # fmt: skip
    lost = [name for name in times_s if name not in order]
    caption = "Simulated seconds of all rounds. Blue: this plan."
    caption += f" Not possible: {', '.join(lost)}." if lost else ""
    return bars("Time of each method", caption, rows)
