"""Units of any kind: several arrays across a cut, any float type, and what cannot run."""

from typing import Any

import finite
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from sfl_jax import models
from sfl_jax.errors import BadInput
from sfl_jax.models import Chain

KEY = jax.random.key(5)


class Down(nn.Module):
    """Halves the image, and also outputs the image before it."""

    features: int

    @nn.compact
    def __call__(self, inputs, train):
        x, skips = inputs if isinstance(inputs, tuple) else (inputs, [])
        x = nn.Conv(self.features, (3, 3), use_bias=False)(nn.Dropout(0.5, deterministic=not train)(x))
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        return nn.max_pool(x, (2, 2), (2, 2)), [*skips, x]


class Up(nn.Module):
    """Doubles the image, and takes in the last skip."""

    features: int

    @nn.compact
    def __call__(self, inputs):
        x, skips = inputs
        x = nn.ConvTranspose(self.features, (2, 2), strides=(2, 2))(x)
        x = nn.Conv(self.features, (1, 1))(jnp.concatenate([x, skips[-1]], -1))
        return (x, skips[:-1]) if skips[1:] else x


CHAIN = Chain([Down(3), Down(2), Up(2), Up(4)], layer_form="conv")  # conv compiles fastest
IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 4, 1)), jnp.float32)


def loss_and_gradients(halves, variables):
    """Loss and gradients of a training pass through the halves in order, with the whole's variables."""

    def loss_of(params):
        x, stats, rest = IMAGES, (), variables._replace(params=params)
        for half in halves:
            own, rest = half.split_variables(rest, len(half))
            x, after = half.apply(own, x, True, KEY)
            stats += after.batch_stats
        return jnp.sin(x).sum(), stats

    return jax.jit(jax.value_and_grad(loss_of, has_aux=True))(variables.params)


def test_skips_cross_a_cut():
    chain = Chain([Down(3), Up(4)], layer_form="conv")
    variables = chain.init(KEY, IMAGES)
    whole, inner = (loss_and_gradients(halves, variables) for halves in ([chain], chain.split(1)))
    finite.pairs(whole, inner)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), whole, inner)
    other = jax.tree.map(lambda x: 1.1 * x, variables)
    assert not finite.are_close(loss_and_gradients(chain.split(1), other)[0], whole[0])


def test_a_link_is_given_the_tree():
    variables, met = CHAIN.init(KEY, IMAGES), {}

    def note(unit, x):
        met[unit] = jax.tree.map(jnp.shape, x)
        return jax.tree.map(lambda leaf: 2 * leaf if unit == 2 else leaf, x)

    outputs, _ = CHAIN.apply(variables, IMAGES, at_boundary=note)
    wide, half, small = (3, 4, 4, 3), (3, 2, 2, 2), (3, 1, 1, 2)
    assert met == {0: IMAGES.shape, 1: ((3, 2, 2, 3), [wide]), 2: (small, [wide, half]), 3: (half, [wide])}
    client, server = CHAIN.split(2)
    front, back = CHAIN.split_variables(variables, 2)
    smashed = jax.tree.map(lambda leaf: 2 * leaf, client.apply(front, IMAGES)[0])
    np.testing.assert_allclose(outputs, server.apply(back, smashed)[0], rtol=1e-5)


def test_all_that_crosses_is_counted():
    profile = models.profile(CHAIN, (4, 4, 1))
    assert profile.smashed.tolist() == [16, 12 + 48, 2 + 48 + 8, 8 + 48, 0]
    sample = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), ((1, 1, 2), [(4, 4, 3), (2, 2, 2)]),
        is_leaf=lambda shape: isinstance(shape[0], int),
    )  # fmt: skip
    half = models.profile(CHAIN.split(2)[1], sample)
    assert profile.shapes[2] == ((1, 1, 2), (4, 4, 3), (2, 2, 2))
    assert half.shapes == profile.shapes[2:]
    for count, of_whole in zip(half[:-1], profile[:-1], strict=True):
        np.testing.assert_array_equal(count, of_whole[2:])


class Masked(nn.Module):
    """Outputs integers and bools beside its activations."""

    @nn.compact
    def __call__(self, x):
        if isinstance(x, dict):
            return jnp.where(x["mask"], x["x"], 0) * x["largest"][:, None]
        x = nn.Dense(3)(x)
        return {"x": x, "mask": x > 0, "largest": jnp.argmax(x, 1)}


def test_integers_may_cross():
    chain = Chain([Masked(), Masked(), nn.Dense(1)])
    assert models.profile(chain, (4,)).smashed.tolist() == [4, 3 + 3 + 1, 3, 0]


class Typed(nn.Module):
    """A dense layer with parameters and arithmetic in one float type."""

    dtype: Any

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(4, dtype=self.dtype, param_dtype=self.dtype)(x)
        return nn.BatchNorm(use_running_average=not train, dtype=self.dtype, param_dtype=self.dtype)(x)


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float64", marks=pytest.mark.slow)])
def test_units_may_have_any_float_type(dtype):
    with jax.enable_x64(dtype == "float64"):
        unit, x = Typed(jnp.dtype(dtype)), jnp.ones((2, 3), jnp.float32)
        chain = Chain([unit, nn.Dense(2, dtype=jnp.float32)])
        variables = chain.init(KEY, x)
        assert variables.params[0]["Dense_0"]["kernel"].dtype == dtype
        own = chain.unit_variables(variables, 0)
        found, after = chain.split(1)[0].apply(chain.split_variables(variables, 1)[0], x, True, KEY)
        expected, stats = unit.apply(own, x, True, mutable=["batch_stats"])
        assert found.dtype == dtype
        np.testing.assert_allclose(np.asarray(found, float), np.asarray(expected, float), rtol=1e-2)
        kinds = [
            jax.tree.map(lambda x: x.dtype, tree) for tree in (after.batch_stats[0], stats["batch_stats"])
        ]
        assert kinds[0] == kinds[1]
        assert chain.apply(variables, x)[0].dtype == jnp.float32
        own = (3 * 4 + 4 + 8) // (1 if dtype == "float64" else 2)  # types of 2 bytes count half
        assert models.profile(chain, (3,)).parameters.tolist() == [own, 4 * 2 + 2]


class Failing(nn.Module):
    """Needs maps, and says so in an error of two lines."""

    @nn.compact
    def __call__(self, x):
        if x.ndim != 4:
            raise ValueError("wants maps\nof pixels")
        return x


def test_a_unit_that_cannot_run_is_named_with_its_input():
    chain = Chain([nn.Dense(3), Failing(name="mine")])
    said = r"^unit mine: cannot run on input of shape \(2, 3\) float32: ValueError: wants maps$"
    with pytest.raises(BadInput, match=said):
        chain.init(KEY, jnp.ones((2, 5)))
    with pytest.raises(
        BadInput, match=r"^unit mine: cannot run on input of shape \(3,\) float32: ValueError"
    ):
        models.profile(chain, (5,))
