"""Many small arrays as one vector.

A network has hundreds of small leaves (batch norm, biases), and each costs kernels of its own for the
optimiser, for masking and for aggregation: most of a round's compile time. Packed, they share a few. Large
leaves stay as they are, since copying them in and out of a vector would cost more than it saves.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

SMALL = 16384  # elements of a leaf that goes into the vector


class Packed(NamedTuple):
    """A pytree as few arrays: all small leaves in `vector`, the others in `large`."""

    vector: jax.Array
    large: tuple[jax.Array, ...]


class Packing(NamedTuple):
    """How pytrees of one structure are packed, and back; both differentiable, as one concatenation or cut
    each.
    """

    pack: Callable[[Any], Packed]
    unpack: Callable[[Packed], Any]


def packing(tree: Any) -> Packing:
    """The packing of pytrees that have the structure and shapes of `tree`; leaves are floats of one type."""
    leaves, structure = jax.tree.flatten(tree)
    shapes = [leaf.shape for leaf in leaves]
    small = [math.prod(shape) <= SMALL for shape in shapes]
    ends = np.cumsum([math.prod(shape) for shape, is_small in zip(shapes, small, strict=True) if is_small])

    def pack(tree):
        leaves = jax.tree.leaves(tree)
        parts = [leaf.reshape(-1) for leaf, is_small in zip(leaves, small, strict=True) if is_small]
        vector = jnp.concatenate(parts) if parts else jnp.zeros(0)
        return Packed(
            vector, tuple(leaf for leaf, is_small in zip(leaves, small, strict=True) if not is_small)
        )

    def cut(packed):
        parts, large = iter(jnp.split(packed.vector, ends[:-1])), iter(packed.large)
        leaves = [
            next(parts).reshape(shape) if is_small else next(large)
            for shape, is_small in zip(shapes, small, strict=True)
        ]
        return jax.tree.unflatten(structure, leaves)

    # The gradient of a cut is a concatenation; derived by itself it would be a sum of padded vectors.
    unpack = jax.custom_vjp(cut)
    unpack.defvjp(lambda packed: (cut(packed), None), lambda _, gradients: (pack(gradients),))
    return Packing(pack, unpack)
