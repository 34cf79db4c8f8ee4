"""A round: the sessions of a cohort in vmapped chunks, and the weighted mean of what they learned."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, Key

from sfl_jax.federated.packing import packing
from sfl_jax.federated.session import Assignment, Samples, Training, run_session
from sfl_jax.models import Variables


class Model(NamedTuple):
    """What outlives a round: the global variables, and the state of the server's optimiser."""

    variables: Variables
    server_state: Any = ()


def run_round(
    training: Training,
    clients_per_chunk: int,
    axis_name: str | None,
    model: Model,
    samples: Samples,
    assignments: Assignment,
    round_key: Key[Array, ""],
    learning_rate: Float[Array, ""],
) -> tuple[Model, Float[Array, ""]]:
    """One round: (the model that its clients' weighted mean makes, the weighted mean of their losses).

    Under `axis_name` this is one device's part of it: weights and sums are those of all devices. Where the
    weights add up to 0 nobody came, the model stays as it is and the loss is NaN.
    """
    came = _total(assignments.weight.sum(), axis_name)
    mean, loss = _total(
        sum_of_sessions(
            training,
            clients_per_chunk,
            model.variables,
            samples,
            assignments._replace(weight=assignments.weight / came),
            round_key,
            learning_rate,
        ),
        axis_name,
    )
    new = _server_step(training.server_optimizer, model, mean), loss
    return jax.tree.map(lambda new, old: jnp.where(came > 0, new, old), new, (model, jnp.nan))


def start_model(training: Training, variables: Variables) -> Model:
    """The model before the first round."""
    optimizer = training.server_optimizer
    return Model(variables, () if optimizer is None else optimizer.init(variables.params))


def _server_step(optimizer, model, mean):
    if optimizer is None:
        return model._replace(variables=mean)
    params = model.variables.params
    gradients = jax.tree.map(jnp.subtract, params, mean.params)
    updates, state = optimizer.update(gradients, model.server_state, params)
    return Model(mean._replace(params=optax.apply_updates(params, updates)), state)


def sum_of_sessions(
    training: Training,
    clients_per_chunk: int,
    variables: Variables,
    samples: Samples,
    assignments: Assignment,
    round_key: Key[Array, ""],
    learning_rate: Float[Array, ""],
) -> tuple[Variables, Float[Array, ""]]:
    """The weighted sum of the variables and the losses of K clients.

    Chunks of `clients_per_chunk` (a divisor of K) vmapped sessions run one after the other, so that memory
    is that of one chunk. A client of weight 0 has no influence whatever its numbers are, NaN included.
    """
    chunks = jax.tree.map(lambda x: x.reshape(-1, clients_per_chunk, *x.shape[1:]), assignments)

    def run_chunk(sums, chunk):
        def session(one):
            return run_session(
                training, variables, samples, one, round_key, learning_rate, loop_steps=chunk.steps.max()
            )

        results = _alone(session, chunk) if clients_per_chunk == 1 else jax.vmap(session)(chunk)
        return jax.tree.map(lambda total, x: total + _weighted_sum(chunk.weight, x), sums, results), None

    params, batch_stats = packing(variables.params), packing(variables.batch_stats)
    like = (
        (params.pack(variables.params), batch_stats.pack(variables.batch_stats)),
        jnp.zeros((), jnp.result_type(float)),
    )
    (packed, stats), loss = lax.scan(run_chunk, jax.tree.map(jnp.zeros_like, like), chunks)[0]
    return Variables(params.unpack(packed), batch_stats.unpack(stats)), loss


def _alone(session, chunk):
    """A chunk of one client without a client axis: its products keep two dimensions."""
    return jax.tree.map(lambda x: x[None], session(jax.tree.map(lambda x: x[0], chunk)))


def _weighted_sum(weights, values):
    present = (weights > 0).reshape(-1, *[1] * (values.ndim - 1))
    return jnp.tensordot(weights.astype(values.dtype), jnp.where(present, values, 0), axes=1)


def _total(tree, axis_name):
    return tree if axis_name is None else lax.psum(tree, axis_name)
