"""Small rounds for tests: tiny on 16x16 noise, one client for every cut, unequal sessions and weights; a
chain of three units on 4x4 noise, which compiles in a second; and the same for the protocol.
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
    """Fewer units, one of each kind: what devices do with a network depends on its variables alone."""
    stem, fused, *_, separable, _, head, classifier = chain.units
    return Chain((stem, fused, separable, head, classifier))


def number(key):
    """In 0..1, another for every key, and cheap to compile."""
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
# Not the identity, so that every cut gives numbers of its own.
SCALING = CutCodec(up=lambda x, _: 0.5 * x, down=lambda g, _: 2.0 * g)
# With the keys that it is given, both ways.
NOISY = CutCodec(up=lambda x, key: (1 + number(key)) * x, down=lambda g, key: number(key) * g)
OPTIMIZERS = {  # of learning rate 1
    "sgd": optimizers.sgd(0.9),
    # With its usual epsilon Adam makes whole steps of gradients that are 0 but for rounding, those of biases
    # that the next batch norm takes away. Element by element only this can be compared; `SHARP` by its norm.
    "adam": optimizers.adam(eps=1.0),
}
OF_OPTAX = {  # by the learning rate
    "sgd": lambda rate: optax.sgd(rate, 0.9),
    "adam": lambda rate: optax.adam(rate, eps=1.0),
}
# By x64: epsilons so small that nearly every element moves by a whole step, whatever its gradient. Of such
# updates the norm is compared, see `distance`.
SHARP = {False: 1e-3, True: 1e-7}
SHARP_RATE, SHARP_BATCH = (
    0.01,
    16,
)  # less of a step is rounding of the parameters, and of a mean over the batch
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
    """The world of the protocol in which parties do what `training` says, with an optimiser of optax."""
    codecs = {} if training.codecs is None else vars(training.codecs)
    if training.augment is not None:
        codecs = codecs | {"augment": training.augment}
    return protocol.World(
        training.chain.units, by_unit(training.chain, variables), optimizer, training.preprocess,
        *samples, key, **codecs, proximal=training.proximal, clip_norm=training.clip_norm,
    )  # fmt: skip


def works(assignments):
    """Assignments as the protocol takes them."""
    rows = zip(*map(np.asarray, assignments[:5]), strict=True)
    return [
        protocol.Work(int(client), int(cut), float(weight), batches[:steps])
        for client, cut, weight, steps, batches in rows
    ]


def by_unit(chain, variables):
    """What the protocol calls variables."""
    return [chain.unit_variables(variables, index) for index in range(len(chain))]


def sharp_training(x64, codecs=None, chain=CHAIN, **changes):
    """With Adam of a small epsilon; `changes` are of its arguments."""
    return Training(chain, optimizers.adam(**{"eps": SHARP[x64], **changes}), preprocess, codecs)


def poisoned(samples, work, client):
    """(samples of which the last is black, work in which that is all that the k-th client sees)."""
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
    """NumPy assignments of one client a cut, of 2 and 1 steps in turn."""
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
        packed, losses = run_session(training, start, samples, work, key, jnp.asarray(rate), jax.vmap)
        return jax.vmap(PackedVariables.unpack)(packed), losses

    results = run(variables, samples, work)
    return [client(results, k) for k in range(len(work.client))]


def client(work, k):
    """What the k-th client has or does, of a tree with a leading axis of clients."""
    return jax.tree.map(lambda x: x[k], work)


def difference(tree, other):
    """The largest difference of two trees, each leaf relative to its largest element. All must be finite.

    Leaves below 0.01 are measured against 0.01: a bias that batch norm cancels is 0 but for rounding.
    """

    def of_leaf(a, b):
        return np.abs(a - b).max() / max(np.abs(a).max(), 0.01)

    return max(of_leaf(a, b) for a, b in finite.pairs(unpacked(tree), unpacked(other)))


def unpacked(tree):
    """The tree with what is packed in it as it was before."""
    return jax.tree.map(
        lambda part: part.unpack() if isinstance(part, Packed) else part,
        tree,
        is_leaf=lambda part: isinstance(part, Packed),
    )


def distance(params, other, start):
    """The norm of the difference of two results over that of the update that led to the second. All must be
    finite.
    """

    def norm(a, b):
        return np.linalg.norm([np.linalg.norm(x - y) for x, y in finite.pairs(a, b)])

    return norm(params, other) / norm(other, start)


def typical_update(params, start, rate):
    """The median size of what elements moved, in steps of the learning rate. All must be finite."""
    moved = [np.abs(np.ravel(x - y)) for x, y in finite.pairs(params, start)]
    return np.median(np.concatenate(moved)) / rate
