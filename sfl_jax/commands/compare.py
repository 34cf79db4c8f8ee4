"""Compares methods: accuracy on the simulated clock of every method, over one training.

With --plan_only it trains nothing. It compares the plans of every method over many fleets, servers and links,
and under wrong costs.
"""

import csv
import dataclasses
import io
import itertools
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sfl_jax.commands import flags
from sfl_jax.commands.config import Config
from sfl_jax.commands.rules import RANDOM
from sfl_jax.commands.screen import Screen, first_line_of_plan, screen
from sfl_jax.errors import BadInput
from sfl_jax.files import CONFIG, HTML_MARK, PNG_MARK, ensure_ours, ensure_writable, whole_file

# The files that the command writes, and a text that each contains.
PLAN_FILES = {
    "methods.csv": b"sweep,value,fleet,", "methods.png": PNG_MARK, "errors.png": PNG_MARK,
    "methods.html": HTML_MARK,
}  # fmt: skip
CLOCK_FILES = {"clocks.csv": b"round,test_accuracy,", "clocks.png": PNG_MARK}
_SWEEPS = {
    "server_flops": "server compute",
    "clients": "number of clients",
    "uplink": "uplink rates",
    "heterogeneity": "heterogeneity",
    "error": "costs misjudged by",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return flags.run(compare, "compare", str(__doc__), argv)


def compare(config: Config) -> int:
    """Trains and writes clocks.csv and .png. With --plan_only: methods.csv, .png, .html, errors.png."""
    ensure_writable(config.workdir, "workdir", config.workdir)
    for name, mark in (PLAN_FILES if config.plan_only else CLOCK_FILES).items():
        ensure_ours(Path(config.workdir, name), mark, "workdir", config.workdir)
    if config.plan_only and Path(config.workdir, CONFIG).exists():
        raise BadInput(f"--workdir={config.workdir}: has a training; choose another, or leave it out")
    return compare_plans(config) if config.plan_only else compare_clocks(config)


def compare_plans(config: Config) -> int:
    """Compares every method's plans without training."""
    with screen(f"plans of every method, no training: {first_line_of_plan(config)}") as say:
        if note := _about_cohorts(config):
            say.aside(note)
        from sfl_jax.commands import accelerators

        accelerators.start()
        accelerators.find()
        from sfl_jax.commands import compare_page, compare_plot, division, parts
        from sfl_jax.planning import comparison

        config, _ = division.settle(config)
        say(f"counting the work of {config.model}, and compiling the methods")
        planner, fleets = parts.planner(config), list(_fleets(config))
        rows = itertools.chain(comparison.sweeps(planner, fleets), comparison.errors(planner, fleets[0]))
        rows = _said(rows, say)
        say("drawing")
        written = [Path(config.workdir) / name for name in PLAN_FILES]
        write_csv(written[0], comparison.Row._fields, rows)
        compare_plot.write_methods(written[1], rows, config)
        compare_plot.write_errors(written[2], rows, config)
        with whole_file(written[3]) as file:
            file.write(compare_page.methods(config, rows).encode(errors="xmlcharrefreplace"))
        say.result(f"{methods_table(rows)}\nwritten: {', '.join(map(str, written))}")
        return 0


def _about_cohorts(config):
    """A line for who gave a size of cohorts, as a preset does: plans without training have none."""
    if config.fleet != RANDOM or not 0 < config.cohort_size < config.clients:
        return ""
    if config.cohort_size == Config.cohort_size:
        return ""
    return (
        f"all {config.clients} clients share the server in one round; for rounds of"
        f" {config.cohort_size} clients, as in training, give --clients={config.cohort_size}"
    )


def _fleets(config: Config) -> Iterator[Any]:
    """The terms of the fleet of a file, or of several random fleets.

    Raises BadInput that names clients that no method can serve.
    """
    from sfl_jax import planning
    from sfl_jax.commands import parts
    from sfl_jax.planning.comparison import RANDOM_FLEETS

    for seed in range(config.seed, config.seed + (RANDOM_FLEETS if config.fleet == RANDOM else 1)):
        own = dataclasses.replace(config, seed=seed)
        fleet, _, terms = parts.read_terms(own)
        planning.solve(parts.planner(dataclasses.replace(own, method="exact")), fleet, terms)
        yield terms


def _said(rows: Iterable[Any], say: Screen) -> list[Any]:
    """The rows. Shows each sweep when it begins."""
    found: list[Any] = []
    for row in rows:
        begins = not found or (row.sweep, row.fleet) != (found[-1].sweep, found[-1].fleet)
        found.append(row)
        if begins:
            say(f"planning: {_SWEEPS.get(row.sweep, row.sweep)}, fleet {row.fleet + 1}")
    return found


def compare_clocks(config: Config) -> int:
    """Trains once, then compares accuracy on the clock of every method."""
    from sfl_jax.commands import report, train

    code = train.train(config)
    from sfl_jax.federated import processes

    if code or not processes.is_first():
        return code
    with screen("comparing the methods") as say:
        from sfl_jax.commands import compare_plot, parts, workdir
        from sfl_jax.run import recording
        from sfl_jax.run.ledger import sent_bytes

        lines = recording.logged(config.workdir)
        accuracies = [line.test_accuracy for line in lines]
        built = parts.build(dataclasses.replace(config, init_from=""), say)  # no clock depends on weights
        workdir.ensure_unchanged(built, names=("dataset", "fleet", "availability"))
        say(f"planning {len(lines)} rounds by every method")
        clocks, history = report.known(config.workdir, built.parts, lines)
        columns = {f"{_column(name)}_s": clock.seconds for name, clock in clocks.items()}
        columns |= {
            f"{_column(name)}_bytes": sent_bytes(clock.ledger).cumsum() for name, clock in clocks.items()
        }
        rows = zip([line.round for line in lines], accuracies, *columns.values(), strict=True)
        written = [Path(config.workdir) / name for name in CLOCK_FILES]
        write_csv(written[0], ("round", "test_accuracy", *columns), rows)
        compare_plot.write_clocks(written[1], accuracies, clocks, config)
        report.put(config.workdir, clocks, history)
        written.append(Path(config.workdir) / report.NAME)
        say.result(f"\n{report.table(clocks, accuracies, config)}\nwritten: {', '.join(map(str, written))}")
        return 0


def _column(method: str) -> str:
    """A method's name in a table, for example "alternating_4_starts" for "alternating, 4 starts"."""
    return method.replace(", ", "_").replace(" ", "_")


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Writes a table. A cell is empty if its number is missing or not finite."""
    with whole_file(path) as file:
        text = io.TextIOWrapper(file, "utf-8", newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(header)
        writer.writerows([_cell(value) for value in row] for row in rows)
        text.detach()


def methods_table(rows: Sequence[Any]) -> str:
    """Each method's round over the optimum: the mean and the worst over all cases of a sweep."""
    titles = [_SWEEPS.get(name, name) for name in _sweeps(rows)]
    lines = [
        "round over the optimum, mean (worst) of all cases; 1.000 is optimal",
        f"  {'varied:':<22}" + "".join(f"{title:>22}" for title in titles),
    ]
    for method in dict.fromkeys(row.method for row in rows):
        cells = []
        for sweep in _sweeps(rows):
            ratios = [
                row.round_s / row.optimum_s for row in rows if (row.method, row.sweep) == (method, sweep)
            ]
            cells.append(f"{sum(ratios) / len(ratios):.3f} ({max(ratios):.3f})")
        lines.append(f"  {method:<22}" + "".join(f"{cell:>22}" for cell in cells))
    return "\n".join(lines)


def _sweeps(rows: Sequence[Any]) -> list[str]:
    return list(dict.fromkeys(row.sweep for row in rows))


def _cell(value: Any) -> Any:
    return "" if value is None or (isinstance(value, float) and not math.isfinite(value)) else value


if __name__ == "__main__":
    sys.exit(main())
