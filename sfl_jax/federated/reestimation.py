"""Batch-norm statistics of the global model, estimated again after each round by the clients of its cohort.

The mean of the clients' running statistics belongs to the clients' own weights, not to the mean of the
weights. Here each client runs the new global model on a few of its own batches, and the mean statistics of
these batches are used.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Key

from sfl_jax.federated.packing import PackedVariables, pack
from sfl_jax.federated.session import Assignment, Samples, Training, batch
from sfl_jax.models import Variables

BATCHES = 4  # of each client, at most


def reestimated(
    training: Training,
    size: int,
    axis_name: str | None,
    packed: PackedVariables,
    samples: Samples,
    assignments: Assignment,
    diverged: Bool[Array, " K"],
    round_key: Key[Array, ""],
) -> PackedVariables:
    """The variables with statistics of their own: the weighted mean over the K clients that came.

    A client that diverged has no part in it.

    Args:
      size: clients computed at once, a divisor of K.
      axis_name: the axis of the devices, each of which has K clients of its own; None is one device.
    """
    chunks = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), (assignments, diverged))
    client = functools.partial(_of_client, training, packed, samples, round_key)

    def of_chunk(sums, given):
        chunk, diverged = given
        counts = (chunk.steps > 0) & ~diverged
        stats = _counted(counts, jax.vmap(client)(chunk))  # those of others may not be finite
        weights = jnp.where(counts, chunk.weight, 0)
        new = jax.tree.map(lambda x: jnp.tensordot(weights.astype(x.dtype), x, 1), stats), weights.sum()
        return jax.tree.map(jnp.add, sums, new), None

    first = jax.tree.map(lambda x: x[0], assignments)
    like = jax.eval_shape(client, first), jax.ShapeDtypeStruct((), assignments.weight.dtype)
    sums, _ = lax.scan(of_chunk, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like), chunks)
    total, weight = sums if axis_name is None else lax.psum(sums, axis_name)

    def of_leaf(old, new):
        if not jnp.issubdtype(old.dtype, jnp.floating):
            return old  # a counter
        return jnp.where(weight > 0, new / weight.astype(new.dtype), old).astype(old.dtype)

    return packed._replace(batch_stats=jax.tree.map(of_leaf, packed.batch_stats, total))


def _of_client(training, packed, samples, round_key, one: Assignment) -> Any:
    """The mean statistics of a client's first batches under the global model, in float32 or wider."""
    plain = dataclasses.replace(training, augment=None)
    count = jnp.clip(one.steps, 1, min(BATCHES, one.batches.shape[0]))

    def add(index, sums):
        images, _, key = batch(plain, samples, one, index, round_key)
        return jax.tree.map(jnp.add, sums, _of_batch(training.chain, packed, images, key))

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, _wide(x.dtype)), packed.batch_stats)
    sums = lax.fori_loop(0, count, add, zeros)
    return jax.tree.map(lambda x: x / count.astype(x.dtype), sums)


def _of_batch(chain, packed, images, key):
    """The statistics of one batch alone.

    Running statistics become m·old + (1 − m)·batch in training. Two values of the old ones tell m, and then
    the batch's. The activations are the same in both, so that XLA computes them once.
    """

    def updated(value):
        stats = jax.tree.map(lambda x: jnp.full_like(x, value), packed.batch_stats)
        now = Variables(packed.params.unpack(), stats.unpack())
        return pack(chain.apply(now, images, train=True, key=key)[1].batch_stats)

    def alone(zero, one):
        zero, one = (x.astype(_wide(x.dtype)) for x in (zero, one))
        share = 1 - (one - zero)  # of the batch in the new statistics, 1 − m
        return jnp.where(share > 0, zero / jnp.where(share > 0, share, 1), one)

    return jax.tree.map(alone, updated(0), updated(1))


def _counted(counts, stats):
    """The statistics of the clients that count, and 0 for others."""
    return jax.tree.map(lambda x: jnp.where(counts.reshape(-1, *(1,) * (x.ndim - 1)), x, 0), stats)


def _wide(dtype):
    return jnp.promote_types(dtype, jnp.float32)
