"""CSV files with named columns, read line by line; what is wrong with them is said with line and reason."""

import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sfl_jax.errors import BadInput

NAME_LENGTH = 64  # letters of a name, at most
_SHOWN = 40  # letters of a cell in a message
_SEPARATORS = {";": "semicolons", "\t": "tabs"}


class Row(NamedTuple):
    """A line of a file. place: file and line. cells: by column, without the blanks around them."""

    place: str
    line: int
    cells: dict[str, str]

    def error(self, column: str, rule: str) -> BadInput:
        """What is wrong with a cell, and whose cell it is."""
        of = "client" if "client" in self.cells else "server"
        name = self.cells.get(of, "")
        who = f"{of} {name}: " if column != of and is_name(name) else ""
        return BadInput(f"{self.place}: {who}column {column}: {shown(self.cells[column])}: {rule}")


def read_rows(path: Path, columns: Sequence[str], required: Sequence[str], empty: str) -> Iterator[Row]:
    """The lines of a CSV file with a header. Lines without any letter are no rows.

    empty: what is missing in a file without rows, and what it must have.

    Raises:
      BadInput: no such file, bytes that are not UTF-8, another separator than a comma, a column that is
        unknown, missing or there twice, a line with too few or too many cells, or no line at all.
    """
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BadInput(f"{path}: {reason}; give the path of a CSV file with {','.join(required)}") from error
    yield from rows_of(path, data, columns, lambda header: required, empty)


def rows_of(
    path: Path,
    data: bytes,
    columns: Sequence[str],
    required: Callable[[Sequence[str]], Sequence[str]],
    empty: str,
) -> Iterator[Row]:
    """The same for the bytes of a file. required: the needed columns of a file with these columns."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise BadInput(f"{path}:{line}: byte {error.object[error.start]:#04x}: must be UTF-8") from error
    rows = csv.reader(io.StringIO(text, newline=""), skipinitialspace=True)
    any_row = False
    try:
        header = [name.strip() for name in next(filter(None, rows), [])]
        _check_header(f"{path}:{max(rows.line_num, 1)}", header, columns, required)
        for row in filter(any, rows):
            place, any_row = f"{path}:{rows.line_num}", True
            if len(row) < len(header):
                raise BadInput(f"{place}: column {header[len(row)]}: missing; a line has {len(header)} cells")
            if len(row) > len(header):
                cell = f"cell {len(header) + 1}: {shown(row[len(header)])}"
                rule = f"a line has {len(header)} cells, and numbers have points"
                raise BadInput(f"{place}: {cell}: has no column; {rule}")
            yield Row(place, rows.line_num, dict(zip(header, map(str.strip, row), strict=True)))
    except csv.Error as error:
        raise BadInput(f"{path}:{rows.line_num}: not CSV ({error})") from error
    if not any_row:
        raise BadInput(f"{path}:{rows.line_num + 1}: {empty}")


def _check_header(place, header, columns, required) -> None:
    for separator, plural in _SEPARATORS.items():
        if len(header) == 1 and separator in header[0]:
            raise BadInput(f"{place}: cells are separated by {plural}; use commas, and points in numbers")
    unknown = [shown(name) for name in header if name not in columns]
    if unknown:
        names = f"columns {', '.join(unknown[:9])}" if len(unknown) > 1 else f"column {unknown[0]}"
        raise BadInput(f"{place}: {names}: must be one of {', '.join(columns)}")
    for at, name in enumerate(header):
        if name in header[:at]:
            raise BadInput(f"{place}: column {name}: must occur once")
    needed = required(header)
    for name in needed:
        if name not in header:
            raise BadInput(f"{place}: column {name}: missing; must have {','.join(needed)}")


def shown(cell: str) -> str:
    """A cell in a message, shortened if it is long."""
    return repr(cell if len(cell) <= _SHOWN else cell[: _SHOWN - 1] + "…")


def is_name(cell: str) -> bool:
    """Whether a cell may be a name."""
    return 1 <= len(cell) <= NAME_LENGTH and cell.isprintable()


def name_in(row: Row, column: str) -> str:
    """The name in a cell."""
    name = row.cells[column]
    if not is_name(name):
        raise row.error(column, f"must be 1 to {NAME_LENGTH} printable characters")
    return name


def known_name(row: Row, column: str, known: Mapping[str, int], where: str) -> int:
    """The place of a name among those that are known."""
    name = name_in(row, column)
    if name not in known:
        raise row.error(column, f"must be a {column} of {where}")
    return known[name]


def number(row: Row, column: str, zero: bool = False, more: str = "") -> float:
    """A number above 0, or also 0, as other programs read it too. more: what else a cell may be."""
    cell = row.cells[column]
    try:
        value = float(cell)
    except ValueError:
        value = -1.0
    # Python reads ١ and 1_0 as numbers; other programs do not.
    if not (0 < value < np.inf or (zero and value == 0)) or not cell.isascii() or "_" in cell:
        raise row.error(column, f"must be {'a number, 0 or more' if zero else 'a positive number'}{more}")
    return value


def integer(row: Row, column: str, least: int, most: int, rule: str) -> int:
    """An integer from `least` to `most`. rule: what is allowed, in words."""
    cell = row.cells[column]
    digits = cell.removeprefix("+")
    is_integer = digits.isascii() and digits.isdecimal() and len(digits) <= _SHOWN
    if not (is_integer and least <= int(cell) <= most):
        raise row.error(column, f"must be {rule}")
    return int(cell)
