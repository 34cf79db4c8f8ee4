import csv
import json
import math
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfl_jax.commands import plan_files
from sfl_jax.commands.plan_files import write_plan

NAMES = st.text(st.characters(codec="utf-8").filter(str.isprintable), min_size=1, max_size=8)
ROWS = st.lists(st.tuples(NAMES, st.integers(0, 2**31 - 1), st.floats(width=64)), min_size=1, max_size=9)


def columns_of(rows):
    names, cuts, seconds = zip(*rows, strict=True)
    return {"client": np.array(names), "cut": np.array(cuts, np.int32), "round_s": np.array(seconds)}


@given(ROWS)
def test_both_files_hold_every_value(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_files, "_ROWS", 4)  # so that there are several pieces
        write_plan(path, {"model": 'a "b"', "bound_s": 1e-9}, columns_of(rows))
    plan = json.loads(path.read_text("utf-8"))
    assert {**plan, "clients": None} == {"model": 'a "b"', "bound_s": 1e-9, "clients": None}
    with path.with_suffix(".csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(plan["clients"]) == len(lines) == len(rows)
    for (name, cut, seconds), client, line in zip(rows, plan["clients"], lines, strict=True):
        assert client["client"] == line["client"] == name
        assert client["cut"] == int(line["cut"]) == cut
        if math.isfinite(seconds):
            assert client["round_s"] == float(line["round_s"]) == seconds
        else:
            assert client["round_s"] is None
            assert line["round_s"] == ""


def test_few_pieces_are_made_ahead_of_those_that_are_written(monkeypatch):
    monkeypatch.setattr(plan_files, "_WORKERS", 2)
    made = []
    texts = plan_files._side_by_side(lambda piece: made.append(piece) or piece, range(100))
    for number, piece in enumerate(texts):
        assert piece == number
        assert len(made) <= number + 6
    assert sorted(made) == list(range(100))


def test_nothing_is_replaced_when_writing_fails(tmp_path):
    path = tmp_path / "plan.json"
    columns = columns_of([("a", 1, 1.0)])
    write_plan(path, {}, columns)
    before = path.read_bytes(), path.with_suffix(".csv").read_bytes()
    with pytest.raises(TypeError):
        write_plan(path, {"model": object()}, columns)
    columns["bad"] = np.array([1j])
    with pytest.raises(NotImplementedError):
        write_plan(path, {}, columns)
    assert (path.read_bytes(), path.with_suffix(".csv").read_bytes()) == before
    assert sorted(os.listdir(tmp_path)) == ["plan.csv", "plan.json"]
