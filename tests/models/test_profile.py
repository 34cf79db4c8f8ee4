import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from sfl_jax import models
from sfl_jax.models import Chain, efficientnet_v2, layers

QUICK = ("efficientnetv2-b0", "efficientnetv2-s")  # one of each kind; the others take longer to trace
PUBLISHED = [  # name, units, all variables, trainable, multiply-adds, image size
    ("efficientnetv2-b0", 24, 7_200_312, 7_139_704, 0.718e9, 224),
    ("efficientnetv2-b1", 30, 8_212_124, 8_141_052, 1.197e9, 240),
    ("efficientnetv2-b2", 31, 10_178_374, 10_096_086, 1.698e9, 260),
    ("efficientnetv2-b3", 35, 14_467_622, 14_358_406, 3.011e9, 300),
    ("efficientnetv2-s", 43, 21_612_360, 21_458_488, 8.366e9, 384),
    ("efficientnetv2-m", 60, 54_431_388, 54_139_356, 24.582e9, 480),
    ("efficientnetv2-l", 82, 119_027_848, 118_515_272, 56.080e9, 480),
    ("efficientnetv2-xl", 103, 208_896_832, 208_119_808, 93.35e9, 512),
]


class Unit(nn.Module):
    """Layers one after the other, as a unit of a chain."""

    layers: tuple[nn.Module, ...]

    @nn.compact
    def __call__(self, x, train):
        for layer in self.layers:
            x = layer(x, train) if isinstance(layer, layers.BatchNorm | layers.DropPath) else layer(x)
        return x


def conv(features, kernel_size=1, stride=1):
    return layers.Conv(features, kernel_size, stride, "conv")


def depthwise(kernel_size=3, stride=1):
    return layers.DepthwiseConv(kernel_size, stride, "conv")


def single(*layers_of_unit, shape, first_unit=1):
    """The profile of a chain with one unit, which is the network's first if `first_unit` is 0."""
    profile = models.profile(Chain((Unit(layers_of_unit),), first_unit), shape)
    return {field: value[0] for field, value in profile._asdict().items()}


@pytest.mark.parametrize(
    ("name", "units", "variables", "trainable", "macs", "size"),
    [pytest.param(*row, marks=[] if row[0] in QUICK else pytest.mark.slow) for row in PUBLISHED],
)
def test_counts_are_those_of_googles_release(name, units, variables, trainable, macs, size):
    profile = models.profile(models.create(name, 1000, 3), (size, size, 3))
    assert [len(column) for column in profile] == [units] * 6 + [units + 1] * 2
    assert profile.parameters.sum() == trainable
    assert profile.parameters.sum() + profile.state.sum() == variables
    assert profile.forward_macs.sum() == pytest.approx(macs, rel=0.005)
    assert {column.dtype for column in profile[1:-1]} == {np.dtype(np.int64)}


@pytest.mark.parametrize(
    ("name", "channels", "macs", "smashed"),
    [
        ("efficientnetv2-s", 3, 61.7e6,
         {1: 6144, 3: 6144, 7: 3072, 11: 1024, 17: 512, 26: 640, 41: 256, 42: 1280}),
        ("efficientnetv2-b0", 3, 15.65e6, {1: 8192, 2: 4096, 22: 192, 23: 1280}),
        ("efficientnetv2-b0", 1, 15.50e6, {1: 8192, 2: 4096, 22: 192, 23: 1280}),
    ],
)  # fmt: skip
def test_at_the_size_of_mnist(name, channels, macs, smashed):
    profile = models.profile(models.create(name, 10, channels), (32, 32, channels))
    assert profile.forward_macs.sum() == pytest.approx(macs, rel=0.002)
    assert {cut: profile.smashed[cut] for cut in smashed} == smashed
    assert profile.smashed[0] == 32 * 32 * channels
    assert profile.smashed[-1] == 0


def test_where_work_and_parameters_of_s_are_at_the_size_of_mnist():
    """Work is early, parameters are late: % of both up to the end of the stem, of each stage, of the head."""
    coloured, grey = (models.profile(models.create("efficientnetv2-s", 10, c), (32, 32, c)) for c in (3, 1))
    cuts = np.array([1, 3, 7, 11, 17, 26, 41, 42])
    macs, parameters = (
        100 * np.cumsum(column)[cuts - 1] / column.sum()
        for column in (coloured.forward_macs, coloured.parameters)
    )
    np.testing.assert_allclose(macs, [0.3, 4.6, 35.9, 51.1, 56.4, 75.3, 99.4, 100], atol=0.0501)
    np.testing.assert_allclose(parameters, [0.0, 0.1, 1.6, 4.5, 9.0, 26.2, 98.3, 99.9], atol=0.0501)
    assert grey.forward_macs.sum() == pytest.approx(61.63e6, abs=5e3)
    assert coloured.parameters.sum() == pytest.approx(20.19e6, abs=5e3)
    b0 = models.profile(models.create("efficientnetv2-b0", 10, 3), (32, 32, 3))
    assert b0.parameters.sum() == pytest.approx(5.87e6, abs=5e3)


# Layer, input shape, forward MACs, the gradient's MACs over the forward's with and without the gradient of
# the input, parameters, state.
BY_HAND = [
    (conv(7, 3, 2), (9, 6, 5), 5 * 3 * 9 * 5 * 7, 2, 1, 9 * 5 * 7, 0),
    (conv(4, 3), (8, 8, 2), 64 * 9 * 2 * 4, 2, 1, 9 * 2 * 4, 0),
    (conv(6), (5, 4, 3), 20 * 3 * 6, 2, 1, 3 * 6, 0),
    (conv(6, 1, 2), (5, 4, 3), 6 * 3 * 6, 2, 1, 3 * 6, 0),
    (conv(3, 3), (1, 1, 2), 9 * 2 * 3, 2, 1, 9 * 2 * 3, 0),
    (conv(3, 3, 2), (2, 2, 2), 9 * 2 * 3, 2, 1, 9 * 2 * 3, 0),
    (depthwise(3), (6, 5, 8), 30 * 9 * 8, 2, 1, 9 * 8, 0),
    (depthwise(3, 2), (6, 5, 8), 9 * 9 * 8, 2, 1, 9 * 8, 0),
    (depthwise(5, 2), (7, 8, 3), 16 * 25 * 3, 2, 1, 25 * 3, 0),
    (layers.Dense(10), (64,), 640, 2, 1, 650, 0),
    # The parameters need three of its four gradient products: not that of the input of `reduce`.
    (layers.SqueezeExcite(4), (5, 5, 16), 128, 2, 1.5, 128 + 20, 0),
    (layers.BatchNorm(), (5, 5, 16), 0, 0, 0, 32, 32),
]


@pytest.mark.parametrize(
    "row", BY_HAND, ids=lambda row: f"{type(row[0]).__name__}-{'x'.join(map(str, row[1]))}"
)
def test_single_layers_by_hand(row):
    layer, shape, forward, with_input, without_input, parameters, state = row
    inner, first = single(layer, shape=shape), single(layer, shape=shape, first_unit=0)
    for measured in (inner, first):
        assert measured["forward_macs"] == forward
        assert (measured["parameters"], measured["state"]) == (parameters, state)
        assert measured["smashed"] == math.prod(shape)
    assert inner["backward_macs"] == with_input * forward
    assert first["backward_macs"] == without_input * forward


@settings(max_examples=25)
@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    channels=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    kernel_size=st.sampled_from([1, 3, 5]),
    stride=st.integers(1, 3),
)
def test_gradients_of_a_convolution_cost_as_much_as_itself_each(size, channels, kernel_size, stride):
    shape = (*size, channels[0])
    forward = math.prod(-(-length // stride) for length in size) * kernel_size**2 * math.prod(channels)
    layer = conv(channels[1], kernel_size, stride)
    for first_unit, gradients in [(0, 1), (1, 2)]:
        measured = single(layer, shape=shape, first_unit=first_unit)
        assert measured["forward_macs"] == forward
        assert measured["backward_macs"] == gradients * forward


def test_units_by_hand():
    """A stem, an MBConv with squeeze-excite, and a head: 8x8 images of 3 channels."""
    block = efficientnet_v2.MBConv(8, 12, 4, 3, 2, 0.25, 0.9)
    chain = Chain(
        (efficientnet_v2.Stem(3, 8), block, efficientnet_v2.Head(20), efficientnet_v2.Classifier(10, 0.2))
    )
    profile = models.profile(chain, (8, 8, 3))
    stem = 16 * 9 * 3 * 8
    expand, depthwise, squeeze, project = 16 * 8 * 32, 4 * 9 * 32, 2 * 32 * 2, 4 * 32 * 12
    inner = np.array([expand + depthwise + squeeze + project, 4 * 12 * 20, 20 * 10])
    np.testing.assert_array_equal(profile.forward_macs, [stem, *inner])
    np.testing.assert_array_equal(profile.backward_macs, [stem, *2 * inner])
    np.testing.assert_array_equal(
        profile.parameters,
        [9 * 3 * 8 + 16, (8 * 32 + 64) + (9 * 32 + 64) + (128 + 2 + 32) + (32 * 12 + 24), 12 * 20 + 40, 210],
    )
    np.testing.assert_array_equal(profile.state, [16, 64 + 64 + 24, 40, 0])
    np.testing.assert_array_equal(profile.smashed, [8 * 8 * 3, 4 * 4 * 8, 2 * 2 * 12, 20, 0])


@pytest.mark.parametrize(
    ("unit_layers", "shape", "floats"),
    [
        ((conv(7, 3, 2),), (9, 6, 5), 9 * 6 * 5),
        ((conv(7, 3, 2), conv(4)), (9, 6, 5), 9 * 6 * 5 + 5 * 3 * 7),
        ((depthwise(),), (6, 5, 8), 6 * 5 * 8),
        ((layers.Dense(10),), (64,), 64),
        ((layers.DropPath(0.5),), (4, 4, 8), 1),
        ((nn.silu,), (4, 4, 8), None),
    ],
)
def test_activations_are_what_a_sample_leaves_for_the_backward_pass(unit_layers, shape, floats):
    """Linear layers keep their input, at any size of kernel; a dropped branch keeps one factor."""
    kept = single(*unit_layers, shape=shape)["activations"]
    if floats is None:  # an activation function keeps its input, and may keep the slope
        assert math.prod(shape) <= kept <= 3 * math.prod(shape)
    else:
        assert kept == floats


def test_a_mask_of_bools_counts_a_quarter_of_its_values():
    """Dropout keeps its mask; its derivative may also keep the zeros that it inserts."""
    chain = Chain((efficientnet_v2.Classifier(10, 0.2),), first_unit=1)
    assert models.profile(chain, (64,)).activations[0] - 64 in (64 // 4, 64 // 4 + 64)


def test_equal_blocks_cost_the_same_and_the_form_does_not_matter():
    product, conv_form = (models.create("efficientnetv2-b0", layer_form=form) for form in layers.FORMS)
    profile = models.profile(product, (32, 32, 1))
    others = models.profile(conv_form, (32, 32, 1))
    assert profile.shapes == others.shapes
    for column, other in zip(profile[:-1], others[:-1], strict=True):
        np.testing.assert_array_equal(column, other)
    last_blocks = [index for index, name in enumerate(profile.names) if name.startswith("block6")][1:]
    assert len(last_blocks) == 7
    for column in profile[1:-1]:
        assert len(set(column[last_blocks])) == 1


def test_a_server_half_has_an_input_gradient_in_its_first_unit():
    chain = models.create("efficientnetv2-tiny")
    whole = models.profile(chain, (32, 32, 1))
    _, server = chain.split(2)
    half = models.profile(server, (16, 16, 8))
    for column, of_half in zip(whole[1:-1], half[1:-1], strict=True):
        np.testing.assert_array_equal(column[2:], of_half)
    np.testing.assert_array_equal(whole.smashed[2:], half.smashed)
    assert half.names == whole.names[2:]


def test_profile_of_a_chain_matches_its_variables():
    chain = models.create("efficientnetv2-tiny")
    variables = chain.init(jax.random.key(0), jnp.zeros((1, 16, 16, 1)))
    profile = models.profile(chain, (16, 16, 1))
    for tree, counts in zip(variables, (profile.parameters, profile.state), strict=True):
        np.testing.assert_array_equal(
            [sum(leaf.size for leaf in jax.tree.leaves(unit)) for unit in tree], counts
        )
