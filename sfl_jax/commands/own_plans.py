"""Plans that tell more than one plan: for uncertain rates, and with a frontier."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from sfl_jax.commands.config import Config
from sfl_jax.commands.own_plan_rules import has_frontier, is_uncertain
from sfl_jax.errors import BadInput
from sfl_jax.files import ensure_ours, whole_file

FRONTIER_MARK = b"round_at_most_s,"


class Told(NamedTuple):
    """What a command writes and prints.

    head: of plan.json before the clients. table: of the clients, in NumPy arrays. summary: lines for the
    terminal. draw: draws the picture into an open PNG file. rows: of the frontier, by column; empty without
    one.
    """

    head: dict[str, Any]
    table: Mapping[str, Any]
    summary: str
    draw: Callable[[BinaryIO], None]
    rows: Mapping[str, Any]


def is_asked(config: Config) -> bool:
    """Whether the flags ask for a plan of this file."""
    return is_uncertain(config) or has_frontier(config)


def outputs(config: Config) -> list[Path]:
    """The files beside those of every plan. Refuses files that another program wrote."""
    if not has_frontier(config):
        return []
    path = _frontier_file(config)
    if path.is_dir():
        raise BadInput(f"--output={config.output}: {path} is a directory; choose another name")
    ensure_ours(path, FRONTIER_MARK, "output", config.output)
    return [path]


def write(config: Config, file: Any, say: Any) -> None:
    """Plans, prints the summary and writes all files. file: the fleet file, if it was read already."""
    if is_uncertain(config):
        from sfl_jax.commands.uncertain_plan import told
    else:
        from sfl_jax.commands.frontier_plan import told
    from sfl_jax.commands.plan_files import write_plan

    made = told(config, file, say)
    output = Path(config.output)
    write_plan(output, made.head, made.table)
    if made.rows:
        with whole_file(_frontier_file(config)) as out:
            lines = [",".join(made.rows), *_lines(made.rows)]
            out.write("".join(f"{line}\n" for line in lines).encode())
    say.result(made.summary)
    if config.plot:
        say("drawing")
        with whole_file(output.with_suffix(".png")) as out:
            made.draw(out)


def _lines(rows):
    for row in zip(*(values.tolist() for values in rows.values()), strict=True):
        yield ",".join(map(repr, row))


def _frontier_file(config: Config) -> Path:
    output = Path(config.output)
    return output.with_name(f"{output.stem}_frontier.csv")
