"""How good the global variables are on held-out samples."""

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
BATCH = 500  # samples of 32x32 at once


def batch_of(shape: tuple[int, ...]) -> int:
    """Samples of an evaluation's batch; samples that are no images (H, W, C) count as small ones."""
    return batch_at(max(shape[:2])) if len(shape) == 3 else BATCH


def accuracy(logits: Float[Array, "B classes"], labels: Int[Array, " B"]) -> Bool[Array, " B"]:
    """Whether the largest logit is that of the label."""
    return logits.argmax(-1) == labels


def batch_at(image_size: int) -> int:
    """Samples of an evaluation's batch: fewer of larger images, so that the memory stays that of `BATCH`."""
    return max(1, min(BATCH, BATCH * 32**2 // image_size**2))


def in_batches(images: np.ndarray, labels: np.ndarray, parts: int = 1, batch: int = BATCH) -> Samples:
    """Samples as (parts, N', B, ...) NumPy arrays, B at most `batch`, filled up with samples of label -1."""
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

    Labels of -1 do not count. A class without samples is NaN. There are no classes where logits are not (B,
    classes). The means are NaN where any logit is not finite: the largest of such logits names a class all
    the same.

    Under `axis_name` these are some of the samples, and the means are those of all devices'.
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
        of_class = is_class.T @ right.astype(jnp.float32), is_class.sum(0)
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
    total = jnp.where(unsound > 0, jnp.nan, total)
    return loss / total, correct / total, by_class[0] / by_class[1]


def classes_of(logits: Any) -> int:
    """The classes of logits (B, classes); 0 of other outputs."""
    return logits.shape[1] if getattr(logits, "ndim", 0) == 2 else 0
