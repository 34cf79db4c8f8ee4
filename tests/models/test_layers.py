import math

import finite
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.errors import InvalidRngError
from hypothesis import given
from hypothesis import strategies as st
from jax import lax
from models import oracles
from scipy import stats

from sfl_jax.models import layers, products

SHAPES = [  # height, width, kernel size, stride
    (1, 1, 3, 1), (1, 2, 3, 2), (2, 2, 3, 2), (5, 6, 3, 1), (5, 6, 3, 2), (3, 2, 1, 1), (5, 4, 1, 2),
    pytest.param(3, 7, 5, 2, marks=pytest.mark.slow),
]  # fmt: skip
FEATURES = {"dense": 5, "narrowing": 3}  # of 4 channels


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def normal(*shape, seed=0, mean=0.0, std=1.0):
    return np.random.default_rng([seed, *shape]).normal(mean, std, shape)


def layer(kind, kernel_size, stride, form):
    if kind in FEATURES:
        shape = kernel_size, kernel_size, 4, FEATURES[kind]
        return layers.Conv(FEATURES[kind], kernel_size, stride, form), shape, "kernel"
    return (
        layers.DepthwiseConv(kernel_size, stride, form),
        (kernel_size, kernel_size, 1, 4),
        "depthwise_kernel",
    )


@pytest.mark.parametrize("kind", ["dense", "depthwise"])
@pytest.mark.parametrize(("height", "width", "kernel_size", "stride"), SHAPES)
def test_both_forms_are_the_convolution(kind, height, width, kernel_size, stride):
    check_forms(kind, height, width, kernel_size, stride)


@pytest.mark.parametrize("size", [(5, 6), (1, 2)])
def test_both_forms_are_the_convolution_to_fewer_channels(size):
    """With fewer output channels the product comes before the shifts."""
    check_forms("narrowing", *size, kernel_size=3, stride=1)


def check_forms(kind, height, width, kernel_size, stride):
    images, kernel = normal(3, height, width, 4), normal(*layer(kind, kernel_size, stride, "conv")[1])
    oracle = oracles.convolution if kind in FEATURES else oracles.depthwise
    expected = oracle(images, kernel, stride)
    weights = normal(*expected.shape)

    @jax.jit
    def both_forms(images, kernel):
        def run(form):
            module, _, name = layer(kind, kernel_size, stride, form)
            outputs, pullback = jax.vjp(lambda x, k: module.apply({"params": {name: k}}, x), images, kernel)
            return outputs, *pullback(weights)

        return [run(form) for form in layers.FORMS]

    results = both_forms(images, kernel)
    for outputs, of_images, of_kernel in results:
        np.testing.assert_allclose(outputs, expected, rtol=1e-12, atol=1e-12)
        # The convolution is linear in both arguments, so both gradients give the same inner product.
        meeting = np.vdot(weights, expected)
        np.testing.assert_allclose(
            [np.vdot(images, of_images), np.vdot(kernel, of_kernel)], meeting, rtol=1e-10
        )
    for product, conv in zip(*results, strict=True):
        np.testing.assert_allclose(product, conv, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", layers.FORMS)
def test_odd_padding_goes_after_the_image(form):
    """With stride 2 mirroring changes the convolution on even sizes, and does not on odd sizes."""
    kernel = normal(3, 3, 2, 2)

    def run(x, kernel):
        return layers.Conv(2, 3, 2, form).apply({"params": {"kernel": kernel}}, jnp.asarray(x))

    for size, symmetric in [(4, False), (5, True)]:
        images = normal(1, size, size, 2)
        mirrored = run(images[:, ::-1, ::-1], kernel[::-1, ::-1])[:, ::-1, ::-1]
        assert finite.are_close(run(images, kernel), mirrored) == symmetric


@pytest.mark.parametrize(
    ("size", "kernel_size", "stride", "padding"),
    [
        (4, 3, 2, (0, 1)), (5, 3, 2, (1, 1)), (224, 3, 2, (0, 1)), (1, 3, 1, (1, 1)), (1, 3, 2, (1, 1)),
        (2, 3, 2, (0, 1)), (8, 5, 2, (1, 2)), (4, 1, 2, (0, 0)),
    ],
)  # fmt: skip
def test_same_padding_by_hand(size, kernel_size, stride, padding):
    assert products.Axis(size, kernel_size, stride).padding == padding


@given(st.integers(1, 600), st.integers(1, 9), st.integers(1, 5))
def test_same_padding_is_that_of_lax(size, kernel_size, stride):
    assert [products.Axis(size, kernel_size, stride).padding] == lax.padtype_to_pads(
        (size,), (kernel_size,), (stride,), "SAME"
    )


def batch_norm_variables(channels):
    params = {"scale": normal(channels, seed=1), "bias": normal(channels, seed=2)}
    return params, {"mean": normal(channels, seed=3), "var": normal(channels, seed=4) ** 2}


@pytest.mark.parametrize("shape", [(5, 3, 4, 6), (7, 6)])
def test_batch_norm_in_training_uses_the_batch_and_moves_the_statistics(shape):
    x = jnp.asarray(normal(*shape, mean=2, std=3))
    params, running = batch_norm_variables(shape[-1])
    outputs, updated = layers.BatchNorm().apply(
        {"params": params, "batch_stats": running}, x, True, mutable=["batch_stats"]
    )
    flat = np.asarray(x).reshape(-1, shape[-1])
    mean, var = flat.mean(0), ((flat - flat.mean(0)) ** 2).sum(0) / len(flat)
    np.testing.assert_allclose(outputs, oracles.batch_norm(x, mean, var, **params), rtol=1e-10, atol=1e-12)
    moved = updated["batch_stats"]
    np.testing.assert_allclose(moved["mean"], 0.9 * running["mean"] + 0.1 * mean, rtol=1e-12)
    np.testing.assert_allclose(moved["var"], 0.9 * running["var"] + 0.1 * var, rtol=1e-12)


def test_batch_norm_in_evaluation_uses_the_statistics_and_leaves_them():
    x = jnp.asarray(normal(5, 3, 4, 6))
    params, running = batch_norm_variables(6)
    outputs, updated = layers.BatchNorm().apply(
        {"params": params, "batch_stats": running}, x, False, mutable=["batch_stats"]
    )
    np.testing.assert_allclose(outputs, oracles.batch_norm(x, **running, **params), rtol=1e-12, atol=1e-12)
    jax.tree.map(np.testing.assert_array_equal, updated["batch_stats"], running)


def test_initialising_in_training_mode_moves_no_statistics():
    running = layers.BatchNorm().init(jax.random.key(0), jnp.full((4, 3), 5.0), True)["batch_stats"]
    np.testing.assert_array_equal(running["mean"], np.zeros(3))
    np.testing.assert_array_equal(running["var"], np.ones(3))


def test_batch_norm_of_constant_channels_stays_finite():
    """For some of these, mean of squares minus square of mean is below -epsilon in float32."""
    constants = 1000 + np.arange(64, dtype=np.float32) / 7
    x = jnp.asarray(np.broadcast_to(constants, (1000, 64)))
    squares = (x * x).mean(0) - x.mean(0) ** 2
    assert (squares < -layers.BN_EPSILON).any()
    variables = layers.BatchNorm().init(jax.random.key(0), x, False)

    def total(x):
        return (layers.BatchNorm().apply(variables, x, True, mutable=["batch_stats"])[0] ** 2).sum()

    value, gradient = jax.value_and_grad(total)(x)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def test_batch_norm_of_bfloat16_keeps_its_statistics_in_float32():
    x = jnp.asarray(normal(4096, 8, mean=3), jnp.bfloat16)
    variables = layers.BatchNorm().init(jax.random.key(0), x, False)
    outputs, updated = layers.BatchNorm().apply(variables, x, True, mutable=["batch_stats"])
    running = updated["batch_stats"]
    assert (outputs.dtype, running["mean"].dtype, running["var"].dtype) == (
        jnp.bfloat16,
        jnp.float32,
        jnp.float32,
    )
    exact = np.asarray(x, np.float64)
    np.testing.assert_allclose(running["mean"], 0.1 * exact.mean(0), rtol=1e-5)
    np.testing.assert_allclose(running["var"], 0.9 + 0.1 * exact.var(0), rtol=1e-5)


def test_squeeze_excite_scales_each_channel_by_its_gate():
    x = jnp.asarray(normal(3, 4, 5, 8))
    params = {
        "reduce": {"kernel": normal(8, 2), "bias": normal(2)},
        "expand": {"kernel": normal(2, 8), "bias": normal(8)},
    }
    outputs = layers.SqueezeExcite(2).apply({"params": params}, x)
    np.testing.assert_allclose(outputs, oracles.squeeze_excite(x, params), rtol=1e-12)


def test_drop_path_drops_whole_samples_and_scales_the_others():
    x, survival = jnp.asarray(1 + normal(4000, 2, 1, 3) ** 2), 0.7
    outputs = np.asarray(layers.DropPath(survival).apply({}, x, True, rngs={"drop": jax.random.key(5)}))
    kept = (outputs != 0).reshape(4000, -1)
    assert (kept.all(1) == kept.any(1)).all()
    np.testing.assert_allclose(outputs, x / survival * kept[:, :1, None, None], rtol=1e-12)
    assert kept[:, 0].mean() == pytest.approx(survival, abs=4 * np.sqrt(survival * (1 - survival) / 4000))
    other = layers.DropPath(survival).apply({}, x, True, rngs={"drop": jax.random.key(6)})
    assert not finite.are_equal(outputs, other)


def test_drop_path_is_off_in_evaluation_and_where_all_survive():
    x = jnp.asarray(normal(4, 2, 2, 3))
    np.testing.assert_array_equal(layers.DropPath(0.5).apply({}, x, False), x)
    np.testing.assert_array_equal(layers.DropPath(1.0).apply({}, x, True), x)
    with pytest.raises(InvalidRngError):
        layers.DropPath(0.5).apply({}, x, True)


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize(
    ("name", "shape", "distribution"),
    [
        ("kernel", (3, 3, 48, 160), stats.norm(0, np.sqrt(2 / (9 * 160)))),
        ("kernel", (300, 200), stats.norm(0, np.sqrt(2 / 200))),
        ("depthwise_kernel", (3, 3, 1, 6000), stats.norm(0, np.sqrt(2 / 9))),
        ("dense_kernel", (200, 300), stats.uniform(-1 / np.sqrt(300), 2 / np.sqrt(300))),
    ],
)
def test_kernels_are_drawn_from_googles_distributions(name, shape, distribution, traced):
    def draw(key):
        return layers.INITIALISERS[name](key, shape)

    draw = jax.jit(draw) if traced else draw
    values = np.asarray(draw(jax.random.key(3)))
    assert values.shape == shape
    assert values.dtype == np.float32
    assert stats.kstest(values.ravel(), distribution.cdf).pvalue > 1e-3
    assert stats.kstest(1.1 * values.ravel(), distribution.cdf).pvalue < 1e-9
    np.testing.assert_array_equal(values, draw(jax.random.key(3)))
    assert not finite.are_equal(values, draw(jax.random.key(4)))


@pytest.mark.parametrize(("name", "value"), [("bias", 0), ("mean", 0), ("scale", 1), ("var", 1)])
def test_what_is_not_a_kernel_starts_constant(name, value):
    np.testing.assert_array_equal(layers.INITIALISERS[name](jax.random.key(0), (7,)), np.full(7, value))


@pytest.mark.parametrize("channels", [16, 12, 5])
def test_group_norm_by_hand_and_that_of_flax(channels):
    x, size = normal(3, 4, 5, channels, mean=2.0), math.gcd(channels, 8)
    own = layers.GroupNorm(epsilon=1e-5)
    assert own.init(jax.random.key(0), jnp.asarray(x)).keys() == {"params"}
    variables = {"params": {"scale": normal(channels), "bias": normal(channels, seed=1)}}
    groups = x.reshape(3, 20, -1, size)
    mean, var = groups.mean((1, 3), keepdims=True), groups.var((1, 3), keepdims=True)
    expected = ((groups - mean) / np.sqrt(var + 1e-5)).reshape(x.shape)
    expected = expected * variables["params"]["scale"] + variables["params"]["bias"]
    found = own.apply(variables, jnp.asarray(x))
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10)
    theirs = nn.GroupNorm(num_groups=None, group_size=size, epsilon=1e-5)  # in float32
    np.testing.assert_allclose(theirs.apply(variables, x), found, rtol=1e-3, atol=1e-4)


def test_group_norm_of_an_image_does_not_depend_on_the_others():
    x = jnp.asarray(normal(3, 4, 5, 16))
    own = layers.GroupNorm()
    variables = own.init(jax.random.key(0), x)
    np.testing.assert_allclose(own.apply(variables, x)[:1], own.apply(variables, x[:1]), rtol=1e-12)
