"""A local optimiser's step may wait: the updates from its state are those of optax.

Any optax optimiser gives the numbers of the protocol, or is refused.
"""

import dataclasses
import functools

import finite
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest
from federated import rounds

from sfl_jax.errors import BadInput
from sfl_jax.federated import optimizers, protocol
from sfl_jax.federated.optimizers import of_optax
from sfl_jax.federated.packing import PackedVariables
from sfl_jax.federated.round import _server_step, start_model
from sfl_jax.federated.session import Training
from sfl_jax.models import Chain

PARAMS = {"a": jnp.array([1.0, -2.0, 3e4]), "b": jnp.full((2, 2), -0.5)}
WHOLE = {
    "sgd": (optimizers.sgd(), optax.sgd(1.0)),
    "momentum": (optimizers.sgd(0.9), optax.sgd(1.0, 0.9)),
    "momentum, decay": (
        optimizers.sgd(0.9, 0.01),
        optax.chain(optax.add_decayed_weights(0.01), optax.sgd(1.0, 0.9)),
    ),
    "adam": (optimizers.adam(), optax.adam(1.0)),
    "adam, decay": (
        optimizers.adam(0.8, 0.99, 1e-3, 0.1),
        optax.adamw(1.0, 0.8, 0.99, 1e-3, weight_decay=0.1),
    ),
    "rmsprop": (of_optax(optax.rmsprop(0.1)), optax.rmsprop(0.1)),
}


@pytest.mark.parametrize("name", WHOLE)
def test_updates_come_from_the_new_state(name):
    ours, whole = WHOLE[name]
    state, expected_state = ours.init(PARAMS), whole.init(PARAMS)
    params, waiting = PARAMS, None
    for seed in range(4):
        # The waiting step is taken when the parameters are read again.
        taken = ours.updates_of(state, params)
        if waiting is not None:
            jax.tree.map(np.testing.assert_array_equal, taken, waiting)
            params = jax.tree.map(lambda p, u: p + 0.1 * u, params, taken)
        gradients = jax.tree.map(
            lambda p, seed=seed: jax.random.normal(jax.random.key(seed), p.shape), PARAMS
        )
        waiting, expected_state = whole.update(gradients, expected_state, params)
        updates, state = ours.update(gradients, state, params)
        jax.tree.map(np.testing.assert_array_equal, updates, waiting)
    assert not finite.are_equal(params["b"], PARAMS["b"])


def test_a_state_of_another_step_gives_other_updates():
    ours = optimizers.adam()
    gradients = jax.tree.map(jnp.ones_like, PARAMS)
    _, first = ours.update(gradients, ours.init(PARAMS), PARAMS)
    _, second = ours.update(jax.tree.map(lambda g: -g, gradients), first, PARAMS)
    once, twice = (ours.updates_of(state, PARAMS)["a"] for state in (first, second))
    assert (np.abs(once - twice) > 0.1).all()


def kernels(params):
    return jax.tree.map_with_path(lambda path, _: path[-1].key == "kernel", params)


def axes(params):
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


# Everything that looks at a leaf: at its norm, rows, axes or name.
BY_LEAF = optax.chain(
    optax.clip_by_block_rms(0.1),
    optax.scale_by_factored_rms(min_dim_size_to_factor=2),
    optax.add_decayed_weights(0.5, mask=axes),
    optax.scale_by_trust_ratio(),
    optax.masked(optax.trace(0.9), kernels),
    optax.scale(-0.1),
)
AS_USED = {
    "by leaf": (BY_LEAF, 1.0),
    "adamw": (optax.adamw(1e-2), 1.0),
    "sgd": (optax.sgd(optax.linear_schedule(0.2, 0.1, 2)), 0.5),
}


def test_what_is_no_optimiser_is_refused_where_it_is_given(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # without type checks, like in use
    chain = Chain((rounds.Head(),))
    for wrong in (optax.adamw(1e-2), "adam", None):
        with pytest.raises(BadInput, match=r"^optimizer: \w+; must be sgd.* or of_optax.* of sfl_jax"):
            Training(chain, wrong, rounds.preprocess)
    for wrong in (optimizers.sgd(0.9), "sgd", 0.9):
        with pytest.raises(BadInput, match=r"^server_optimizer: \w+; must be None or an optimiser of optax"):
            dataclasses.replace(rounds.training(chain=chain), server_optimizer=wrong)
    both = Training(chain, of_optax(optax.adamw(1e-2)), rounds.preprocess, server_optimizer=optax.adamw(1e-2))
    assert hash(both) == hash(dataclasses.replace(both))  # static under jit


@pytest.mark.parametrize("name", AS_USED)
def test_an_optimiser_of_optax_as_it_is_used_gives_the_numbers_of_the_protocol(name):
    """The rate of a round is a factor on its updates."""
    optimizer, factor = AS_USED[name]
    training = rounds.training(chain=Chain((rounds.Head(), rounds.Head())))
    training = dataclasses.replace(training, optimizer=of_optax(optimizer))
    variables, samples = rounds.start(training.chain, rounds.SMALL_SIZE)
    work = rounds.assignments(cuts=[1], steps=3, batch=8)
    [(found, loss)] = rounds.sessions(training, variables, samples, work, jax.random.key(7), factor)
    scaled = optax.chain(optimizer, optax.scale(factor))
    world = rounds.world(training, variables, samples, jax.random.key(7), scaled)
    expected, expected_loss = protocol.run_session(world, rounds.works(work)[0])
    found = rounds.by_unit(training.chain, found)
    assert rounds.difference(found, expected) < 1e-5
    assert rounds.difference(found, world.variables) > 0.01
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)


UPHILL = {
    "adam without a rate": optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(1e-4)),
    "momentum without a rate": optax.trace(0.9),
    "nothing": optax.identity(),
    "late": optax.scale_by_schedule(lambda count: jnp.where(count < 5, 0.0, 1.0)),
    "NaN": optax.scale(np.nan),
}


def if_large_by_global_norm(most):
    """A clip that lets NaN pass."""

    def clip(updates, params):
        norm = optax.tree.norm(updates)
        return jax.tree.map(lambda u: jnp.where(norm > most, u * most / norm, u), updates)

    return optax.stateless(clip)


COUPLED = {
    "global norm": optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)),
    "a large global norm": optax.chain(optax.clip_by_global_norm(1e6), optax.adam(0.1)),
    "a norm that is large, but no NaN": optax.chain(if_large_by_global_norm(1e6), optax.sgd(0.1)),
    "after Adam": optax.chain(optax.scale_by_adam(), optax.clip_by_global_norm(1.0), optax.scale(-1e-3)),
    "after signs": optax.chain(optax.scale_by_lion(), optax.clip_by_global_norm(1.0), optax.scale(-1e-3)),
    "norm of all updates": optax.chain(optax.adam(1e-2), optax.normalize_by_update_norm()),
    "one rate that is found": optax.contrib.prodigy(1.0),
    "one factor that is learnt": optax.contrib.mechanize(optax.adam(1e-2)),
    "noise by the number of units": optax.noisy_sgd(0.1, key=0),
    "all or nothing": optax.apply_if_finite(optax.adam(1e-2), 3),
}
REFUSED = (
    {name: (optimizer, "uphill") for name, optimizer in UPHILL.items()}
    | {name: (optimizer, "depends on the gradients of others") for name, optimizer in COUPLED.items()}
    | {
        "line search": (optax.lbfgs(), r"cannot run .*\(TypeError"),
        "labels": (optax.multi_transform({"a": optax.sgd(0.1)}, {"w": "a"}), "cannot run .* of_optax"),
    }
)  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_train_uphill_or_know_too_much_is_refused_in_a_line(name):
    optimizer, reason = REFUSED[name]
    with pytest.raises(BadInput, match=rf"^optimizer: .*{reason}") as caught:
        of_optax(optimizer)
    assert "\n" not in str(caught.value)


TAKEN = {
    "a rate that rises from 0": optax.adamw(optax.linear_schedule(0.0, 1e-3, 10)),
    "clipped by unit": optax.chain(optax.adaptive_grad_clip(0.1), optax.sgd(0.1)),
    "lion": optax.lion(1e-4),
    "adafactor": optax.adafactor(1e-3),
    "frozen": optax.set_to_zero(),
}


@pytest.mark.parametrize("name", TAKEN)
def test_what_trains_downhill_is_taken(name):
    of_optax(TAKEN[name])


def test_labels_are_those_of_the_parameters_that_are_given():
    square, row = np.ones((3, 3), np.float32), np.ones(3, np.float32)
    params = ({}, {"w": square, "v": row}, {"w": row})
    labels = ({}, {"w": "a", "v": "b"}, {"w": "b"})
    of_optax(optax.multi_transform({"a": optax.sgd(0.1), "b": optax.adam(0.1)}, labels), params)
    shapes = jax.eval_shape(lambda: params)
    with pytest.raises(BadInput, match="depends on"):
        of_optax(optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)), shapes)
    with pytest.raises(BadInput, match="uphill"):
        of_optax(optax.multi_transform({"a": optax.sgd(0.1), "b": optax.scale(1.0)}, labels), params)


def test_the_optimiser_of_the_server_gets_leaves_as_they_are_too():
    chain = Chain((rounds.Head(), rounds.Head()))
    variables, _ = rounds.start(chain, rounds.SMALL_SIZE)
    model = start_model(
        dataclasses.replace(rounds.training(chain=chain), server_optimizer=BY_LEAF), variables
    )
    mean = variables._replace(params=jax.tree.map(lambda p: 0.9 * p - 0.01, variables.params))

    @jax.jit
    def expected_step(params, state):
        updates, state = BY_LEAF.update(jax.tree.map(jnp.subtract, params, mean.params), state, params)
        return optax.apply_updates(params, updates), state

    expected = variables.params, BY_LEAF.init(variables.params)
    step = jax.jit(functools.partial(_server_step, BY_LEAF))
    for _ in range(2):
        expected, model = expected_step(*expected), step(model, PackedVariables.of(mean))
        assert rounds.difference(model.variables.params, expected[0]) < 1e-5
    assert rounds.difference(model.variables.params, variables.params) > 0.01
