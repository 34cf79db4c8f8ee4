"""What a chain requires of its units.

A unit is any Flax module that maps one array (B, ...) to another, or a pytree of these to a pytree. It may
take `train`. Its own initialisers make its variables. It may draw from any random stream and keep state in
any collection. Names of its attributes have no meaning here: this project's own units have the class
`OwnUnit`.
"""

import contextlib
import dataclasses
import functools
import inspect
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import FrozenDict
from jaxtyping import Array, Key, PyTree

from sfl_jax.errors import BadInput
from sfl_jax.models import layers, substitutes

DROPOUT = 2**32 - 1  # folded into a unit's key; no other draws use this number
FACTORS = "factors"  # the collection in which a chain gives its own units factors of stochastic depth


class OwnUnit(nn.Module):
    """A unit of this project, made of `layers`. It takes `train` and draws from the stream `drop`."""

    @nn.nowrap
    def initial(self, key: Key[Array, ""], shapes: PyTree) -> PyTree:
        """New variables of these shapes. Names select initialisers. NumPy draws, so nothing compiles."""
        leaves, structure = jax.tree.flatten_with_path(shapes)
        values = [
            layers.INITIALISERS[path[-1].key](jax.random.fold_in(key, number), leaf.shape)
            for number, (path, leaf) in enumerate(leaves)
        ]
        return jax.tree.unflatten(structure, [jnp.asarray(value) for value in values])


def name(unit: nn.Module, index: int) -> str:
    """The unit's name; if it has none, its class and its index in the whole network."""
    return unit.name or f"{type(unit).__name__}{index}"


def hashable(unit: Any, index: int) -> nn.Module:
    """The unit with lists and dicts among its attributes frozen, as Flax does when it binds a module.

    Raises:
      BadInput: it is not a module, or an attribute cannot be hashed, such as an array.
    """
    if not isinstance(unit, nn.Module):
        is_class = isinstance(unit, type) and issubclass(unit, nn.Module)
        raise BadInput(
            f"unit {index}: must be a Flax module; got "
            + (f"the class {unit.__name__}; call it first" if is_class else repr(unit))
        )
    unit = _frozen(unit)
    try:
        hash(unit)
    except TypeError:
        bad = ", ".join(
            f"{key} ({type(value).__name__})" for key, value in _attributes(unit) if not _hashes(value)
        )
        raise BadInput(
            f"unit {name(unit, index)}: attributes must be hashable, since they decide what is compiled; "
            f"not hashable: {bad}; an array can be a variable of the unit"
        ) from None
    return unit


def _frozen(value):
    if isinstance(value, nn.Module):
        after = {key: _frozen(old) for key, old in _attributes(value)}
        changes = {key: after[key] for key, old in _attributes(value) if after[key] is not old}
        return value.clone(**changes) if changes else value
    if isinstance(value, list) or type(value) is tuple:
        parts = tuple(map(_frozen, value))
        same = isinstance(value, tuple) and all(a is b for a, b in zip(parts, value, strict=True))
        return value if same else parts
    if isinstance(value, dict):
        return FrozenDict({key: _frozen(part) for key, part in value.items()})
    return value


def _attributes(unit):
    names = [field.name for field in dataclasses.fields(unit) if field.name not in ("parent", "name")]
    return [(name, getattr(unit, name)) for name in names if hasattr(unit, name)]


def _hashes(value):
    try:
        hash(value)
    except TypeError:
        return False
    return True


def in_form(unit: nn.Module, layer_form: str) -> nn.Module:
    """An own unit with its convolutions in this form and the same variables; other units unchanged."""
    has_form = isinstance(unit, OwnUnit) and hasattr(unit, "form")
    return unit.clone(form=layer_form) if has_form else unit


def reference_form(unit: nn.Module) -> nn.Module:
    """A unit in the `conv` form, which has a shorter trace; its work is counted there."""
    return in_form(unit, "conv")


def kind(unit: nn.Module) -> nn.Module:
    """An own unit without name and survival, so that equal blocks are traced once; other units unchanged."""
    if not isinstance(unit, OwnUnit):
        return unit
    same: dict[str, Any] = {"survival": 0.5} if survival(unit) < 1 else {}
    return unit.clone(name=None, **same)


def survival(unit: nn.Module) -> float:
    """The probability that the branch of an own block is kept; 1 for every other unit."""
    return getattr(unit, "survival", 1.0) if isinstance(unit, OwnUnit) else 1.0


def streams(unit: nn.Module, key: Any) -> dict[str, Any]:
    """The random streams of a unit. Flax draws missing streams from `params`. `dropout` is given, because a
    unit may check whether it is there.
    """
    if isinstance(unit, OwnUnit):
        return {"drop": key}
    return {"params": key, "dropout": jax.random.fold_in(key, DROPOUT)}


def given_factors(unit: nn.Module, factors: Array, place: Array) -> dict[str, PyTree]:
    """Factors of stochastic depth for an own unit, by collection; nothing for other units."""
    return {FACTORS: {"drop_path": {"samples": factors[place]}}} if isinstance(unit, OwnUnit) else {}


class Shapes(NamedTuple):
    """The shapes of a unit's output, and of its variables by collection."""

    output: PyTree
    variables: dict[str, PyTree]


@contextlib.contextmanager
def named_errors(part: str, x: PyTree) -> Iterator[None]:
    """Turns any error in the block into a BadInput that names the part, its input's shape and the error."""
    try:
        yield
    except BadInput:
        raise
    except Exception as error:
        said = (str(error).strip().splitlines() or [""])[0]
        raise BadInput(f"{part}: cannot run on {described(x)}: {type(error).__name__}: {said}") from error


def described(x: PyTree) -> str:
    """The shapes and types of a pytree of arrays, on one line."""
    leaves = [f"{tuple(leaf.shape)} {leaf.dtype}" for leaf in jax.tree.leaves(x)]
    return f"input of shape {leaves[0]}" if len(leaves) == 1 else f"inputs of shapes {', '.join(leaves)}"


def shapes(unit: nn.Module, x: PyTree) -> Shapes:
    """The shapes of a unit's output and of its variables. Equal units are traced once."""
    leaves, structure = jax.tree.flatten(x)
    arrays = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves)
    output, variables = _traced_shapes(kind(reference_form(unit)), arrays, structure)
    # The caller may take its dicts apart.
    return Shapes(output, jax.tree.map(lambda leaf: leaf, variables))


@functools.cache
def _traced_shapes(unit, arrays, structure):
    key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype)
    init = functools.partial(unit.init_with_output, **mode(unit, train=False))
    return jax.eval_shape(init, key, jax.tree.unflatten(structure, arrays))


def init(unit: nn.Module, key: Key[Array, ""], x: PyTree, shapes: Shapes) -> dict[str, PyTree]:
    """New variables by collection: those of `unit.init`, or of `OwnUnit.initial` for an own unit."""
    if isinstance(unit, OwnUnit):
        return unit.initial(key, shapes.variables)
    leaves, structure = jax.tree.flatten(x)
    return _init_by_flax(unit, key, tuple((leaf.shape, leaf.dtype) for leaf in leaves), structure)


def apply(
    unit: nn.Module,
    variables: dict[str, PyTree],
    x: PyTree,
    train: bool,
    rngs: dict[str, Any],
    layer_form: str = "conv",
) -> tuple[PyTree, dict[str, PyTree]]:
    """(output, the new state by collection). State is all that is neither a parameter nor a given factor.

    layer_form: one of `layers.FORMS`, for a user's unit; an own unit has its form in an attribute.
    """
    fixed = ("params", FACTORS) if isinstance(unit, OwnUnit) else ("params",)
    mutable = [collection for collection in variables if collection not in fixed]

    def run(variables, x, rngs):
        return unit.apply(variables, x, rngs=rngs, mutable=mutable, **mode(unit, train))

    if layer_form == "conv" or isinstance(unit, OwnUnit):
        return run(variables, x, rngs)  # pyright: ignore[reportReturnType]
    return substitutes.in_product_form(run, layer_form == layers.ALONE)(variables, x, rngs)


def batch_norm_values(found: list[tuple[tuple[str, ...], int]]) -> Any:
    """In this context, each batch norm that uses its batch's statistics adds (path, number of values that it
    averages over) to `found`. A batch norm is a module that keeps a running `mean` and `var`.
    """

    def look(call, args, kwargs, context):
        module, is_call = context.module, context.method_name == "__call__"
        before = _running(module) if is_call else None
        result = call(*args, **kwargs)
        # A module that only reads running statistics does not depend on the batch.
        if before is not None and _running(module) is not before:
            found.append((module.path, math.prod(args[0].shape) // before.size))
        return result

    return nn.intercept_methods(look)


def _running(module):
    """The running mean of a batch norm; None for any other module."""
    if not all(module.has_variable("batch_stats", part) for part in ("mean", "var")):
        return None
    return module.get_variable("batch_stats", "mean")


@functools.partial(jax.jit, static_argnames=("unit", "kinds", "structure"))
def _init_by_flax(unit, key, kinds, structure):
    zeros = jax.tree.unflatten(structure, [jnp.zeros(shape, dtype) for shape, dtype in kinds])
    return unit.init(key, zeros, **mode(unit, train=False))


def mode(unit: nn.Module, train: bool) -> dict[str, Any]:
    """{"train": train} if the unit takes it."""
    return {"train": train} if _takes_train(type(unit)) else {}


@functools.cache
def _takes_train(kind):
    return "train" in inspect.signature(kind.__call__).parameters
