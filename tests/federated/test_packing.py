"""Packed trees and their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sfl_jax.federated import packing

UNIT = {
    "small": jnp.arange(6.0).reshape(2, 3),
    "large": jnp.arange(40000.0).reshape(200, 200),
    "scalar": jnp.array(7.0),
}
UNITS = (UNIT, {"large": UNIT["large"]}, {"small": UNIT["small"]}, {}, UNIT)


@pytest.mark.parametrize("units", [UNITS, (), ({},)])
def test_unpacking_gives_back_what_was_packed(units):
    packed = packing.pack(units)
    for arrays, unit in zip(packed.arrays, units, strict=True):
        assert sum(array.size for array in arrays) == sum(leaf.size for leaf in jax.tree.leaves(unit))
        assert sum(array.ndim == 1 for array in arrays) == bool(unit.keys() - {"large"})
    back = packed.unpack()
    assert jax.tree.structure(back) == jax.tree.structure(units)
    jax.tree.map(np.testing.assert_array_equal, back, units)


def test_equal_units_are_packed_alike():
    first, *_, last = packing.pack(UNITS).layouts
    assert first == last
    assert first != packing.pack(({"small": UNIT["small"]},)).layouts[0]


def test_the_gradient_of_packed_units_is_the_packed_gradient():
    def loss(units):
        first, *_, last = units
        return (first["small"] ** 2).sum() + last["scalar"] ** 3 + (first["large"] * 2).sum()

    packed = jax.grad(lambda p: loss(p.unpack()))(packing.pack(UNITS))
    jax.tree.map(np.testing.assert_array_equal, packed.unpack(), jax.grad(loss)(UNITS))
