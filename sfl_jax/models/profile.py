"""The costs of every unit of a chain per sample, traced from its jaxpr and its gradient's jaxpr."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import PyTree

from sfl_jax.errors import BadInput
from sfl_jax.models import pieces, substitutes, units
from sfl_jax.models.chain import Chain


class Profile(NamedTuple):
    """Costs per sample and unit of a chain of L units; NumPy int64.

    Parameters, state and activations with a type of 2 bytes count half. Floats that cross a cut count fully.

    names: (L,) the units.
    forward_macs: (L,) multiply-accumulates of convolutions and products; padding counts, as in publications.
    backward_macs: (L,) those of the gradient; unit 0 has no input gradient.
    parameters: (L,) trainable floats.
    state: (L,) floats of batch-norm statistics and other state.
    activations: (L,) floats that training keeps for the backward pass.
    smashed: (L+1,) floats that cross cut l: the stored image at 0, none at L.
    shapes: (L+1,) the shapes of one sample's arrays that cross cut l.
    """

    names: tuple[str, ...]
    forward_macs: np.ndarray
    backward_macs: np.ndarray
    parameters: np.ndarray
    state: np.ndarray
    activations: np.ndarray
    smashed: np.ndarray
    shapes: tuple[tuple[tuple[int, ...], ...], ...] = ()


def profile(chain: Chain, image_shape: PyTree, stored_shape: tuple[int, ...] | None = None) -> Profile:
    """The costs of every unit of `chain`, traced in the `lax.conv` form. Nothing is computed.

    image_shape: (H, W, C), of floats; or a `jax.ShapeDtypeStruct` of one sample, or a pytree of these for the
    smashed data of a server half.
    stored_shape: the shape of a stored image before resizing, which goes up at cut 0; None: `image_shape`.

    BadInput names a unit that cannot be traced, or whose work cannot be counted.
    """
    sample = _sample(image_shape)
    rows = _rows(chain, sample)
    stored = math.prod(stored_shape) if stored_shape else _numbers(sample)
    inputs = [stored] + [_numbers(row.output) for row in rows[:-1]]
    counts = ("forward_macs", "backward_macs", "parameters", "state", "activations")
    counted = {count: np.array([getattr(row, count) for row in rows], np.int64) for count in counts}
    names = tuple(units.name(unit, index) for index, unit in enumerate(chain.units, start=chain.first_unit))
    crossing = [sample, *(row.output for row in rows[:-1]), ()]
    shapes = tuple(tuple(leaf.shape for leaf in jax.tree.leaves(tree)) for tree in crossing)
    return Profile(names=names, smashed=np.array([*inputs, 0], np.int64), shapes=shapes, **counted)


def least_normalised(chain: Chain, image_shape: PyTree) -> int | None:
    """The least number of values, per sample and channel, that a batch norm averages over in training.

    It is H x W of the smallest map that is normalised. If it is 1, batch norm makes a constant of a batch of
    one sample (or of copies of one), and nothing can be learnt. None for a chain without batch norm.
    """
    found = [values for row in _rows(chain, _sample(image_shape)) for values in row.normalised]
    return min(found, default=None)


class _Row(NamedTuple):
    forward_macs: int
    backward_macs: int
    parameters: int
    state: int
    activations: int
    output: PyTree  # of one sample
    normalised: tuple[int, ...]  # values per sample and channel of each batch norm


def _sample(image_shape):
    """The shapes and types of one sample. Work is counted in float32 for all types of floats."""
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(image_shape)):
        return jax.tree.map(lambda leaf: _counted(leaf.shape, leaf), image_shape)
    return jax.ShapeDtypeStruct(tuple(image_shape), jnp.float32)


def _numbers(sample):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(sample))


def _rows(chain, sample):
    rows = []
    for index, unit in enumerate(chain.units, start=chain.first_unit):
        leaves, structure = jax.tree.flatten(sample)
        form = units.kind(units.reference_form(unit))
        try:
            with units.named_errors(f"unit {units.name(unit, index)}", sample):
                rows.append(_trace(form, tuple(leaves), structure, is_first=index == 0))
        except _Uncountable as error:
            raise BadInput(f"unit {units.name(unit, index)}: {error}") from error
        sample = rows[-1].output
    return rows


@functools.cache
def _trace(unit: nn.Module, leaves: tuple[Any, ...], structure: Any, is_first: bool) -> _Row:
    key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype)

    def example(batch):
        batches = [jax.ShapeDtypeStruct((batch, *leaf.shape), leaf.dtype) for leaf in leaves]
        return jax.tree.unflatten(structure, batches)

    variables = dict(units.shapes(unit, example(1)).variables)
    params, state = variables.pop("params", {}), variables

    def run(params, x, state, key):
        return units.apply(unit, {"params": params, **state}, x, True, units.streams(unit, key))

    def pullback(params, x, state, key):
        inputs = () if is_first else (x,)
        return jax.vjp(lambda p, x=x: run(p, x, state, key), params, *inputs, has_aux=True)[:2]

    def gradients(*arguments):
        output, pull = pullback(*arguments)
        return pull(jax.tree.map(_cotangent, output)), pull

    normalised: list[tuple[tuple[str, ...], int]] = []
    with units.batch_norm_values(normalised):
        forward, (output, _) = jax.make_jaxpr(run, return_shape=True)(params, example(1), state, key)
    forward_macs = _macs(forward.jaxpr)
    both, (_, kept) = jax.make_jaxpr(gradients, return_shape=True)(params, example(1), state, key)
    # A sample keeps what a second sample adds to the residuals: parameters and constants cancel.
    _, kept_of_two = jax.eval_shape(pullback, params, example(2), state, key)
    return _Row(
        forward_macs,
        _macs(both.jaxpr) - forward_macs,
        _floats(params),
        _floats(state),
        _floats(kept_of_two) - _floats(kept),
        jax.tree.map(_one_of, output),
        tuple(_values(unit, normalised)),
    )


def _values(unit, normalised):
    """How many values each batch norm averages over. A piece traces its whole module, so it picks its own."""
    return pieces.normalised(unit) if isinstance(unit, pieces.Piece) else [values for _, values in normalised]


def _one_of(batch):
    """The shape of one sample. Work is counted in float32 for all types of floats."""
    return _counted(batch.shape[1:], batch)


def _counted(shape, x):
    return jax.ShapeDtypeStruct(shape, jnp.float32 if _is_float(x) else x.dtype)


def _cotangent(x):
    return jnp.ones_like(x) if _is_float(x) else np.zeros(x.shape, jax.dtypes.float0)


def _is_float(x):
    return jnp.issubdtype(x.dtype, jnp.inexact)


def _floats(tree):
    """The number of 4-byte words in a pytree of shapes: a mask of bools counts a quarter."""
    return sum(-(-math.prod(leaf.shape) * min(leaf.dtype.itemsize, 4) // 4) for leaf in jax.tree.leaves(tree))


class _Uncountable(BadInput):
    """The program does not tell how often products run."""


def _macs(jaxpr):
    total = 0
    for equation in jaxpr.eqns:
        name, inner = equation.primitive.name, [_macs(body) for body in substitutes.bodies(equation)]
        if name in _UNCOUNTED:
            raise _Uncountable(f"the work of {name} is not known")
        if name == "while" and any(inner):
            raise _Uncountable(
                "a while loop has matrix products or convolutions, and its number of turns is not known; "
                "use lax.scan, or lax.fori_loop with bounds that are Python numbers"
            )
        total += _MACS.get(name, lambda _: 0)(equation)
        if name == "cond":
            total += max(inner, default=0)
        elif name == "custom_linear_solve":  # its other functions are for derivatives
            total += _macs(equation.params["jaxprs"].solve.jaxpr)
        else:
            total += equation.params.get("length", 1) * sum(inner)
    return total


def _dot_macs(equation):
    (contracted, _), _ = equation.params["dimension_numbers"]
    left, output = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    return math.prod(output) * math.prod(left[axis] for axis in contracted)


def _conv_macs(equation):
    """Outputs x kernel positions x input channels of a group; holes of a dilated input do not count."""
    numbers = equation.params["dimension_numbers"]
    left, right, output = (v.aval.shape for v in (*equation.invars, equation.outvars[0]))
    out_batch, out_features, *out_spatial = (output[axis] for axis in numbers.out_spec)
    in_spatial = [left[axis] for axis in numbers.lhs_spec[2:]]
    _, in_features, *kernel = (right[axis] for axis in numbers.rhs_spec)
    sizes = zip(in_spatial, out_spatial, equation.params["lhs_dilation"], strict=True)
    positions = [inside if dilation > 1 else outside for inside, outside, dilation in sizes]
    return math.prod([out_batch, out_features, in_features, *positions, *kernel])


def _ragged_macs(equation):
    """Each row of the left array meets one group's matrix; in the gradient each group meets its own rows."""
    left, output = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    numbers = equation.params["ragged_dot_dimension_numbers"]
    (contracted, _), _ = numbers.dot_dimension_numbers
    groups = numbers.rhs_group_dimensions
    inner = math.prod(left[axis] for axis in contracted)
    # Without groups on the right, the summed axis is the one in groups.
    return math.prod(output) * inner // (1 if groups else output[0])


def _fft_macs(equation):
    """2.5 n log2(n) for a transform of n numbers: half of the 5 n log2(n) FLOP that FFTW counts."""
    size = math.prod(equation.params["fft_lengths"])
    batch = math.prod(equation.invars[0].aval.shape[: -len(equation.params["fft_lengths"])])
    return int(2.5 * batch * size * math.log2(max(size, 1)))


def _solve_macs(equation):
    """n^2/2 per right-hand side, for a triangle of n rows."""
    rows = equation.invars[0].aval.shape[-1]
    return rows * math.prod(equation.invars[1].aval.shape) // 2


def _factor_macs(share):
    """share * n^2 m, for a matrix with sides m and n <= m (Golub & Van Loan)."""

    def macs(equation):
        *batch, rows, columns = equation.invars[0].aval.shape
        return int(share * math.prod(batch) * min(rows, columns) ** 2 * max(rows, columns))

    return macs


_MACS = {
    "dot_general": _dot_macs,
    "conv_general_dilated": _conv_macs,
    "ragged_dot_general": _ragged_macs,
    "fft": _fft_macs,
    "triangular_solve": _solve_macs,
    "cholesky": _factor_macs(1 / 6),
    "lu": _factor_macs(1 / 3),
}
# Iterative algorithms, or kernels written by hand for a device.
_UNCOUNTED = {"eig", "eigh", "ffi_call", "hessenberg", "pallas_call", "qr", "schur", "svd", "tridiagonal"}
