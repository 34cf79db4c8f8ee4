"""The comparisons of tests refuse a number that is not finite, in any place and on either side."""

import ast
import math
from pathlib import Path

import finite
import jax
import numpy as np
import pytest
from federated import rounds

from sfl_jax.federated.packing import PackedVariables
from sfl_jax.models import Variables

TREE = {"first": np.ones(3), "middle": np.arange(4.0).reshape(2, 2) + 1, "last": np.ones(())}
COMPARISONS = {
    "pairs": finite.pairs,
    "assert_equal": finite.assert_equal,
    "difference": rounds.difference,
    "distance": lambda a, b: rounds.distance(a, b, jax.tree.map(np.zeros_like, b)),
    "distance, the start": lambda a, b: rounds.distance(b, jax.tree.map(lambda x: x + 1, b), a),
    "typical update": lambda a, b: rounds.typical_update(a, b, 1.0),
    "assert_allclose": lambda a, b: jax.tree.map(np.testing.assert_allclose, a, b),
}


def broken(number, leaf):
    """`TREE` with `number` as the last number of a leaf."""
    numbers = TREE[leaf].copy()
    numbers.reshape(-1)[-1] = number
    return TREE | {leaf: numbers}


@pytest.mark.parametrize("leaf", TREE)
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", COMPARISONS)
def test_what_is_not_finite_is_refused(name, number, leaf):
    compare, wrong = COMPARISONS[name], broken(number, leaf)
    compare(TREE, TREE)
    if name == "assert_allclose":
        number_pairs = [(wrong, wrong)] if math.isnan(number) else []  # two infinities are equal
    else:
        number_pairs = [(wrong, wrong), (wrong, TREE), (TREE, wrong)]
    for a, b in number_pairs:
        with pytest.raises(AssertionError, match="nan" if name == "assert_allclose" else f"{leaf}.*1 of"):
            compare(a, b)


def test_what_is_not_finite_is_not_apart_either():
    assert finite.are_close(np.ones(2), np.ones(2) + 1e-9)
    assert not finite.are_close(np.ones(2), np.zeros(2))
    assert finite.are_equal(np.ones(2), np.ones(2))
    assert not finite.are_equal(np.ones(2), np.ones(2) + 1e-9)
    assert finite.differ_everywhere(np.ones(2), np.zeros(2))
    assert not finite.differ_everywhere(np.ones(2), np.arange(2))
    for compare in (finite.are_close, finite.are_equal, finite.differ_everywhere):
        with pytest.raises(AssertionError, match="1 of 2 numbers are not finite"):
            compare(np.ones(2), np.array([1.0, np.nan]))


TESTS = Path(__file__).parent
HELPERS = [path for path in TESTS.rglob("*.py") if not path.name.startswith(("test_", "conftest"))]


@pytest.mark.parametrize(
    "helper", [path for path in HELPERS if "np.testing." in path.read_text()], ids=lambda path: path.stem
)
def test_what_may_compare_in_a_process_of_its_own_sees_nan_there(helper):
    """A separate process reads no conftest.py, so its module must import `finite` itself."""
    imported = {
        name.name
        for node in ast.walk(ast.parse(helper.read_text()))
        if isinstance(node, ast.Import)
        for name in node.names
    }
    assert helper.name == "finite.py" or "finite" in imported


def test_a_leaf_inside_of_packed_variables_is_named():
    whole = Variables(tuple({"w": np.ones(2)} for _ in range(3)), ({}, {}, {"mean": np.ones(2)}))
    wrong = whole._replace(batch_stats=({}, {}, {"mean": np.array([1.0, np.nan])}))
    packed = PackedVariables.of(whole)
    assert rounds.difference(packed, whole) == 0
    with pytest.raises(AssertionError, match="mean"):
        rounds.difference(PackedVariables.of(wrong), packed)


def test_shapes_and_leaves_are_those_of_the_other():
    with pytest.raises(AssertionError, match=r"middle.*\(2, 2\)"):
        finite.pairs(TREE, TREE | {"middle": np.ones((2, 1))})
    with pytest.raises(ValueError, match="zip"):
        finite.pairs(TREE, {"first": TREE["first"]})
    with pytest.raises(AssertionError, match="first"):
        finite.assert_equal(TREE, TREE | {"first": np.ones(3) + 1e-15})
