"""A page of HTML in one file, for light and dark, phones and wide screens. It needs no network.

Pictures are drawn by matplotlib and put into the page as SVG. Their colours are variables of the page's
style. A short script shows the value under the pointer; without it the page lacks only that.
"""

import contextlib
import html
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sfl_jax.files import HTML_MARK

# Name: (light, dark). Text has a contrast of 4.5 or more on the background of its page, marks of 3 or more.
COLOURS = {
    "page": ("#f4f6f8", "#10151b"), "card": ("#ffffff", "#19212a"), "ink": ("#18212c", "#e9edf2"),
    "muted": ("#566270", "#a3afbb"), "rule": ("#dfe4e9", "#2d3843"),
    "blue": ("#1f57d6", "#83aaff"), "orange": ("#cc4a0d", "#ff935a"), "green": ("#1b8537", "#56cf7f"),
    "amber": ("#a86f00", "#f0bb42"), "pink": ("#b03f88", "#f294cd"), "sky": ("#0876b5", "#5cc0f5"),
    "violet": ("#7548cc", "#b79dff"), "grey": ("#74808c", "#98a4b0"), "pale_sky": ("#5a98c9", "#4581a8"),
    "pale_green": ("#559c68", "#3d8a55"), "pale_orange": ("#d67d3c", "#b8683a"),
}  # fmt: skip
# The two directions of one thing share a hue.
TERM_COLOURS = {
    "model_down": "pale_sky", "client_forward": "pale_green", "smashed_up": "orange", "server": "violet",
    "gradient_down": "pale_orange", "client_backward": "green", "model_up": "sky",
}  # fmt: skip
WIDTH, HEIGHT = 360, 230  # of a picture; its unit is a pixel of a phone
_RC: dict[Any, Any] = {
    "svg.fonttype": "none", "font.size": 11, "axes.edgecolor": COLOURS["rule"][0], "axes.linewidth": 1.0,
    "axes.labelcolor": COLOURS["muted"][0], "axes.labelsize": 11, "text.color": COLOURS["ink"][0],
    "xtick.color": COLOURS["muted"][0], "ytick.color": COLOURS["muted"][0], "xtick.major.size": 0,
    "xtick.major.pad": 7, "ytick.major.size": 0, "xtick.minor.size": 0, "ytick.minor.size": 0,
    "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False,
    "grid.color": COLOURS["rule"][0], "grid.linewidth": 1.0, "axes.axisbelow": True,
    "lines.solid_capstyle": "round", "path.simplify": False,
}  # fmt: skip


class Point(NamedTuple):
    """A place in a picture's axes, and the text that is shown there under the pointer."""

    x: Any
    y: Any
    text: str


class Mark(NamedTuple):
    """An entry of a legend. colour: a name in COLOURS. dashes: of a line in SVG; None is a filled square."""

    label: str
    colour: str
    dashes: str | None = ""


def _text(plain: str) -> str:
    return html.escape(plain, quote=False)


def paint(name: str) -> str:
    """The colour of this name as matplotlib takes it. The page replaces it by its variable."""
    return COLOURS[name][0]


def document(title: str, inside: Iterable[str]) -> str:
    """The whole page. title: plain text. inside: HTML."""
    here = Path(__file__)
    light, dark = (" ".join(f"--{name}: {pair[i]};" for name, pair in COLOURS.items()) for i in (0, 1))
    style = (
        f":root {{ color-scheme: light dark; {light} }}\n"
        f"@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n"
        + here.with_suffix(".css").read_text()
    )
    return "\n".join([
        "<!doctype html>", '<html lang="en">', '<meta charset="utf-8">', HTML_MARK.decode(),
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{_text(title)}</title>", f"<style>{style}</style>", "<main>", *inside, "</main>",
        f"<script>{here.with_suffix('.js').read_text()}</script>", "</html>", "",
    ])  # fmt: skip


def heading(title: str, below: str) -> str:
    """The top of the page, from plain texts."""
    return f'<h1>{_text(title)}</h1>\n<p class="muted">{_text(below)}</p>'


def section(title: str, below: str = "") -> str:
    """The beginning of a section, from plain texts."""
    return f"<h2>{_text(title)}</h2>" + (f'\n<p class="muted">{_text(below)}</p>' if below else "")


def paragraph(text: str) -> str:
    """A plain text as a paragraph."""
    return f"<p>{_text(text)}</p>"


def tiles(rows: Iterable[tuple[str, str, str]]) -> str:
    """The largest numbers of the page: (what it is, the number, a remark)."""
    made = (
        f'<div class="tile"><span>{_text(name)}</span><b>{_text(value)}</b>'
        f"<small>{_text(remark)}</small></div>"
        for name, value, remark in rows
    )
    return '<div class="tiles">\n' + "\n".join(made) + "\n</div>"


def cards(inside: Iterable[str], kind: str = "cards") -> str:
    """Figures and other cards side by side.

    kind: "cards", as many as fit, all of one height; "tables", at most two; "parts", of different heights.
    """
    return f'<div class="{kind}">\n' + "\n".join(inside) + "\n</div>"


def card(title: str, inside: str) -> str:
    """HTML in a frame, below a title."""
    return f'<div class="card"><h3>{_text(title)}</h3>{inside}</div>'


def legend(marks: Iterable[Mark]) -> str:
    """What the colours of a picture mean."""
    items = (f"<li>{_swatch(mark)}{_text(mark.label)}</li>" for mark in marks)
    return '<ul class="legend">\n' + "\n".join(items) + "\n</ul>"


def _swatch(mark: Mark) -> str:
    paint = f"var(--{mark.colour})"
    if mark.dashes is None:
        width, shape = 11, f'<rect width="11" height="11" rx="2" style="fill: {paint}"/>'
    else:
        style = f"stroke: {paint}; stroke-width: 2.5; stroke-dasharray: {mark.dashes or 'none'}"
        width, shape = 22, f'<path d="M0 6H22" style="{style}"/>'
    return f'<svg width="{width}" height="11" aria-hidden="true">{shape}</svg>'


def table(rows: Iterable[Sequence[str]]) -> str:
    """Rows of a name, a number, and remarks."""
    cells = (
        f'<td>{_text(name)}<td class="number">{_text(value)}' + "".join(f"<td>{_text(word)}" for word in more)
        for name, value, *more in rows
    )
    return _wide("<table>\n" + "\n".join(f"<tr>{row}" for row in cells) + "\n</table>")


def grid(rows: Iterable[Sequence[str]], numbers: bool = True) -> str:
    """A table below a row of titles. numbers: whether all columns but the first are numbers."""
    (corner, *titles), *body = rows
    kind = ' class="number"' if numbers else ""
    head = f"<tr><th>{_text(corner)}" + "".join(f"<th{kind}>{_text(title)}" for title in titles)
    lines = (
        f"<tr><td>{_text(name)}" + "".join(f"<td{kind}>{_text(cell)}" for cell in cells)
        for name, *cells in body
    )
    return _wide("<table>\n" + "\n".join([head, *lines]) + "\n</table>")


def details(summary: str, inside: str) -> str:
    """HTML that is shown when the reader opens it."""
    return f"<details><summary>{_text(summary)}</summary>\n{inside}\n</details>"


def columns(values: Mapping[str, Any]) -> str:
    """Settings in columns."""
    entries = (f"<code>{_text(f'{name}={value}')}</code><br>" for name, value in values.items())
    return '<p class="columns">\n' + "\n".join(entries) + "\n</p>"


def code(text: str) -> str:
    """A command line, or several lines of output.

    A browser breaks a command between words, and within a word only if that is too long. Output keeps its
    lines and columns, and scrolls by itself.
    """
    if "\n" in text:
        return f'<pre class="output">{_text(text)}</pre>'
    words = (f"<code>{_text(word)}</code>" for word in text.split(" "))
    return f"<pre>{' '.join(words)}</pre>"


def _wide(inside: str) -> str:
    """A part that scrolls by itself if the page is narrower."""
    return f'<div class="wide">\n{inside}\n</div>'


@contextlib.contextmanager
def drawing(left: float = 46, right: float = 10, height: float = HEIGHT) -> Iterator[Axes]:
    """Axes in the style of the page. `left` and `right`: margins in units of the picture."""
    with mpl.rc_context(_RC):
        figure = Figure(figsize=(WIDTH / 72, height / 72), dpi=72)
        axes = figure.add_axes((left / WIDTH, 38 / height, 1 - (left + right) / WIDTH, 1 - 46 / height))
        axes.grid(axis="y")
        yield axes


def whole_numbers(axes: Axes) -> None:
    """Ticks of the horizontal axis at whole numbers, such as rounds."""
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def figure(
    title: str,
    caption: str,
    axes: Axes,
    points: Sequence[Point],
    mode: str = "xy",
    marks: Sequence[Mark] = (),
) -> str:
    """A card with a picture. points: what the pointer finds. mode: see page.js. Use it within `drawing`."""
    number, drawn = re.sub(r"\W+", "-", title.lower()), axes.get_figure(root=True)
    assert drawn is not None
    text = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": number}):
        drawn.savefig(text, format="svg", metadata={"Date": None}, transparent=True, dpi=72)
    svg = _clean(text.getvalue(), number, title)
    height = float(drawn.get_figheight()) * 72
    places = (
        axes.transData.transform([(point.x, point.y) for point in points]) if points else np.empty((0, 2))
    )
    found = [
        [round(float(x), 1), round(height - float(y), 1), point.text]
        for (x, y), point in zip(places, points, strict=True)
        if np.isfinite((x, y)).all()
    ]
    frame = axes.get_window_extent()
    data = {
        "mode": mode, "points": found,
        "box": [round(float(v), 1) for v in (frame.x0, height - frame.y1, frame.x1, height - frame.y0)],
    }  # fmt: skip
    kind = ' class="short"' if height < HEIGHT else ""
    script = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    return (
        f"<figure{kind}>\n<h3>{_text(title)}</h3>{_below(caption)}\n"
        + (legend(marks) + "\n" if marks else "")
        + svg
        + (f'\n<script type="application/json">{script}</script>' if found else "")
        + "\n</figure>"
    )


def _below(caption: str) -> str:
    return f"<figcaption>{_text(caption)}</figcaption>" if caption else ""


def _clean(text: str, number: str, title: str) -> str:
    """Matplotlib's SVG for this page: its colours are variables, and its ids belong to one figure alone."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', text))
    text = re.sub(r' id="([^"]+)"', lambda m: f' id="{number}-{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r'(url\(#|href="#)', rf"\1{number}-", text)
    for name, (colour, _) in COLOURS.items():
        text = text.replace(colour, f"var(--{name})")
    size = re.search(r'viewBox="[^"]*"', text)
    assert size
    text = re.sub(
        r"<svg[^>]*>",
        f'<svg class="plot" role="img" aria-label="{html.escape(title)}" {size[0]}>',
        text,
        count=1,
    )
    return re.sub(r"\n\s*", "\n", text).replace("xlink:href", "href").strip()
