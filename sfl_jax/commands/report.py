"""report.html of a run, done or not: what it reached, on every scheme's clock, and with which settings."""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sfl_jax.commands import flags, words
from sfl_jax.commands.screen import screen
from sfl_jax.config import Config
from sfl_jax.files import ensure_writable, whole_file

NAME = "report.html"


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return flags.run(report, "report", str(__doc__), argv)


def report(config: Config) -> int:
    """Write the page of the run in the workdir, with the clock of every scheme."""
    with screen(f"reading the run in {config.workdir}") as say:
        from sfl_jax import accelerators

        accelerators.start()
        accelerators.find()
        from sfl_jax import experiment, recording

        run, _ = recording.described(config.workdir)
        rounds = len(recording.logged(config.workdir))  # before anything long
        ensure_writable(config.workdir, "workdir", config.workdir)
        # Clocks follow from the settings alone, on whatever devices are here.
        built = experiment.build(dataclasses.replace(run, devices=0), say)
        say(f"planning {rounds} rounds by every method")
        clocks = write(built)
        say.result(f"{table(clocks)}\nwritten: {Path(config.workdir) / NAME}")
        return 0


def write(built: Any, rivals: Sequence[str] | None = None) -> dict[str, Any]:
    """Write the page of an experiment's workdir; the simulated seconds after each round by scheme, the run's
    own first, and then those of `rivals`, or all. OSError where the disk does not let it.
    """
    from sfl_jax import comparison, recording
    from sfl_jax.commands import report_page

    workdir = built.config.workdir
    run, environment = recording.described(workdir)
    lines = recording.logged(workdir)
    clocks = comparison.clocks(built, len(lines), rivals)
    with whole_file(Path(workdir) / NAME) as file:
        file.write(report_page.page(run, environment, lines, clocks).encode(errors="xmlcharrefreplace"))
    return clocks


def table(clocks: Mapping[str, Any]) -> str:
    """The simulated time of every scheme, (R,) seconds after each round, the run's own first."""
    own_s, *_ = (seconds[-1] for seconds in clocks.values())
    own, *_ = clocks
    rows = [
        (name, words.clock(seconds[-1]), "this plan" if name == own else words.beside(seconds[-1], own_s))
        for name, seconds in clocks.items()
    ]
    return f"simulated time of every scheme, the accuracy being the same\n{words.columns(rows)}"


if __name__ == "__main__":
    sys.exit(main())
