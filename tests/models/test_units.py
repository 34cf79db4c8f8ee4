"""Units of a user: any Flax module, run as Flax runs it."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.errors import InvalidRngError
from jax import lax

from sfl_jax import models
from sfl_jax.errors import BadInput
from sfl_jax.models import Chain, layers, units

KEY = jax.random.key(3)
X = jnp.asarray(np.random.default_rng(0).normal(size=(4, 6)), jnp.float32)


class Scaled(nn.Module):
    """Has own initialisers, variable names that no unit of ours has, and attribute names that ours have."""

    features: int
    survival: float = 0.9
    form: str = "max"

    @nn.compact
    def __call__(self, x, train):
        zeros, threes = nn.initializers.zeros, nn.initializers.constant(3)
        x = nn.Dense(self.features, kernel_init=zeros, bias_init=threes)(x)
        gain = self.param("gain", nn.initializers.normal(0.1), (self.features,))
        temperature = self.param("temperature", lambda key: jnp.full((), 2.0))
        extra = 0 if self.form == "max" else nn.Dense(self.features)(x)
        return (x * gain / temperature + extra) * self.survival


class Noisy(nn.Module):
    """Draws from two streams: its own and that of Flax's layers."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dropout(0.5)(x, deterministic=not train)
        return x + jax.random.normal(self.make_rng("noise"), x.shape) if train else x


class Counting(nn.Module):
    """Has own state: an integer among the statistics, and a collection with another name."""

    @nn.compact
    def __call__(self, x, train):
        calls = self.variable("batch_stats", "calls", lambda: jnp.zeros((), jnp.int32))
        seen = self.variable("averages", "seen", lambda: jnp.zeros(x.shape[-1]))
        scale = self.param("scale", nn.initializers.ones, ())
        if train:
            calls.value = calls.value + 1
            seen.value = 0.5 * seen.value + 0.5 * x.mean(0)
        return scale * (x - seen.value)


class Function(nn.Module):
    """A function of the input and a square matrix."""

    function: Callable[..., jax.Array]

    @nn.compact
    def __call__(self, x):
        return self.function(x, self.param("w", nn.initializers.ones, (6, 6)))


class Normed(nn.Module):
    """Flax's batch norm over all values of a channel."""

    is_frozen: bool = False

    @nn.compact
    def __call__(self, x, train):
        return nn.BatchNorm(use_running_average=self.is_frozen or not train)(x)


class OwnNorm(nn.Module):
    """A user's own batch norm, over maps with any number of axes."""

    @nn.compact
    def __call__(self, x, train):
        axes = tuple(range(x.ndim - 1))
        mean = self.variable("batch_stats", "mean", jnp.zeros, x.shape[-1:])
        var = self.variable("batch_stats", "var", jnp.ones, x.shape[-1:])
        if train:
            mean.value, var.value = x.mean(axes), x.var(axes)
        return (x - mean.value) / jnp.sqrt(var.value + 1e-5)


def assert_close(tree, other):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), tree, other)


def test_a_unit_starts_as_its_own_initialisers_say():
    chain = Chain([Scaled(5), nn.Dense(7)])
    variables, x = chain.init(KEY, X), X
    for index, unit in enumerate(chain.units):
        mode = {} if isinstance(unit, nn.Dense) else {"train": False}
        expected = unit.init(jax.random.fold_in(KEY, index), x, **mode)
        assert_close(variables.params[index], expected["params"])
        x = unit.apply(expected, x, **mode)
    assert set(variables.params[0]) == {"Dense_0", "gain", "temperature"}
    np.testing.assert_array_equal(variables.params[0]["Dense_0"]["kernel"], 0)
    np.testing.assert_array_equal(variables.params[0]["Dense_0"]["bias"], 3)
    np.testing.assert_allclose(chain.apply(variables, X)[0], x, rtol=1e-6)
    assert_close(chain.split(1)[1].init(KEY, jnp.zeros((4, 5))).params, variables.params[1:])


def test_our_own_units_start_with_the_numbers_that_they_always_had():
    """NumPy draws them, so that nothing compiles: 14 000 parameters of three kinds, including constants."""
    variables = models.create("efficientnetv2-tiny").init(jax.random.key(7), jnp.zeros((1, 16, 16, 1)))
    found = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(variables):
        found.update(jax.tree_util.keystr(path).encode() + np.asarray(leaf).tobytes())
    assert found.hexdigest()[:16] == "8205b2bf25dd5659"


def test_attributes_of_a_unit_are_its_own():
    """`survival` and `form` have a meaning in our blocks, but not in a user's unit."""
    chain = Chain([Scaled(5)])
    variables = chain.init(KEY, X)
    expected = np.tile(3 * variables.params[0]["gain"] / 2 * 0.9, (4, 1))
    for train in (False, True):
        outputs, _ = chain.apply(variables, X, train=train, key=KEY)
        np.testing.assert_allclose(outputs, expected, rtol=1e-6)
    profile = models.profile(chain, (6,))
    assert (profile.forward_macs[0], profile.parameters[0]) == (6 * 5, 6 * 5 + 5 + 5 + 1)


def test_every_random_stream_is_served_and_belongs_to_the_unit():
    chain = Chain([Noisy(), Noisy(), nn.Dense(1)])
    variables = chain.init(KEY, X)

    def first(key, number=0):
        return np.asarray(Chain(chain.units[:1], number).apply(variables, X, train=True, key=key)[0])

    draws = [first(KEY), first(KEY, 1), first(jax.random.key(4))]
    assert len({draw.tobytes() for draw in draws}) == 3
    whole, _ = chain.apply(variables, X, train=True, key=KEY)
    client, server = chain.split(1)
    front, back = chain.split_variables(variables, 1)
    smashed, _ = client.apply(front, X, train=True, key=KEY)
    np.testing.assert_array_equal(smashed, draws[0])
    np.testing.assert_allclose(server.apply(back, smashed, train=True, key=KEY)[0], whole, rtol=1e-5)
    np.testing.assert_allclose(
        chain.apply(variables, X)[0], nn.Dense(1).apply({"params": back.params[1]}, X), rtol=1e-5
    )
    with pytest.raises(InvalidRngError):
        chain.apply(variables, X, train=True)


def test_state_of_any_collection_is_kept():
    chain = Chain([nn.Dense(6), Counting()])
    variables = chain.init(KEY, X)
    unit = chain.unit_variables(variables, 1)
    assert {name: set(tree) for name, tree in unit.items()} == {
        "params": {"scale"}, "batch_stats": {"calls"}, "averages": {"seen"},
    }  # fmt: skip
    for _ in range(2):
        _, variables = chain.apply(variables, X, train=True, key=KEY)
    _, back = chain.split_variables(variables, 1)
    expected = Counting().apply(unit, inner := chain.split(1)[0].apply(variables, X)[0], True, mutable=True)[
        1
    ]
    expected = Counting().apply(expected, inner, True, mutable=True)[1]
    found = chain.split(1)[1].unit_variables(back, 0)
    assert found["batch_stats"]["calls"] == 2
    assert found["batch_stats"]["calls"].dtype == jnp.int32
    assert_close(found, expected)
    np.testing.assert_allclose(
        chain.apply(variables, X)[0], Counting().apply(expected, inner, False), rtol=1e-5
    )
    assert models.profile(chain, (6,)).state.tolist() == [0, 1 + 6]


def test_a_list_of_units_is_a_chain():
    chain = Chain([nn.Dense(3), Scaled(2)])
    assert chain == Chain((nn.Dense(3), Scaled(2)))
    assert hash(chain) == hash(Chain((nn.Dense(3), Scaled(2))))
    assert chain.split(1)[1] == Chain([Scaled(2)], 1)


class Listed(nn.Module):
    """Has attributes that are lists and dicts."""

    features: list
    options: dict = dataclasses.field(default_factory=lambda: {"bias": [True, False]})
    inner: Any = None

    @nn.compact
    def __call__(self, x):
        for features, bias in zip(self.features, self.options["bias"], strict=True):
            x = nn.Dense(features, use_bias=bias)(x)
        return x if self.inner is None else self.inner(x)


def test_attributes_may_be_lists_and_dicts():
    unit = Listed([5, 3], inner=Listed([2, 1], name="within"), name="mine")
    chain = Chain([unit, nn.Dense(1)])
    assert hash(chain) == hash(Chain(chain.units))
    variables = chain.init(KEY, X)
    inner = unit.init(jax.random.fold_in(KEY, 0), X)
    assert_close(chain.unit_variables(variables, 0)["params"], inner["params"])
    assert models.profile(chain, (6,)).names[0] == "mine"
    assert unit.features == [5, 3]


def test_what_cannot_be_a_unit_is_refused_by_name():
    for unit, said in (
        (nn.Dense, "unit 1: must be a Flax module; got the class Dense; call it first"),
        (print, "unit 1: must be a Flax module; got <built-in function print>"),
        (
            Listed([np.ones(2)]),
            r"unit Listed1: attributes must be hashable, .*; not hashable: features \(tuple\)",
        ),
    ):
        with pytest.raises(BadInput, match=f"^{said}"):
            units.hashable(unit, 1)


class Asking(nn.Module):
    """Drops if there is a stream for it, as networks without a `train` argument do."""

    @nn.compact
    def __call__(self, x):
        return nn.Dropout(0.5, deterministic=not self.has_rng("dropout"))(x)


def test_a_unit_that_asks_for_the_stream_of_dropout_finds_it_in_training():
    chain = Chain([Asking()])
    variables = chain.init(KEY, X)
    np.testing.assert_array_equal(chain.apply(variables, X)[0], X)
    dropped, _ = chain.apply(variables, X, train=True, key=KEY)
    assert 0 < (dropped == 0).sum() < X.size
    np.testing.assert_array_equal(dropped, jnp.where(dropped == 0, 0, 2 * X))


def test_a_unit_without_a_name_goes_by_its_class_and_number():
    chain = Chain([nn.Dense(6), Scaled(6, name="mine"), nn.Dense(6)])
    assert models.profile(chain, (6,)).names == ("Dense0", "mine", "Dense2")
    assert models.profile(chain.split(1)[1], (6,)).names == ("mine", "Dense2")


def ten_turns(body):
    return lambda x, w: lax.fori_loop(0, 10, lambda _, x: body(x, w), x)


def product(x, w):
    return jnp.tanh(x @ w)


@jax.custom_vjp
def own_gradient(x, w):
    return x @ w


own_gradient.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, g: (g @ kept[1].T, kept[0].T @ g))


def repeated(function, times):
    def unrolled(x, w):
        for _ in range(times):
            x = function(x, w)
        return x

    return unrolled


ONE = 6 * 6
COUNTED = {  # (function, products forward, products in its gradient), counted by hand
    "unrolled": (repeated(product, 10), 10, 20),
    "scan": (lambda x, w: lax.scan(lambda x, _: (product(x, w), None), x, length=10)[0], 10, 20),
    "fori_loop": (ten_turns(product), 10, 20),
    "scan in a scan": (ten_turns(lambda x, w: lax.fori_loop(0, 3, lambda _, x: product(x, w), x)), 30, 60),
    "cond": (lambda x, w: lax.cond(x.sum() > 0, product, repeated(product, 3), x, w), 3, 6),
    "cond without work": (lambda x, w: lax.cond(x.sum() > 0, product, lambda x, w: x, x, w), 1, 2),
    "cond in a scan": (ten_turns(lambda x, w: lax.cond(x.sum() > 0, product, lambda x, w: x, x, w)), 10, 20),
    "jit": (jax.jit(product), 1, 2),
    "own gradient": (own_gradient, 1, 2),
    "remat": (jax.checkpoint(lambda x, w: product(product(x, w), w)), 2, 6),
    "a loop without products": (lambda x, w: lax.stop_gradient(
        lax.while_loop(lambda x: x.sum() < 9, lambda x: x + 1, x)) + x @ w, 1, 2),
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTED)
def test_products_in_loops_and_branches_are_counted(name):
    function, forward, backward = COUNTED[name]
    profile = models.profile(Chain([Function(function)], first_unit=1), (6,))
    assert (profile.forward_macs[0], profile.backward_macs[0]) == (forward * ONE, backward * ONE)


OTHER_PRODUCTS = {  # (function, MACs of one sample forward, in its gradient), counted by hand
    "rows by group": (lambda x, w: lax.ragged_dot(x, jnp.stack([w, w]), jnp.array([1, 0])), 36, 36 + 36),
    "a triangle": (lambda x, w: lax.linalg.triangular_solve(jnp.tril(w) + jnp.eye(6), x), 18, 36 + 36),
    "a solution": (lambda x, w: jnp.linalg.solve(jnp.eye(6) + w, x[0])[None], 72 + 36, 36 + 36),
    "a Fourier transform": (lambda x, w: jnp.fft.fft(x).real, 38, 38),
}


@pytest.mark.parametrize("name", OTHER_PRODUCTS)
def test_other_products_than_those_of_layers_are_counted(name):
    function, forward, backward = OTHER_PRODUCTS[name]
    profile = models.profile(Chain([Function(function)], first_unit=1), (6,))
    assert (profile.forward_macs[0], profile.backward_macs[0]) == (forward, backward)


def test_work_that_cannot_be_counted_is_refused_by_the_name_of_its_unit():
    with pytest.raises(BadInput, match=r"^unit Function0: the work of svd is not known"):
        models.profile(Chain([Function(lambda x, w: x @ jnp.linalg.svd(w)[0])]), (6,))

    def until_large(x, w):
        return lax.while_loop(lambda x: x.sum() < 9, lambda x: product(x, w), x)

    chain = Chain([nn.Dense(6), Function(until_large)])
    with pytest.raises(BadInput, match=r"^unit Function1: a while loop has matrix products") as error:
        models.profile(chain, (6,))
    assert "\n" not in str(error.value)


def test_at_cut_0_the_stored_image_goes_up():
    chain = models.create("efficientnetv2-tiny")
    resized, stored = (models.profile(chain, (8, 8, 1), shape) for shape in (None, (28, 20, 1)))
    assert (resized.smashed[0], stored.smashed[0]) == (8 * 8, 28 * 20)
    np.testing.assert_array_equal(resized.smashed[1:], stored.smashed[1:])


@pytest.mark.parametrize(
    ("units", "shape", "values"),
    [
        ([Normed()], (5, 3, 2), 15),
        ([Normed(), nn.Conv(2, (1, 1), strides=4), Normed()], (5, 3, 2), 2),
        ([Normed()], (7,), 1),
        ([OwnNorm()], (5, 3, 2), 15),
        ([layers.BatchNorm()], (4, 4, 2), 16),
        ([Normed(is_frozen=True), nn.LayerNorm(), nn.Dense(2)], (7,), None),
        (models.create("efficientnetv2-tiny").units, (8, 8, 1), 1),
    ],
)
def test_values_that_a_batch_norm_averages_over(units, shape, values):
    assert models.least_normalised(Chain(units), shape) == values
