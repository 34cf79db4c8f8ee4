"""Plans a round of a fleet: cuts, server shares, a proven bound, and what would make the round shorter."""

import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sfl_jax.commands import flags, plan_kinds
from sfl_jax.commands.config import Config
from sfl_jax.commands.plan_difference import difference, read_plan
from sfl_jax.commands.screen import first_line_of_plan, screen
from sfl_jax.errors import BadInput
from sfl_jax.files import HTML_MARK, PNG_MARK, ensure_ours, ensure_writable, whole_file

# A text that each file of this command contains, by the file's ending.
MARKS = {
    ".json": b'"bound_s":', ".csv": b"client,cut,unit,share_flops", ".png": PNG_MARK, ".html": HTML_MARK,
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return flags.run(plan, "plan", str(__doc__), argv)


def plan(config: Config) -> None:
    """Plans, prints the summary, and writes the plan as JSON, CSV, and what else is asked for."""
    output = Path(config.output)
    asked = {".json": True, ".csv": True, ".png": config.plot, ".html": config.report}
    written = [output.with_suffix(suffix) for suffix in MARKS if asked[suffix]]
    check_outputs(written, config.fleet)
    check_fleet_output(config)
    _check_calibration_outputs(config)
    earlier = read_plan(config.compare_with) if config.compare_with else None
    written += plan_kinds.outputs(config)
    with screen(first_line_of_plan(config)) as say, ThreadPoolExecutor(1) as pool:
        from sfl_jax.fleet import read_fleet

        reading = pool.submit(read_fleet, config.fleet) if config.fleet != "random" else None
        # In another thread, because importing JAX takes as long as reading a million lines.
        from sfl_jax.commands import accelerators

        accelerators.start()
        accelerators.find()
        from sfl_jax import planning
        from sfl_jax.commands import compilation_cache, parts
        from sfl_jax.commands.plan_files import write_plan
        from sfl_jax.commands.plan_summary import head, summary

        if config.compilation_cache:
            compilation_cache.enable()
        say(f"counting the work of {config.model}, and planning")
        if plan_kinds.is_asked(config):
            made = plan_kinds.write(config, reading and reading.result(), earlier, say)
            _write_fleet(config, made, written)
            print(f"{'written':<11} {', '.join(map(str, written))}")
            return
        file = reading and reading.result()
        config, planned = parts.planned(config, file)
        fitted: dict[str, Any] = {}
        if config.measured and file is not None:
            say(f"fitting rates to {config.measured}, and planning again")
            from sfl_jax.commands import plan_calibration

            made = plan_calibration.calibrated(config, file, planned)
            config, planned, fitted = made.config, made.planned, plan_calibration.head(made)
            plan_calibration.write(made)
            say.result(plan_calibration.told(made))
            written += plan_calibration.files(config)
        say("planning with more server, with faster links and clients, and in cohorts")
        cohorts_s = planning.cohort_rounds_s(planned, config.cohort_size, config.seed)
        heading, columns = head(config, planned, cohorts_s) | fitted, planning.table(planned)
        writing = pool.submit(write_plan, output, heading, columns)
        gains = planning.gains(planned)
        text = summary(config, planned, gains, cohorts_s)
        say.result(text)
        if earlier:
            say.result(difference(earlier, heading, columns))
        if config.plot:
            say("drawing the plan")
            from sfl_jax.commands.plan_plot import write_plot

            with whole_file(output.with_suffix(".png")) as image:
                write_plot(image, config, planned)
        if config.report:
            say("writing the page of the plan")
            from sfl_jax.commands.plan_page import page_of

            with whole_file(output.with_suffix(".html")) as page:
                page.write(page_of(config, planned, gains, text).encode(errors="xmlcharrefreplace"))
        writing.result()
        _write_fleet(config, planned.fleet, written)
    print(f"{'written':<11} {', '.join(map(str, written))}")


def check_fleet_output(config: Config) -> None:
    """Refuses a fleet to write that would replace a file, or cannot be written."""
    if not config.write_fleet:
        return
    path = Path(config.write_fleet)
    if path.suffix != ".csv":
        raise BadInput(f"--write_fleet={path}: must end in .csv")
    if path.exists() or path == Path(config.output).with_suffix(".csv"):
        raise BadInput(f"--write_fleet={path}: is there already, or will be the plan; choose another name")
    ensure_writable(path.parent, "write_fleet", str(path))


def _check_calibration_outputs(config: Config) -> None:
    """Refuses files of a calibration that would replace others."""
    if config.measured:
        from sfl_jax.commands import plan_calibration

        for path in plan_calibration.files(config):
            mark = plan_calibration.MARKS["".join(path.suffixes[-2:])]
            ensure_ours(path, mark, "output", config.output)


def _write_fleet(config: Config, fleet: Any, written: list[Path]) -> None:
    """Writes the fleet that was planned, if it was asked for."""
    if config.write_fleet:
        from sfl_jax.fleet import write_fleet

        write_fleet(config.write_fleet, fleet)
        written.append(Path(config.write_fleet))


def check_outputs(written: Sequence[Path], fleet: str) -> None:
    """Refuses, before any work, outputs that cannot be written or would replace the fleet."""
    output = written[0]
    ensure_writable(output.parent, "output", str(output))
    for path in written:
        if path.is_dir():
            raise BadInput(f"--output={output}: {path} is a directory; choose another name")
        if path.exists() and Path(fleet).exists() and path.samefile(fleet):
            raise BadInput(f"--output={output}: {path} is the fleet file; choose another name")
        ensure_ours(path, MARKS[path.suffix], "output", str(output))


if __name__ == "__main__":
    sys.exit(main())
