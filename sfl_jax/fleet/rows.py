"""CSV files with named columns, read line by line."""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from sfl_jax.errors import BadInput

_NAME_LENGTH = 64


def read_rows(
    path: Path, columns: Sequence[str], required: Sequence[str]
) -> Iterator[tuple[str, dict[str, str]]]:
    """The place and the cells of each line of a CSV file, blanks around cells removed.

    BadInput names the line and the column that is not allowed.
    """
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: byte {error.object[error.start]:#04x}: must be UTF-8") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BadInput(f"{path}: {reason}; give the path of a CSV file with {','.join(required)}") from error
    rows = csv.reader(io.StringIO(text, newline=""), skipinitialspace=True)
    try:
        header = [name.strip() for name in next(filter(None, rows), [])]
        place = f"{path}:{max(rows.line_num, 1)}"
        for at, name in enumerate(header):
            if name not in columns:
                raise BadInput(f"{place}: column {name!r}: must be one of {', '.join(columns)}")
            if name in header[:at]:
                raise BadInput(f"{place}: column {name}: must occur once")
        for name in required:
            if name not in header:
                raise BadInput(f"{place}: column {name}: missing; must have {','.join(required)}")
        for row in filter(any, rows):
            place = f"{path}:{rows.line_num}"
            if len(row) != len(header):
                raise BadInput(f"{place}: {len(row)} cells; must be {len(header)}, as in the first line")
            yield place, dict(zip(header, map(str.strip, row), strict=True))
    except csv.Error as error:
        raise BadInput(f"{path}:{rows.line_num}: not CSV ({error})") from error


def name_in(place: str, column: str, row: Mapping[str, str]) -> str:
    """The name in a cell."""
    name = row[column]
    if not (1 <= len(name) <= _NAME_LENGTH and name.isprintable()):
        raise BadInput(
            f"{place}: column {column}: {name!r}: must be 1 to {_NAME_LENGTH} printable characters"
        )
    return name


def known_name(place: str, column: str, row: Mapping[str, str], known: Mapping[str, int], where: str) -> int:
    """The place of a name among those that are known."""
    name = name_in(place, column, row)
    if name not in known:
        raise BadInput(f"{place}: column {column}: {name!r}: must be a {column} of {where}")
    return known[name]


def number(place: str, column: str, cell: str) -> float:
    """A positive number, as other programs read it too."""
    try:
        value = float(cell)
    except ValueError:
        value = -1.0
    if not 0 < value < np.inf or not cell.isascii() or "_" in cell:
        raise BadInput(f"{place}: column {column}: {cell!r}: must be a positive number")
    return value
