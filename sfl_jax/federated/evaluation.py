"""Measures the global variables on test samples."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from sfl_jax.federated.packing import PackedVariables
from sfl_jax.federated.session import Loss, Samples
from sfl_jax.models import Chain

Metric = Callable[[Array, Array], Array]  # logits (B, classes), labels (B,) -> (B,) bools or floats
BATCH = 500  # images of 32x32 that are evaluated at once


def batch_of(shape: tuple[int, ...]) -> int:
    """The batch size of an evaluation. Samples that are not images (H, W, C) count as small ones."""
    return batch_at(max(shape[:2])) if len(shape) == 3 else BATCH


def accuracy(logits: Float[Array, "B classes"], labels: Int[Array, " B"]) -> Bool[Array, " B"]:
    """Whether the largest logit is the label's."""
    return logits.argmax(-1) == labels


def batch_at(image_size: int) -> int:
    """The batch size of an evaluation. It falls with the image size, so that memory stays the same."""
    return max(1, min(BATCH, BATCH * 32**2 // image_size**2))


def in_batches(images: np.ndarray, labels: np.ndarray, parts: int = 1, batch: int = BATCH) -> Samples:
    """Samples as NumPy arrays (parts, N', B, ...), with B at most `batch`. Padding has the label -1."""
    of_part = -(-len(labels) // parts)
    batches = -(-of_part // batch)
    shape = parts, batches, -(-of_part // batches)
    missing = math.prod(shape) - len(labels)
    images = np.concatenate([images, np.zeros((missing, *images.shape[1:]), images.dtype)])
    labels = np.concatenate([labels, np.full(missing, -1, labels.dtype)])
    return Samples(images.reshape(*shape, *images.shape[1:]), labels.reshape(shape))


def evaluate(
    chain: Chain,
    preprocess: Callable[[Array], Array],
    loss_of: Loss,
    metric: Metric,
    axis_name: str | None,
    packed: PackedVariables,
    samples: Samples,
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, " classes"]]:
    """(mean loss, mean metric, mean metric of each class) over samples in batches (N', B, ...).

    Samples with label -1 do not count. A class without samples is NaN. If logits are not (B, classes), there
    are no classes. All are NaN if any logit is not finite, because even then the largest names a class.

    Under `axis_name` the samples are one device's part, and the means are over all devices.
    """
    chain, variables = chain.alone(), packed.unpack()

    def add_batch(sums, batch):
        images, labels = batch
        logits, _ = chain.apply(variables, preprocess(images))
        counts = labels >= 0
        known = jnp.maximum(labels, 0)
        loss = jnp.where(counts, loss_of(logits, known), 0).sum()
        right = jnp.where(counts, metric(logits, known), False)
        unsound = counts & ~jnp.isfinite(logits).all(-1)
        is_class = jax.nn.one_hot(labels, classes_of(logits), dtype=jnp.float32)
        # In full precision: a GPU would round a metric that is no 0 or 1.
        rights = jnp.matmul(right.astype(jnp.float32), is_class, precision=lax.Precision.HIGHEST)
        of_class = rights, is_class.sum(0)
        return jax.tree.map(jnp.add, sums, (loss, right.sum(), unsound.sum(), of_class)), None

    nothing = jnp.zeros((), jnp.int32)
    first = jax.tree.map(lambda x: x[0], tuple(samples))
    logits, _ = jax.eval_shape(lambda x: chain.apply(variables, preprocess(x)), first[0])
    right = jax.eval_shape(metric, logits, first[1])
    no_class = jnp.zeros(classes_of(logits))
    start = jnp.zeros(()), jax.eval_shape(jnp.sum, right), nothing, (no_class, no_class)
    start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), start)
    sums, _ = lax.scan(add_batch, start, tuple(samples))
    sums = *sums, (samples.labels >= 0).sum()
    loss, correct, unsound, by_class, total = sums if axis_name is None else lax.psum(sums, axis_name)
    total, of_class = (jnp.where(unsound > 0, jnp.nan, count) for count in (total, by_class[1]))
    return loss / total, correct / total, by_class[0] / of_class


def classes_of(logits: Any) -> int:
    """The classes of logits (B, classes); 0 of other outputs."""
    return logits.shape[1] if getattr(logits, "ndim", 0) == 2 else 0
