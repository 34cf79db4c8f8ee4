"""Whole Flax modules cut automatically: where the cuts are, and that nothing else changes."""

import functools
from typing import Any, NamedTuple

import finite
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.errors import InvalidRngError
from models import whole_nets

from sfl_jax import models
from sfl_jax.errors import BadInput
from sfl_jax.models import Chain, Variables

KEY = jax.random.key(2)
NAMES = {  # the expected units, by their largest module
    "resnet": ["Conv_0", "ResidualBlock_0", "ResidualBlock_1", "Dense_0"],
    "vit": ["Conv_0", "Encoder_0.EncoderBlock_0", "Encoder_0.EncoderBlock_1", "Dense_0"],
    "unet": ["DoubleConv_0", "DoubleConv_2", "DoubleConv_4", "Conv_0"],
    "unet, three arrays": ["DoubleConv_0", "DoubleConv_1", "DoubleConv_2", "ConvTranspose_0", "DoubleConv_3",
                           "ConvTranspose_1", "DoubleConv_4", "Conv_0"],
    "efficientnetv2": ["Conv_0", "MBConv_0", "MBConv_1", "MBConv_2", "MBConv_3", "Conv_1", "Dense_0"],
}  # fmt: skip
NETS = {
    "resnet": whole_nets.ResNet(), "vit": whole_nets.VisionTransformer(), "unet": whole_nets.UNet(),
    "unet, three arrays": whole_nets.UNet(), "efficientnetv2": whole_nets.EfficientNetV2(),
}  # fmt: skip
DRAWING = ("vit", "efficientnetv2")


class Case(NamedTuple):
    """A module, its chain, variables of both in float64, and images."""

    module: nn.Module
    chain: Chain
    whole: Any
    images: jax.Array


def float64(tree):
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) ** 2, jnp.float64), tree)


@functools.cache
def make_case(name):
    images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8, 1)))
    module, most = NETS[name], 3 if "three" in name else 1
    chain = Chain.from_module(module, images, max_arrays=most, layer_form="conv")
    init = functools.partial(module.init, train=False)
    return Case(module, chain, float64(jax.eval_shape(init, KEY, images)), images)


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def assert_close(found, expected, tolerance=1e-9):
    finite.pairs(found, expected)
    close = functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance)
    jax.tree.map(close, found, expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_module_is_cut_where_a_person_would_cut_it(name):
    assert [unit.name for unit in make_case(name).chain.units] == NAMES[name]


@pytest.mark.parametrize(
    ("name", "size"),
    [("vit", 1), *(pytest.param(name, 5, marks=pytest.mark.slow) for name in NAMES if name != "unet")],
)
def test_a_chain_is_the_module(name, size):
    """In inference and at any batch size; every variable returns under its name."""
    case = make_case(name)
    variables = case.chain.divide_variables(case.whole)
    assert_close(case.chain.unite_variables(variables), case.whole, 0)
    images = jnp.resize(case.images, (size, 8, 8, 1))
    outputs, after = case.chain.apply(variables, images)
    assert_close(outputs, jax.jit(functools.partial(case.module.apply, train=False))(case.whole, images))
    assert_close(after, variables, 0)


def passes(case, cut, key=KEY):
    """(outputs, gradients of variables and images, state) of both halves in training."""
    halves = case.chain.split(cut)

    def run(whole, images):
        rest, x, done = case.chain.divide_variables(whole), images, []
        for half in halves:
            own, rest = case.chain.split_variables(rest, len(half))
            x, after = half.apply(own, x, True, key)
            done.append(after)
        return x, case.chain.unite_variables(case.chain.join_variables(*done))

    outputs, pullback, after = jax.vjp(run, case.whole, case.images, has_aux=True)
    return outputs, pullback(jnp.cos(outputs)), after.get("batch_stats")


@pytest.mark.parametrize("name", ["resnet", pytest.param("unet, three arrays", marks=pytest.mark.slow)])
def test_halves_in_training_are_the_module_at_every_cut(name):
    case = make_case(name)

    def run(whole, images):
        return case.module.apply(whole, images, True, mutable=["batch_stats"])

    @jax.jit
    def of_module(whole, images):
        outputs, pullback, after = jax.vjp(run, whole, images, has_aux=True)
        return outputs, pullback(jnp.cos(outputs)), after["batch_stats"]

    expected = of_module(case.whole, case.images)
    for cut in range(len(case.chain) + 1):
        assert_close(passes(case, cut), expected)
    mixed = case._replace(whole=jax.tree.map(lambda x: 1.01 * x, case.whole))
    assert not finite.are_close(passes(mixed, 1)[0], expected[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", DRAWING)
def test_halves_draw_what_the_whole_chain_draws_at_every_cut(name):
    case = make_case(name)
    whole = passes(case, 0)
    for cut in range(1, len(case.chain) + 1):
        assert_close(passes(case, cut), whole)
    assert not finite.are_close(passes(case, 1, jax.random.key(9))[0], whole[0])


def masked_chain(is_shared):
    """(chain, variables, input) of a module that drops after its first two layers; else no output is 0."""
    module, x = whole_nets.SharedMask(is_shared), jnp.ones((2, 40))
    shapes = jax.eval_shape(functools.partial(module.init, train=False), KEY, x)
    chain = Chain.from_module(module, x)
    return chain, chain.divide_variables(float64(shapes)), x


def test_a_piece_draws_from_its_own_key():
    chain, variables, x = masked_chain(is_shared=False)
    client, server = chain.split(1)
    front, back = chain.split_variables(variables, 1)
    whole, _ = chain.apply(variables, x, True, KEY)
    smashed, _ = client.apply(front, x, True, KEY)
    assert 0.2 < (smashed == 0).mean() < 0.8
    for key, is_same in ((KEY, True), (jax.random.key(3), False)):
        assert finite.are_close(server.apply(back, smashed, True, key)[0], whole) == is_same
    with pytest.raises(InvalidRngError):
        client.apply(front, x, True)


def test_a_piece_runs_on_devices_that_are_mapped_in_one_way_and_in_another():
    chain, x = Chain.from_module(whole_nets.Averaging(), jnp.ones((2, 3))), jnp.arange(15.0).reshape(5, 3)

    def run(x):
        return chain.apply(Variables(({}, {}), ({}, {})), x)[0]

    mesh, own = jax.sharding.Mesh(jax.devices()[:1], ("device",)), jax.sharding.PartitionSpec("device")
    mapped = jax.pmap(run, devices=jax.devices()[:1])(x[None])  # traces a batch of five first
    sharded = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=own, out_specs=own, check_vma=False))(x)
    np.testing.assert_allclose(mapped[0], run(x), rtol=1e-6)
    np.testing.assert_allclose(sharded, run(x), rtol=1e-6)


def test_what_is_shared_stays_together():
    words = jax.ShapeDtypeStruct((2, 5), jnp.int32)
    for is_tied, names in ((True, ["Embed_0", "head"]), (False, ["Embed_0", "Dense_0", "last", "head"])):
        chain = Chain.from_module(whole_nets.Tied(is_tied), words)
        assert [unit.name for unit in chain.units] == names
    # A mask for two places is drawn in one unit, so nothing is dropped before the first cut.
    chain, variables, x = masked_chain(is_shared=True)
    smashed, _ = chain.split(1)[0].apply(chain.split_variables(variables, 1)[0], x, True, KEY)
    assert (smashed > 0).all()


def test_a_state_belongs_to_the_unit_that_writes_it():
    module, x = whole_nets.Remembering(), jnp.ones((4, 2))
    chain = Chain.from_module(module, x)
    whole = float64(jax.eval_shape(functools.partial(module.init, train=False), KEY, x))
    variables = chain.divide_variables(whole)
    assert [list(state["/seen"]) for state in variables.batch_stats] == [["mean0"], ["mean1"]]
    outputs, after = chain.apply(variables, x, True, KEY)
    expected, seen = module.apply(whole, x, True, mutable=["seen"])
    assert_close((outputs, chain.unite_variables(after)["seen"]), (expected, seen["seen"]))


def test_variables_start_as_the_module_draws_them():
    """Each unit starts with the numbers that the whole module draws from the unit's key."""
    chain, units, x = masked_chain(is_shared=False)
    variables = chain.init(KEY, x)
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, units)
    for params in variables.params:
        (layer,) = params.values()
        np.testing.assert_array_equal(layer["bias"], 0)
        assert layer["kernel"].std() == pytest.approx(1 / np.sqrt(40), rel=0.3)  # LeCun's


@pytest.mark.slow
def test_clients_with_their_own_weights_train_in_the_product_form():
    """vmapped and compiled, every convolution is a product."""
    case = make_case("resnet")
    chain = Chain(case.chain.units)
    two = jax.tree.map(lambda x: jnp.stack([x, 1.5 * x]), chain.divide_variables(case.whole))
    images = jnp.stack([case.images, case.images[::-1]])

    def step(variables, images):
        def loss_of(params):
            return chain.apply(variables._replace(params=params), images, True, KEY)[0].sum()

        return jax.grad(loss_of)(variables.params)

    program = jax.jit(jax.vmap(step))
    assert "conv_general_dilated" not in str(jax.make_jaxpr(program)(two, images))
    found = program(two, images)
    for client in range(2):
        pick = functools.partial(jax.tree.map, lambda x, client=client: x[client])
        variables = pick(two)

        def loss_of(params, variables=variables, client=client):
            return case.chain.apply(variables._replace(params=params), images[client], True, KEY)[0].sum()

        assert_close(pick(found), jax.grad(loss_of)(variables.params), 1e-7)


def test_a_piece_is_profiled_as_its_module():
    case = make_case("efficientnetv2")
    profile = models.profile(case.chain, (8, 8, 1))
    assert profile.smashed.tolist() == [64, 4 * 4 * 2, 4 * 4 * 2, 2 * 2 * 3, 2 * 2 * 4, 2 * 2 * 4, 5, 0]
    assert profile.forward_macs[[0, -2, -1]].tolist() == [4 * 4 * 9 * 2, 4 * 4 * 5, 5 * 3]
    assert profile.parameters.sum() == sum(x.size for x in jax.tree.leaves(case.whole["params"]))
    assert profile.state.sum() == sum(x.size for x in jax.tree.leaves(case.whole["batch_stats"]))
    assert models.least_normalised(case.chain, (8, 8, 1)) == 4
    assert models.least_normalised(case.chain.split(6)[1], (5,)) is None


def test_what_cannot_be_cut_or_run_is_said():
    case = make_case("resnet")
    variables = case.chain.divide_variables(case.whole)
    with pytest.raises(
        BadInput, match=r"^unit Conv_0: must get .* \[\(2, 8, 8, 1\)\]; got input of shape \(2, 8, 6, 1\)"
    ):
        case.chain.apply(variables, case.images[:, :, :6])
    with pytest.raises(BadInput, match=r"^module ResNet: cannot run on input of shape \(2, 8\) float32: \w+"):
        Chain.from_module(whole_nets.ResNet(), jax.ShapeDtypeStruct((2, 8), jnp.float32))
