"""Finds where a traced module can be cut: between equations where few arrays are alive.

Two things forbid a cut: a module or variable that is used on both sides, and a random array that both sides
would draw. Of the other cuts only those are kept after which there are products. So layers that normalise,
activate, pool or reshape belong to the unit before them.
"""

import bisect
import functools
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.extend import core

from sfl_jax.models import substitutes, traces
from sfl_jax.models.traces import Path, Program, Whole

PRODUCTS = {"dot_general", "conv_general_dilated", "ragged_dot_general"}


class Signature(NamedTuple):
    """Identifies a cut in every trace: the modules used before it and the shapes per sample that cross."""

    before: frozenset[Any]
    shapes: tuple[tuple[int, ...], ...]


class Recipe(NamedTuple):
    """Cuts in order, {variable: group}, the groups that all modes use, and {variable: unit that owns it}."""

    cuts: tuple[Signature, ...]
    groups: dict[Path, Any]
    common: frozenset[Any]
    owners: dict[Path, int]


class Flow(NamedTuple):
    """The equations of a program that depend on the input, in order, and the lifetimes of arrays.

    line: the equations. uses: {group of variables or random array: [numbers of the equations that use it]}.
    made: {array: number of the equation that makes it, -1 for an input}. last: {array: number of the last
    equation that uses it}.
    """

    line: list[core.JaxprEqn]
    uses: dict[Any, list[int]]
    made: dict[Any, int]
    last: dict[Any, int]


def sizes(whole: Whole) -> tuple[int, int]:
    """Two batch sizes above 1. Comparing them shows along which axis samples lie."""
    first = max(2, whole.kinds[0][0][0])
    return first, 2 * first


@functools.lru_cache(maxsize=16)
def recipe(whole: Whole) -> Recipe:
    """The cuts of a module: those in all of four traces, in both modes at two batch sizes."""
    batches = sizes(whole) * 2
    modes = (False, False, True, True)
    programs = [traces.trace(whole, train, batch) for train, batch in zip(modes, batches, strict=True)]
    groups = _groups(list(programs[0].variables), programs[0].modules)
    flows = [flow(program, groups) for program in programs]
    common = frozenset(group for group in groups.values() if all(group in one.uses for one in flows))
    tables = [_found(one, batch, common, whole.max_arrays) for one, batch in zip(flows, batches, strict=True)]
    cuts = [cut for cut in tables[0] if all(cut in table for table in tables)]
    cuts = _substantial(_ordered(cuts, tables), tables[0], flows[0])
    owners = {path: _owner(groups[path], cuts, tables, flows) for path in groups}
    return Recipe(tuple(cuts), groups, common, owners)


def located(recipe: Recipe, program: Program, batch: int, max_arrays: int) -> tuple[Flow, list[int]] | None:
    """(the flow of another trace, the places of the cuts in its line); None if a cut is not found."""
    one = flow(program, recipe.groups)
    table = _found(one, batch, recipe.common, max_arrays)
    places = [table[cut] for cut in recipe.cuts if cut in table]
    is_same = len(places) == len(recipe.cuts) and places == sorted(places)
    return (one, places) if is_same else None


def flow(program: Program, groups: dict[Path, Any]) -> Flow:
    """How the input flows through a program."""
    line, uses, made, last = [], defaultdict(list), dict.fromkeys(program.inputs, -1), {}
    sources = {variable: frozenset([groups[path]]) for path, variable in program.variables.items()}
    random = {program.key}
    for equation in traces.needed(program.equations, [*program.outputs, *program.states.values()]):
        atoms = [atom for atom in equation.invars if isinstance(atom, core.Var)]
        read = frozenset().union(*(sources.get(atom, ()) for atom in atoms))
        carried = [atom for atom in atoms if atom in made]
        if carried:
            last |= dict.fromkeys(carried, len(line))
            made |= dict.fromkeys(equation.outvars, len(line))
            for source in read:
                uses[source].append(len(line))
            line.append(equation)
            continue
        is_random = not random.isdisjoint(atoms)
        random |= set(equation.outvars) if is_random else set()
        for variable in equation.outvars:
            sources[variable] = read | ({variable} if is_random and not _is_key(variable) else set())
    for path, atom in program.states.items():
        own = uses[groups[path]]
        if isinstance(atom, core.Var) and atom in made:
            own.append(made[atom])
        elif isinstance(atom, core.Var):
            for source in sources.get(atom, frozenset()) - {groups[path]}:  # a state stays with what makes it
                own += uses[source]
                uses[source] += own
    uses = {source: numbers for source, numbers in uses.items() if numbers}
    last |= {atom: len(line) for atom in program.outputs if isinstance(atom, core.Var) and atom in made}
    return Flow(line, uses, made, last)


def alive(flow: Flow) -> Iterator[tuple[int, list[Any]]]:
    """(place, arrays made before it and used after it) for every place between two equations."""
    now = [array for array, number in flow.made.items() if number < 0]
    for place in range(1, len(flow.line)):
        now = [array for array in (*now, *flow.line[place - 1].outvars) if flow.last.get(array, -1) >= place]
        yield place, now


def _found(flow, batch, common, max_arrays):
    """{signature: the last place in the line with it}."""
    torn = set()
    for numbers in flow.uses.values():
        torn |= set(range(min(numbers) + 1, max(numbers) + 1))
    begins = sorted((min(numbers), source) for source, numbers in flow.uses.items() if source in common)
    firsts = [number for number, _ in begins]
    found = {}
    for place, arrays in alive(flow):
        shapes = [array.aval.shape for array in arrays]
        are_samples = all(shape[:1] == (batch,) for shape in shapes)
        if place not in torn and 1 <= len(arrays) <= max_arrays and are_samples:
            before = frozenset(source for _, source in begins[: bisect.bisect_left(firsts, place)])
            found[Signature(before, tuple(shape[1:] for shape in shapes))] = place
    return found


def _ordered(cuts, tables):
    """The cuts, without those whose order differs in another trace."""
    kept = []
    for cut in sorted(cuts, key=tables[0].__getitem__):
        if all(not kept or table[kept[-1]] < table[cut] for table in tables):
            kept.append(cut)
    return kept


def _substantial(cuts, table, flow):
    """The cuts between two units that both have products."""
    places = [table[cut] for cut in cuts] + [len(flow.line)]
    works = [number for number, equation in enumerate(flow.line) if _multiplies(equation, flow)]

    def has_work(start, stop):
        return bisect.bisect_left(works, start) < bisect.bisect_left(works, stop)

    kept = [cut for cut, place, stop in zip(cuts, places, places[1:], strict=False) if has_work(place, stop)]
    return kept if not kept or has_work(0, table[kept[0]]) else kept[1:]


def _multiplies(equation, flow):
    """Whether an equation has products or a look-up in a table of parameters."""
    name = equation.primitive.name
    if name == "gather":
        return equation.invars[0] not in flow.made
    return name in PRODUCTS or any(_has_products(body) for body in substitutes.bodies(equation))


def _has_products(jaxpr):
    return any(
        equation.primitive.name in PRODUCTS or any(map(_has_products, substitutes.bodies(equation)))
        for equation in jaxpr.eqns
    )


def _owner(group, cuts, tables, flows):
    """The unit that uses a group of variables; the first unit owns unused ones."""
    for flow, table in zip(flows, tables, strict=True):
        if group in flow.uses:
            return bisect.bisect_right([table[cut] for cut in cuts], min(flow.uses[group]))
    return 0


def _groups(variables, modules):
    """{path of a variable: the group that is not divided}: its module, if that is a layer or a block."""
    inside = {path[:end] for path in modules for end in range(len(path) + 1)}
    owning = {path[1:end] for path in variables for end in range(2, len(path))} & inside
    children = defaultdict(list)
    for path in owning - {()}:
        children[path[:-1]].append(path)

    def is_divided(module):
        """Whether a module is a row of blocks: two of its modules have the same class and modules inside."""
        blocks = Counter(modules.get(child) for child in children[module] if children[child])
        is_row = issubclass(modules.get(module, nn.Module), nn.Sequential)
        return module == () or is_row or max(blocks.values(), default=0) > 1

    def group(path):
        module = ()
        while is_divided(module):
            module = path[1 : len(module) + 2]
            if module not in owning:
                return path
        return module

    return {path: group(path) for path in variables}


def _is_key(variable):
    return jnp.issubdtype(variable.aval.dtype, jax.dtypes.prng_key)
