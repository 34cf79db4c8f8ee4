"""plan.json and plan.csv for a million clients in seconds: Arrow makes the text, column by column."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from sfl_jax.files import whole_file

pc: Any = pyarrow.compute  # made while it is imported, so type checkers know little of it
_ROWS = 2**17  # of a piece: text of a piece stays small, and far below Arrow's 2 GiB


def write_plan(path: Path, head: Mapping[str, Any], columns: Mapping[str, np.ndarray]) -> None:
    """Write `path` (JSON: `head`, and `clients` as one object each) and the same table as .csv beside it.

    columns: by name, (K,) numbers or texts; numbers that are not finite become null, and empty in the CSV.
    Numbers are written so that reading gives the same float64. Each file appears whole or not at all.
    """
    with whole_file(path) as js, whole_file(path.with_suffix(".csv")) as table:
        js.write(json.dumps(dict(head), indent=1, ensure_ascii=False).removesuffix("\n}").encode())
        table.write(",".join(columns).encode())
        before_row = ',\n "clients": [\n  {'
        for piece in _pieces(columns):
            js.write(before_row.encode())
            js.write(_joined(_json_row(piece), "}", ",\n  {"))
            table.write(b"\n")
            table.write(_joined(_csv_row(piece), "", "\n"))
            before_row = ",\n  {"
        js.write(b"\n ]\n}\n")
        table.write(b"\n")


def _pieces(columns: Mapping[str, np.ndarray]) -> Iterator[dict[str, tuple[pa.Array, bool]]]:
    """The columns of some rows at a time: texts, null where not finite, and whether they are numbers."""
    count = len(next(iter(columns.values())))
    for start in range(0, count, _ROWS):
        yield {name: _texts(values[start : start + _ROWS]) for name, values in columns.items()}


def _texts(values: np.ndarray) -> tuple[pa.Array, bool]:
    if values.dtype.kind == "U":
        return pa.array(values), False
    mask = ~np.isfinite(values) if values.dtype.kind == "f" else None
    return pc.cast(pa.array(values, mask=mask), pa.string()), True


def _json_row(piece: Mapping[str, tuple[pa.Array, bool]]) -> list[pa.Array | str]:
    parts: list[pa.Array | str] = []
    for name, (texts, are_numbers) in piece.items():
        parts.append(f'{", " if parts else ""}"{name}": ')
        if are_numbers:
            parts.append(pc.fill_null(texts, "null"))
        else:
            escaped = pc.replace_substring(pc.replace_substring(texts, "\\", "\\\\"), '"', '\\"')
            parts += ['"', escaped, '"']
    return parts


def _csv_row(piece: Mapping[str, tuple[pa.Array, bool]]) -> list[pa.Array | str]:
    parts: list[pa.Array | str] = []
    for texts, are_numbers in piece.values():
        if parts:
            parts.append(",")
        if are_numbers:
            parts.append(pc.fill_null(texts, ""))
        else:
            quoted = pc.binary_join_element_wise('"', pc.replace_substring(texts, '"', '""'), '"', "")
            parts.append(pc.if_else(pc.match_substring_regex(texts, '[",]'), quoted, texts))
    return parts


def _joined(parts: list[pa.Array | str], end: str, between: str) -> memoryview:
    """The rows as one text, without a Python string for any of them."""
    rows = pc.binary_join_element_wise(*parts, end + between, "")
    length = np.frombuffer(rows.buffers()[1], np.int32)[len(rows)] - len(between)
    return memoryview(rows.buffers()[2])[:length]
