"""The plans of every method over many fleets as one page of HTML."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sfl_jax.commands import page, pictures, software, words
from sfl_jax.commands.config import Config
from sfl_jax.commands.page import Mark
from sfl_jax.commands.pictures import Bar, Curve
from sfl_jax.commands.report_page import made_with_card, settings_card
from sfl_jax.planning.comparison import DRAWS, ERRORS, Row

FLOOR = 0.01  # percent above the optimum; smaller numbers are drawn here
SWEEPS = {
    "server_flops": ("Server", "FLOP/s"),
    "clients": ("Clients that share it", "clients"),
    "uplink": ("Uplink", "times as fast"),
    "heterogeneity": ("Heterogeneity", "0: all alike, 1: the fleet as it is"),
}
_VARIED = (
    "How much longer a round lasts than with optimal cuts and shares, in percent: the mean over fleets, with"
    " one thing varied at a time; and the median over draws of true rates, for a plan made on other rates."
)
MOST = 50.0  # percent: longer bars end here
_TILES = {"exact": "The optimum", "common_cut": "One cut for all", "no_split": "No split"}


def methods(config: Config, rows: Sequence[Row]) -> str:
    """The page. rows: as `comparison.sweeps` and `comparison.errors` yield them."""
    names = list(dict.fromkeys(row.method for row in rows))
    swept = [row for row in rows if row.sweep in SWEEPS]
    kind = (
        f"{config.clients} random clients in one round"
        if config.fleet == "random"
        else Path(config.fleet).name
    )
    below = (
        f"{config.model} at {config.image_size}x{config.image_size}, {kind}, {config.barrier} barrier, server"
        f" {words.amount(config.server_flops, 'FLOP/s')} unless swept"
    )
    looks = {name: pictures.METHODS.get(name, ("grey", "6 3")) for name in names}
    marks = [Mark(name, *looks[name]) for name in names]
    return page.document("Plans of every method", [
        page.heading("Plans of every method", below),
        page.tiles(_tile(name, swept) for name in _TILES if name in names),
        page.section("Rounds of other methods", _VARIED),
        page.legend(marks),
        page.cards([
            *(_sweep(sweep, [row for row in swept if row.sweep == sweep], looks) for sweep in SWEEPS),
            *(_errors(error, rows, looks) for error in ERRORS),
        ]),
        page.section("Settings and software"),
        page.cards(
            [settings_card(config, "compare"), made_with_card({"packages": software.packages()})], "tables"
        ),
    ])  # fmt: skip


def _above(row: Row) -> float:
    """Percent above the optimum."""
    return 100 * max(0.0, row.round_s / row.optimum_s - 1) if math.isfinite(row.round_s) else math.nan


def _tile(name, rows) -> tuple[str, str, str]:
    above = [value for row in rows if row.method == name and math.isfinite(value := _above(row))]
    if not above:
        return _TILES[name], words.NONE, f"{name} serves no case"
    gaps = [row.optimum_s / row.bound_s - 1 for row in rows if row.method == "exact" and row.bound_s > 0]
    if name == "exact":
        return _TILES[name], "proven", f"exact plans are within {max(gaps, default=0):.0e} of their bounds"
    ratio = 1 + statistics.fmean(above) / 100
    return _TILES[name], f"{ratio:.2f} times", f"as long as the optimum: {name}, mean of {len(above)} cases"


def _sweep(sweep, rows, looks) -> str:
    title, label = SWEEPS[sweep]

    def curve(name):
        values = sorted({row.value for row in rows if row.method == name})
        above = [
            float(np.mean([_above(row) for row in rows if (row.method, row.value) == (name, value)]))
            for value in values
        ]

        def text(i):
            return f"{name}: {above[i]:.3g} % above the optimum\n{words.amount(values[i], '')} {label}"

        return Curve(values, above, text, *looks[name])

    drawn = [curve(name) for name in looks if name in {row.method for row in rows}]
    return pictures.curves(
        title, f"Varied: {label}.", drawn, label, "above the optimum, %",
        log=sweep != "heterogeneity", floor=FLOOR,
    )  # fmt: skip


def _errors(error, rows, looks) -> str:
    found = []
    for name in looks:
        above = [_above(row) for row in rows if (row.sweep, row.value, row.method) == ("error", error, name)]
        if above and np.isfinite(above).all():
            low, median, high = np.quantile(above, (0.05, 0.5, 0.95))
            text = f"{name}: {median:.3g} % in the median\n{low:.3g} to {high:.3g} % in nine draws of ten"
            found.append(Bar(name, min(float(median), MOST), f"{median:.3g} %", text, looks[name][0]))
    found.sort(key=lambda bar: bar.value)
    title = f"Rates wrong by up to {words.percent(error, 0)}"
    caption = f"The plan is kept. {DRAWS} draws; bars end at {MOST:g} %."
    return pictures.bars(title, caption, found) if found else pictures.unknown(title, words.NONE)
