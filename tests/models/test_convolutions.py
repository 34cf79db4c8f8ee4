"""Convolutions for one client at a time against `lax.conv` and JAX's gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from sfl_jax.models import Chain, convolutions, create, substitutes
from sfl_jax.models.taps import Axis

GRIDS = {
    "same": (Axis(6, 3, 1), Axis(5, 3, 1)),
    "strides": (Axis(7, 3, 2), Axis(6, 2, 3)),
    "holes and ragged padding": (Axis(6, 3, 1, (1, 0), 2), Axis(7, 2, 2, (0, 3), 2)),
    "one row": (Axis(1, 1, 1, (0, 0)), Axis(9, 5, 1)),
}


def normal(*shape):
    return np.random.default_rng(shape).normal(size=shape).astype(np.float32)


def reference(x, kernel, grid):
    return lax.conv_general_dilated(
        x, kernel, [axis.stride for axis in grid], [axis.padding for axis in grid],
        rhs_dilation=[axis.dilation for axis in grid], dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip


def with_gradients(function, x, kernel, grid):
    outputs, pullback = jax.vjp(lambda x, kernel: function(x, kernel, grid), x, kernel)
    return outputs, *pullback(jnp.asarray(normal(*outputs.shape), outputs.dtype))


@pytest.fixture
def small(monkeypatch):
    """Forces the path of large images: no product, and a few samples at a time."""
    monkeypatch.setattr(convolutions, "FEW", 0)
    monkeypatch.setattr(convolutions, "CACHED_BYTES", 1e4)


@pytest.mark.parametrize("name", GRIDS)
def test_outputs_and_gradients_are_those_of_lax(small, name):
    grid = GRIDS[name]
    x = jnp.asarray(normal(6, grid[0].size, grid[1].size, 3))
    kernel = jnp.asarray(normal(grid[0].kernel_size, grid[1].kernel_size, 3, 4))
    found = jax.jit(with_gradients, static_argnums=(0, 3))(convolutions.convolution_on, x, kernel, grid)
    with jax.enable_x64(True):
        wide = jnp.asarray(x, jnp.float64), jnp.asarray(kernel, jnp.float64)
        expected = with_gradients(reference, *wide, grid)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    # Another padding gives other numbers.
    other = (grid[0], grid[1]._replace(pads=(grid[1].padding[0] + 1, max(grid[1].padding[1] - 1, 0))))
    moved = with_gradients(reference, x, kernel, other)[2]
    assert not np.allclose(moved, expected[2], atol=1e-2)


def test_the_gradient_by_the_kernel_is_a_sum_over_few_samples(small):
    def program(size):
        x, kernel = jnp.zeros((size, 6, 5, 3)), jnp.zeros((3, 3, 3, 4))
        run = jax.make_jaxpr(lambda x, k: with_gradients(convolutions.convolution_on, x, k, GRIDS["same"]))
        return str(run(x, kernel))

    # 6 x 5 positions with 9 taps of 3 channels take 3240 bytes per sample.
    assert "scan[" in program(6)
    assert "length=2" in program(6)
    assert "scan[" not in program(3)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_other_types_are_products(small, dtype):
    with jax.enable_x64(True):
        x, kernel = (jnp.asarray(normal(*shape), dtype) for shape in ((2, 6, 5, 3), (3, 3, 3, 4)))
        run = jax.make_jaxpr(lambda x, k: convolutions.convolution_on(x, k, GRIDS["same"]))
        assert "conv_general_dilated" not in str(run(x, kernel))


def convolutions_in(chain, monkeypatch):
    monkeypatch.setattr(convolutions, "FEW", 0)
    images = jnp.zeros((2, 32, 32, 1))
    variables = jax.eval_shape(chain.init, jax.random.key(0), images)
    program = jax.make_jaxpr(lambda v, x: chain.apply(v, x)[0])(variables, images).jaxpr

    def count(jaxpr):
        return sum(
            (equation.primitive.name == "conv_general_dilated")
            + sum(map(count, substitutes.bodies(equation)))
            for equation in jaxpr.eqns
        )

    return count(program)


@pytest.mark.parametrize("name", ["efficientnetv2-tiny", "resnet18"])
def test_a_chain_alone_has_them_and_a_chain_of_clients_together_has_none(name, monkeypatch):
    chain = create(name, 10, 1)
    assert convolutions_in(chain, monkeypatch) == 0
    assert convolutions_in(chain.alone(), monkeypatch) > 0
    assert isinstance(chain.alone(), Chain)
    conv = chain.in_form("conv")
    assert conv.alone() == conv
