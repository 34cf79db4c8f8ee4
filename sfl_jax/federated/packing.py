"""Packs the variables of a chain into few arrays. A unit's small leaves of one type become one vector.

A network has hundreds of small leaves (batch norm, biases). Each one needs its own kernels for the optimiser,
for masking and for aggregation. Packed leaves share these kernels. Each unit has its own vector, because
XLA:CPU compiles equal kernels once: equal blocks then cut their leaves from the same places of equal vectors.
Large leaves stay as they are, because copying them would cost more than it saves.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sfl_jax.models import Variables

SMALL = 16384  # the most elements of a leaf that goes into the vector


class Layout(NamedTuple):
    """The tree, shapes and types of a unit's leaves. Hashable."""

    structure: Any
    shapes: tuple[tuple[int, ...], ...]
    types: tuple[str, ...]

    def vectors(self) -> list[list[int]]:
        """The leaves in each vector: the small leaves of one type."""
        groups: dict[str, list[int]] = {}
        for leaf, (shape, type) in enumerate(zip(self.shapes, self.types, strict=True)):
            if math.prod(shape) <= SMALL:
                groups.setdefault(type, []).append(leaf)
        return list(groups.values())


@functools.partial(jax.tree_util.register_dataclass, data_fields=["arrays"], meta_fields=["layouts"])
@dataclasses.dataclass(frozen=True)
class Packed:
    """A pytree for each unit, in few arrays: one vector for each type of small leaves, and large leaves."""

    arrays: Any  # tuple[tuple[jax.Array, ...], ...]; JAX sometimes puts other objects here
    layouts: tuple[Layout, ...]

    def unpack(self) -> tuple[Any, ...]:
        """The pytrees that were packed. Its gradient is one concatenation for each unit."""
        return _unpack(self)


class PackedVariables(NamedTuple):
    """`Variables` in the form that sessions and aggregation use."""

    params: Packed
    batch_stats: Packed

    @classmethod
    def of(cls, variables: Variables, numpy: Any = jnp) -> "PackedVariables":
        """Packs the variables. numpy: see `pack`."""
        return cls(pack(variables.params, numpy), pack(variables.batch_stats, numpy))

    def unpack(self) -> Variables:
        """The variables in the form that the chain takes."""
        return Variables(self.params.unpack(), self.batch_stats.unpack())


def pack(units: Sequence[Any], numpy: Any = jnp) -> Packed:
    """Packs a pytree for each unit. `numpy` is `np` to pack on the host."""
    flat = [jax.tree.flatten(unit) for unit in units]
    layouts = [
        Layout(structure, tuple(leaf.shape for leaf in leaves), tuple(str(leaf.dtype) for leaf in leaves))
        for leaves, structure in flat
    ]
    arrays = [_join(leaves, layout, numpy) for (leaves, _), layout in zip(flat, layouts, strict=True)]
    return Packed(tuple(arrays), tuple(layouts))


def plain(tree: Any) -> Any:
    """`tree` with everything packed in it unpacked on the host, in views of the same numbers."""
    return _map_packed(lambda packed: tuple(map(_cut_on_host, packed.arrays, packed.layouts)), tree)


def plain_like(tree: Any) -> Any:
    """The shapes and types that `plain` returns, from shapes or arrays."""
    return _map_packed(functools.partial(jax.eval_shape, Packed.unpack), tree)


def as_packed(tree: Any, like: Any) -> Any:
    """The inverse of `plain`, on the host. Packs where `like` is packed."""
    return _map_packed(lambda _, units: pack(units, np), like, tree)


def _map_packed(function, tree, *others):
    """Applies `function` to each `Packed` in `tree` and the nodes in its place in the others.

    All other nodes are taken from the last tree.
    """

    def of(*nodes):
        return function(*nodes) if isinstance(nodes[0], Packed) else nodes[-1]

    return jax.tree.map(of, tree, *others, is_leaf=lambda node: isinstance(node, Packed))


def _forward(packed):
    return _unpack(packed), dataclasses.replace(packed, arrays=())


def _backward(empty, gradients):
    joined = [
        _join(jax.tree.leaves(unit), at, jnp) for unit, at in zip(gradients, empty.layouts, strict=True)
    ]
    return (dataclasses.replace(empty, arrays=tuple(joined)),)


# The gradient of unpacking is a concatenation. JAX would derive a sum of padded vectors instead.
@jax.custom_vjp
def _unpack(packed: Packed) -> tuple[Any, ...]:
    return tuple(map(_cut, packed.arrays, packed.layouts))


_unpack.defvjp(_forward, _backward)


def _join(leaves, layout, numpy):
    vectors = layout.vectors()
    joined = [numpy.concatenate([leaves[leaf].reshape(-1) for leaf in vector]) for vector in vectors]
    return *joined, *(leaves[leaf] for leaf in _large(layout, vectors))


def _large(layout, vectors):
    small = {leaf for vector in vectors for leaf in vector}
    return [leaf for leaf in range(len(layout.shapes)) if leaf not in small]


def _cut_on_host(arrays, layout):
    return _cut(list(map(np.asarray, arrays)), layout, np)


def _cut(arrays, layout, numpy=jnp):
    vectors = layout.vectors()
    leaves = dict(zip(_large(layout, vectors), arrays[len(vectors) :], strict=True))
    for vector, joined in zip(vectors, arrays[: len(vectors)], strict=True):
        shapes = [layout.shapes[leaf] for leaf in vector]
        ends = list(itertools.accumulate(map(math.prod, shapes)))
        parts = numpy.split(joined, ends[:-1])
        leaves |= {leaf: part.reshape(s) for leaf, part, s in zip(vector, parts, shapes, strict=True)}
    return jax.tree.unflatten(layout.structure, [leaves[leaf] for leaf in range(len(layout.shapes))])
