"""Decides whether an optax transformation treats every number alike, in whichever leaf it is.

SGD, momentum and Adam do. Then small leaves may be joined into one vector, which is faster, see `packing`.
Other transformations look at a leaf: at its norm (LARS, Adafactor), its shape or its name (a mask for weight
decay). They must get the leaves unjoined.

The answer is a proof. It is read from the traced program of the transformation, with the real shapes and
names. If the program cannot be followed, the answer is no.
"""

# pyright: reportPrivateImportUsage=false
# Newer releases of JAX export `jax.extend.core.ClosedJaxpr`, but their type stubs do not say so.

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend import core
from jax.tree_util import keystr, tree_leaves_with_path

from sfl_jax.federated.packing import Layout, pack

# Primitives in which each output number depends only on the input numbers in the same place.
_BY_NUMBER = frozenset(
    (
        "abs", "add", "add_any", "and", "atan2", "cbrt", "ceil", "clamp", "convert_element_type",
        "copy", "cos", "div", "eq", "erf", "exp", "exp2", "expm1", "floor", "ge", "gt",
        "integer_pow", "is_finite", "le", "log", "log1p", "logistic", "lt", "max", "min", "mul",
        "ne", "neg", "nextafter", "not", "or", "pow", "rem", "round", "rsqrt", "select_n", "sign",
        "sin", "sqrt", "square", "stop_gradient", "sub", "tan", "tanh", "xor",
    )
)  # fmt: skip
_CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "custom_jvp_call": "call_jaxpr", "closed_call": "call_jaxpr"}


class _Value(NamedTuple):
    """A traced value.

    owners: the leaves that it depends on. formula: an object that identifies how each of its numbers is
    computed. None if that is unknown or differs among its numbers.
    """

    owners: frozenset[int]
    formula: object | None


_UNKNOWN = _Value(frozenset(), None)
_formula = functools.cache(lambda *description: object())


@functools.cache
def may_join(transformation: optax.GradientTransformation, layouts: tuple[Layout, ...]) -> bool:
    """Whether joining the leaves of units with these layouts changes no update."""
    units = tuple(
        jax.tree.unflatten(
            layout.structure, map(jax.ShapeDtypeStruct, layout.shapes, map(jnp.dtype, layout.types))
        )
        for layout in layouts
    )
    try:
        apart = _formulas(transformation, units)
        return apart is not None and apart == _formulas(transformation, jax.eval_shape(pack, units))
    except Exception:  # the transformation may ask for names, which joined leaves do not have
        return False


def _formulas(transformation, params):
    """How the transformation computes numbers, in its first state, its updates and its new state.

    Each is {(which, type of the parameter): formula}. None if numbers of one type have different formulas.
    """
    state = jax.eval_shape(transformation.init, params)
    paths, shapes = zip(*((path, leaf.shape) for path, leaf in tree_leaves_with_path(params)), strict=True)

    def part(path, leaf):
        """(the parameter leaf that a leaf of the state belongs to, or None; the leaf's role)"""
        for owner, (own, shape) in enumerate(zip(paths, shapes, strict=True)):
            if path[len(path) - len(own) :] == own and leaf.shape == shape:
                return owner, keystr(path[: len(path) - len(own)])
        return None, keystr(path)

    def each(what):
        return [(owner, what) for owner in range(len(paths))]

    of_state = [part(path, leaf) for path, leaf in tree_leaves_with_path(state)]
    types = [leaf.dtype for leaf in jax.tree.leaves(params)]
    first = jax.make_jaxpr(transformation.init)(params)
    step = jax.make_jaxpr(transformation.update)(params, state, params)
    given = each("gradient") + of_state + each("parameter")
    found = [
        _uniform(first, each("parameter"), of_state, types),
        _uniform(step, given, each("update") + of_state, types),
    ]
    return None if None in found else found


def _uniform(program, inputs, outputs, types):
    """{(which, type): formula} of a program's outputs. None if leaves of one type differ in their formula."""
    given = [
        _Value(frozenset(() if owner is None else (owner,)), _formula("input", which))
        if owner is not None or not var.aval.shape
        else _UNKNOWN
        for (owner, which), var in zip(inputs, program.jaxpr.invars, strict=True)
    ]
    formulas: dict[Any, Any] = {}
    for (owner, which), made in zip(outputs, _follow(program, given), strict=True):
        key = which, None if owner is None else types[owner]
        alike = formulas.setdefault(key, made.formula) is made.formula
        if made.formula is None or not made.owners <= {owner} or not alike:
            return None
    return formulas


def _follow(program: core.ClosedJaxpr, given: list[_Value]) -> list[_Value]:
    """The outputs of a traced program for these inputs."""
    jaxpr = program.jaxpr
    known = dict(zip(jaxpr.invars, given, strict=True))
    known |= zip(jaxpr.constvars, map(_constant, program.consts), strict=True)

    def read(atom):
        return _constant(atom.val) if isinstance(atom, core.Literal) else known[atom]

    for equation in jaxpr.eqns:
        known |= zip(equation.outvars, _outputs(equation, [read(x) for x in equation.invars]), strict=True)
    return [read(atom) for atom in jaxpr.outvars]


def _outputs(equation, given):
    name = equation.primitive.name
    if name in _CALLS:
        return _follow(equation.params[_CALLS[name]], given)
    shapes = {atom.aval.shape for atom in equation.invars} - {()}
    if name == "broadcast_in_dim" and not shapes:
        return given[:1]
    made = {var.aval.shape for var in equation.outvars}
    owners = frozenset().union(*(value.owners for value in given))
    of_scalars = not owners and made == {()}
    if not (of_scalars or name in _BY_NUMBER) or any(value.formula is None for value in given):
        return [_Value(owners, None)] * len(equation.outvars)
    settings = str(sorted(equation.params.items(), key=str))
    formulas = (value.formula for value in given)
    return [
        _Value(owners, formula)
        for formula in (
            _formula(name, settings, *formulas, number) for number in range(len(equation.outvars))
        )
    ]


def _constant(value):
    if np.shape(value):
        return _UNKNOWN
    return _Value(
        frozenset(), _formula("constant", str(jnp.result_type(value)), repr(np.asarray(value).item()))
    )
