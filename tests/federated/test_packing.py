"""Packed trees and their gradients."""

import functools

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


LARGE_INTEGER = 2**24 + 1  # float32 cannot hold it
MIXED = (
    {
        "count": jnp.array(LARGE_INTEGER),
        "half": jnp.array([1.0, -0.0, 2.0**-133, 3e38], jnp.bfloat16),
        "here": jnp.arange(3, dtype=jnp.float32) / 3,
        "large": jnp.full((129, 128), 1 / 3, jnp.bfloat16),
        "more": jnp.array([7, LARGE_INTEGER], jnp.int32),
        "scalar": jnp.float32(1 / 3),
        "told": jnp.array([True, False]),
    },
    {"half": jnp.ones((2, 2), jnp.bfloat16)},
)


def bits(leaf):
    return leaf.shape, leaf.dtype, np.asarray(leaf).tobytes()


@pytest.mark.parametrize("numpy", [jnp, np])
def test_leaves_of_any_types_keep_their_bits(numpy):
    packed = packing.pack(jax.tree.map(numpy.asarray, MIXED), numpy)
    assert [len(arrays) for arrays in packed.arrays] == [5, 1]
    assert {array.dtype for array in packed.arrays[0]} == {leaf.dtype for leaf in MIXED[0].values()}
    back = packed.unpack() if numpy is jnp else packing.plain(packed)
    assert jax.tree.structure(back) == jax.tree.structure(MIXED)
    assert jax.tree.map(bits, back) == jax.tree.map(bits, MIXED)


def test_units_of_other_types_are_laid_out_otherwise():
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), MIXED[1])
    assert packing.pack((MIXED[1],)).layouts != packing.pack((wide,)).layouts


def test_gradients_of_leaves_of_several_types_are_packed_like_them():
    def loss(units):
        first, second = units
        powers = first["half"] ** 2, first["here"] ** 3, first["large"] * 2, second["half"] ** 3
        return sum(power.astype(jnp.float32).sum() for power in powers)

    gradient = functools.partial(jax.grad, allow_int=True)
    packed = gradient(lambda packed: loss(packed.unpack()))(packing.pack(MIXED))
    assert packed.layouts == packing.pack(MIXED).layouts
    assert jax.tree.map(bits, packed.unpack()) == jax.tree.map(bits, gradient(loss)(MIXED))
