"""The results of an evaluation for given logits."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

from sfl_jax.federated.evaluation import BATCH, batch_at, batch_of, evaluate, in_batches
from sfl_jax.federated.evaluation import accuracy as accuracy_of
from sfl_jax.federated.packing import PackedVariables
from sfl_jax.federated.session import cross_entropy
from sfl_jax.models import Chain, Variables

CLASSES, BAD = 4, 255


class PixelsAreLogits(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return x.reshape(len(x), -1)


def said_of(pixels, labels, bad=np.nan):
    """(mean loss, accuracy) of images of four pixels, each a logit. `bad` replaces a pixel of 255."""

    def preprocess(images):
        return jnp.where(images == BAD, bad, images.astype(jnp.float32))

    chain, packed = Chain((PixelsAreLogits(),)), PackedVariables.of(Variables(({},), ({},)))
    samples = in_batches(pixels.reshape(-1, 2, 2, 1), labels, batch=3)
    samples = type(samples)(*(x[0] for x in samples))
    loss, mean, by_class = evaluate(chain, preprocess, cross_entropy, accuracy_of, None, packed, samples)
    rights = np.where((pixels == BAD).any(), np.nan, pixels.argmax(-1) == labels)
    expected = [
        rights[labels == number].mean() if (labels == number).any() else np.nan for number in range(CLASSES)
    ]
    np.testing.assert_array_equal(np.isnan(by_class), np.isnan(expected))
    np.testing.assert_allclose(np.nan_to_num(by_class), np.nan_to_num(expected), rtol=1e-6)
    return float(loss), float(mean)


@pytest.fixture
def pixels():
    return np.random.default_rng(0).permutation(40).reshape(10, CLASSES).astype(np.uint8)


def test_loss_and_accuracy_are_those_of_all_samples(pixels):
    """Ten samples in batches of three, with padding in the last."""
    labels = np.array([0, 1, 2, 3, 0, 0, 1, 2, 3, 3], np.int32)
    logits = pixels.astype(float)
    own = np.log(np.exp(logits).sum(1)) - logits[np.arange(10), labels]
    loss, accuracy = said_of(pixels, labels)
    np.testing.assert_allclose(loss, own.mean(), rtol=1e-5)
    np.testing.assert_allclose(accuracy, (logits.argmax(1) == labels).mean(), rtol=1e-6)
    assert 0 < accuracy < 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_network_that_computes_no_number_has_no_accuracy(pixels, bad):
    """NaN everywhere would count as right for class 0. One infinite logit may be right or wrong."""
    for where in (np.s_[:], np.s_[3, 2]):
        broken = pixels.copy()
        broken[where] = BAD
        for label in (0, 2):
            assert np.isnan(said_of(broken, np.full(10, label, np.int32), bad)).all()


def test_what_fills_a_batch_up_is_no_sample():
    """Padding is black: here its logits are not finite, and they do not count."""
    full = np.full((4, CLASSES), 7, np.uint8)
    full[:, 1] = 9

    def black_is_nan(images):
        return jnp.where((images == 0).all((1, 2, 3), keepdims=True), jnp.nan, images.astype(jnp.float32))

    chain, packed = Chain((PixelsAreLogits(),)), PackedVariables.of(Variables(({},), ({},)))
    samples = in_batches(full.reshape(-1, 2, 2, 1), np.full(4, 1, np.int32), batch=3)
    assert samples.labels.tolist() == [[[1, 1], [1, 1]]]
    samples = in_batches(full[:3].reshape(-1, 2, 2, 1), np.full(3, 1, np.int32), batch=2)
    assert samples.labels.tolist() == [[[1, 1], [1, -1]]]
    given = type(samples)(*(x[0] for x in samples))
    loss, accuracy, _ = evaluate(chain, black_is_nan, cross_entropy, accuracy_of, None, packed, given)
    assert np.isfinite(loss)
    assert accuracy == 1


def test_an_evaluation_takes_fewer_of_larger_images():
    assert [batch_at(size) for size in (8, 32, 64, 224, 4096)] == [BATCH, BATCH, 125, 10, 1]
    assert [batch_of(shape) for shape in ((28, 64, 3), (784,), (65, 192))] == [125, BATCH, BATCH]
    pixels = np.array([batch_at(size) * size**2 for size in (33, 64, 224)])
    assert (pixels <= BATCH * 32**2).all()
