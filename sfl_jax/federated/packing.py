"""The variables of a chain as few arrays: a vector of a unit's small leaves of a type, the large as they are.

A network has hundreds of small leaves (batch norm, biases), and each costs kernels of its own for the
optimiser, for masking and for aggregation. Packed, those of a unit share one. It is one for a unit and not
for the network, because XLA:CPU compiles equal kernels once: equal blocks then cut their leaves from the same
places of equal vectors. Large leaves would cost more in copies than they save.
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

SMALL = 16384  # elements of a leaf that goes into the vector


class Layout(NamedTuple):
    """What a unit's leaves were: their tree, shapes and types. Hashable."""

    structure: Any
    shapes: tuple[tuple[int, ...], ...]
    types: tuple[str, ...]

    def vectors(self) -> list[list[int]]:
        """The leaves of each vector: the small ones of one type."""
        groups: dict[str, list[int]] = {}
        for leaf, (shape, type) in enumerate(zip(self.shapes, self.types, strict=True)):
            if math.prod(shape) <= SMALL:
                groups.setdefault(type, []).append(leaf)
        return list(groups.values())


@functools.partial(jax.tree_util.register_dataclass, data_fields=["arrays"], meta_fields=["layouts"])
@dataclasses.dataclass(frozen=True)
class Packed:
    """A pytree for each unit as few arrays: of every unit the vectors of its small leaves, one for each type,
    and then the other leaves.
    """

    arrays: Any  # tuple[tuple[jax.Array, ...], ...], but for what JAX puts in its place for a while
    layouts: tuple[Layout, ...]

    def unpack(self) -> tuple[Any, ...]:
        """What was packed; differentiable as one concatenation a unit."""
        return _unpack(self)


class PackedVariables(NamedTuple):
    """`Variables` as sessions and their aggregation hold them."""

    params: Packed
    batch_stats: Packed

    @classmethod
    def of(cls, variables: Variables) -> "PackedVariables":
        """`variables`, packed."""
        return cls(pack(variables.params), pack(variables.batch_stats))

    def unpack(self) -> Variables:
        """As the chain takes them."""
        return Variables(self.params.unpack(), self.batch_stats.unpack())


def pack(units: Sequence[Any], numpy: Any = jnp) -> Packed:
    """A pytree for each unit, packed; `numpy`: where, np on the host."""
    flat = [jax.tree.flatten(unit) for unit in units]
    layouts = [
        Layout(structure, tuple(leaf.shape for leaf in leaves), tuple(str(leaf.dtype) for leaf in leaves))
        for leaves, structure in flat
    ]
    arrays = [_join(leaves, layout, numpy) for (leaves, _), layout in zip(flat, layouts, strict=True)]
    return Packed(tuple(arrays), tuple(layouts))


def plain(tree: Any) -> Any:
    """`tree` with all that is packed in it unpacked, on the host, in views of the same numbers."""
    return _map_packed(lambda packed: tuple(map(_cut_on_host, packed.arrays, packed.layouts)), tree)


def plain_like(tree: Any) -> Any:
    """Shapes and types of `plain`, of shapes or arrays."""
    return _map_packed(functools.partial(jax.eval_shape, Packed.unpack), tree)


def as_packed(tree: Any, like: Any) -> Any:
    """What `plain` made, packed again on the host where `like` is."""
    return _map_packed(lambda _, units: pack(units, np), like, tree)


def _map_packed(function, tree, *others):
    """`function` of all that is packed in `tree`, and of what is in its place in others; the rest as it is in
    the last of them.
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


# The gradient of a cut is a concatenation; derived by itself it would be a sum of padded vectors.
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
