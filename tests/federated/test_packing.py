"""Packed trees and their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sfl_jax.federated import packing

TREE = {
    "small": jnp.arange(6.0).reshape(2, 3),
    "large": jnp.arange(40000.0).reshape(200, 200),
    "scalar": jnp.array(7.0),
}


@pytest.mark.parametrize("tree", [TREE, {"large": TREE["large"]}, {"small": TREE["small"]}, {}])
def test_unpacking_gives_back_what_was_packed(tree):
    pack, unpack = packing.packing(tree)
    packed = pack(tree)
    assert all(leaf.size > packing.SMALL for leaf in packed.large)
    back = unpack(packed)
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    jax.tree.map(np.testing.assert_array_equal, back, tree)


def test_the_gradient_of_a_packed_tree_is_the_packed_gradient():
    pack, unpack = packing.packing(TREE)

    def loss(tree):
        return (tree["small"] ** 2).sum() + tree["scalar"] ** 3 + (tree["large"] * 2).sum()

    packed = jax.grad(lambda p: loss(unpack(p)))(pack(TREE))
    jax.tree.map(np.testing.assert_array_equal, unpack(packed), jax.grad(loss)(TREE))
