"""Comparisons of numbers that must not be NaN or infinite.

Python's `max` can ignore NaN, and NumPy's assertions take NaN as equal to NaN, so a broken result may look
equal. `not np.allclose`, `not np.array_equal` and `!=` are true for NaN, so a broken result may look
different. Importing this module changes NumPy's assertions: NaN is never equal.
"""

import functools

import jax
import numpy as np

# NaN on both sides must fail.
np.testing.assert_allclose = functools.partial(np.testing.assert_allclose, equal_nan=False)
_are_equal = np.testing.assert_array_equal


@functools.wraps(_are_equal)
def _assert_array_equal(actual, desired, *given, **named):
    __tracebackhide__ = True
    _are_equal(actual, desired, *given, **named)
    arrays = map(np.asarray, (actual, desired))
    assert not any(array.dtype.kind in "fc" and np.isnan(array).any() for array in arrays), "both are NaN"


np.testing.assert_array_equal = _assert_array_equal


def leaves(tree):
    """The leaves by path, in float64. AssertionError names the first leaf that is not finite."""
    found = {
        jax.tree_util.keystr(path) or "the number": np.asarray(leaf, np.float64)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    for path, leaf in found.items():
        wrong = leaf[~np.isfinite(leaf)]
        assert not wrong.size, f"{path}: {wrong.size} of {leaf.size} numbers are not finite, first {wrong[0]}"
    return found


def pairs(tree, other):
    """The pairs of leaves of two trees, which must have the same shapes and finite numbers."""
    found, expected = leaves(tree), leaves(other)
    both = list(zip(found.values(), expected.values(), strict=True))
    for path, (a, b) in zip(found, both, strict=True):
        assert a.shape == b.shape, f"{path}: shape {a.shape}, not {b.shape}"
    return both


def assert_equal(tree, other):
    """Asserts that both trees have the same numbers, bit for bit, all finite."""
    for path, (a, b) in zip(leaves(tree), pairs(tree, other), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=path)


def are_equal(a, b):
    """np.array_equal for trees that must be finite."""
    return all(np.array_equal(*pair) for pair in pairs(a, b))


def differ_everywhere(a, b):
    """Whether the trees differ in every number; all must be finite."""
    return all((one != other).all() for one, other in pairs(a, b))


def are_close(a, b, **tolerances):
    """np.allclose for trees that must be finite."""
    return all(np.allclose(*pair, **tolerances) for pair in pairs(a, b))
