"""Units that are pieces of a whole Flax module, cut where `cuts` says.

A piece holds the whole module. For each batch size it traces the module once and runs its own slice of the
program. So the batch size is free; other axes are those of the example.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.extend import core
from jaxtyping import PyTree

from sfl_jax.errors import BadInput
from sfl_jax.models import cuts, substitutes, traces, units
from sfl_jax.models.traces import Path, Whole


class Piece(nn.Module):
    """Unit `number` of a module that was cut. It maps what crosses one cut to what crosses the next.

    Its variables are those of the module that it uses, with their names there. What crosses is an array, or a
    tuple of several.
    """

    whole: Whole
    number: int

    @nn.compact
    def __call__(self, x: PyTree, train: bool = False) -> PyTree:
        if self.is_initializing():
            self._put(_initial(self.whole, self.number, self.make_rng("params")))
        variables = {path: self._get(path) for path in _owned(self.whole, self.number)}
        one = _slice_for(self, variables, x, train)
        values = dict(one.consts) | {one.variables[path]: value for path, value in variables.items()}
        arrays = zip(one.inputs, jax.tree.leaves(x), strict=True)
        values |= {variable: _cast(value, variable) for variable, value in arrays}
        if one.draws:
            values[one.key] = self.make_rng("params")
        for equation in one.equations:
            substitutes.run(equation, values)
        if not self.is_initializing():
            self._put({path: substitutes.read(values, atom) for path, atom in one.states.items()})
        outputs = [substitutes.read(values, atom) for atom in one.outputs]
        return jax.tree.unflatten(one.structure, outputs)

    def _get(self, path):
        collection, name, *inner = path
        return functools.reduce(lambda tree, key: tree[key], inner, self.get_variable(collection, name))

    def _put(self, values):
        """Writes variables by path; those with the same first name are written together."""
        for collection, trees in unflatten_dict(values).items():
            if self.is_mutable_collection(collection):
                for name, tree in trees.items():
                    self.put_variable(collection, name, tree)


def pieces(module: nn.Module, example: PyTree, max_arrays: int = 1) -> tuple[Piece, ...]:
    """The units of a module, which is cut wherever at most `max_arrays` arrays (B, ...) cross.

    Args:
      module: takes the input, and may take `train`.
      example: an input, or its shapes and types.

    Raises:
      BadInput: the module cannot be traced on the example.
    """
    leaves, structure = jax.tree.flatten(example)
    kinds = tuple((tuple(leaf.shape), jnp.dtype(leaf.dtype)) for leaf in leaves)
    frozen = units.hashable(module, 0)
    whole = Whole(frozen, kinds, structure, max_arrays)
    with units.named_errors(f"module {type(module).__name__}", example):
        for train in (False, True):
            traces.trace(whole, train, cuts.sizes(whole)[0])
    return tuple(Piece(whole, number, name=name) for number, name in enumerate(_names(whole)))


def divided(chain_units: Sequence[nn.Module], variables: PyTree) -> list[dict[str, PyTree]]:
    """The variables of a whole module by unit, then by collection. BadInput names a missing one."""
    whole = _whole_of(chain_units)
    variables = nn.meta.unbox(variables)
    by_path = dict(zip(traces.paths(variables), jax.tree.leaves(variables), strict=True))
    missing = [path for path in cuts.recipe(whole).owners if path not in by_path]
    if missing:
        raise BadInput(f"variables: must have {'/'.join(missing[0])}, as the module has")
    numbers = range(len(chain_units))
    return [unflatten_dict({path: by_path[path] for path in _owned(whole, number)}) for number in numbers]


def united(chain_units: Sequence[nn.Module], variables: list[dict[str, PyTree]]) -> PyTree:
    """The inverse of `divided`, for all units of a module."""
    whole = traces.variables(_whole_of(chain_units))
    by_path = {}
    for of_unit in variables:
        by_path |= flatten_dict(of_unit)
    return jax.tree.unflatten(jax.tree.structure(whole), [by_path[path] for path in traces.paths(whole)])


def _whole_of(chain_units):
    whole = getattr(chain_units[0], "whole", None) if chain_units else None
    pieces_of_it = isinstance(whole, Whole) and len(chain_units) == len(cuts.recipe(whole).cuts) + 1
    if not pieces_of_it:
        raise BadInput("chain: must be the whole chain that Chain.from_module returned")
    return whole


def normalised(unit: Piece) -> list[int]:
    """The number of values, per sample and channel, that each batch norm of a piece averages over."""
    program = traces.trace(unit.whole, True, 1)
    return [
        values
        for module, values in program.normalised
        if any(path[1:-1] == module for path in _owned(unit.whole, unit.number))
    ]


class Slice(NamedTuple):
    """The equations that a piece runs, and the variables of the program that they read and write."""

    equations: list[core.JaxprEqn]
    consts: dict[Any, Any]
    key: Any
    draws: bool
    variables: dict[Path, Any]
    inputs: list[Any]
    outputs: list[Any]
    states: dict[Path, Any]
    structure: Any  # of the outputs


def _slice_for(unit, variables, x, train):
    """The slice for these variables and this input. BadInput if the input's shape is not the example's."""
    name, leaves = units.name(unit, unit.number), jax.tree.leaves(x)
    float_type = _other_type(unit.whole, variables)
    slices = _slices(unit.whole, train, leaves[0].shape[0], float_type)
    if slices is None:
        raise BadInput(
            f"unit {name}: a batch of {leaves[0].shape[0]} runs another program than the example's batch"
        )
    one = slices[unit.number]
    expected = [variable.aval.shape for variable in one.inputs]
    if [leaf.shape for leaf in leaves] != expected:
        raise BadInput(f"unit {name}: must get the example's shapes {expected}; got {units.described(x)}")
    return one


def _other_type(whole, variables):
    """The float type of the variables if it differs from their original type; else None."""
    made = _kinds(whole)
    others = [value.dtype for path, value in variables.items() if value.dtype != made[path]]
    return next((dtype for dtype in others if jnp.issubdtype(dtype, jnp.floating)), None)


@functools.lru_cache(maxsize=16)
def _kinds(whole):
    shapes = traces.variables(whole)
    return dict(zip(traces.paths(shapes), (leaf.dtype for leaf in jax.tree.leaves(shapes)), strict=True))


def _slices(whole, train, batch, float_type):
    """The slice of every piece; None if the program lacks one of the cuts."""
    return _all_slices(whole, train, batch, float_type, traces.circumstances())


@functools.lru_cache(maxsize=64)
def _all_slices(whole, train, batch, float_type, _):
    recipe, program = cuts.recipe(whole), traces.trace(whole, train, batch, float_type)
    found = cuts.located(recipe, program, batch, whole.max_arrays)
    if found is None:
        return None
    flow, places = found
    crossing = {place: arrays for place, arrays in cuts.alive(flow) if place in places}
    edges = [program.inputs, *(crossing[place] for place in places), program.outputs]
    return [_slice(program, recipe, number, edges) for number in range(len(edges) - 1)]


def _slice(program, recipe, number, edges):
    inputs, outputs = edges[number], edges[number + 1]
    owned = {path: variable for path, variable in program.variables.items() if recipe.owners[path] == number}
    states = {path: atom for path, atom in program.states.items() if path in owned}
    given = {*inputs, *owned.values(), program.key}
    equations = traces.needed(program.equations, [*outputs, *states.values()], given)
    is_last = number == len(edges) - 2
    structure = jax.tree.structure(outputs[0] if len(outputs) == 1 else tuple(outputs))
    return Slice(
        equations,
        program.consts,
        program.key,
        any(program.key in equation.invars for equation in equations),
        owned,
        inputs,
        outputs,
        states,
        program.output_structure if is_last else structure,
    )


def _owned(whole, number):
    return [path for path, owner in cuts.recipe(whole).owners.items() if owner == number]


def _names(whole):
    """A name for each piece: its module with the most parameters; None if it has no parameters."""
    recipe, sizes = cuts.recipe(whole), {}
    shapes = traces.variables(whole)
    for path, leaf in zip(traces.paths(shapes), jax.tree.leaves(shapes), strict=True):
        if path[0] == "params":
            of_unit = sizes.setdefault(recipe.owners[path], {})
            of_unit[recipe.groups[path]] = of_unit.get(recipe.groups[path], 0) + leaf.size
    largest = [max(sizes[n], key=sizes[n].get) if n in sizes else None for n in range(len(recipe.cuts) + 1)]
    return [group and ".".join(group[1:] if group[0] == "params" else group) for group in largest]


def _initial(whole, number, key):
    """New variables of a piece by path, as the whole module draws them from the key."""
    program, made = traces.initial(whole)
    wanted = {path: made[path] for path in _owned(whole, number)}
    values = dict(zip(program.jaxpr.constvars, program.consts, strict=True)) | {program.jaxpr.invars[0]: key}
    for equation in traces.needed(program.jaxpr.eqns, wanted.values(), program.jaxpr.invars):
        substitutes.run(equation, values)
    return {path: substitutes.read(values, atom) for path, atom in wanted.items()}


def _cast(value, variable):
    is_float = jnp.issubdtype(variable.aval.dtype, jnp.floating)
    return jnp.asarray(value, variable.aval.dtype) if is_float else value
