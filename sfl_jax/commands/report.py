"""Writes report.html for a run, finished or not: accuracy on the clock of every method, and its settings."""

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sfl_jax.commands import flags, words
from sfl_jax.commands.config import Config, as_flags
from sfl_jax.commands.screen import screen
from sfl_jax.errors import BadInput
from sfl_jax.files import ensure_ours, ensure_writable, whole_file

NAME = "report.html"
SAME = 1e-6  # relative difference that a recomputed clock may have


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return flags.run(report, "report", str(__doc__), argv)


def report(config: Config) -> int:
    """Writes the page of the run in the workdir, with the clock of every method."""
    with screen(f"reading the run in {config.workdir}") as say:
        from sfl_jax.commands import accelerators

        accelerators.start()
        accelerators.find()
        from sfl_jax.commands import parts, workdir
        from sfl_jax.run import recording

        run, _ = workdir.described(config.workdir)
        recording.logged(config.workdir)  # fail early
        ensure_writable(config.workdir, "workdir", config.workdir)
        ensure_page_is_ours(config.workdir)

        def all_clocks(lines):
            # Clocks depend on settings, data and fleet, not on devices.
            built = parts.build(dataclasses.replace(run, devices=0, init_from=""), say)
            workdir.ensure_unchanged(built, names=("dataset", "fleet", "availability"))
            say(f"planning {len(lines)} rounds by every method")
            return known(run.workdir, built.parts, lines)

        found, note = _write(config.workdir, all_clocks)
        accuracies = [line.test_accuracy for line in recording.logged(config.workdir)]
        shown = table(found, accuracies, run)
        say.result("\n".join(filter(None, [shown, note])))
        print(f"written: {Path(config.workdir) / NAME}")
        return 0


def write(workdir: str, parts: Any) -> str:
    """Writes the page of the run in a workdir, with the clocks of its rivals.

    Returns a line if it has none of them, else an empty text. OSError if the disk refuses, BadInput if the
    workdir has a page of the user's own.
    """
    return _write(workdir, lambda lines: known(workdir, parts, lines, parts.rivals))[1]


def known(
    workdir: str, parts: Any, lines: Sequence[Any], rivals: Sequence[str] | None = None
) -> tuple[dict[str, Any], Any]:
    """Returns (`clocks`, the `History` of the run's plans). Raises BadInput like `clocks`."""
    from sfl_jax.run.history import Builder

    builder = Builder(parts, len(lines))
    return clocks(workdir, parts, lines, rivals, builder.add), builder.history()


def clocks(
    workdir: str,
    parts: Any,
    lines: Sequence[Any],
    rivals: Sequence[str] | None = None,
    see: Callable[..., None] | None = None,
) -> dict[str, Any]:
    """The clock of each method: the run's own from `lines`, then those of `rivals`, or all.

    see: as for `run.clocks.clocks`. Raises BadInput if today's plans are not those of the run, which then had
    other settings or inputs.
    """
    import numpy as np

    from sfl_jax.run import clocks

    made = clocks.clocks(parts, len(lines), rivals, see)
    own = clocks.own_clock(parts.planner, lines)
    (name, logged), *_ = own.items()
    if not np.allclose(made[name].seconds, logged.seconds, rtol=SAME, atol=0):
        raise BadInput(
            f"--workdir={workdir}: its rounds were planned with other settings or inputs, or by another "
            "release"
        )
    return made | own


def ensure_page_is_ours(workdir: str) -> None:
    """BadInput if the workdir has a page of this name that this package did not write."""
    from sfl_jax.run import recording

    ensure_ours(Path(workdir) / NAME, recording.MARKS[NAME], "workdir", workdir)


def _write(workdir, known_of):
    """Returns (the clocks on the page, a line if those of other methods are left out)."""
    from sfl_jax.commands import parts
    from sfl_jax.commands.workdir import described
    from sfl_jax.run import recording
    from sfl_jax.run.clocks import own_clock

    lines, note, history = recording.logged(workdir), "", None
    try:
        found, history = known_of(lines)
    except BadInput as error:
        found = own_clock(parts.planner(described(workdir)[0]), lines)
        note = f"other methods' clocks are left out, and cuts and shares: {as_flags(str(error))}"
    put(workdir, found, history, note)
    return found, note


def put(workdir: str, clocks: Mapping[str, Any], history: Any, note: str = "") -> None:
    """Writes the page of the run in a workdir. BadInput if the user has one of this name there.

    clocks, history: as from `known`. note: says what is left out.
    """
    from sfl_jax.commands import report_page
    from sfl_jax.commands.workdir import described
    from sfl_jax.run import recording

    ensure_page_is_ours(workdir)
    page = report_page.report(*described(workdir), recording.logged(workdir), clocks, history, note)
    with whole_file(Path(workdir) / NAME) as file:
        file.write(page.encode(errors="xmlcharrefreplace"))


def table(clocks: Mapping[str, Any], accuracies: Sequence[float | None], config: Config) -> str:
    """The simulated time of every method, the run's own first, and what each sends, computes and holds."""
    from sfl_jax.commands import parts, totals

    own, *_ = clocks
    times_s = {name: clock.seconds[-1] for name, clock in clocks.items()}
    rows = [
        (name, words.clock(time_s), "this plan" if name == own else words.beside(time_s, times_s[own]))
        for name, time_s in times_s.items()
    ]
    note = words.whose_accuracy(config.deadline_factor, parts.cuts_matter(config))
    tables = totals.method_rows(clocks), totals.accuracy_rows(clocks, accuracies)
    more = "\n\n".join(map(totals.text, tables))
    return f"simulated time of every method\n{words.columns(rows)}\n  {note}\n\n{more}"


if __name__ == "__main__":
    sys.exit(main())
