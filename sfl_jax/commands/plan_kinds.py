"""The kinds of plans beside the plain one: several servers, rates that change, and a frontier.

Each kind has a module with a function `told`, which plans and returns a `Told`.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from sfl_jax.commands.config import Config
from sfl_jax.commands.plan_difference import Earlier, difference
from sfl_jax.commands.plan_kind_rules import has_frontier, has_servers, is_uncertain
from sfl_jax.errors import BadInput
from sfl_jax.files import ensure_ours, whole_file

FRONTIER_MARK = b"round_at_most_s,"


class Told(NamedTuple):
    """What a command writes and prints.

    head: of plan.json before the clients. table: of the clients, in NumPy arrays. summary: lines for the
    terminal. fleet: the clients, a `Fleet`. draw: draws the picture into an open PNG file. rows: of the
    frontier, by column; empty without one.
    """

    head: dict[str, Any]
    table: Mapping[str, Any]
    summary: str
    fleet: Any  # not imported, so that --help stays quick
    draw: Callable[[BinaryIO], None]
    rows: Mapping[str, Any]


def is_asked(config: Config) -> bool:
    """Whether the flags ask for another kind of plan than the plain one."""
    return has_servers(config) or is_uncertain(config) or has_frontier(config)


def outputs(config: Config) -> list[Path]:
    """The files beside those of every plan. Refuses files that another program wrote."""
    if not has_frontier(config):
        return []
    path = _frontier_file(config)
    if path.is_dir():
        raise BadInput(f"--output={config.output}: {path} is a directory; choose another name")
    ensure_ours(path, FRONTIER_MARK, "output", config.output)
    return [path]


def write(config: Config, file: Any, earlier: Earlier | None, say: Any) -> Any:
    """Plans, prints the summary, writes the plan and its picture, and returns the fleet that was planned.

    file: the fleet file, if it was read already. earlier: the plan of --compare_with.
    """
    from sfl_jax.commands.plan_files import write_plan

    made = _told(config, file, say)
    output = Path(config.output)
    write_plan(output, made.head, made.table)
    if made.rows:
        with whole_file(_frontier_file(config)) as out:
            lines = [",".join(made.rows), *_lines(made.rows)]
            out.write("".join(f"{line}\n" for line in lines).encode())
    say.result(made.summary)
    if earlier:
        say.result(difference(earlier, made.head, made.table))
    if config.plot:
        say("drawing")
        with whole_file(output.with_suffix(".png")) as out:
            made.draw(out)
    return made.fleet


def _told(config: Config, file: Any, say: Any) -> Told:
    if has_servers(config):
        from sfl_jax.commands.servers_plan import told
    elif is_uncertain(config):
        from sfl_jax.commands.uncertain_plan import told
    else:
        from sfl_jax.commands.frontier_plan import told
    return told(config, file, say)


def _lines(rows):
    for row in zip(*(values.tolist() for values in rows.values()), strict=True):
        yield ",".join(map(repr, row))


def _frontier_file(config: Config) -> Path:
    output = Path(config.output)
    return output.with_name(f"{output.stem}_frontier.csv")
