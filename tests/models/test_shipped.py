"""Shipped networks except EfficientNet: their published sizes, what they compute, and that they learn."""

import finite
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from sfl_jax import models, registry
from sfl_jax.errors import BadInput

# Parameters, multiply-accumulates of one image, and state. ResNet-18 and VGG-11: those of
# kuangliu/pytorch-cifar; CNN and 2NN: the counts of McMahan et al. (2017); DeiT-Ti: Touvron et al. (2021).
PUBLISHED = {
    "resnet18": ((32, 32, 3), 10, 11_173_962, 555.4e6, 9_600),
    "vgg11": ((32, 32, 3), 10, 9_231_114, 152.9e6, 5_504),
    "cnn": ((28, 28, 1), 10, 1_663_370, 12.3e6, 0),
    "mlp": ((28, 28, 1), 10, 199_210, 0.2e6, 0),
    "vit-tiny": ((224, 224, 3), 1000, 5_717_416, 1.26e9, 0),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_the_published_ones(name):
    shape, classes, parameters, macs, state = PUBLISHED[name]
    profile = models.profile(models.create(name, classes, shape[-1]), shape)
    assert profile.parameters.sum() == parameters
    assert profile.state.sum() == state
    assert profile.forward_macs.sum() == pytest.approx(macs, rel=0.02)


def test_every_registered_network_is_tested():
    assert {name for name in registry.NETWORKS if name not in models.VARIANTS} == PUBLISHED.keys()
    with pytest.raises(BadInput, match=r"^model=resnet19: must be one of efficientnetv2-tiny, .*, resnet18"):
        models.create("resnet19")


def test_pixels_that_no_patch_holds_are_refused():
    for height, width, line in ((30, 32, "images of 30x32: must"), (33, 33, "image_size=33: must")):
        with pytest.raises(BadInput, match=f"^{line}"):
            models.create("vit-tiny", 10, 1).init(jax.random.key(0), jnp.zeros((1, height, width, 1)))


def test_a_function_that_takes_other_arguments_is_refused_in_one_line(monkeypatch):
    monkeypatch.setitem(models.NETWORKS._members, "mine", lambda num_classes: ())
    with pytest.raises(BadInput, match=r"^model=mine: its function must take \(name, num_classes, "):
        models.create("mine")


def test_smashed_data_by_hand():
    smashed = models.profile(models.create("resnet18", 10, 3), (32, 32, 3)).smashed
    maps = [3 * 32**2, *[64 * 32**2] * 3, *[128 * 16**2] * 2, *[256 * 8**2] * 2, *[512 * 4**2] * 2, 512, 0]
    assert smashed.tolist() == maps
    assert models.profile(models.create("vit-tiny", 10, 3), (32, 32, 3)).smashed.tolist() == [
        3 * 32**2, *[65 * 192] * 13, 192, 0,
    ]  # fmt: skip


def conv(x, layer, stride=1, pad=1):
    ways = ("NHWC", "HWIO", "NHWC")
    padding = [(pad, pad)] * 2
    y = lax.conv_general_dilated(x, layer["kernel"], (stride, stride), padding, dimension_numbers=ways)
    return y + layer.get("bias", 0)


def norm(x, layer, stats):
    return (x - stats["mean"]) / np.sqrt(stats["var"] + 1e-5) * layer["scale"] + layer["bias"]


def layer_norm(x, layer):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * layer["scale"] + layer["bias"]


def dense(x, layer):
    return x @ layer["kernel"] + layer["bias"]


def relu(x):
    return np.maximum(x, 0)


def pooled(x):
    batch, height, width, channels = x.shape
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).max((2, 4))


def resnet18(x, params, stats):
    x = relu(norm(conv(x, params[0]["conv"]), params[0]["bn"], stats[0]["bn"]))
    for place, (own, state) in enumerate(zip(params[1:9], stats[1:9], strict=True)):
        stride = 2 if place in (2, 4, 6) else 1
        y = relu(norm(conv(x, own["conv1"], stride), own["bn1"], state["bn1"]))
        y = norm(conv(y, own["conv2"]), own["bn2"], state["bn2"])
        if stride == 2:
            x = conv(x, own["shortcut_conv"], 2, 0)
            x = norm(x, own["shortcut_bn"], state["shortcut_bn"])
        x = relu(x + y)
    return dense(x.mean((1, 2)), params[-1]["dense"])


def vgg11(x, params, stats):
    for place, (own, state) in enumerate(zip(params[:8], stats[:8], strict=True)):
        x = relu(norm(conv(x, own["conv"]), own["bn"], state["bn"]))
        x = pooled(x) if place in (0, 1, 3, 5, 7) else x
    return dense(x[:, 0, 0], params[-1]["dense"])


def cnn(x, params, stats):
    for own in params[:2]:
        x = pooled(relu(conv(x, own["conv"], pad=2)))
    return dense(relu(dense(x.reshape(len(x), -1), params[2]["dense"])), params[3]["dense"])


def mlp(x, params, stats):
    x = x.reshape(len(x), -1)
    for own in params[:2]:
        x = relu(dense(x, own["dense"]))
    return dense(x, params[2]["dense"])


def vit(x, params, stats):
    own, batch = params[0], len(x)
    patches = [
        x[:, row : row + 4, column : column + 4].reshape(batch, -1)
        for row in range(0, x.shape[1], 4)
        for column in range(0, x.shape[2], 4)
    ]
    x = dense(np.stack(patches, 1), own["patches"])
    x = np.concatenate([np.repeat(own["token"], batch, 0), x], 1) + own["positions"]
    for own in params[1:13]:
        y, heads = layer_norm(x, own["norm1"]), own["attention"]
        q, k, v = (
            np.einsum("btd,dhe->bhte", y, heads[name]["kernel"]) + heads[name]["bias"][:, None]
            for name in ("query", "key", "value")
        )
        weights = jax.nn.softmax(np.einsum("bhte,bhse->bhts", q, k) / 8, axis=-1)
        mixed = np.einsum("bhts,bhse->bthe", weights, v)
        x = x + np.einsum("bthe,hed->btd", mixed, heads["out"]["kernel"]) + heads["out"]["bias"]
        y = dense(layer_norm(x, own["norm2"]), own["expand"])
        x = x + dense(y * (1 + jax.scipy.special.erf(y / np.sqrt(2))) / 2, own["project"])
    return dense(layer_norm(x[:, 0], params[13]["norm"]), params[14]["dense"])


ORACLES = {"resnet18": resnet18, "vgg11": vgg11, "cnn": cnn, "mlp": mlp, "vit-tiny": vit}
of_each_network = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in ("cnn", "mlp") else pytest.mark.slow) for n in PUBLISHED]
)


@of_each_network
def test_it_computes_what_is_published(name):
    """In float64, with variables that differ from the initial ones, in both forms, at every cut."""
    shape = PUBLISHED[name][0] if name != "vit-tiny" else (32, 32, 3)
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        chain = models.create(name, 10, shape[-1])
        variables = chain.init(jax.random.key(0), jnp.zeros((1, *shape)))
        variables = jax.tree.map(lambda v: jnp.asarray(v + 0.1 * rng.random(v.shape)), variables)
        images = jnp.asarray(rng.normal(size=(2, *shape)))
        numbers = jax.tree.map(np.asarray, variables)
        expected = ORACLES[name](np.asarray(images), numbers.params, numbers.batch_stats)
        found, _ = chain.apply(variables, images)
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)
        other, _ = chain.in_form("conv").apply(variables, images)
        np.testing.assert_allclose(other, expected, rtol=1e-9, atol=1e-9)
        assert not finite.are_close(found, np.roll(expected, 1, axis=0), rtol=1e-3, atol=1e-3)
        for cut in range(len(chain) + 1):
            front, back = chain.split_variables(variables, cut)
            client, server = chain.split(cut)
            smashed, _ = client.apply(front, images)
            again, _ = server.apply(back, smashed)
            np.testing.assert_allclose(again, found, rtol=1e-12, atol=1e-12)


@of_each_network
def test_a_step_of_two_clients_lowers_the_loss_of_each(name):
    """In float64, from initial variables, with one gradient in both forms."""
    rng, channels = np.random.default_rng(1), PUBLISHED[name][0][-1]
    with jax.enable_x64(True):
        images, labels = jnp.asarray(rng.normal(size=(2, 4, 8, 8, channels))), jnp.arange(4) % 3
        chain = models.create(name, 3, channels)
        one = jax.tree.map(lambda v: jnp.asarray(v, float), chain.init(jax.random.key(0), images[0]))
        variables = jax.tree.map(lambda v: jnp.stack([v, v]), one)

        def slopes(params, form):
            def loss_of(params, images):
                inputs = one._replace(params=params)
                logits, _ = chain.in_form(form).apply(inputs, images, train=True, key=jax.random.key(0))
                return -jax.nn.log_softmax(logits)[jnp.arange(4), labels].mean()

            return jax.vmap(jax.value_and_grad(loss_of))(params, images)

        slopes = jax.jit(slopes, static_argnums=1)
        before, gradients = slopes(variables.params, "product")
        _, expected = slopes(variables.params, "conv")
        assert finite.are_close(gradients, expected, rtol=1e-8, atol=1e-10)
        assert not finite.are_close(gradients, jax.tree.map(lambda g: g[::-1], expected), atol=1e-4)
        moved = jax.tree.map(lambda p, g: p - 1e-3 * g, variables.params, gradients)
        after, _ = slopes(moved, "product")
        assert (after < before).all()


@pytest.mark.parametrize("name", ["efficientnetv2-tiny", "resnet18", "vgg11"])
def test_group_norm_takes_the_place_of_batch_norm(name):
    """It has the same parameters, keeps no statistics, and a sample does not depend on the others."""
    plain, own = (models.create(name, 10, 1, norm=norm) for norm in ("batch", "group"))
    shapes = [jax.eval_shape(c.init, jax.random.key(0), jnp.zeros((1, 16, 16, 1))) for c in (plain, own)]
    assert jax.tree.map(jnp.shape, shapes[0].params) == jax.tree.map(jnp.shape, shapes[1].params)
    assert jax.tree.leaves(shapes[0].batch_stats)
    assert not jax.tree.leaves(shapes[1].batch_stats)


def test_networks_without_batch_norm_refuse_group_norm():
    for name in ("cnn", "mlp", "vit-tiny"):
        with pytest.raises(BadInput, match=f"norm=group: model={name} has no batch norm"):
            models.create(name, norm="group")
    with pytest.raises(BadInput, match="norm=layer: must be one of batch, group"):
        models.create("resnet18", norm="layer")
