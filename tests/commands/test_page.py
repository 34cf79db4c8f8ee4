"""Pages: one file, colours that can be read in the light and in the dark, texts that stay texts."""

import html.parser
import itertools
import json
import re

import numpy as np
import pytest
from commands.histories import told

from sfl_jax.commands import page, pictures
from sfl_jax.commands.page import COLOURS
from sfl_jax.run.history import TERMS


def luminance(colour):
    """Of WCAG 2."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [x / 12.92 if x <= 0.03928 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def contrast(first, second):
    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [0, 1])
def test_texts_and_marks_can_be_told_from_their_background(scheme):
    card, background = COLOURS["card"][scheme], COLOURS["page"][scheme]
    for name in ("ink", "muted"):
        assert contrast(COLOURS[name][scheme], card) >= 4.5, name
        assert contrast(COLOURS[name][scheme], background) >= 4.5, name
    for name in COLOURS.keys() - {"card", "page", "rule"}:
        assert contrast(COLOURS[name][scheme], card) >= 3, name


def test_each_colour_has_its_own_value_by_which_the_page_finds_it():
    values = [pair[0] for pair in COLOURS.values()]
    assert len(set(values)) == len(values)
    styles = [*pictures.METHODS.values(), *pictures.CYCLE]
    assert len(set(pictures.METHODS.values()) | {pictures.OWN}) == len(pictures.METHODS) + 1
    assert len(set(pictures.CYCLE)) == len(pictures.CYCLE)
    assert {colour for colour, _ in styles} | set(page.TERM_COLOURS.values()) <= COLOURS.keys()
    assert tuple(page.TERM_COLOURS) == TERMS


class Tags(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.seen, self.attributes = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.attributes += [(name, value) for name, value in attrs]


def curve(colour="blue", name="a", count=5):
    x = list(range(1, count + 1))
    return pictures.Curve(x, [2.0 * value for value in x], lambda i: f"{name} at {x[i]}", colour)


def test_a_page_has_all_that_it_needs_and_every_id_once():
    evil = "<b onmouseover='x'>&\"</script><script>"
    mark = [page.Mark(evil, "blue")]
    made = page.document(evil, [
        page.heading(evil, evil), page.tiles([(evil, evil, evil)]), page.table([(evil, "1", evil)]),
        page.code(evil), page.columns({evil: evil}), page.grid([(evil, evil), (evil, evil)]),
        page.cards(
            pictures.curves(f"{evil} {i}", evil, [curve(name=evil)], "x", "y", marks=mark) for i in range(2)
        ),
    ])  # fmt: skip
    tags = Tags(made)
    assert tags.seen.count("script") == 3, "one of the page and the points of two pictures"
    assert "b" not in [tag for tag in tags.seen if tag != "b"]
    assert "onmouseover" not in [name for name, _ in tags.attributes]
    ids = [value for name, value in tags.attributes if name == "id"]
    assert len(set(ids)) == len(ids) > 0
    wanted = {value[1:] for name, value in tags.attributes if name == "href"}
    wanted |= set(re.findall(r"url\(#([^)]+)\)", made))
    assert wanted <= set(ids)
    assert not re.findall(r'(?:src|href)="(?!#)', made)
    assert re.findall(r"#[0-9a-f]{6}", made[made.index("<main>") : made.index("</main>")]) == []


def points(figure):
    return json.loads(re.search(r'application/json">(.*?)</script>', figure, re.DOTALL)[1])


def test_the_pointer_finds_the_places_that_are_drawn():
    """Of a line of five points, the path in the SVG and the points of the script are the same."""
    figure = pictures.curves("T", "", [curve("orange")], "x", "y")
    found = points(figure)
    assert [text for _, _, text in found["points"]] == [f"a at {i}" for i in range(1, 6)]
    path = re.search(r'<path d="([^"]*)"[^>]*stroke: var\(--orange\)', figure)[1]
    drawn = [float(number) for number in re.findall(r"-?[\d.]+", path)]
    places = [number for x, y, _ in found["points"] for number in (x, y)]
    assert places == pytest.approx(drawn, abs=0.06)
    left, top, right, bottom = found["box"]
    assert all(left <= x <= right and top <= y <= bottom for x, y, _ in found["points"])


def test_long_curves_are_thinned_and_keep_their_ends():
    found = points(pictures.curves("T", "", [curve(count=1000)], "x", "y"))["points"]
    assert len(found) == pictures.MOST_POINTS
    assert (found[0][2], found[-1][2]) == ("a at 1", "a at 1000")


def test_what_is_not_known_is_said():
    unknown = pictures.Curve([1, 2], [np.nan, np.nan], str, "blue")
    assert "not known of this run" in pictures.curves("T", "", [unknown], "x", "y")


def test_bins_cover_all_rounds_once():
    for rounds in (1, 7, pictures.MOST_BINS, pictures.MOST_BINS + 1, 1000):
        own = pictures.bins(rounds)
        assert len(own.names) == len(own.starts) == len(own.edges) - 1 <= pictures.MOST_BINS
        assert (own.edges[0], own.edges[-1]) == (0.5, rounds + 0.5)
        values = np.arange(2.0 * rounds).reshape(rounds, 2)
        ends = [*own.starts[1:], rounds]
        means = [values[a:b].mean(axis=0) for a, b in zip(own.starts, ends, strict=True)]
        assert own.mean(values) == pytest.approx(np.array(means))


def test_the_pictures_of_rounds_say_who_what_and_how_long():
    history = told()
    by_term = points(pictures.seconds_by_term(history, [1.0] * 3, [1.0] * 3, "c"))
    assert by_term["mode"] == "x"
    (_, _, text), *_ = by_term["points"]
    assert text.startswith(f"round 1: 1.00 s, held up by phone-{history.holder[0]}\nmodel down: ")
    assert len(text.splitlines()) == 8
    cuts = points(pictures.cuts(history))["points"]
    assert cuts[0][2] == "round 1, clients by cut\nall units 5: 1\nblock1 2: 3"
    who = points(pictures.holders(history, "about"))["points"]
    largest = history.pull.argmax()
    assert who[0][2].startswith(f"phone-{largest}: {100 * history.pull[largest] / history.pull.sum():.1f} %")
    shares = points(pictures.shares(history))["points"]
    assert len(shares) == 4


@pytest.mark.parametrize("rounds", [1, 500])
def test_many_rounds_and_clients_stay_a_small_picture(rounds):
    history = told(rounds, clients=5000, units=40)
    made = [
        pictures.seconds_by_term(history, [1.0] * rounds, [0.5] * rounds, ""), pictures.cuts(history),
        pictures.holders(history, "about"), pictures.shares(history),
    ]  # fmt: skip
    assert sum(map(len, made)) < 250_000


def test_rounds_to_which_nobody_came_are_drawn():
    none = told(
        cuts=np.zeros((3, 6), np.int64), seconds=np.zeros((3, 7)), pull=np.zeros(4), holder=np.full(3, -1)
    )
    for drawn in (
        pictures.cuts(none), pictures.holders(none, "about"),
        pictures.seconds_by_term(none, [0.0] * 3, [0.0] * 3, ""),
    ):  # fmt: skip
        assert "Nobody came." in drawn
    first = points(pictures.seconds_by_term(told(holder=np.array([-1, 0, 1])), [1.0] * 3, [1.0] * 3, ""))
    assert ["held up by" in text for _, _, text in first["points"]] == [False, True, True]
    assert pictures.shares(told(share=np.full(4, np.nan))) is None
    assert "all train alone" in pictures.shares(told(share=np.zeros(4)))


def test_names_of_units_keep_apart_in_the_heat_map():
    """Of neighbouring cuts of a long network only some are named, the most used ones first."""
    cuts = np.ones((2, 61), np.int64)
    cuts[:, 30] = 9
    drawn = pictures.cuts(told(2, units=60, cuts=cuts))
    named = [int(n) for n in re.findall(r">(?:block\d+|images|all units) (\d+)</text>", drawn)]
    assert 30 in named
    assert min(b - a for a, b in itertools.pairwise(sorted(named))) >= 4


def test_output_keeps_its_lines_and_a_command_breaks_between_its_flags():
    assert page.code("a  <b\nc") == '<pre class="output">a  &lt;b\nc</pre>'
    assert page.code("a --b=c") == "<pre><code>a</code> <code>--b=c</code></pre>"


def test_a_picture_of_few_bars_is_as_high_as_its_bars():
    def height(count):
        drawn = pictures.bars("T", "", [pictures.Bar(str(n), n + 1, "x", "y", "blue") for n in range(count)])
        return drawn, float(re.search(r'viewBox="0 0 360 (\d+)"', drawn)[1])

    (few, low), (many, high), (most, highest) = map(height, (2, 6, 20))
    assert (low, high, highest) == (112, page.HEIGHT, 500)
    assert few.startswith('<figure class="short">')
    assert [figure.startswith("<figure class") for figure in (many, most)] == [False, False]
    (_, first, _), (_, second, _) = points(few)["points"]
    assert (first, second) == pytest.approx((28, 84), abs=3), "a bar in the middle of its row"
