"""The reference: two parties that exchange messages, one client at a time, nothing compiled as a whole.

Each party has its own half of the chain, its own variables and its own optimiser. What crosses is what the
protocol sends: smashed data and labels up, the gradient of the smashed data down, once a step; the client's
half of the model down before a session and up after it. It shares no code with the compiled round, which
tests hold equal to it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from sfl_jax.federated.optimizers import LocalOptimizer
from sfl_jax.federated.session import Assignment, Link, Samples, Training
from sfl_jax.models import Chain, Variables


class Up(NamedTuple):
    """Client to server, once a step. At cut 0 the smashed data are the images."""

    smashed: Array
    labels: Int[Array, " B"]


class Down(NamedTuple):
    """Server to client, once a step: the gradient of the smashed data."""

    gradient: Array


class Party:
    """A half of the chain with its variables and its own optimiser."""

    def __init__(self, half: Chain, variables: Variables, optimizer: LocalOptimizer, rate: float):
        self.half, self.variables, self.optimizer, self.rate = half, variables, optimizer, rate
        self.state = optimizer.init(variables.params)

    def forward(self, x: Array, key: Key[Array, ""]) -> tuple[Array, Any]:
        """(the half's output, its pullback to gradients of parameters and input); keeps the new BN
        statistics.
        """

        def run(params, x):
            output, updated = self.half.apply(self.variables._replace(params=params), x, train=True, key=key)
            return output, updated.batch_stats

        output, pullback, batch_stats = jax.vjp(run, self.variables.params, x, has_aux=True)
        self.variables = self.variables._replace(batch_stats=batch_stats)
        return output, pullback

    def update(self, gradients: Any) -> None:
        """One step of this party's optimiser."""
        updates, self.state = self.optimizer.update(gradients, self.state, self.variables.params)
        params = jax.tree.map(lambda p, u: p - self.rate * u, self.variables.params, updates)
        self.variables = self.variables._replace(params=params)


class Server(Party):
    """The server's replica for one client: completes the forward pass, answers with the gradient."""

    def answer(self, message: Up, key: Key[Array, ""]) -> tuple[Down, Float[Array, ""]]:
        logits, pullback = self.forward(message.smashed, key)
        loss, loss_pullback = jax.vjp(lambda logits: mean_cross_entropy(logits, message.labels), logits)
        gradients, smashed_gradient = pullback(loss_pullback(jnp.ones_like(loss))[0])
        self.update(gradients)
        return Down(smashed_gradient), loss


def run_session(
    training: Training,
    variables: Variables,
    samples: Samples,
    assignment: Assignment,
    round_key: Key[Array, ""],
    learning_rate: float,
) -> tuple[Variables, float]:
    """One client's session with its server: (variables of both halves joined, mean loss of its steps)."""
    chain, cut = training.chain, int(assignment.cut)
    link = training.link or Link(up=lambda x: x, down=lambda x: x)
    halves = zip(chain.split(cut), chain.split_variables(variables, cut), strict=True)
    (client_half, client_variables), (server_half, server_variables) = halves
    client = Party(client_half, client_variables, training.optimizer, learning_rate)
    server = Server(server_half, server_variables, training.optimizer, learning_rate)

    losses = []
    for step in range(int(assignment.steps)):
        key = jax.random.fold_in(jax.random.fold_in(round_key, assignment.client), step)
        batch = assignment.batches[step]
        labels = samples.labels[batch]
        output, pullback = client.forward(training.preprocess(samples.images[batch]), key)
        if cut == len(
            chain
        ):  # nothing is left to the server: the client has the logits, and no message is sent
            loss, loss_pullback = jax.vjp(lambda logits, y=labels: mean_cross_entropy(logits, y), output)
            gradient = loss_pullback(jnp.ones_like(loss))[0]
        else:
            down, loss = server.answer(Up(link.up(output), labels), key)
            gradient = link.down(down.gradient)
        client.update(pullback(gradient)[0])
        losses.append(float(loss))
    return chain.join_variables(client.variables, server.variables), float(np.mean(losses))


def run_round(
    training: Training,
    variables: Variables,
    samples: Samples,
    assignments: Assignment,
    round_key: Key[Array, ""],
    learning_rate: float,
) -> tuple[Variables, float]:
    """Sessions one after the other, then the weighted mean of every unit over all clients, and of their
    losses.
    """
    clients = [jax.tree.map(lambda x, k=k: x[k], assignments) for k in range(len(assignments.client))]
    results = [run_session(training, variables, samples, one, round_key, learning_rate) for one in clients]
    weights = np.asarray(assignments.weight, np.float64) / np.sum(assignments.weight, dtype=np.float64)
    mean = jax.tree.map(
        lambda *leaves: sum(w * leaf for w, leaf in zip(weights, leaves, strict=True)), *results
    )
    return mean[0], float(mean[1])


def mean_cross_entropy(logits: Float[Array, "B classes"], labels: Int[Array, " B"]) -> Float[Array, ""]:
    """The mean of -log softmax(logits) at the labels."""
    picked = jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
    return (jax.nn.logsumexp(logits, axis=1) - picked).mean()
