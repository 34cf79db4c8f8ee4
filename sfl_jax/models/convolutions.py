"""Dense convolutions when a device computes one client at a time.

When clients with their own weights are computed together, `vmap` turns `lax.conv` into grouped convolutions,
which are slow everywhere. So convolutions are matrix products there, see `products`. One client has no client
axis. On a CPU XLA's convolution is then two to five times as fast as products, which must write out what
every tap meets. XLA's gradient by the kernel is slow, though. It is replaced by a sum of products over a few
samples at a time, whose patches fit in the cache.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from sfl_jax.models import products
from sfl_jax.models.taps import Grid, taps

FEW = 512  # up to this many positions, over all samples, a product is as fast
_ORDER = "NHWC", "HWIO", "NHWC"
CACHED_BYTES = 2.5e6  # size of the patches that are multiplied at a time


def convolution(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """(B, H, W, C_in) -> (B, ceil(H / stride), ceil(W / stride), C_out) with SAME padding."""
    return convolution_on(x, kernel, products.axes(x.shape, kernel.shape, stride))


def convolution_on(x: jax.Array, kernel: jax.Array, grid: Grid) -> jax.Array:
    """(B, H, W, C_in) -> (B, outputs, outputs, C_out) on a grid; kernel (kh, kw, C_in, C_out)."""
    is_pointwise = grid[0].is_pointwise and grid[1].is_pointwise
    is_single = x.dtype == kernel.dtype == jnp.float32  # XLA:CPU has only plain loops for other types
    is_small = len(x) * grid[0].outputs * grid[1].outputs <= FEW
    if is_pointwise or is_small or not is_single or jax.default_backend() != "cpu":
        return products.convolution_on(x, kernel, grid)
    return _convolution(x, kernel, grid)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _convolution(x, kernel, grid):
    return lax.conv_general_dilated(
        x, kernel, [axis.stride for axis in grid], [axis.padding for axis in grid],
        rhs_dilation=[axis.dilation for axis in grid], dimension_numbers=_ORDER,
    )  # fmt: skip


def _forward(x, kernel, grid):
    return _convolution(x, kernel, grid), (x, kernel)


def _backward(grid, residuals, gradient):
    x, kernel = residuals
    of_sample = 4 * grid[0].outputs * grid[1].outputs * len(taps(grid)) * kernel.shape[2]
    most = max(1, CACHED_BYTES // of_sample)
    size = max(n for n in range(1, len(x) + 1) if len(x) % n == 0 and n <= most)
    of_kernel = products.kernel_gradient(x, gradient, kernel.shape, grid, size)
    # The barrier keeps the turn out of the convolution: in a loop XLA:CPU would not recognise a convolution
    # of its library, and would take ten times as long.
    turned = lax.optimization_barrier(kernel[::-1, ::-1].transpose(0, 1, 3, 2))
    of_image = lax.conv_general_dilated(
        gradient, turned, (1, 1), [_sent_back(axis) for axis in grid],
        lhs_dilation=[axis.stride for axis in grid], rhs_dilation=[axis.dilation for axis in grid],
        dimension_numbers=_ORDER,
    )  # fmt: skip
    return of_image, of_kernel


_convolution.defvjp(_forward, _backward)


def _sent_back(axis):
    """Padding of the outputs, `stride` apart, for which the turned kernel gives an axis of the images."""
    before = axis.reached - axis.padding[0]
    return before, axis.size - (axis.outputs - 1) * axis.stride - 1 - before + axis.reached
