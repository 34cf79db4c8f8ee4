"""Plans a round of a fleet: cuts, server shares, a proven bound, and what would make the round shorter."""

import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sfl_jax.commands import flags, own_plans
from sfl_jax.commands.config import Config
from sfl_jax.commands.screen import first_line_of_plan, screen
from sfl_jax.errors import BadInput
from sfl_jax.files import PNG_MARK, ensure_ours, ensure_writable, whole_file

# A text that each file of this command contains, by the file's ending.
MARKS = {".json": b'"bound_s":', ".csv": b"client,cut,unit,share_flops", ".png": PNG_MARK}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return flags.run(plan, "plan", str(__doc__), argv)


def plan(config: Config) -> None:
    """Plans, prints the summary, and writes the plan as JSON and CSV, and as a picture if asked for."""
    output = Path(config.output)
    written = [output.with_suffix(suffix) for suffix in (MARKS if config.plot else (".json", ".csv"))]
    check_outputs(written, config.fleet)
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
        if own_plans.is_asked(config):
            written += own_plans.outputs(config)
            own_plans.write(config, reading and reading.result(), say)
            print(f"{'written':<11} {', '.join(map(str, written))}")
            return
        if config.servers:
            from sfl_jax.commands.servers_plan import told

            several = told(config, reading and reading.result())
            write_plan(output, several.head, several.table)
            say.result(several.summary)
            print(f"{'written':<11} {', '.join(map(str, written))}")
            return
        config, planned = parts.planned(config, reading and reading.result())
        say("planning with more server, with faster links and clients, and in cohorts")
        cohorts_s = planning.cohort_rounds_s(planned, config.cohort_size, config.seed)
        writing = pool.submit(write_plan, output, head(config, planned, cohorts_s), planning.table(planned))
        say.result(summary(config, planned, planning.gains(planned), cohorts_s))
        if config.plot:
            say("drawing the plan")
            from sfl_jax.commands.plan_plot import write_plot

            with whole_file(written[-1]) as file:
                write_plot(file, config, planned)
        writing.result()
    print(f"{'written':<11} {', '.join(map(str, written))}")


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
