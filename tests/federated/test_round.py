"""A round: against FedAvg that knows no cuts, chunk by chunk, with unequal, absent and broken clients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from federated import rounds

from sfl_jax import metrics
from sfl_jax.federated.round import Model, run_round, start_model

KEY = jax.random.key(7)


@functools.cache
def compiled(clients_per_chunk, link=None):
    training = rounds.training(link=link)
    return jax.jit(functools.partial(run_round, training, clients_per_chunk, None))


def run(work, clients_per_chunk=3, link=None):
    variables, samples = rounds.start()
    model, loss = compiled(clients_per_chunk, link)(
        Model(variables), samples, work, KEY, jnp.asarray(rounds.RATE)
    )
    return model.variables, loss


def fedavg(work):
    """Federated averaging from its definition, on the whole network, one client after the other."""
    variables, samples = rounds.start()
    chain = rounds.REFERENCE_CHAIN

    @jax.jit
    def step(params, stats, velocity, batch, key):
        def loss_of(params):
            logits, new = chain.apply(
                variables._replace(params=params, batch_stats=stats),
                rounds.preprocess(samples.images[batch]), train=True, key=key,
            )  # fmt: skip
            return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(len(batch)), samples.labels[batch]]), new

        (_, new), gradients = jax.value_and_grad(loss_of, has_aux=True)(params)
        velocity = jax.tree.map(lambda v, g: 0.9 * v + g, velocity, gradients)
        return jax.tree.map(lambda p, v: p - rounds.RATE * v, params, velocity), new.batch_stats, velocity

    total = jax.tree.map(np.zeros_like, variables)
    for k in range(len(work.client)):
        params, stats = variables
        velocity = jax.tree.map(jnp.zeros_like, params)
        for index in range(work.steps[k]):
            key = jax.random.fold_in(jax.random.fold_in(KEY, work.client[k]), index)
            params, stats, velocity = step(params, stats, velocity, work.batches[k, index], key)
        weight = work.weight[k] / work.weight.sum()
        total = jax.tree.map(
            lambda t, v, w=weight: t + w * np.asarray(v),
            total,
            variables._replace(params=params, batch_stats=stats),
        )
    return total


def test_any_cuts_give_fedavg():
    work = rounds.assignments()
    expected = fedavg(work)
    mean, _ = run(work)
    assert rounds.difference(mean, expected) < 1e-5
    # A wrong weight breaks the equality.
    skewed = work._replace(weight=work.weight + np.eye(rounds.CUTS, dtype=np.float32)[0])
    assert rounds.difference(run(skewed)[0], expected) > 1e-4


def test_cuts_change_nothing_with_the_identity_link():
    work = rounds.assignments()
    other = work._replace(cut=work.cut[::-1].copy())
    for a, b in zip(jax.tree.leaves(run(work)), jax.tree.leaves(run(other)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_new_cuts_steps_weights_and_cohorts_compile_nothing():
    work = rounds.assignments()
    run(work)
    clock = metrics.CompileClock()
    other = rounds.assignments(cuts=[5] * rounds.CUTS, seed=1)
    run(
        other._replace(
            client=other.client + 50, steps=other.steps[::-1].copy(), weight=other.weight[::-1].copy()
        )
    )
    assert clock.compilations == 0
    jax.jit(lambda x: x * 3.25)(jnp.ones(7))
    assert clock.compilations > 0, "the counter counts"


def test_chunks_give_the_same_mean():
    work = rounds.assignments()
    by_threes, by_ones = run(work, 3), run(work, 1)
    assert rounds.difference(by_threes, by_ones) < 1e-5


def test_idle_steps_change_nothing_bitwise():
    work = rounds.assignments(steps=np.array([2, 1, 1] * 3))
    changed = work.batches.copy()
    changed[work.steps == 1, 1] = 63
    for a, b in zip(
        jax.tree.leaves(run(work)), jax.tree.leaves(run(work._replace(batches=changed))), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    changed[0, 1] = 63  # a step that is run
    assert rounds.difference(run(work), run(work._replace(batches=changed))) > 1e-4


def test_a_client_of_weight_0_has_no_influence():
    work = rounds.assignments()
    work.weight[4] = 0
    elsewhere = work.batches.copy()
    elsewhere[4] = 0
    for a, b in zip(
        jax.tree.leaves(run(work)), jax.tree.leaves(run(work._replace(batches=elsewhere))), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_nobody_came_keeps_the_variables():
    work = rounds.assignments()
    mean, loss = run(work._replace(weight=work.weight * 0))
    for a, b in zip(jax.tree.leaves(mean), jax.tree.leaves(rounds.start()[0]), strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.isnan(loss)


def test_learning_rate_free_optimisers_match_optax_sgd():
    """The session applies the rate itself; that is what optax.sgd does."""
    params, gradients = {"w": jnp.array([1.0, -2.0])}, {"w": jnp.array([0.5, 0.25])}
    ours, whole = rounds.OPTIMIZERS["sgd"], optax.sgd(rounds.RATE, 0.9)
    state, whole_state = ours.init(params), whole.init(params)
    for _ in range(3):
        update, state = ours.update(gradients, state, params)
        expected, whole_state = whole.update(gradients, whole_state, params)
        np.testing.assert_allclose(-rounds.RATE * update["w"], expected["w"], rtol=1e-6)


def test_server_momentum_adds_up_the_mean_changes():
    training = rounds.training()._replace(server_optimizer=optax.sgd(0.5, 0.9))
    step = jax.jit(functools.partial(run_round, training, 3, None))
    variables, samples = rounds.start()
    model, velocity = start_model(training, variables), 0.0
    for seed in range(2):
        work = rounds.assignments(seed=seed)
        before = model.variables
        mean, _ = compiled(3)(Model(before), samples, work, KEY, jnp.asarray(rounds.RATE))
        model, _ = step(model, samples, work, KEY, jnp.asarray(rounds.RATE))
        velocity = jax.tree.map(
            lambda old, new, v: 0.9 * v + (np.asarray(old) - new),
            before.params, mean.variables.params, velocity or jax.tree.map(np.zeros_like, before.params),
        )  # fmt: skip
        expected = jax.tree.map(lambda old, v: np.asarray(old) - 0.5 * v, before.params, velocity)
        assert rounds.difference(model.variables.params, expected) < 1e-5
        # Statistics are averaged, not accelerated.
        assert rounds.difference(model.variables.batch_stats, mean.variables.batch_stats) == 0
