import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import oracles

from sfl_jax import models
from sfl_jax.errors import BadInput
from sfl_jax.models import efficientnet_v2, layers

FUSED_ONCE = efficientnet_v2.FusedMBConv(8, 8, 1, 3, 1, 1.0, "conv")
FUSED = efficientnet_v2.FusedMBConv(8, 8, 4, 3, 1, 1.0, "conv")
FUSED_STRIDED = efficientnet_v2.FusedMBConv(8, 8, 4, 3, 2, 1.0, "conv")  # the stride forbids a residual
MBCONV = efficientnet_v2.MBConv(8, 8, 4, 3, 1, 0.25, 1.0, "conv")
MBCONV_STRIDED = efficientnet_v2.MBConv(8, 12, 6, 3, 2, 0.25, 1.0, "conv")
RESIDUAL = [FUSED_ONCE, FUSED, MBCONV]


def with_random_variables(unit, shape, seed=0):
    """Images of `shape`, and variables of the unit that all differ from their initial values."""
    rng = np.random.default_rng(seed)
    images = jnp.asarray(rng.normal(size=shape))
    shapes = jax.eval_shape(lambda: unit.init(jax.random.key(0), images, False))
    variables = jax.tree.map(lambda leaf: jnp.asarray(0.2 + 0.8 * rng.random(leaf.shape)), shapes)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.5, leaf.shape)), shapes["params"])
    return images, {**variables, "params": params}


def run(unit, variables, images, train, seed=0):
    rngs = {"drop": jax.random.key(seed)}
    return unit.apply(variables, images, train, rngs=rngs, mutable=["batch_stats"])


@pytest.mark.parametrize(
    ("unit", "shape", "oracle"),
    [
        (efficientnet_v2.Stem(2, 8, "conv"), (2, 5, 6, 2), oracles.stem),
        (FUSED_ONCE, (2, 4, 5, 8), lambda *args: args[0] + oracles.fused_once(*args)),
        (efficientnet_v2.FusedMBConv(8, 12, 1, 3, 1, 1.0, "conv"), (2, 4, 5, 8), oracles.fused_once),
        (FUSED, (2, 4, 5, 8), lambda *args: args[0] + oracles.fused(*args)),
        (FUSED_STRIDED, (2, 4, 5, 8), lambda *args: oracles.fused(*args, stride=2)),
        (MBCONV, (2, 4, 5, 8), lambda *args: args[0] + oracles.mbconv(*args)),
        (MBCONV_STRIDED, (2, 4, 5, 8), lambda *args: oracles.mbconv(*args, stride=2)),
        (efficientnet_v2.Head(12, "conv"), (2, 3, 2, 8), oracles.head),
        (efficientnet_v2.Classifier(5, 0.5), (2, 8), oracles.classifier),
    ],
)
def test_units_are_those_of_the_paper(unit, shape, oracle):
    with jax.enable_x64(True):
        images, variables = with_random_variables(unit, shape)
        outputs, _ = run(unit, variables, images, train=False)
        params, stats = variables["params"], variables.get("batch_stats", {})
        expected = oracle(*jax.tree.map(np.asarray, (images, params, stats)))
        np.testing.assert_allclose(outputs, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "stem", "stages", "head"),
    [
        ("efficientnetv2-b0", 32, [(1, 16), (2, 32), (2, 48), (3, 96), (5, 112), (8, 192)], 1280),
        ("efficientnetv2-b2", 32, [(2, 16), (3, 32), (3, 56), (4, 104), (6, 120), (10, 208)], 1408),
        ("efficientnetv2-b3", 40, [(2, 16), (3, 40), (3, 56), (5, 112), (7, 136), (12, 232)], 1536),
        ("efficientnetv2-s", 24, [(2, 24), (4, 48), (4, 64), (6, 128), (9, 160), (15, 256)], 1280),
    ],
)
def test_scaled_depths_and_widths(name, stem, stages, head):
    first, *blocks, last, _ = models.create(name).units
    assert (first.features, last.features) == (stem, head)
    expected = [channels for repeats, channels in stages for _ in range(repeats)]
    assert [block.out_channels for block in blocks] == expected
    assert [block.in_channels for block in blocks] == [stem, *expected[:-1]]


# Google's own notation (r repeats, k kernel, s stride, e expansion, i in, o out, c1 fused).
BASE = """r1_k3_s1_e1_i32_o16_c1 r2_k3_s2_e4_i16_o32_c1 r2_k3_s2_e4_i32_o48_c1
    r3_k3_s2_e4_i48_o96_se0.25 r5_k3_s1_e6_i96_o112_se0.25 r8_k3_s2_e6_i112_o192_se0.25"""
S = """r2_k3_s1_e1_i24_o24_c1 r4_k3_s2_e4_i24_o48_c1 r4_k3_s2_e4_i48_o64_c1
    r6_k3_s2_e4_i64_o128_se0.25 r9_k3_s1_e6_i128_o160_se0.25 r15_k3_s2_e6_i160_o256_se0.25"""
M = """r3_k3_s1_e1_i24_o24_c1 r5_k3_s2_e4_i24_o48_c1 r5_k3_s2_e4_i48_o80_c1 r7_k3_s2_e4_i80_o160_se0.25
    r14_k3_s1_e6_i160_o176_se0.25 r18_k3_s2_e6_i176_o304_se0.25 r5_k3_s1_e6_i304_o512_se0.25"""
L = """r4_k3_s1_e1_i32_o32_c1 r7_k3_s2_e4_i32_o64_c1 r7_k3_s2_e4_i64_o96_c1 r10_k3_s2_e4_i96_o192_se0.25
    r19_k3_s1_e6_i192_o224_se0.25 r25_k3_s2_e6_i224_o384_se0.25 r7_k3_s1_e6_i384_o640_se0.25"""
XL = """r4_k3_s1_e1_i32_o32_c1 r8_k3_s2_e4_i32_o64_c1 r8_k3_s2_e4_i64_o96_c1 r16_k3_s2_e4_i96_o192_se0.25
    r24_k3_s1_e6_i192_o256_se0.25 r32_k3_s2_e6_i256_o512_se0.25 r8_k3_s1_e6_i512_o640_se0.25"""
RELEASED = {  # blocks, width, depth, dropout, image size in evaluation
    "b0": (BASE, 1.0, 1.0, 0.2, 224), "b1": (BASE, 1.0, 1.1, 0.2, 240), "b2": (BASE, 1.1, 1.2, 0.3, 260),
    "b3": (BASE, 1.2, 1.4, 0.3, 300), "s": (S, 1.0, 1.0, 0.2, 384), "m": (M, 1.0, 1.0, 0.3, 480),
    "l": (L, 1.0, 1.0, 0.4, 480), "xl": (XL, 1.0, 1.0, 0.4, 512),
}  # fmt: skip


def blocks_as_released(text, width, depth):
    """(kernel, stride, expansion, in, out, squeeze-excite) of every block."""
    for row in text.split():
        sizes = {part.rstrip("0123456789."): part.lstrip("rksieoc") for part in row.split("_")}
        r, k, s, e, i, o = (int(sizes[letter]) for letter in "rkseio")
        i, o = (int(8 * np.floor((filters * width + 4) / 8)) for filters in (i, o))
        ratio = float(sizes.get("se", 0))
        for repeat in range(int(np.ceil(r * depth))):
            yield (k, 1, e, o, o, ratio) if repeat else (k, s, e, i, o, ratio)


@pytest.mark.parametrize("name", RELEASED)
def test_every_block_of_every_variant_is_that_of_googles_release(name):
    text, width, depth, dropout, size = RELEASED[name]
    _, *blocks, _, classifier = models.create(f"efficientnetv2-{name}").units
    found = [
        (b.kernel_size, b.stride, b.expansion, b.in_channels, b.out_channels, getattr(b, "squeeze_excite", 0))
        for b in blocks
    ]
    assert found == list(blocks_as_released(text, width, depth))
    assert classifier.dropout == dropout
    assert efficientnet_v2.VARIANTS[f"efficientnetv2-{name}"].eval_size == size


def test_kinds_names_and_strides_of_s():
    units = models.create("efficientnetv2-s").units
    kinds = [type(unit).__name__ for unit in units]
    assert kinds == ["Stem", *["FusedMBConv"] * 10, *["MBConv"] * 30, "Head", "Classifier"]
    assert [unit.name for unit in units[:4]] == ["stem", "block1a", "block1b", "block2a"]
    assert [unit.name for unit in units[-3:]] == ["block6o", "head", "classifier"]
    strided = [unit.name for unit in units[1:-2] if unit.stride == 2]
    assert strided == ["block2a", "block3a", "block4a", "block6a"]
    assert [unit.squeeze_excite for unit in units if isinstance(unit, efficientnet_v2.MBConv)] == [0.25] * 30


@pytest.mark.parametrize("name", models.VARIANTS)
def test_names_are_unique(name):
    names = [unit.name for unit in models.create(name).units]
    assert len(set(names)) == len(names)


def test_blocks_after_z_are_named_as_columns_of_a_sheet():
    names = [unit.name for unit in models.create("efficientnetv2-xl").units if unit.name.startswith("block6")]
    assert names[25:28] == ["block6z", "block6aa", "block6ab"]


@pytest.mark.parametrize(
    ("name", "blocks", "last"), [("efficientnetv2-b0", 21, 1 - 4 / 21), ("efficientnetv2-b3", 32, 0.80625),
                                 ("efficientnetv2-s", 40, 0.805), ("efficientnetv2-xl", 100, 0.802)],
)  # fmt: skip
def test_survival_falls_linearly_over_the_scaled_number_of_blocks(name, blocks, last):
    survivals = [unit.survival for unit in models.create(name).units[1:-2]]
    assert len(survivals) == blocks
    assert survivals[0] == 1
    assert survivals[-1] == pytest.approx(last, abs=1e-12)
    np.testing.assert_allclose(np.diff(survivals), (last - 1) / (blocks - 1), rtol=1e-9)


def test_drop_rates_scale_to_nothing():
    chain = models.create("efficientnetv2-b3", drop_rate_scale=0.0)
    assert {unit.survival for unit in chain.units[1:-2]} == {1.0}
    assert chain.units[-1].dropout == 0
    half, published = (models.create("efficientnetv2-b3", drop_rate_scale=s).units for s in (0.5, 1.0))
    assert half[-1].dropout == published[-1].dropout / 2 == 0.15
    for unit, whole in zip(half[1:-2], published[1:-2], strict=True):
        assert 1 - unit.survival == pytest.approx((1 - whole.survival) / 2)


@pytest.mark.parametrize("unit", RESIDUAL)
def test_a_dropped_branch_leaves_its_sample_and_a_kept_one_is_scaled(unit):
    with jax.enable_x64(True):
        images, variables = with_random_variables(unit, (16, 2, 3, 8))
        whole, stats = run(unit, variables, images, train=True)
        dropping = unit.clone(survival=0.5)
        dropped, stats_dropping = run(dropping, variables, images, train=True)
        branch, factors = np.asarray(whole - images), np.asarray(dropped - images)
        kept = np.abs(factors).max((1, 2, 3)) > 0
        assert 0 < kept.sum() < 16
        np.testing.assert_allclose(factors, 2 * branch * kept[:, None, None, None], rtol=1e-9, atol=1e-12)
        jax.tree.map(np.testing.assert_array_equal, stats_dropping, stats)
        evaluated = [run(block, variables, images, train=False)[0] for block in (unit, dropping)]
        np.testing.assert_array_equal(*evaluated)


@pytest.mark.parametrize("unit", [FUSED_STRIDED, MBCONV_STRIDED])
def test_blocks_without_a_residual_never_drop(unit):
    images, variables = with_random_variables(unit, (4, 2, 3, 8))
    outputs = [run(block, variables, images, True)[0] for block in (unit, unit.clone(survival=1e-9))]
    np.testing.assert_array_equal(*outputs)


def test_dropout_drops_single_values_before_the_classifier():
    classifier, x = efficientnet_v2.Classifier(500, 0.3), jnp.ones((100, 500))
    identity = {"params": {"dense": {"dense_kernel": jnp.eye(500), "bias": jnp.zeros(500)}}}
    outputs, _ = run(classifier, identity, x, train=True)
    np.testing.assert_allclose(np.unique(outputs), [0, 1 / 0.7], rtol=1e-6)
    assert (outputs == 0).mean() == pytest.approx(0.3, abs=4 * np.sqrt(0.21 / 50_000))
    np.testing.assert_array_equal(run(classifier, identity, x, train=False)[0], x)


@pytest.mark.parametrize(("in_channels", "reduced"), [(2, 1), (48, 12), (99, 24)])
def test_squeeze_excite_reduces_to_a_quarter_of_the_blocks_input(in_channels, reduced):
    block = efficientnet_v2.MBConv(in_channels, 8, 4, 3, 1, 0.25, 1.0)
    x = jax.ShapeDtypeStruct((1, 2, 2, in_channels), jnp.float32)
    params = jax.eval_shape(lambda x: block.init(jax.random.key(0), jnp.zeros(x.shape), False), x)["params"]
    assert params["squeeze_excite"]["reduce"]["kernel"].shape == (4 * in_channels, reduced)


def test_tiny_has_every_kind_of_unit():
    units = models.create("efficientnetv2-tiny").units
    assert {type(unit) for unit in units} == {type(unit) for unit in models.create("efficientnetv2-b0").units}
    residual = [unit for unit in units[1:-2] if unit.stride == 1 and unit.in_channels == unit.out_channels]
    assert {(type(unit).__name__, unit.expansion) for unit in residual} == {
        ("FusedMBConv", 1), ("FusedMBConv", 4), ("MBConv", 4),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (
            {"name": "efficientnetv2-b9"},
            ["model=efficientnetv2-b9", "efficientnetv2-b0", "efficientnetv2-tiny"],
        ),
        ({"name": "efficientnetv2-b0", "layer_form": "dots"}, ["layer_form=dots", *layers.FORMS]),
    ],
)
def test_what_does_not_exist_is_refused_in_one_line(arguments, named):
    with pytest.raises(BadInput) as refused:
        models.create(**arguments)
    message = str(refused.value)
    assert "\n" not in message
    assert all(word in message for word in named)


def test_images_of_other_channels_are_refused():
    chain = models.create("efficientnetv2-tiny", in_channels=1)
    with pytest.raises(ValueError, match="images have 3 channels; the stem takes 1"):
        chain.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
