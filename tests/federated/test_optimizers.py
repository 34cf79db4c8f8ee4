"""A local optimiser's step may wait: what it then takes from its state is what optax would have given."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sfl_jax.federated import optimizers

PARAMS = {"a": jnp.array([1.0, -2.0, 3e4]), "b": jnp.full((2, 2), -0.5)}
WHOLE = {
    "sgd": (optimizers.sgd(), optax.identity()),
    "momentum": (optimizers.sgd(0.9), optax.trace(0.9)),
    "momentum, decay": (
        optimizers.sgd(0.9, 0.01),
        optax.chain(optax.add_decayed_weights(0.01), optax.trace(0.9)),
    ),
    "adam": (optimizers.adam(), optax.scale_by_adam()),
    "adam, decay": (
        optimizers.adam(0.8, 0.99, 1e-3, 0.1),
        optax.chain(optax.scale_by_adam(0.8, 0.99, 1e-3), optax.add_decayed_weights(0.1)),
    ),
    "rmsprop": (optimizers.of_optax(optax.scale_by_rms()), optax.scale_by_rms()),
}


@pytest.mark.parametrize("name", WHOLE)
def test_updates_come_from_the_new_state(name):
    ours, whole = WHOLE[name]
    state, expected_state = ours.init(PARAMS), whole.init(PARAMS)
    params, waiting = PARAMS, None
    for seed in range(4):
        # What was left waiting is taken when the parameters are read again.
        taken = ours.updates_of(state, params)
        if waiting is not None:
            jax.tree.map(np.testing.assert_array_equal, taken, waiting)
            params = jax.tree.map(lambda p, u: p - 0.1 * u, params, taken)
        gradients = jax.tree.map(
            lambda p, seed=seed: jax.random.normal(jax.random.key(seed), p.shape), PARAMS
        )
        waiting, expected_state = whole.update(gradients, expected_state, params)
        updates, state = ours.update(gradients, state, params)
        jax.tree.map(np.testing.assert_array_equal, updates, waiting)
    assert not np.array_equal(params["b"], PARAMS["b"])


def test_a_state_of_another_step_gives_other_updates():
    ours = optimizers.adam()
    gradients = jax.tree.map(jnp.ones_like, PARAMS)
    _, first = ours.update(gradients, ours.init(PARAMS), PARAMS)
    _, second = ours.update(jax.tree.map(lambda g: -g, gradients), first, PARAMS)
    once, twice = (ours.updates_of(state, PARAMS)["a"] for state in (first, second))
    assert (np.abs(once - twice) > 0.1).all()
