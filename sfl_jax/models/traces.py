"""A whole Flax module as one flat program, with its equations in the order of the code."""

# pyright: reportPrivateImportUsage=false
# Newer releases of JAX export `jax.extend.core.ClosedJaxpr`, but their types do not say so.

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.extend import core
from jaxtyping import PyTree

from sfl_jax.models import substitutes, units

Path = tuple[str, ...]  # of a variable: its collection, the modules around it, its name
CALLS = ("jit", "pjit", "closed_call", "core_call")


@dataclasses.dataclass(frozen=True)
class Whole:
    """A module to cut, and the shapes of its input. Hashable, and opaque to Flax.

    kinds: ((shape, type), ...) of the example's arrays, with samples along the first axis. structure: that of
    their pytree. max_arrays: how many arrays may cross a cut.
    """

    module: nn.Module
    kinds: tuple[tuple[tuple[int, ...], Any], ...]
    structure: Any
    max_arrays: int = 1

    def example(self, batch: int | None = None, float_type: Any = None) -> PyTree:
        """The shapes of an input of `batch` samples; None: as many as the example has."""
        shapes = [
            jax.ShapeDtypeStruct((batch or shape[0], *shape[1:]), _typed(dtype, float_type))
            for shape, dtype in self.kinds
        ]
        return jax.tree.unflatten(self.structure, shapes)


class Program(NamedTuple):
    """A traced pass of a module.

    equations: in order. Calls of other programs are written out, except loops, branches and custom gradients.
    consts: the values of constant variables.
    key, variables, inputs: variables of the program.
    outputs, states: its results; the states by path.
    modules: the class of each module by path.
    normalised: see `units.batch_norm_values`.
    """

    equations: list[core.JaxprEqn]
    consts: dict[Any, Any]
    key: Any
    variables: dict[Path, Any]
    inputs: list[Any]
    outputs: list[Any]
    output_structure: Any
    states: dict[Path, Any]
    modules: dict[tuple[str, ...], type]
    normalised: list[tuple[tuple[str, ...], int]]


def trace(whole: Whole, train: bool, batch: int, float_type: Any = None) -> Program:
    """The pass of a batch in one mode. float_type: type of input and variables; None keeps their own."""
    return _trace(whole, train, batch, float_type, circumstances())


@functools.lru_cache(maxsize=64)
def _trace(whole, train, batch, float_type, _):
    module, modules, normalised = whole.module, {}, []
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, _typed(leaf.dtype, float_type)), variables(whole)
    )

    def run(key, variables, x):
        rngs = units.streams(module, key) if train else {}
        mutable = [collection for collection in variables if collection != "params"]
        return module.apply(variables, x, rngs=rngs, mutable=mutable, **units.mode(module, train))

    def note(call, args, kwargs, context):
        modules[context.module.path] = type(context.module)
        return call(*args, **kwargs)

    arguments = (_key(), shapes, whole.example(batch, float_type))
    with (
        nn.intercept_methods(note),
        units.batch_norm_values(normalised),
    ):
        program, (outputs, states) = jax.make_jaxpr(run, return_shape=True)(*arguments)
    flat = flattened(program)
    key, *inner = flat.jaxpr.invars
    by_path = dict(zip(paths(shapes), inner, strict=False))
    count = len(jax.tree.leaves(outputs))
    return Program(
        flat.jaxpr.eqns,
        dict(zip(flat.jaxpr.constvars, flat.consts, strict=True)),
        key,
        by_path,
        inner[len(by_path) :],
        flat.jaxpr.outvars[:count],
        jax.tree.structure(outputs),
        dict(zip(paths(states), flat.jaxpr.outvars[count:], strict=True)),
        modules,
        normalised,
    )


@functools.lru_cache(maxsize=16)
def variables(whole: Whole) -> PyTree:
    """The shapes of a module's variables, by collection."""
    return jax.eval_shape(functools.partial(_init, whole), _key())


def initial(whole: Whole) -> tuple[core.ClosedJaxpr, dict[Path, Any]]:
    """(the flat program that draws a module's variables from a key, its outputs by path)."""
    return _initial(whole, circumstances())


@functools.lru_cache(maxsize=16)
def _initial(whole, _):
    program, shapes = jax.make_jaxpr(functools.partial(_init, whole), return_shape=True)(_key())
    flat = flattened(program)
    return flat, dict(zip(paths(shapes), flat.jaxpr.outvars, strict=True))


def _init(whole, key):
    example = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), whole.example())
    return nn.meta.unbox(whole.module.init(key, example, **units.mode(whole.module, train=False)))


def paths(tree: PyTree) -> list[Path]:
    """The paths of a tree's leaves."""
    return [tuple(map(_name, path)) for path, _ in jax.tree.leaves_with_path(tree)]


def _name(entry):
    return str(getattr(entry, "key", getattr(entry, "idx", getattr(entry, "name", entry))))


def flattened(program: core.ClosedJaxpr) -> core.ClosedJaxpr:
    """The program, with the programs that it calls written out."""
    return jax.make_jaxpr(functools.partial(substitutes.evaluate, program, other=_written_out))(
        *program.in_avals
    )


def _written_out(equation):
    if equation.primitive.name not in CALLS:
        return None
    body = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
    return functools.partial(substitutes.evaluate, body, other=_written_out)


def needed(equations: list[core.JaxprEqn], atoms: Any, given: Any = ()) -> list[core.JaxprEqn]:
    """The equations that compute `atoms` from `given`, in order."""
    wanted = {atom for atom in atoms if isinstance(atom, core.Var)} - set(given)
    kept = []
    for equation in reversed(equations):
        if not wanted.isdisjoint(equation.outvars):
            kept.append(equation)
            wanted |= {atom for atom in equation.invars if isinstance(atom, core.Var)} - set(given)
    return kept[::-1]


def _key():
    return jax.ShapeDtypeStruct((), jax.random.key(0).dtype)


def circumstances() -> tuple[Any, ...]:
    """The settings of JAX and the devices it maps over, which change a program; used as a cache key."""
    precision = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    return jnp.result_type(float), precision, jax.sharding.get_abstract_mesh()


def _typed(dtype, float_type):
    is_float = float_type is not None and jnp.issubdtype(dtype, jnp.floating)
    return jnp.dtype(float_type) if is_float else dtype
