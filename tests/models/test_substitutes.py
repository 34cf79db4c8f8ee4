"""A user's units in the product form give Flax's numbers with products and shifts."""

import functools
from typing import Any

import finite
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

from sfl_jax.errors import BadInput
from sfl_jax.models import Chain, substitutes

WINDOWS = ("conv_general_dilated", "reduce_window")
RAGGED = ((1, 2), (0, 1))
CONVOLUTIONS = [  # with 4 channels: strides, paddings, dilations and groups in turn
    nn.Conv(6, (3, 2), strides=(2, 1), padding="VALID", use_bias=False),
    nn.Conv(3, (2, 3), padding=RAGGED),
    nn.Conv(5, (3, 3), strides=2, padding="CIRCULAR", kernel_dilation=2),
    nn.Conv(4, (3, 3), strides=2, padding=RAGGED, feature_group_count=4),
    nn.Conv(6, (3, 3), strides=2, feature_group_count=2),
    nn.ConvTranspose(3, (3, 2), strides=(2, 1)),
]
MORE_CONVOLUTIONS = [
    nn.Conv(3, (3, 3)),
    nn.Conv(3, (1, 1), strides=3),
    nn.Conv(8, (3, 3), padding="VALID", feature_group_count=4, kernel_dilation=(1, 2)),
    nn.Conv(2, (3, 3), padding=((5, 0), (0, 0)), mask=jnp.tril(jnp.ones((3, 3, 4, 2)))),
    nn.ConvTranspose(5, (3, 4), strides=(2, 3), padding="VALID"),
]
POOLS = {
    "max": lambda x: nn.max_pool(x, (2, 2), (2, 2)),
    "max, overlapping": lambda x: nn.max_pool(x, (3, 3), (2, 1), "SAME"),
    "mean": lambda x: nn.avg_pool(x, (3, 2), (2, 2), RAGGED),
    "mean of pixels": lambda x: nn.avg_pool(x, (3, 3), (1, 2), "SAME", count_include_pad=False),
    "max, one axis": lambda x: nn.max_pool(x[:, 0], (3,), (2,)),
}


def mostly(names, slow):
    return [pytest.param(name, marks=pytest.mark.slow) if name in slow else name for name in names]


def normal(*shape):
    return np.random.default_rng(shape).normal(size=shape)


def outputs_and_gradients(function, arguments):
    outputs, pullback = jax.vjp(function, *arguments)
    return outputs, pullback(jnp.asarray(normal(*outputs.shape), outputs.dtype))


def assert_same(found, expected, tolerance=1e-10):
    close = functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance)
    jax.tree.map(lambda a, b: close(np.asarray(a, float), np.asarray(b, float)), found, expected)


def primitives(jaxpr):
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for body in substitutes.bodies(equation):
            yield from primitives(body)


def is_replaced(function, *arguments):
    found = set(primitives(jax.make_jaxpr(function)(*arguments).jaxpr))
    return not any(name.startswith(WINDOWS) for name in found)


def check(function, *arguments):
    """Equal outputs and gradients for two clients with their own arguments, and no `lax.conv` left."""
    fast = substitutes.in_product_form(function)
    assert is_replaced(fast, *arguments)
    two = jax.tree.map(lambda x: jnp.stack([x, 2 * x[::-1]]), arguments)

    @jax.jit
    def both(two):
        return [jax.vmap(functools.partial(outputs_and_gradients, one))(two) for one in (function, fast)]

    found, expected = both(two)
    assert_same(found, expected)
    assert not finite.are_close(found[0][0], found[0][1])  # the clients differ


@pytest.mark.parametrize(
    "module", [*CONVOLUTIONS, *(pytest.param(one, marks=pytest.mark.slow) for one in MORE_CONVOLUTIONS)]
)
def test_convolutions_are_those_of_flax(module):
    with jax.enable_x64(True):
        x = jnp.asarray(normal(2, 5, 6, 4))
        shapes = jax.eval_shape(module.init, jax.random.key(0), x)
        variables = jax.tree.map(lambda shape: jnp.asarray(normal(*shape.shape)), shapes)
        check(module.apply, variables, x)


@pytest.mark.parametrize("name", mostly(POOLS, slow=("max", "mean")))
def test_pools_are_those_of_flax_also_where_maxima_are_equal(name):
    with jax.enable_x64(True):
        check(POOLS[name], jnp.asarray(normal(2, 5, 6, 3).round()))


def conv(x, kernel, layout=("NHWC", "HWIO", "NHWC"), padding="SAME", **options):
    return lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=layout, **options)


BODIES = {
    "jit": jax.jit(conv),
    "remat": jax.checkpoint(lambda x, k: jnp.tanh(conv(x, k))),
    "scan": lambda x, k: lax.scan(lambda x, _: (jnp.tanh(conv(x, k)), None), x, length=2)[0],
    "cond": lambda x, k: lax.cond(x.sum() > 0, conv, lambda x, k: x, x, k),
    "channels first": lambda x, k: conv(
        x.transpose(0, 3, 1, 2), k.transpose(3, 2, 0, 1), ("NCHW", "OIHW", "NCHW")
    ),
    "taps that meet nothing": lambda x, k: conv(x[:, :1], k[..., :2], padding=((2, 0), (0, 2))),
}


@pytest.mark.parametrize("name", mostly(BODIES, slow=("jit", "remat", "cond")))
def test_convolutions_are_replaced_wherever_they_stand(name):
    with jax.enable_x64(True):
        check(BODIES[name], jnp.asarray(normal(1, 3, 2, 3)), jnp.asarray(normal(3, 3, 3, 3)))


STAY = {
    "another precision": functools.partial(conv, precision="highest"),
    "groups of samples": functools.partial(conv, batch_group_count=2),
    "a cropped image": functools.partial(conv, padding=((-1, 1), (1, 1))),
    "a large window": lambda x, k: nn.max_pool(x, (10, 9), padding="SAME"),
    "a window over channels": lambda x, k: lax.reduce_window(
        x, -jnp.inf, lax.max, (1, 1, 1, 2), (1, 1, 1, 1), "VALID"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STAY)
def test_what_cannot_be_replaced_stays(name):
    x, kernel = jnp.ones((2, 3, 3, 2)), jnp.ones((3, 3, 2, 2))
    fast = substitutes.in_product_form(STAY[name])
    assert not is_replaced(fast, x, kernel)
    np.testing.assert_array_equal(fast(x, kernel), STAY[name](x, kernel))


def test_a_precision_that_is_set_for_everything_is_kept():
    with jax.default_matmul_precision("highest"):
        fast = substitutes.in_product_form(conv)
        x, kernel = jnp.ones((2, 3, 3, 2)), jnp.ones((3, 3, 2, 2))
        assert is_replaced(fast, x, kernel)
        assert "HIGHEST" in str(jax.make_jaxpr(fast)(x, kernel))


class Net(nn.Module):
    """A convolution, pooling and a batch norm."""

    dtype: Any = None

    @nn.compact
    def __call__(self, x, train):
        x = nn.max_pool(nn.Conv(3, (3, 3), dtype=self.dtype)(x), (2, 2), (2, 2))
        return nn.relu(nn.BatchNorm(use_running_average=not train, dtype=self.dtype)(x))


def run_both(module, x):
    """(output, gradients, state) of a unit in the product form, and of the module in Flax."""
    chain = Chain([module])
    variables = chain.init(jax.random.key(1), x)
    own = chain.unit_variables(variables, 0)
    params = own.pop("params")

    def fast(params):
        outputs, after = chain.apply(variables._replace(params=(params,)), x, True, jax.random.key(0))
        return outputs, chain.unit_variables(after, 0)["batch_stats"]

    def flax(params):
        outputs, after = module.apply({"params": params, **own}, x, True, mutable=["batch_stats"])
        return outputs, after["batch_stats"]

    @jax.jit
    def both(params):
        def one(function):
            outputs, pullback, state = jax.vjp(function, params, has_aux=True)
            return outputs, pullback(jnp.asarray(normal(*outputs.shape), outputs.dtype)), state

        return one(fast), one(flax)

    return both(params)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("bfloat16", 0.1), pytest.param("float64", 1e-10, marks=pytest.mark.slow)]
)
def test_a_net_is_that_of_flax_in_any_float_type(dtype, tolerance):
    """Outputs, gradients and statistics."""
    with jax.enable_x64(dtype == "float64"):
        found, expected = run_both(Net(jnp.dtype(dtype)), jnp.asarray(normal(4, 4, 6, 2), jnp.float32))
        assert found[0].dtype == expected[0].dtype
        assert_same(found, expected, tolerance)
        assert not finite.are_close(found[0], 2 * expected[0])


def test_the_form_belongs_to_the_chain_and_its_halves():
    x = jnp.asarray(normal(2, 4, 4, 2), jnp.float32)
    for form, is_product in (("product", True), ("conv", False)):
        chain = Chain([Net(), Net()], layer_form=form)
        variables = chain.init(jax.random.key(0), x)
        client, server = chain.split(1)
        assert client.layer_form == server.layer_form == form
        front, _ = chain.split_variables(variables, 1)
        assert is_replaced(lambda v, x, c=client: c.apply(v, x), front, x) == is_product
    with pytest.raises(BadInput, match=r"^layer_form=fft: must be one of product, conv$"):
        Chain([Net()], layer_form="fft")
