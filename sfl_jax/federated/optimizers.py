"""Local optimisers whose step can wait until the parameters are read again.

A step that is taken where its gradient is made reads the old moments for two results, the new moments and
the new parameters, in no order that XLA knows, which then copies all of them, every step. Taken at the start
of the next step, from the new moments alone, each array is read for the last time before it is overwritten,
in place: a tenth less time for a step of B0 with Adam on two cores. The numbers are optax's.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class LocalOptimizer(NamedTuple):
    """An optax transformation without the learning rate, and its updates as a function of its new state.

    init, update: optax's own. updates_of: (new state, parameters before the step) -> what `update` returns.
    """

    init: Callable[[Any], Any]
    update: Callable[..., tuple[Any, Any]]
    updates_of: Callable[[Any, Any], Any]


def sgd(momentum: float = 0.0, weight_decay: float = 0.0) -> LocalOptimizer:
    """Stochastic gradient descent with heavy-ball momentum and decay that the momentum takes up."""
    decay = optax.add_decayed_weights(weight_decay) if weight_decay else optax.identity()
    if not momentum:
        return of_optax(decay)
    whole = optax.chain(decay, optax.trace(momentum))
    return LocalOptimizer(whole.init, whole.update, lambda state, params: state[1].trace)


def adam(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.0) -> LocalOptimizer:
    """Adam with decoupled weight decay (Kingma & Ba, arXiv 1412.6980; Loshchilov & Hutter, 1711.05101)."""
    decay = optax.add_decayed_weights(weight_decay) if weight_decay else optax.identity()
    whole = optax.chain(optax.scale_by_adam(b1, b2, eps), decay)

    def updates_of(state, params):
        first, second = state[0].mu, state[0].nu
        mean = optax.tree.bias_correction(first, b1, state[0].count)
        square = optax.tree.bias_correction(second, b2, state[0].count)
        updates = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mean, square)
        return decay.update(updates, state[1], params)[0]

    return LocalOptimizer(whole.init, whole.update, updates_of)


def of_optax(transformation: optax.GradientTransformation) -> LocalOptimizer:
    """Any other: its updates are kept beside its state until they are taken."""

    def init(params):
        return transformation.init(params), jax.tree.map(jnp.zeros_like, params)

    def update(gradients, state, params):
        updates, own = transformation.update(gradients, state[0], params)
        return updates, (own, updates)

    return LocalOptimizer(init, update, lambda state, params: state[1])
