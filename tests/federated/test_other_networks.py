"""A round of a network from outside: Flax layers, dropout, batch norm, and state of other kinds."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from federated import rounds
from flax import linen as nn

from sfl_jax.federated import optimizers
from sfl_jax.federated.round import Model, run_round
from sfl_jax.federated.session import Assignment, Samples, Training
from sfl_jax.models import Chain

RATE, KEY = 0.1, jax.random.key(2)
CALLS = 2**24 + 1  # before the round; float32 cannot hold it


class Body(nn.Module):
    """Counts its calls in an integer, and keeps a mean of its inputs in its own collection."""

    @nn.compact
    def __call__(self, x, train):
        calls = self.variable("batch_stats", "calls", lambda: jnp.zeros((), jnp.int32))
        seen = self.variable("averages", "seen", lambda: jnp.zeros(()))
        if train:
            calls.value, seen.value = calls.value + 1, 0.5 * (seen.value + x.mean())
        x = nn.Dense(6)(x.reshape(len(x), -1) + seen.value)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5)(x)
        return nn.Dropout(0.3)(nn.relu(x), deterministic=not train)


CHAIN = Chain([Body(), nn.Dense(10)])


@jax.jit
def step_by_hand(params, state, images, labels, key):
    """One step of SGD in plain Flax."""

    def loss(params):
        dropout = jax.random.fold_in(jax.random.fold_in(key, 0), 2**32 - 1)
        x, after = Body().apply(
            {"params": params["body"], **state}, images, True, rngs={"dropout": dropout},
            mutable=["batch_stats", "averages"],
        )  # fmt: skip
        logits = nn.Dense(10).apply({"params": params["head"]}, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), after

    gradients, state = jax.grad(loss, has_aux=True)(params)
    return jax.tree.map(lambda p, g: p - RATE * g, params, gradients), state


def by_hand(variables, samples, work, client):
    """One client's session."""
    state, head = (dict(CHAIN.unit_variables(variables, unit)) for unit in (0, 1))
    params = {"body": state.pop("params"), "head": head["params"]}
    for step in range(work.steps[client]):
        batch = work.batches[client, step]
        key = jax.random.fold_in(jax.random.fold_in(KEY, int(work.client[client])), step)
        images = rounds.preprocess(samples.images[batch])
        params, state = step_by_hand(params, state, images, samples.labels[batch], key)
    return params, state


def test_a_round_is_the_mean_of_what_flax_makes_of_each_client():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (12, 2, 2, 1), np.uint8)
    samples = Samples(jnp.asarray(images), jnp.asarray(rng.integers(0, 10, 12).astype(np.int32)))
    work = Assignment(
        client=np.array([5, 9], np.int32),
        cut=np.array([1, 2], np.int32),
        weight=np.array([1, 3], np.float32),
        steps=np.array([3, 1], np.int32),
        batches=rng.integers(0, 12, (2, 3, 4)).astype(np.int32),
    )
    shapes = jax.eval_shape(CHAIN.init, KEY, jnp.zeros((1, 2, 2, 1)))
    variables = jax.tree.map(lambda leaf: jnp.asarray(rng.uniform(0.1, 1, leaf.shape), leaf.dtype), shapes)
    variables.batch_stats[0]["calls"] = jnp.int32(CALLS)
    training = Training(CHAIN, optimizers.sgd(0.0), rounds.preprocess)

    @jax.jit
    def run(model):
        return run_round(training, 2, None, model, samples, work, KEY, jnp.float32(RATE))[0].variables

    found = run(Model.of(variables))
    clients = [by_hand(variables, samples, work, client) for client in (0, 1)]
    params, state = jax.tree.map(lambda a, b: (a + 3 * b) / 4, *clients)
    unit = CHAIN.unit_variables(found, 0)
    assert rounds.difference(unit["params"], params["body"]) < 1e-5
    assert rounds.difference(found.params[1], params["head"]) < 1e-5
    assert rounds.difference(unit["averages"], state["averages"]) < 1e-5
    assert rounds.difference(unit["batch_stats"]["BatchNorm_0"], state["batch_stats"]["BatchNorm_0"]) < 1e-5
    # The counts grow by 3 and 1: integers stay integers, and change by the rounded mean of 1.5.
    assert unit["batch_stats"]["calls"].dtype == jnp.int32
    assert unit["batch_stats"]["calls"] == CALLS + 2
