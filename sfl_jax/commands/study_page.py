"""A study as one page of HTML: its runs against rounds, simulated seconds and bytes, and its table."""

import math
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from sfl_jax.commands import page, pictures, software, study_table, words
from sfl_jax.commands.page import Mark
from sfl_jax.commands.pictures import Curve
from sfl_jax.commands.report_page import made_with_card

_ACCURACY = "test accuracy, %"
_TABLE = "A dash is for what is not known or was not reached; ± is the standard deviation."
_SAID = (
    "Each line is a run. Runs that differ in the seed alone share a colour. Seconds are of the simulated"
    " fleet, bytes those sent both ways."
)


def study_page(
    runs: Sequence[tuple[Mapping[str, str], Sequence[Any]]],
    rows: Sequence[Mapping[str, Any]],
    targets: Sequence[float],
    command: Sequence[str],
) -> str:
    """The page. runs, rows: as for `study_table.summarised`. command: repeats the study."""
    looks: dict[str, tuple[str, str]] = {}
    for values, _ in runs:
        looks.setdefault(name_of(values), pictures.CYCLE[len(looks) % len(pictures.CYCLE)])
    title = f"Study of {', '.join(runs[0][0])}"
    return page.document(title, [
        page.heading(title, f"{len(runs)} runs, {len(looks)} settings"),
        page.tiles(_headline(rows)),
        page.section("Accuracy", _SAID),
        page.legend(Mark(name, *look) for name, look in looks.items()),
        page.cards(_panels(runs, looks)),
        page.section("Table", _TABLE),
        page.card(_title(rows), page.grid(study_table.cells(rows, targets))),
        page.section("Command and software"),
        page.cards(
            [
                page.card("The command that repeats this", page.code(shlex.join(command))),
                made_with_card({"packages": software.packages()}),
            ],
            "tables",
        ),
    ])  # fmt: skip


def _title(rows):
    return "Means over seeds" if any(row["runs"] > 1 for row in rows) else "Each run"


def name_of(values: Mapping[str, str]) -> str:
    """The settings of a run without its seed."""
    return ", ".join(f"{key} {value}" for key, value in values.items() if key != "seed") or "all seeds"


def _headline(rows):
    """The best setting in each respect."""
    for title, field, best, said in (
        ("Highest accuracy", "test_accuracy", max, words.percent),
        ("Shortest simulated time", "simulated_s", min, words.clock),
        ("Fewest bytes", "bytes", min, lambda number: words.amount(number, "B")),
    ):
        known = [row for row in rows if row[field] is not None]
        if known:
            row = best(known, key=lambda row: row[field])
            yield title, said(row[field]), name_of(row["settings"])


def _panels(runs, looks):
    sent = [[math.nan if b is None else b for b in study_table.sent_so_far(lines)] for _, lines in runs]
    unit, size = words.byte_unit(max((sums[-1] for sums in sent if math.isfinite(sums[-1])), default=1.0))
    for title, label, rounds, of in (
        ("Accuracy by round", "round", True, lambda lines, _: [line.round for line in lines]),
        (
            "Accuracy by simulated time",
            "simulated seconds",
            False,
            lambda lines, _: [x.simulated_s for x in lines],
        ),
        (
            "Accuracy by bytes",
            f"sent so far, {unit}",
            False,
            lambda _, sums: [total / size for total in sums],
        ),
    ):
        drawn = [
            _curve(values, lines, of(lines, sums), label, looks)
            for (values, lines), sums in zip(runs, sent, strict=True)
        ]
        yield pictures.curves(title, "", drawn, label, _ACCURACY, rounds=rounds)


def _curve(values, lines, x, label, looks):
    percent = [math.nan if line.test_accuracy is None else 100 * line.test_accuracy for line in lines]
    seed = f", seed {values['seed']}" if "seed" in values else ""

    def text(i):
        place = "" if label == "round" else f"\n{label} {x[i]:.4g}"
        return f"{name_of(values)}{seed}\n{percent[i]:.2f} % after round {i + 1}{place}"

    return Curve(x, percent, text, *looks[name_of(values)])
