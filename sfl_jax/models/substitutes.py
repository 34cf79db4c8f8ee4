"""Programs in the product form: convolutions and windows of a jaxpr become products and shifts.

`vmap` over weights turns `lax.conv` into grouped convolutions, which are slow, see `layers`. So a user's unit
is traced, and each operation that `products` or `pools` can compute is replaced. Others stay unchanged.
Replaced operations have a gradient, but no forward derivative.
"""

# pyright: reportPrivateImportUsage=false
# Newer releases of JAX export `jax.extend.core.ClosedJaxpr`, but their types do not say so.

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from sfl_jax.models import convolutions, pools, products
from sfl_jax.models.taps import Axis, Grid, dilated, is_usable

Replacement = Callable[[core.JaxprEqn], Callable[..., Any] | None]
MOST_TAPS = 81  # largest pooling window that is computed by shifts: each tap is an operation


def in_product_form(function: Callable[..., Any], alone: bool = False) -> Callable[..., Any]:
    """A function of pytrees of arrays, with convolutions and windows replaced where possible.

    alone: choose what is fastest for one client at a time.
    """
    other = functools.partial(substitute, alone=alone)

    def run(*arguments):
        program, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
        outputs = evaluate(program, *jax.tree.leaves(arguments), other=other)
        return jax.tree.unflatten(jax.tree.structure(shapes), outputs)

    return run


def evaluate(program: core.ClosedJaxpr, *arguments: Any, other: Replacement | None = None) -> list[Any]:
    """The outputs of a program in the product form, or with the replacements that `other` gives."""
    jaxpr = program.jaxpr
    values = dict(zip(jaxpr.constvars, program.consts, strict=True))
    values |= dict(zip(jaxpr.invars, arguments, strict=True))
    for equation in jaxpr.eqns:
        run(equation, values, other or substitute)
    return [read(values, atom) for atom in jaxpr.outvars]


def run(equation: core.JaxprEqn, values: dict[Any, Any], other: Replacement | None = None) -> None:
    """Runs an equation and adds its outputs to `values`. `other(equation)`: a replacement for it, or None."""
    inputs = [read(values, atom) for atom in equation.invars]
    function = other and other(equation)
    if function is None:
        function = functools.partial(
            equation.primitive.bind, **equation.primitive.get_bind_params(equation.params)
        )
    outputs = function(*inputs)
    outputs = outputs if equation.primitive.multiple_results else [outputs]
    values.update(zip(equation.outvars, outputs, strict=True))


def read(values: dict[Any, Any], atom: Any) -> Any:
    """The value of a variable or a literal."""
    return atom.val if isinstance(atom, core.Literal) else values[atom]


def substitute(equation: core.JaxprEqn, alone: bool = False) -> Callable[..., Any] | None:
    """A faster function for an equation; None if there is none."""
    if equation.primitive.name in _WITH_BODIES:
        return _with_new_bodies(equation, alone)
    make = _SUBSTITUTES.get(equation.primitive.name)
    return make(equation, alone) if make and all(map(_is_float, equation.invars)) else None


def _is_float(atom):
    return jnp.issubdtype(atom.aval.dtype, jnp.floating)


def _with_new_bodies(equation, alone):
    """The same equation with its inner programs rewritten; None if nothing changes."""
    old = equation.params
    params = {key: _rewritten(value, alone) for key, value in old.items()}
    if all(params[key] is old[key] for key in old):
        return None
    return functools.partial(equation.primitive.bind, **equation.primitive.get_bind_params(params))


def _rewritten(value, alone):
    """A parameter with its programs in the product form; the same object if nothing changes."""
    if isinstance(value, tuple) and any(isinstance(part, core.ClosedJaxpr) for part in value):
        parts = tuple(_rewritten(part, alone) for part in value)
        return parts if any(a is not b for a, b in zip(parts, value, strict=True)) else value
    is_closed = isinstance(value, core.ClosedJaxpr)
    if not (is_closed or isinstance(value, core.Jaxpr)):
        return value
    program = value if is_closed else core.ClosedJaxpr(value, ())
    if not _has_substitute(program.jaxpr):
        return value
    other = functools.partial(substitute, alone=alone)
    new = jax.make_jaxpr(functools.partial(evaluate, program, other=other))(*program.in_avals)
    if is_closed:
        return new
    return value if new.consts else new.jaxpr


def _has_substitute(jaxpr):
    return any(
        any(map(_has_substitute, bodies(equation)))
        if equation.primitive.name in _WITH_BODIES
        else substitute(equation) is not None
        for equation in jaxpr.eqns
    )


def bodies(equation: core.JaxprEqn) -> Iterator[core.Jaxpr]:
    """The jaxprs among the parameters of an equation, also inside tuples, as branches are."""
    for value in equation.params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            if isinstance(part, core.ClosedJaxpr):
                yield part.jaxpr
            elif isinstance(part, core.Jaxpr):
                yield part


def _convolution(equation, alone):
    numbers, params = equation.params["dimension_numbers"], equation.params
    left, right = (atom.aval for atom in equation.invars)
    grid = _convolution_grid(params, left.shape, right.shape)
    if grid is None:
        return None
    kernel_order = (*numbers.rhs_spec[2:], numbers.rhs_spec[1], numbers.rhs_spec[0])
    groups, is_dilated = params["feature_group_count"], math.prod(params["lhs_dilation"]) > 1
    plain = convolutions.convolution_on if alone and groups == 1 else products.convolution_on
    one = products.transposed if is_dilated else plain

    def run(x, kernel):
        x, kernel = _image(x, numbers.lhs_spec), _flat(jnp.transpose(kernel, kernel_order), 0)
        if groups == 1:
            outputs = one(x, kernel, grid)
        elif groups == x.shape[-1] and not is_dilated:
            repeats = kernel.shape[-1] // groups
            outputs = products.depthwise_on(x if repeats == 1 else jnp.repeat(x, repeats, -1), kernel, grid)
        else:
            outputs = _grouped(one, x, kernel, grid, groups)
        return _like(outputs, numbers.out_spec)

    return run


def _grouped(one, x, kernel, grid, groups):
    """A grouped convolution: the groups become a batch axis of the products."""
    x = x.reshape(*x.shape[:3], groups, -1)
    kernel = kernel.reshape(*kernel.shape[:3], groups, -1)
    outputs = jax.vmap(functools.partial(one, grid=grid), (3, 3), 3)(x, kernel)
    return outputs.reshape(*outputs.shape[:3], -1)


def _convolution_grid(params, image_shape, kernel_shape):
    """The rows and columns of a convolution; None if `products` cannot compute it."""
    numbers = params["dimension_numbers"]
    sizes = [image_shape[axis] for axis in numbers.lhs_spec[2:]]
    kernel_sizes = [kernel_shape[axis] for axis in numbers.rhs_spec[2:]]
    holes, strides = params["lhs_dilation"], params["window_strides"]
    is_odd = params["batch_group_count"] != 1 or params["preferred_element_type"] is not None
    if is_odd or not _is_default(params["precision"]) or (max(holes, default=1) > 1 and max(strides) > 1):
        return None
    details = zip(sizes, kernel_sizes, strides, params["padding"], params["rhs_dilation"], strict=True)
    if max(holes, default=1) == 1:
        return _grid([Axis(*detail) for detail in details])
    sides = zip(details, holes, strict=True)
    return _grid([dilated(size, kernel, hole, *others) for (size, kernel, _, *others), hole in sides])


def _grid(axes: Sequence[Axis]) -> Grid | None:
    """Rows and columns. A single axis is the columns of an image with one row."""
    if not 1 <= len(axes) <= 2 or not all(map(is_usable, axes)):
        return None
    return axes[0] if len(axes) == 2 else Axis(1, 1, 1, (0, 0)), axes[-1]


def _is_default(precision):
    """Whether this precision is the one of a product that names none."""
    default = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    if precision is None or default not in _PRECISIONS:
        return precision is None
    return precision == (lax.Precision(default),) * 2


_PRECISIONS = ("default", "high", "highest", "float32", "bfloat16", "tensorfloat32")


def _window(compute):
    def make(equation, alone):
        params = equation.params
        names = ("window_dimensions", "window_strides", "padding", "window_dilation")
        details = zip(equation.invars[0].aval.shape, *(params[name] for name in names), strict=True)
        first, *axes, last = (Axis(*detail) for detail in details)
        grid = _grid(axes)
        is_still = all(axis.is_pointwise for axis in (first, last))
        if grid is None or not is_still or max(params["base_dilation"]) > 1:
            return None
        if math.prod(params["window_dimensions"]) > MOST_TAPS:
            return None
        spec = (0, len(axes) + 1, *range(1, len(axes) + 1))
        return lambda x: _like(compute(_image(x, spec), grid), spec)

    return make


def _image(x, spec):
    """The array as (B, H, W, C); `spec` gives its axes (batch, channels, *spatial)."""
    return _flat(jnp.transpose(x, (spec[0], *spec[2:], spec[1])), 1)


def _flat(x, row):
    """Adds an axis of one row to an array with only columns."""
    return jnp.expand_dims(x, row) if x.ndim == 3 else x


def _like(x, spec):
    """The inverse of `_image`."""
    x = x if len(spec) == 4 else x[:, 0]
    order = (spec[0], *spec[2:], spec[1])
    return jnp.transpose(x, [order.index(axis) for axis in range(len(order))])


_SUBSTITUTES = {
    "conv_general_dilated": _convolution,
    "reduce_window_sum": _window(pools.window_sums),
    "reduce_window_max": _window(pools.window_maxima),
}
_WITH_BODIES = {"jit", "pjit", "checkpoint", "remat2", "scan", "while", "cond", "closed_call", "remat"}
