"""Sums and maxima over windows, computed by shifts of the image: on CPU faster than XLA's windows.

Images are (B, H, W, C); a window moves along them like a kernel, see `taps`.
"""

import functools

import jax
import jax.numpy as jnp

from sfl_jax.models import products
from sfl_jax.models.taps import Grid, taps


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def window_sums(x: jax.Array, grid: Grid) -> jax.Array:
    """(B, H, W, C) -> (B, outputs, outputs, C): the sum over each window; padding counts as 0."""
    return functools.reduce(jnp.add, _views(x, grid, 0))


def _sums_forward(x, grid):
    return window_sums(x, grid), None


def _sums_backward(grid, _, gradient):
    return (products.fold_with(lambda tap, sent: sent, gradient, grid),)


window_sums.defvjp(_sums_forward, _sums_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def window_maxima(x: jax.Array, grid: Grid) -> jax.Array:
    """(B, H, W, C) -> (B, outputs, outputs, C): the maximum of each window; padding counts as -inf.

    The gradient goes to the first of equal maxima, row by row, as in XLA.
    """
    return functools.reduce(jnp.maximum, _views(x, grid, -jnp.inf))


def _maxima_forward(x, grid):
    """Keeps the tap, counted row by row, that met the first maximum."""
    views = _views(x, grid, -jnp.inf)
    best, winner = views[0], jnp.zeros(views[0].shape, jnp.uint8)
    for number, view in enumerate(views[1:], start=1):
        winner = jnp.where(view > best, jnp.uint8(number), winner)
        best = jnp.maximum(best, view)
    return best, winner


def _maxima_backward(grid, winner, gradient):
    order = {tap: number for number, tap in enumerate(taps(grid))}
    sent = jnp.concatenate([jnp.where(winner == number, gradient, 0) for number in order.values()], axis=-1)
    channels = gradient.shape[-1]
    return (
        products.fold_with(
            lambda tap, sent: sent[..., order[tap] * channels : (order[tap] + 1) * channels], sent, grid
        ),
    )


window_maxima.defvjp(_maxima_forward, _maxima_backward)


def _views(x, grid, filling):
    """The pixels that each tap meets."""
    padded = products.pad(x, [axis.padding for axis in grid], filling)
    return [padded[:, grid[0].met(a), grid[1].met(b)] for a, b in taps(grid)]
