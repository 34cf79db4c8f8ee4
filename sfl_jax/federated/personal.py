"""Normalisation that stays with its client: what a client keeps of its own from round to round.

Each client of the fleet has a row in a bank. A session starts from the global variables with the client's own
row in them, and ends with a new row. The mean over clients is formed of these leaves too: it is what a model
without a client of its own, as in an evaluation on held-out samples, takes.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int

from sfl_jax.errors import BadInput
from sfl_jax.federated.packing import Layout, PackedVariables

STATISTICS, LAYERS = "local_statistics", "local"
Row = tuple[tuple[Array, ...], tuple[tuple[Array, ...], ...]]  # own parameters, statistics by unit


@dataclasses.dataclass(frozen=True)
class Personal:
    """What each client keeps of its own. Static under jit.

    Attributes:
      kind: "local_statistics": the running statistics (SiloBN, Andreux et al., arXiv 2008.07424). "local":
        the scales and biases of the same layers too (FedBN, Li et al., arXiv 2102.07623).
      clients: the clients of the fleet, N. The bank holds N rows on each device.
    """

    kind: str
    clients: int

    def __post_init__(self):
        if self.kind not in (STATISTICS, LAYERS):
            raise BadInput(f"batch_norm={self.kind}: must be {STATISTICS} or {LAYERS}")

    def row(self, packed: PackedVariables) -> Row:
        """The client's own part of its variables."""
        own = tuple(x.reshape(-1)[places] for x, places in self._own_arrays(packed))
        return own, packed.batch_stats.arrays

    def merged(self, packed: PackedVariables, row: Row) -> PackedVariables:
        """The variables with a client's own part in them."""
        own, stats = iter(row[0]), row[1]
        places = _places(self.kind, packed.params.layouts, packed.batch_stats.layouts)
        arrays = tuple(
            tuple(
                x if at is None else x.reshape(-1).at[at].set(next(own)).reshape(x.shape)
                for x, at in zip(arrays, of_unit, strict=True)
            )
            for arrays, of_unit in zip(packed.params.arrays, places, strict=True)
        )
        params = dataclasses.replace(packed.params, arrays=arrays)
        return PackedVariables(params, dataclasses.replace(packed.batch_stats, arrays=stats))

    def bank(self, packed: PackedVariables) -> Row:
        """The rows before the first round: (N, ...) arrays."""
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (self.clients, *x.shape)), self.row(packed))

    def stored(
        self,
        bank: Row,
        clients: Int[Array, " K"],
        counts: Bool[Array, " K"],
        rows: Row,
        axis_name: str | None,
    ) -> Row:
        """The bank after a round, with the rows (K, ...) of the clients that count.

        Under `axis_name` each device has clients of its own, and the result is the bank of all of them.
        """
        at = jnp.where(counts, clients, self.clients)  # the last is no client's
        if axis_name is None:
            return jax.tree.map(lambda x, new: x.at[at].set(new, mode="drop"), bank, rows)
        is_new = jnp.zeros(self.clients, jnp.int32).at[at].set(1, mode="drop")
        sent = jax.tree.map(lambda x, new: jnp.zeros_like(x).at[at].set(new, mode="drop"), bank, rows)
        is_new, sent = lax.psum((is_new, sent), axis_name)

        def of_leaf(old, new):
            return jnp.where(is_new.reshape(-1, *(1,) * (old.ndim - 1)) > 0, new, old)

        return jax.tree.map(of_leaf, bank, sent)

    def _own_arrays(self, packed):
        """(packed array, places of the client's own numbers in it) of each array that has some."""
        places = _places(self.kind, packed.params.layouts, packed.batch_stats.layouts)
        return [
            (x, at)
            for arrays, of_unit in zip(packed.params.arrays, places, strict=True)
            for x, at in zip(arrays, of_unit, strict=True)
            if at is not None
        ]


@functools.cache
def _places(kind: str, params: tuple[Layout, ...], stats: tuple[Layout, ...]) -> Any:
    """The places of own numbers in each packed array of parameters, None where it has none; by unit."""
    if kind == STATISTICS:
        return tuple((None,) * len(_numbered(layout)) for layout in params)
    return tuple(map(_of_unit, params, stats))


def _of_unit(params: Layout, stats: Layout) -> tuple[np.ndarray | None, ...]:
    """Own are the parameters of modules that keep statistics."""
    normalising = {path[:-1] for path in _paths(stats)}
    is_own = [path[:-1] in normalising for path in _paths(params)]
    found = []
    for leaf_of in _numbered(params):
        places = np.flatnonzero(np.asarray(is_own, bool)[leaf_of])
        found.append(places if len(places) else None)
    return tuple(found)


def _paths(layout: Layout) -> list[tuple[str, ...]]:
    """The path of each leaf of a unit."""
    tree = jax.tree.unflatten(layout.structure, range(len(layout.shapes)))
    return [tuple(map(str, path)) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def _numbered(layout: Layout) -> list[np.ndarray]:
    """The packed arrays of a unit, flat, with the number of its leaf in the place of each number."""
    vectors = layout.vectors()
    small = {leaf for vector in vectors for leaf in vector}
    large = [[leaf] for leaf in range(len(layout.shapes)) if leaf not in small]
    sizes = [int(np.prod(shape)) for shape in layout.shapes]
    return [np.repeat(leaves, [sizes[leaf] for leaf in leaves]) for leaves in (*vectors, *large)]
