"""Small rounds for tests, compiled and for the protocol.

One is tiny on 16x16 noise, with one client for each cut and unequal sessions and weights. The other is a
chain of three units on 4x4 noise, which compiles in a second.
"""

import finite
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from sfl_jax import models
from sfl_jax.federated import optimizers, protocol
from sfl_jax.federated.crossing import CutCodec
from sfl_jax.federated.packing import Packed, PackedVariables
from sfl_jax.federated.session import Assignment, Samples, Training, run_session
from sfl_jax.models import Chain


def short(chain):
    """Fewer units, one of each kind. What devices do with a network depends only on its variables."""
    stem, fused, *_, separable, _, head, classifier = chain.units
    return Chain((stem, fused, separable, head, classifier))


def number(key):
    """A number in 0..1 that differs for every key and is cheap to compile."""
    return jax.random.key_data(key)[-1].astype(jnp.result_type(float)) / 2.0**32


class Block(nn.Module):
    """A unit with statistics, a counter and random numbers."""

    features: int

    @nn.compact
    def __call__(self, x, train):
        calls = self.variable("batch_stats", "calls", lambda: jnp.zeros((), jnp.int32))
        calls.value += train
        x = nn.Dense(self.features, use_bias=False)(x.reshape(len(x), -1))
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        return nn.silu(x) * (number(self.make_rng("drop")) if train else 0.5)


class Head(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.Dense(10)(x.reshape(len(x), -1))


SMALL_CHAIN = Chain((Block(12), Block(8), Head()))
SMALL_CUTS, SMALL_SIZE = len(SMALL_CHAIN) + 1, 4
CHAIN = models.create("efficientnetv2-tiny")
REFERENCE_CHAIN = models.create("efficientnetv2-tiny", layer_form="conv")
CUTS = len(CHAIN) + 1
# Not the identity, so that every cut gives other numbers.
SCALING = CutCodec(up=lambda x, _: 0.5 * x, down=lambda g, _: 2.0 * g)
# Uses its key in both directions.
NOISY = CutCodec(up=lambda x, key: (1 + number(key)) * x, down=lambda g, key: number(key) * g)
OPTIMIZERS = {  # with learning rate 1
    "sgd": optimizers.sgd(0.9),
    # Biases before a batch norm have gradients that are 0 except for rounding. With its usual epsilon, Adam
    # makes whole steps of them. Only this epsilon can be compared by element; `SHARP` is compared by norm.
    "adam": optimizers.adam(eps=1.0),
}
OF_OPTAX = {  # depends on the learning rate
    "sgd": lambda rate: optax.sgd(rate, 0.9),
    "adam": lambda rate: optax.adam(rate, eps=1.0),
}
# By x64: epsilons so small that nearly every element moves by a whole step for any gradient. The norm of
# such updates is compared, see `distance`.
SHARP = {False: 1e-3, True: 1e-7}
SHARP_RATE, SHARP_BATCH = (
    0.01,
    16,
)  # a smaller part of a step is rounding of the parameters and of a mean over the batch
RATE = 0.05


def preprocess(images):
    return images.astype(jnp.result_type(float)) / 127.5 - 1


def mirror(images, key):
    """Images that are mirrored or not, by the key."""
    return jnp.where(number(key) > 0.5, images[:, :, ::-1], images)


def preprocess_black_to_nan(images):
    return jnp.where((images == 0).all((1, 2, 3), keepdims=True), jnp.nan, preprocess(images))


def training(optimizer="sgd", codecs=None, chain=CHAIN):
    return Training(chain, OPTIMIZERS[optimizer], preprocess, codecs)


def world(training, variables, samples, key, optimizer):
    """The protocol's world in which parties do what `training` says, with an optax optimiser."""
    codecs = {} if training.codecs is None else vars(training.codecs)
    if training.augment is not None:
        codecs = codecs | {"augment": training.augment}
    return protocol.World(
        training.chain.units, by_unit(training.chain, variables), optimizer, training.preprocess,
        *samples, key, **codecs, proximal=training.proximal, clip_norm=training.clip_norm,
    )  # fmt: skip


def works(assignments):
    """Assignments in the form of the protocol."""
    rows = zip(*map(np.asarray, assignments[:5]), strict=True)
    return [
        protocol.ClientWork(int(client), int(cut), float(weight), batches[:steps])
        for client, cut, weight, steps, batches in rows
    ]


def by_unit(chain, variables):
    """Variables in the form of the protocol."""
    return [chain.unit_variables(variables, index) for index in range(len(chain))]


def sharp_training(x64, codecs=None, chain=CHAIN, **changes):
    """With Adam of a small epsilon. `changes` are arguments of Adam."""
    return Training(chain, optimizers.adam(**{"eps": SHARP[x64], **changes}), preprocess, codecs)


def poisoned(samples, work, client):
    """(samples of which the last is black, work in which the k-th client sees only this one)."""
    batches = work.batches.copy()
    batches[client] = len(samples.labels) - 1
    images = np.array(samples.images)
    images[-1] = 0
    return samples._replace(images=images), work._replace(batches=batches)


def start(chain=CHAIN, size=16):
    """(variables, samples) with all floats in the default float type."""

    def default(x):
        return x.astype(jnp.result_type(float)) if jnp.issubdtype(x.dtype, jnp.floating) else x

    variables = jax.tree.map(default, chain.init(jax.random.key(0), jnp.zeros((1, size, size, 1))))
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (64, size, size, 1), np.uint8)
    return variables, Samples(jnp.asarray(images), jnp.asarray(rng.integers(0, 10, 64).astype(np.int32)))


def assignments(cuts=range(CUTS), steps=None, batch=4, seed=0):
    """NumPy assignments of one client for each cut, with 2 and 1 steps in turn."""
    clients = len(cuts)
    rng = np.random.default_rng(seed)
    steps = np.arange(clients) % 2 + 1 if steps is None else np.broadcast_to(steps, clients)
    return Assignment(
        client=np.arange(clients, dtype=np.int32) + 3,
        cut=np.array(cuts, np.int32),
        weight=np.arange(1, clients + 1, dtype=np.float32),
        steps=steps.astype(np.int32),
        batches=rng.integers(0, 64, (clients, max(2, steps.max()), batch)).astype(np.int32),
    )


def sessions(training, variables, samples, work, key, rate=RATE):
    """Compiled sessions of all clients at once: a list of (variables, loss)."""

    @jax.jit
    def run(variables, samples, work):
        start = PackedVariables.of(variables)
        packed, losses, _ = run_session(training, start, samples, work, key, jnp.asarray(rate), jax.vmap)
        return jax.vmap(PackedVariables.unpack)(packed), losses

    results = run(variables, samples, work)
    return [client(results, k) for k in range(len(work.client))]


def client(work, k):
    """The k-th client's part of a tree with a leading axis of clients."""
    return jax.tree.map(lambda x: x[k], work)


def difference(tree, other):
    """The largest difference of two trees, each leaf relative to its largest element. All must be finite.

    A leaf below 0.01 is compared with 0.01: a bias that batch norm cancels is 0 except for rounding.
    """

    def of_leaf(a, b):
        return np.abs(a - b).max() / max(np.abs(a).max(), 0.01)

    return max(of_leaf(a, b) for a, b in finite.pairs(unpacked(tree), unpacked(other)))


def unpacked(tree):
    """The tree with everything packed in it unpacked."""
    return jax.tree.map(
        lambda part: part.unpack() if isinstance(part, Packed) else part,
        tree,
        is_leaf=lambda part: isinstance(part, Packed),
    )


def distance(params, other, start):
    """The norm of the difference of two results over the norm of the update that led to the second.

    All numbers must be finite.
    """

    def norm(a, b):
        return np.linalg.norm([np.linalg.norm(x - y) for x, y in finite.pairs(a, b)])

    return norm(params, other) / norm(other, start)


def typical_update(params, start, rate):
    """The median size of the moved elements' updates, in steps of the learning rate. All must be finite."""
    moved = [np.abs(np.ravel(x - y)) for x, y in finite.pairs(params, start)]
    return np.median(np.concatenate(moved)) / rate
