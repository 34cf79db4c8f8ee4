"""How good the global variables are on held-out samples."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from sfl_jax.federated.session import Samples, cross_entropy
from sfl_jax.models import Chain, Variables

BATCH = 500


def in_batches(images: np.ndarray, labels: np.ndarray, batch: int = BATCH) -> Samples:
    """Samples as (N / batch, batch, ...) NumPy arrays, the last batch filled up with samples of label -1."""
    missing = -len(labels) % batch
    images = np.concatenate([images, np.zeros((missing, *images.shape[1:]), images.dtype)])
    labels = np.concatenate([labels, np.full(missing, -1, labels.dtype)])
    return Samples(images.reshape(-1, batch, *images.shape[1:]), labels.reshape(-1, batch))


def compile_evaluation(
    chain: Chain, preprocess: Callable[[Array], Array]
) -> Callable[..., tuple[Array, Array]]:
    """evaluate(variables, samples from `in_batches`) -> (mean cross-entropy, accuracy); labels of -1 do not
    count.
    """
    return jax.jit(functools.partial(_evaluate, chain, preprocess))


def _evaluate(
    chain: Chain, preprocess: Callable[[Array], Array], variables: Variables, samples: Samples
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    def add_batch(sums, batch):
        images, labels = batch
        logits, _ = chain.apply(variables, preprocess(images))
        counts = labels >= 0
        loss = jnp.where(counts, cross_entropy(logits, jnp.maximum(labels, 0)), 0).sum()
        return (sums[0] + loss, sums[1] + (counts & (logits.argmax(-1) == labels)).sum()), None

    (loss, correct), _ = lax.scan(add_batch, (jnp.zeros(()), jnp.zeros((), jnp.int32)), tuple(samples))
    total = (samples.labels >= 0).sum()
    return loss / total, correct / total
