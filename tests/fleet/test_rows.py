"""Every CSV file is read by the same rules, and a fault is one line that says where, whose, what and why."""

import dataclasses

import numpy as np
import pytest

from sfl_jax import fleet as fleets
from sfl_jax.errors import BadInput

NAMES = ("cam-1", "cam-2")
FLEET = fleets.Fleet(np.array(NAMES), *(np.full(2, 1e7) for _ in range(4)), samples=np.array([64, 100]))
FILES = {
    "fleet": "client,flops,uplink_bps,downlink_bps,memory_bytes\ncam-1,1e8,1e7,2e7,9\ncam-2,2e8,1e7,2e7,9\n",
    "servers": "server,flops\nnear,1e9\nfar,5e9\n",
    "links": "client,server,uplink_bps,downlink_bps\ncam-1,near,2e7,2e7\ncam-2,near,2e7,3e7\n",
    "traces": "round,client,uplink_bps\n0,cam-1,4e6\n0,cam-2,5e6\n",
    "measured": "round,client,cut,client_s\n0,cam-1,1,30.5\n0,cam-2,2,31.5\n",
    "availability": "client,from_round,until_round\ncam-1,1,2\ncam-2,1,4\n",
}  # fmt: skip
NUMBER = {  # a column of numbers, and what it must be
    "fleet": ("uplink_bps", "must be a positive number"),
    "servers": ("flops", "must be a positive number"),
    "links": ("downlink_bps", "must be a positive number"),
    "traces": ("uplink_bps", "must be a positive number, or empty"),
    "measured": ("client_s", "must be a positive number, or empty"),
    "availability": ("until_round", "must be an integer, at least 1"),
}


def read(kind, path):
    if kind == "links":
        (path.parent / "servers.csv").write_text("server,flops\nnear,1e9\n")
        return fleets.read_servers(path.parent / "servers.csv", FLEET, path)
    return {
        "fleet": fleets.read_fleet,
        "servers": lambda path: fleets.read_servers(path, FLEET),
        "traces": lambda path: fleets.read_traces(path, FLEET),
        "measured": lambda path: fleets.read_measured(path, NAMES, 8),
        "availability": lambda path: fleets.read_availability(path, NAMES),
    }[kind](path)


def contents(made):
    parts = (
        made if isinstance(made, tuple) else [getattr(made, each.name) for each in dataclasses.fields(made)]
    )
    return [str(part.tolist() if isinstance(part, np.ndarray) else part) for part in parts]


def cell(text, line, column, value):
    rows = [row.split(",") for row in text.splitlines()]
    rows[line - 1][rows[0].index(column)] = value
    return "".join(",".join(row) + "\n" for row in rows)


def faults(kind):
    """(what is wrong, the file, where, and words of the message)"""
    text, (column, rule) = FILES[kind], NUMBER[kind]
    head, first, last = text.splitlines()
    who = "server far" if kind == "servers" else "client cam-2"
    yield "empty", "", 1, ": missing; must have "
    yield "header alone", f"{head}\n", 2, ": no "
    yield (
        "a column is missing",
        text.replace(head.split(",")[1], "what", 1),
        1,
        "column 'what': must be one of ",
    )
    yield "a column twice", f"{head},{column}\n{first},1\n", 1, f"column {column}: must occur once"
    yield "a short line", f"{head}\n{first}\n{last.rpartition(',')[0]}\n", 3, ": missing; a line has "
    yield "a long line", f"{head}\n{first},7\n", 2, "'7': has no column; a line has "
    yield "semicolons", text.replace(",", ";"), 1, "cells are separated by semicolons; use commas, and points"
    yield "tabs", text.replace(",", "\t"), 1, "cells are separated by tabs; use commas"
    yield (
        "latin-1",
        text.replace("cam-2", "é").replace("far", "é").encode("latin-1"),
        3,
        "byte 0xe9: must be UTF-8",
    )
    yield "utf-16", text.encode("utf-16"), 1, "byte 0xff: must be UTF-8"
    for value in ("0", "-1", "nan", "inf", "many", "1_0", "1 000", "٣"):
        yield value, cell(text, 3, column, value), 3, f"{who}: column {column}: {value!r}: {rule}"
    yield "a long cell", cell(text, 3, column, "7" * 500), 3, f"column {column}: '{'7' * 39}…': {rule}"


ALL = [(kind, *fault) for kind in FILES for fault in faults(kind)]


@pytest.mark.parametrize(("kind", "what", "text", "line", "words"), ALL, ids=[f"{a}-{b}" for a, b, *_ in ALL])
def test_a_fault_is_one_line_with_its_place(tmp_path, kind, what, text, line, words):
    path = tmp_path / f"{kind}.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(BadInput) as caught:
        read(kind, path)
    said = str(caught.value)
    assert said.startswith(f"{path}:{line}: ")
    assert words in said
    assert "\n" not in said
    assert len(said) < len(str(path)) + 250


@pytest.mark.parametrize("kind", FILES)
def test_a_file_may_come_from_any_system(tmp_path, kind):
    path, text = tmp_path / f"{kind}.csv", FILES[kind]
    path.write_text(text)
    expected = contents(read(kind, path))
    commas = "," * text.partition("\n")[0].count(",")
    for same in (
        text.replace("\n", "\r\n"), text.replace("\n", "\r"), f"\ufeff{text}", text.replace(",", " , "),
        f"{text}{commas}\n\n", text.rstrip("\n"),
    ):  # fmt: skip
        path.write_bytes(same.encode())
        assert contents(read(kind, path)) == expected
