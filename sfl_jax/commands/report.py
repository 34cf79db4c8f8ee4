"""report.html of a run, done or not: what it reached, on every method's clock, and with which settings."""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sfl_jax.commands import flags, words
from sfl_jax.commands.config import Config, as_flags
from sfl_jax.commands.screen import screen
from sfl_jax.errors import BadInput
from sfl_jax.files import ensure_ours, ensure_writable, whole_file

NAME = "report.html"
SAME = 1e-6  # part by which a clock may differ that is made again


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return flags.run(report, "report", str(__doc__), argv)


def report(config: Config) -> int:
    """Write the page of the run in the workdir, with the clock of every method."""
    with screen(f"reading the run in {config.workdir}") as say:
        from sfl_jax.commands import accelerators

        accelerators.start()
        accelerators.find()
        from sfl_jax.commands import parts, workdir
        from sfl_jax.run import recording

        run, _ = workdir.described(config.workdir)
        recording.logged(config.workdir)  # before anything long
        ensure_writable(config.workdir, "workdir", config.workdir)
        ensure_page_is_ours(config.workdir)

        def all_clocks(lines):
            # They follow from settings, data and fleet, on whatever devices are here.
            built = parts.build(dataclasses.replace(run, devices=0, init_from=""), say)
            workdir.ensure_unchanged(built, names=("dataset", "fleet", "availability"))
            say(f"planning {len(lines)} rounds by every method")
            return clocks(run.workdir, built.parts, lines)

        found, note = _write(config.workdir, all_clocks)
        accuracies = [line.test_accuracy for line in recording.logged(config.workdir)]
        shown = table(found, accuracies, run.deadline_factor)
        say.result("\n".join(filter(None, [shown, note])))
        print(f"written: {Path(config.workdir) / NAME}")
        return 0


def write(workdir: str, parts: Any) -> str:
    """Write the page of the run in a workdir, with the clocks of its rivals; a line where it has none of
    them, else nothing. OSError where the disk does not let it, BadInput where somebody else's page is there.
    """
    return _write(workdir, lambda lines: clocks(workdir, parts, lines, parts.rivals))[1]


def clocks(
    workdir: str, parts: Any, lines: Sequence[Any], rivals: Sequence[str] | None = None
) -> dict[str, Any]:
    """The clock of each method: the run's own first, as `lines` have it, and then those of `rivals`, or all.

    BadInput where the plans made now are not those of the run: then other settings or inputs held in it.
    """
    import numpy as np

    from sfl_jax.run import clocks

    made = clocks.clocks(parts, len(lines), rivals)
    own = clocks.own_clock(parts.planner, lines)
    (name, logged), *_ = own.items()
    if not np.allclose(made[name].seconds, logged.seconds, rtol=SAME, atol=0):
        raise BadInput(
            f"--workdir={workdir}: its rounds were planned with other settings, inputs or another release"
        )
    return made | own


def ensure_page_is_ours(workdir: str) -> None:
    """BadInput where the workdir has a page of this name that is somebody else's."""
    from sfl_jax.run import recording

    ensure_ours(Path(workdir) / NAME, recording.MARKS[NAME], "workdir", workdir)


def _write(workdir, clocks_of):
    """(the clocks on the page, a line where those of other methods are left out)"""
    from sfl_jax.commands import parts, report_page
    from sfl_jax.commands.workdir import described
    from sfl_jax.run import recording
    from sfl_jax.run.clocks import own_clock

    run, environment = described(workdir)
    lines, note = recording.logged(workdir), ""
    try:
        found = clocks_of(lines)
    except BadInput as error:
        found = own_clock(parts.planner(run), lines)
        note = f"other methods' clocks are left out: {as_flags(str(error))}"
    ensure_page_is_ours(workdir)
    with whole_file(Path(workdir) / NAME) as file:
        file.write(report_page.page(run, environment, lines, found, note).encode(errors="xmlcharrefreplace"))
    return found, note


def table(clocks: Mapping[str, Any], accuracies: Sequence[float | None], deadline_factor: float) -> str:
    """The simulated time of every method, the run's own first, and what each sends, computes and holds."""
    from sfl_jax.commands import totals

    own, *_ = clocks
    times_s = {name: clock.seconds[-1] for name, clock in clocks.items()}
    rows = [
        (name, words.clock(time_s), "this plan" if name == own else words.beside(time_s, times_s[own]))
        for name, time_s in times_s.items()
    ]
    note = words.whose_accuracy(deadline_factor)
    tables = totals.method_rows(clocks), totals.accuracy_rows(clocks, accuracies)
    more = "\n\n".join(map(totals.text, tables))
    return f"simulated time of every method\n{words.columns(rows)}\n  {note}\n\n{more}"


if __name__ == "__main__":
    sys.exit(main())
