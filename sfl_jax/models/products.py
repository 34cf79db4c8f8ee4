"""Convolutions without `lax.conv`: matrix products and shifted sums, with gradients of the same kind.

There are two kinds of shift. `_patches` puts the pixels that the taps of a kernel meet side by side. `_fold`
is its transpose and adds up what the taps send back. JAX's derivative of a shifted slice is a padded slice,
which XLA:CPU computes with a condition for every number. Here an array is padded once and then sliced.

Images are (B, H, W, C); kernels (kh, kw, C_in, C_out), depthwise ones (kh, kw, 1, C).
"""

import functools
import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from sfl_jax.models.taps import Axis, Grid, is_usable, taps

MANY = 256  # from this many positions on, turning a product of two images saves time
FEW = 4  # a depthwise convolution with at most this many output positions is written out
FEW_TERMS = 16  # the gradient of a depthwise tap that meets at most this many pixels adds them one by one


def axes(image_shape: tuple[int, ...], kernel_shape: tuple[int, ...], stride: int) -> Grid:
    """The rows and the columns of a convolution with SAME padding."""
    return Axis(image_shape[1], kernel_shape[0], stride), Axis(image_shape[2], kernel_shape[1], stride)


def convolution(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """(B, H, W, C_in) -> (B, ceil(H / stride), ceil(W / stride), C_out) with SAME padding."""
    return convolution_on(x, kernel, axes(x.shape, kernel.shape, stride))


def convolution_on(x: jax.Array, kernel: jax.Array, grid: Grid) -> jax.Array:
    """(B, H, W, C_in) -> (B, outputs, outputs, C_out) on a grid; kernel (kh, kw, C_in, C_out).

    One product and one shift, of the side with fewer channels.
    """
    if grid[0].is_pointwise and grid[1].is_pointwise:
        return _pointwise(x, kernel[0, 0])
    if grid[0].stride == grid[1].stride == 1 and kernel.shape[3] < kernel.shape[2]:
        back = grid[0].transpose, grid[1].transpose
        if is_usable(back[0]) and is_usable(back[1]):
            return transposed(x, kernel, back)
    return _shift_first(x, kernel, grid)


def transposed(x: jax.Array, kernel: jax.Array, grid: Grid) -> jax.Array:
    """(B, outputs, outputs, C_in) -> (B, H, W, C_out) on `taps.dilated` axes: convolves a dilated image."""
    return _shift_last(x, kernel, grid)


@jax.custom_vjp
def _pointwise(x, matrix):
    return x @ matrix


def _pointwise_backward(residuals, gradient):
    x, matrix = residuals
    return gradient @ matrix.T, _product_of(x, gradient)


_pointwise.defvjp(lambda x, matrix: (x @ matrix, (x, matrix)), _pointwise_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _shift_first(x, kernel, grid):
    return _shift_first_forward(x, kernel, grid)[0]


def _shift_first_forward(x, kernel, grid):
    patches = _patches(x, grid)
    return patches @ _matrix(_live(kernel, grid)), (patches, kernel)


def _shift_first_backward(grid, residuals, gradient):
    patches, kernel = residuals
    live = _live(kernel, grid)
    of_x = _fold(gradient @ _matrix(live).T, grid)
    return of_x, _revive(_product_of(patches, gradient).reshape(live.shape), kernel.shape, grid)


_shift_first.defvjp(_shift_first_forward, _shift_first_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _shift_last(x, kernel, grid):
    return _shift_last_forward(x, kernel, grid)[0]


def _shift_last_forward(x, kernel, grid):
    """The transpose of the convolution with the kernel turned around."""
    return _fold(x @ _turned(kernel, grid), grid), (x, kernel)


def _shift_last_backward(grid, residuals, gradient):
    x, kernel = residuals
    patches = _patches(gradient, grid)
    of_x = patches @ _turned(kernel, grid).T
    rows, columns, inputs, outputs = _live(kernel, grid).shape
    turned = _product_of(x, patches).reshape(inputs, rows, columns, outputs).transpose(1, 2, 0, 3)
    return of_x, _revive(turned, kernel.shape, grid)[::-1, ::-1]


_shift_last.defvjp(_shift_last_forward, _shift_last_backward)


def depthwise(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """(B, H, W, C) -> (B, ceil(H / stride), ceil(W / stride), C), a kernel per channel; SAME padding."""
    return depthwise_on(x, kernel, axes(x.shape, kernel.shape, stride))


def depthwise_on(x: jax.Array, kernel: jax.Array, grid: Grid) -> jax.Array:
    """(B, H, W, C) -> (B, outputs, outputs, C) on a grid, a kernel per channel."""
    is_small = grid[0].outputs * grid[1].outputs <= FEW and grid[0].is_met and grid[1].is_met
    return (_depthwise_written_out if is_small else _depthwise_shifted)(x, kernel, grid)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _depthwise_shifted(x, kernel, grid):
    return _depthwise_shifted_forward(x, kernel, grid)[0]


def _depthwise_shifted_forward(x, kernel, grid):
    padded = pad(x, [axis.padding for axis in grid])
    terms = [padded[:, grid[0].met(a), grid[1].met(b)] * kernel[a, b] for a, b in taps(grid)]
    return functools.reduce(jnp.add, terms), (x, kernel)


def _depthwise_shifted_backward(grid, residuals, gradient):
    x, kernel = residuals
    gradient = lax.optimization_barrier(gradient)
    of_x = fold_with(lambda tap, sent: sent * kernel[tap], gradient, grid)
    return of_x, _kernel_of({tap: _sent_by(tap, x, gradient, grid) for tap in taps(grid)}, kernel)


def _sent_by(tap, x, gradient, grid):
    """The gradient (C,) of a tap. Adds products by row, on small images by pixel, in one kernel: for one sum
    over everything XLA:CPU would first write out all products.
    """
    rows, columns = (axis.meetings(place) for axis, place in zip(grid, tap, strict=True))
    if not rows or not columns:
        return jnp.zeros(x.shape[-1], jnp.result_type(x, gradient))
    if len(rows) * len(columns) <= FEW_TERMS:
        terms = [x[:, i, j] * gradient[:, y, z] for y, i in rows for z, j in columns]
        return functools.reduce(jnp.add, terms).sum(0)
    (first, start), (last, stop) = columns[0], columns[-1]
    met, by = slice(start, stop + 1, grid[1].stride), slice(first, last + 1)
    return functools.reduce(jnp.add, [x[:, i, met] * gradient[:, y, by] for y, i in rows]).sum((0, 1))


_depthwise_shifted.defvjp(_depthwise_shifted_forward, _depthwise_shifted_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _depthwise_written_out(x, kernel, grid):
    return _depthwise_written_out_forward(x, kernel, grid)[0]


def _depthwise_written_out_forward(x, kernel, grid):
    """Computes position by position: for small images, where shifts are mostly padding."""
    pixels = lax.optimization_barrier(x).reshape(len(x), -1, x.shape[-1])
    terms = [(output, pixels[:, pixel] * kernel[tap]) for output, pixel, tap in _meetings(grid)]
    outputs = jnp.stack(list(_add_up(terms).values()), axis=1)
    return outputs.reshape(len(x), grid[0].outputs, grid[1].outputs, -1), (x, kernel)


def _depthwise_written_out_backward(grid, residuals, gradient):
    x, kernel = residuals
    meetings = _meetings(grid)
    pixels = lax.optimization_barrier(x).reshape(len(x), -1, x.shape[-1])
    gradient = lax.optimization_barrier(gradient).reshape(len(x), -1, x.shape[-1])
    of_pixels = _add_up([(pixel, gradient[:, output] * kernel[tap]) for output, pixel, tap in meetings])
    unmet = jnp.zeros_like(pixels[:, 0])
    of_x = jnp.stack([of_pixels.get(pixel, unmet) for pixel in range(pixels.shape[1])], axis=1)
    taps = _add_up([(tap, gradient[:, output] * pixels[:, pixel]) for output, pixel, tap in meetings])
    return of_x.reshape(x.shape), _kernel_of({tap: total.sum(0) for tap, total in taps.items()}, kernel)


_depthwise_written_out.defvjp(_depthwise_written_out_forward, _depthwise_written_out_backward)


def _meetings(grid):
    """[(output position, pixel, tap)] by output, positions counted row by row."""
    rows, columns = grid
    met = [
        (y * columns.outputs + z, i * columns.size + j, (a, b))
        for a, b in taps(grid)
        for y, i in rows.meetings(a)
        for z, j in columns.meetings(b)
    ]
    return sorted(met)


def _patches(x, grid):
    """(B, H, W, C) -> (B, outputs, outputs, taps * C)."""
    padded = jnp.pad(x, ((0, 0), *(axis.padding for axis in grid), (0, 0)))
    return jnp.concatenate([padded[:, grid[0].met(a), grid[1].met(b)] for a, b in taps(grid)], axis=-1)


def _fold(patches, grid):
    """The transpose of `_patches`."""
    channels = patches.shape[-1] // len(taps(grid))
    order = {tap: number * channels for number, tap in enumerate(taps(grid))}
    return fold_with(lambda tap, sent: sent[..., order[tap] : order[tap] + channels], patches, grid)


def fold_with(
    take: Callable[[tuple[int, int], jax.Array], jax.Array], sent: jax.Array, grid: Grid
) -> jax.Array:
    """(B, outputs, outputs, ...) -> (B, H, W, C): at every pixel the sum of `take(tap, sent)` of the outputs
    whose taps met it.
    """
    rows, columns = grid
    reach = [axis.reach for axis in grid]
    padded = pad(sent, reach)

    def plane(row, column):
        """The pixels whose places modulo the stride are (row, column)."""
        terms = [
            take((a, b), _window(padded, reach[0][0] + up, rows, reach[1][0] + left, columns))
            for a, up in rows.senders(row)
            for b, left in columns.senders(column)
        ]
        return functools.reduce(jnp.add, terms) if terms else None

    planes = [[plane(row, column) for column in range(columns.stride)] for row in range(rows.stride)]
    some = next(x for x in itertools.chain(*planes) if x is not None)
    if rows.stride == columns.stride == 1:
        return some
    filled = [[jnp.zeros_like(some) if x is None else x for x in row] for row in planes]
    woven = jnp.stack([jnp.stack(row, axis=3) for row in filled], axis=2)
    whole = woven.reshape(len(some), rows.places * rows.stride, columns.places * columns.stride, -1)
    return whole[:, : rows.size, : columns.size]


def _window(x, top, rows, left, columns):
    return x[:, top : top + rows.places, left : left + columns.places]


def pad(x: jax.Array, amounts: Sequence[tuple[int, int]], value: float = 0) -> jax.Array:
    """Padded images, behind a barrier so that XLA does not repeat the padding in every slice."""
    return lax.optimization_barrier(jnp.pad(x, ((0, 0), *amounts, (0, 0)), constant_values=value))


def _live(kernel, grid):
    rows, columns = (axis.live for axis in grid)
    return kernel[rows.start : rows.stop, columns.start : columns.stop]


def _revive(live, shape, grid):
    """The gradient of the whole kernel: 0 for taps that meet only padding."""
    around = [(axis.live.start, size - axis.live.stop) for axis, size in zip(grid, shape[:2], strict=True)]
    return jnp.pad(live, (*around, (0, 0), (0, 0)))


def _matrix(kernel):
    """The kernel as a matrix (taps * C_in, C_out)."""
    return kernel.reshape(-1, kernel.shape[-1])


def _turned(kernel, grid):
    """The kernel turned around, as a matrix (C_in, taps * C_out)."""
    return _live(kernel[::-1, ::-1], grid).transpose(2, 0, 1, 3).reshape(kernel.shape[2], -1)


def _product_of(x, y):
    """The sum over samples and positions of the outer products of two images' channels.

    XLA:CPU is up to three times as fast if the first image has fewer channels. With many positions this is
    worth turning the result. The barrier keeps XLA from undoing the turn.
    """
    x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    if x.shape[1] <= y.shape[1] or len(x) < MANY or jax.default_backend() != "cpu":
        return x.T @ y
    return lax.optimization_barrier(y.T @ x).T


def kernel_gradient(
    x: jax.Array, gradient: jax.Array, shape: tuple[int, ...], grid: Grid, size: int
) -> jax.Array:
    """The gradient by a kernel of `shape`, from the gradient by the outputs.

    It is summed over `size` samples at a time; `size` divides the number of samples.
    """

    def add(total, part):
        of_part = lax.optimization_barrier(_patches(part[0], grid))
        sent = part[1].reshape(-1, part[1].shape[-1])
        return total + sent.T @ of_part.reshape(-1, of_part.shape[-1]), None

    total = jnp.zeros((shape[3], len(taps(grid)) * shape[2]), x.dtype)
    if size == len(x):
        total, _ = add(total, (x, gradient))
    else:
        parts = [array.reshape(-1, size, *array.shape[1:]) for array in (x, gradient)]
        total, _ = lax.scan(add, total, parts)
    live = (*(len(axis.live) for axis in grid), *shape[2:])
    return _revive(total.T.reshape(live), shape, grid)


def _add_up(terms):
    """{name: sum of its terms} from [(name, term)], in the order of first appearance."""
    sums = {}
    for name, term in terms:
        sums[name] = sums[name] + term if name in sums else term
    return sums


def _kernel_of(taps, kernel):
    """A depthwise kernel's gradient from {tap: (C,)}."""
    zero = jnp.zeros_like(kernel[0, 0, 0])
    every = itertools.product(range(kernel.shape[0]), range(kernel.shape[1]))
    return jnp.stack([taps.get(tap, zero) for tap in every]).reshape(kernel.shape)
