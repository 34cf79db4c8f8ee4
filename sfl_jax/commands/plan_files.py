"""Writes plan.json and plan.csv, a million clients in seconds: Arrow makes the text, column by column."""

import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute

from sfl_jax.files import whole_file

pc: Any = pyarrow.compute  # created at import, so type checkers do not know it
_T = TypeVar("_T")
# Rows of a piece. Its text fits the caches, which is twice as fast as with four times the rows.
_ROWS = 2**15
_WORKERS = min(os.cpu_count() or 1, 8)


def write_plan(path: Path, head: Mapping[str, Any], columns: Mapping[str, np.ndarray]) -> None:
    """Writes `path` (JSON: `head`, and `clients` as one object each) and the same table as .csv beside it.

    columns: by name, (K,) numbers or texts of printable characters. Numbers that are not finite become null,
    and empty in the CSV. Reading gives the same float64. Each file appears whole or not at all.
    """
    starts = range(0, len(next(iter(columns.values()))), _ROWS)
    pieces = ({name: values[start : start + _ROWS] for name, values in columns.items()} for start in starts)
    with whole_file(path) as js, whole_file(path.with_suffix(".csv")) as table:
        js.write(json.dumps(dict(head), indent=1, ensure_ascii=False).removesuffix("\n}").encode())
        js.write(b',\n "clients": [')
        table.write(",".join(columns).encode())
        comma = b""
        for objects, lines in _side_by_side(_texts, pieces):
            js.write(comma + b"\n")
            js.write(objects)
            table.write(b"\n")
            table.write(lines)
            comma = b","
        js.write(b"\n ]\n}\n")
        table.write(b"\n")


def _side_by_side(make: Callable[[Any], _T], pieces: Iterable[Any]) -> Iterator[_T]:
    """make(piece) in order. Only a few are made ahead, or a slow disk would fill memory with text."""
    waiting: deque[Future[_T]] = deque()
    with ThreadPoolExecutor(_WORKERS) as pool:
        for piece in pieces:
            waiting.append(pool.submit(make, piece))
            if len(waiting) > 2 * _WORKERS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _texts(piece: Mapping[str, np.ndarray]) -> tuple[memoryview, memoryview]:
    """The objects and the lines of some rows. Arrow releases Python's lock, so pieces are made at once."""
    objects, lines = [], []
    for name, values in piece.items():
        before, comma = f'{", " if objects else ""}"{name}": ', "," if lines else ""
        if values.dtype.kind == "U":
            texts = pa.array(values)
            escaped = pc.replace_substring(pc.replace_substring(texts, "\\", "\\\\"), '"', '\\"')
            quoted = pc.binary_join_element_wise('"', pc.replace_substring(texts, '"', '""'), '"', "")
            objects += [before + '"', escaped, '"']
            lines += [comma, pc.if_else(pc.match_substring_regex(texts, '[",]'), quoted, texts)]
        else:
            texts = pc.cast(pa.array(values, mask=~np.isfinite(values)), pa.string())
            objects += [before, pc.fill_null(texts, "null")]
            lines += [comma, pc.fill_null(texts, "")]
    return _joined(["  {", *objects, "}"], ",\n"), _joined(lines, "\n")


def _joined(parts: list[pa.Array | str], between: str) -> memoryview:
    """The rows as one text, without making a Python string for each."""
    rows = pc.binary_join_element_wise(*parts, between, "")
    length = np.frombuffer(rows.buffers()[1], np.int32)[len(rows)] - len(between)
    return memoryview(rows.buffers()[2])[:length]
