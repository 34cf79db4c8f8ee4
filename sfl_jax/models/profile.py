"""What every unit of a chain costs, traced from its jaxpr and that of its gradient, per sample."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.extend import core

from sfl_jax.models import layers
from sfl_jax.models.chain import Chain


class Profile(NamedTuple):
    """Costs per sample and unit of a chain of L units; NumPy int64.

    names: (L,) the units.
    forward_macs: (L,) multiply-accumulates of convolutions and products; padding counts, as is published.
    backward_macs: (L,) the same of the gradient; unit 0 has no input gradient.
    parameters: (L,) trainable floats.
    state: (L,) batch-norm statistics.
    activations: (L,) floats that training keeps for the backward pass.
    smashed: (L+1,) floats that cross cut l: the image at 0, nothing at L.
    """

    names: tuple[str, ...]
    forward_macs: np.ndarray
    backward_macs: np.ndarray
    parameters: np.ndarray
    state: np.ndarray
    activations: np.ndarray
    smashed: np.ndarray


def profile(chain: Chain, image_shape: tuple[int, ...]) -> Profile:
    """Traces every unit of `chain` in the `lax.conv` form. Nothing is computed.

    `image_shape` is (H, W, C), for a server half the shape of a sample's smashed data.
    """
    rows, shape = [], tuple(image_shape)
    for index, unit in enumerate(chain.units):
        rows.append(_trace(layers.kind(layers.reference_form(unit)), shape, chain.first_unit + index == 0))
        shape = rows[-1].output_shape
    inputs = [math.prod(image_shape)] + [math.prod(row.output_shape) for row in rows[:-1]]
    counts = _Row._fields[:-1]
    counted = {count: np.array([getattr(row, count) for row in rows], np.int64) for count in counts}
    names = tuple(str(unit.name) for unit in chain.units)
    return Profile(names=names, smashed=np.array([*inputs, 0], np.int64), **counted)


class _Row(NamedTuple):
    forward_macs: int
    backward_macs: int
    parameters: int
    state: int
    activations: int
    output_shape: tuple[int, ...]


@functools.cache
def _trace(unit: nn.Module, shape: tuple[int, ...], is_first: bool) -> _Row:
    key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype)

    def example(batch):
        return jax.ShapeDtypeStruct((batch, *shape), jnp.float32)

    variables = jax.eval_shape(lambda k, x: unit.init(k, x, False), key, example(1))
    params, state = variables.get("params", {}), variables.get("batch_stats", {})

    def run(params, x, state, key):
        return unit.apply(
            {"params": params, "batch_stats": state}, x, True, rngs={"drop": key}, mutable=["batch_stats"]
        )

    def pullback(params, x, state, key):
        inputs = () if is_first else (x,)
        return jax.vjp(lambda p, x=x: run(p, x, state, key), params, *inputs, has_aux=True)[:2]

    def gradients(*arguments):
        output, pull = pullback(*arguments)
        return pull(jnp.ones_like(output)), pull

    forward, (output, _) = jax.make_jaxpr(run, return_shape=True)(params, example(1), state, key)
    both, (_, kept) = jax.make_jaxpr(gradients, return_shape=True)(params, example(1), state, key)
    forward_macs, macs = _macs(forward.jaxpr), _macs(both.jaxpr)
    # What a second sample adds to the residuals is what one sample keeps: parameters and constants cancel.
    _, kept_of_two = jax.eval_shape(pullback, params, example(2), state, key)
    activations = _floats(kept_of_two) - _floats(kept)
    return _Row(
        forward_macs, macs - forward_macs, _floats(params), _floats(state), activations, output.shape[1:]
    )


def _floats(tree):
    """Number of 4-byte words in a pytree of shapes: a mask of bools counts a quarter."""
    return sum(-(-math.prod(leaf.shape) * min(leaf.dtype.itemsize, 4) // 4) for leaf in jax.tree.leaves(tree))


def _macs(jaxpr):
    total = 0
    for equation in jaxpr.eqns:
        total += _MACS.get(equation.primitive.name, lambda _: 0)(equation)
        total += sum(_macs(inner) for inner in _inner_jaxprs(equation.params))
    return total


def _inner_jaxprs(params):
    for value in params.values():
        if isinstance(value, core.ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, core.Jaxpr):
            yield value


def _dot_macs(equation):
    (contracted, _), _ = equation.params["dimension_numbers"]
    left, output = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    return math.prod(output) * math.prod(left[axis] for axis in contracted)


def _conv_macs(equation):
    """Outputs x kernel positions x input channels of a group, without holes dilated into the input."""
    numbers = equation.params["dimension_numbers"]
    left, right, output = (v.aval.shape for v in (*equation.invars, equation.outvars[0]))
    out_batch, out_features, *out_spatial = (output[axis] for axis in numbers.out_spec)
    in_spatial = [left[axis] for axis in numbers.lhs_spec[2:]]
    _, in_features, *kernel = (right[axis] for axis in numbers.rhs_spec)
    sizes = zip(in_spatial, out_spatial, equation.params["lhs_dilation"], strict=True)
    positions = [inside if dilation > 1 else outside for inside, outside, dilation in sizes]
    return math.prod([out_batch, out_features, in_features, *positions, *kernel])


_MACS = {"dot_general": _dot_macs, "conv_general_dilated": _conv_macs}
