"""A network as an ordered tuple of units, which can be cut between any two units."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Key, PyTree

from sfl_jax.errors import BadInput
from sfl_jax.models import layers, pieces, units


class Variables(NamedTuple):
    """Parameters and batch-norm statistics, each a tuple with one pytree per unit.

    Other collections of a unit are state too: they are in the unit's `batch_stats` under "/" and their name.
    """

    params: tuple[PyTree, ...]
    batch_stats: tuple[PyTree, ...]


@dataclasses.dataclass(frozen=True)
class Chain:
    """Units [first_unit, first_unit + len(units)) of a network. Hashable, so that it can be static under jit.

    `models.units` says what can be a unit. `layer_form` says how convolutions and pooling of a user's units
    are computed: "product" is fast when every client has its own weights, "conv" computes as Flax does. Both
    give the same numbers; "product" has no forward derivative. This project's units have their own attribute
    for it.

    Unit i of the whole network draws its random numbers from fold_in(key, i), whichever side holds it.
    """

    units: Sequence[nn.Module]  # held as a tuple
    first_unit: int = 0
    layer_form: str = "product"

    def __post_init__(self):
        if self.layer_form not in (*layers.FORMS, layers.ALONE):
            raise BadInput(f"layer_form={self.layer_form}: must be one of {', '.join(layers.FORMS)}")
        numbered = enumerate(self.units, start=self.first_unit)
        object.__setattr__(self, "units", tuple(units.hashable(unit, index) for index, unit in numbered))

    def __len__(self) -> int:
        return len(self.units)

    @classmethod
    def from_module(
        cls, module: nn.Module, example: PyTree, *, max_arrays: int = 1, layer_form: str = "product"
    ) -> "Chain":
        """The chain of a whole Flax module, which can be cut wherever at most `max_arrays` arrays cross.

        The module is traced on the shapes of `example`, (B, ...), in training and in inference. There is no
        cut where a variable or a module is used on both sides. Layers without products belong to the unit
        before them. The batch size is free; other axes are those of the example. BadInput says why the module
        cannot be traced.
        """
        return cls(pieces.pieces(module, example, max_arrays), layer_form=layer_form)

    def divide_variables(self, whole: PyTree) -> Variables:
        """The variables of the whole module (see `from_module`), divided by unit."""
        of_units = pieces.divided(self.units, whole)
        params = tuple(collections.get("params", {}) for collections in of_units)
        return Variables(params, tuple(map(_state, of_units)))

    def unite_variables(self, variables: Variables) -> PyTree:
        """The inverse of `divide_variables`, for the whole network."""
        return pieces.united(self.units, [self.unit_variables(variables, here) for here in range(len(self))])

    def init(self, key: Key[Array, ""], images: PyTree) -> Variables:
        """New variables of every unit. Only the shapes of `images` (smashed data for a server half) are used.

        Unit i of the whole network gets the result of `unit.init(fold_in(key, i), images, train=False)`. This
        project's units draw with NumPy, see `units.OwnUnit`; with a key traced by jit or vmap they get other
        numbers of the same distributions. BadInput names a unit that cannot be traced.
        """
        fresh, x = [], jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), images)
        for index, unit in enumerate(self.units, start=self.first_unit):
            with units.named_errors(f"unit {units.name(unit, index)}", x):
                shapes = units.shapes(unit, x)
            fresh.append(units.init(unit, jax.random.fold_in(key, index), x, shapes))
            x = shapes.output
        params = tuple(collections.get("params", {}) for collections in fresh)
        return Variables(params, tuple(map(_state, fresh)))

    def apply(
        self,
        variables: Variables,
        images: PyTree,
        train: bool = False,
        key: Key[Array, ""] | None = None,
        at_boundary: Callable[[int, Any], Any] | None = None,
    ) -> tuple[PyTree, Variables]:
        """Runs all units; (outputs, variables with updated batch-norm statistics).

        images: (B, H, W, C), or smashed data for a server half. Outputs are logits (B, classes), or smashed
        data for a client half. Smashed data are an array (B, ...) or a pytree of such arrays.
        key: needed in training.
        at_boundary: `at_boundary(i, x)` may change what enters unit i of the whole network, as a codec does.
        """
        x, batch_stats = images, []
        random = (
            self._randomness(key, len(jax.tree.leaves(images)[0]))
            if train and key is not None
            else [({}, {})] * len(self)
        )
        for index, unit in enumerate(self.units, start=self.first_unit):
            if at_boundary is not None:
                x = at_boundary(index, x)
            here = index - self.first_unit
            rngs, factors = random[here]
            with jax.named_scope(units.name(unit, index)):
                unit_variables = self.unit_variables(variables, here) | factors
                x, updated = _apply(units.kind(unit), unit_variables, x, train, rngs, self.layer_form)
            batch_stats.append(_state(updated))
        return x, Variables(variables.params, tuple(batch_stats))

    def split(self, cut: int) -> tuple["Chain", "Chain"]:
        """(client, server): units [0, cut) and [cut, L). Raises ValueError outside 0..L."""
        self._check(cut)
        return (
            dataclasses.replace(self, units=self.units[:cut]),
            dataclasses.replace(self, units=self.units[cut:], first_unit=self.first_unit + cut),
        )

    def split_variables(self, variables: Variables, cut: int) -> tuple[Variables, Variables]:
        """The variables of the two halves of `split(cut)`."""
        self._check(cut)
        front = Variables(variables.params[:cut], variables.batch_stats[:cut])
        return front, Variables(variables.params[cut:], variables.batch_stats[cut:])

    def join_variables(self, front: Variables, back: Variables) -> Variables:
        """The inverse of `split_variables`."""
        return Variables(front.params + back.params, front.batch_stats + back.batch_stats)

    def unit_variables(self, variables: Variables, index: int) -> dict[str, PyTree]:
        """{"params": ..., "batch_stats": ...} of unit `index` of this chain, in the form that Flax takes."""
        return {"params": variables.params[index]} | _collections(variables.batch_stats[index])

    def in_form(self, layer_form: str) -> "Chain":
        """The same network with its layers in this form, see `layers.FORMS`."""
        own = [units.in_form(unit, layer_form) for unit in self.units]
        return dataclasses.replace(self, units=own, layer_form=layer_form)

    def alone(self) -> "Chain":
        """The same network in the form that is fastest for one client at a time."""
        return self.in_form(layers.ALONE) if self.layer_form == layers.FORMS[0] else self

    def _randomness(self, key, samples):
        """[(rngs, factors of stochastic depth)] of units. All are drawn together: each single draw would be a
        loop, which takes time to compile. The places are hidden from XLA, so that equal units share a kernel.
        """
        numbers = jnp.arange(len(self))
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, self.first_unit + numbers)
        survival = jnp.array([units.survival(unit) for unit in self.units])
        factors = jax.vmap(functools.partial(layers.drop_path_factors, samples=samples))(keys, survival)
        places = lax.optimization_barrier(numbers)
        return [
            (units.streams(unit, keys[place]), units.given_factors(unit, factors, place))
            for unit, place in zip(self.units, places, strict=True)
        ]

    def _check(self, cut):
        if not 0 <= cut <= len(self.units):
            raise ValueError(f"cut={cut}: must be in 0..{len(self.units)}, the number of units")


_apply = jax.jit(units.apply, static_argnames=("unit", "train", "layer_form"))


def _state(collections):
    """A unit's state as one tree: batch-norm statistics, and other collections under "/" and their name."""
    others = {f"/{name}": tree for name, tree in collections.items() if name not in ("params", "batch_stats")}
    return collections.get("batch_stats", {}) | others


def _collections(state):
    """The inverse of `_state`."""
    others = {name[1:]: tree for name, tree in state.items() if name.startswith("/")}
    return {"batch_stats": {name: x for name, x in state.items() if not name.startswith("/")}} | others
