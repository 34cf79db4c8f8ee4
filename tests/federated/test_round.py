"""A round against FedAvg without cuts, chunk by chunk, with unequal, absent and broken clients."""

import dataclasses
import functools

import finite
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from federated import rounds

from sfl_jax.federated import devices
from sfl_jax.federated.crossing import CutCodec
from sfl_jax.federated.round import Model, _finite, normalised, run_round, start_model
from sfl_jax.federated.session import batch_loss
from sfl_jax.models import Chain
from sfl_jax.run import metrics

KEY = jax.random.key(7)
CHAIN, CLIENTS = rounds.SMALL_CHAIN, 9


@functools.cache
def start():
    return rounds.start(CHAIN, rounds.SMALL_SIZE)


def assignments(cuts=None, **given):
    """Nine clients, with every cut."""
    return rounds.assignments(np.arange(CLIENTS) % rounds.SMALL_CUTS if cuts is None else cuts, **given)


@functools.cache
def compiled(clients_per_chunk, codecs=None, **changes):
    training = dataclasses.replace(rounds.training(codecs=codecs, chain=CHAIN), **changes)
    return jax.jit(functools.partial(run_round, training, clients_per_chunk, None))


def run(work, clients_per_chunk=3, codecs=None):
    variables, samples = start()
    model, loss, _ = compiled(clients_per_chunk, codecs)(
        Model.of(variables), samples, work, KEY, jnp.asarray(rounds.RATE)
    )
    return model.variables, loss


def momentum(state, gradients, count):
    """(updates without the learning rate, the new state)."""
    velocity = jax.tree.map(lambda v, g: 0.9 * v + g, state[0], gradients)
    return velocity, (velocity, state[1])


def adam(epsilon):
    def update(state, gradients, count):
        first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, state[0], gradients)
        second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g**2, state[1], gradients)
        return jax.tree.map(
            lambda m, v: m / (1 - 0.9**count) / (jnp.sqrt(v / (1 - 0.999**count)) + epsilon), first, second
        ), (first, second)

    return update


def fedavg(chain, begin, work, update=momentum, rate=rounds.RATE):
    """Federated averaging from its definition, on the whole network, one client after the other."""
    variables, samples = begin

    @jax.jit
    def step(params, stats, state, batch, key, count):
        def loss_of(params):
            logits, new = chain.apply(
                variables._replace(params=params, batch_stats=stats),
                rounds.preprocess(samples.images[batch]), train=True, key=key,
            )  # fmt: skip
            return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(len(batch)), samples.labels[batch]]), new

        (_, new), gradients = jax.value_and_grad(loss_of, has_aux=True)(params)
        updates, state = update(state, gradients, count)
        return jax.tree.map(lambda p, u: p - rate * u, params, updates), new.batch_stats, state

    total = jax.tree.map(np.zeros_like, variables)
    for k in range(len(work.client)):
        params, stats = variables
        zeros = jax.tree.map(jnp.zeros_like, params)
        state = zeros, zeros
        for index in range(work.steps[k]):
            key = jax.random.fold_in(jax.random.fold_in(KEY, work.client[k]), index)
            count = jnp.asarray(index + 1.0)
            params, stats, state = step(params, stats, state, work.batches[k, index], key, count)
        weight = work.weight[k] / work.weight.sum(dtype=np.float64)
        total = jax.tree.map(
            lambda t, v, w=weight: t + w * np.asarray(v),
            total,
            variables._replace(params=params, batch_stats=stats),
        )
    return jax.tree.map(
        lambda v, t: np.rint(t) if jnp.issubdtype(v.dtype, jnp.integer) else t, variables, total
    )


def test_any_cuts_give_fedavg():
    work = assignments()
    expected = fedavg(CHAIN, start(), work)
    mean, _ = run(work)
    assert rounds.difference(mean, expected) < 1e-5
    # A wrong weight breaks the equality.
    skewed = work._replace(weight=work.weight + np.eye(CLIENTS, dtype=np.float32)[0])
    assert rounds.difference(run(skewed)[0], expected) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(("x64", "optimizer"), [(True, "sgd"), (True, "adam"), (False, "adam")])
def test_any_cuts_give_fedavg_with_every_optimizer(x64, optimizer):
    """Adam with whole steps, in float32 and x64."""
    tolerance = 1e-10 if x64 else 1e-5
    with jax.enable_x64(x64):
        variables, samples = rounds.start()
        work = rounds.assignments(batch=rounds.SHARP_BATCH)
        if optimizer == "sgd":
            training, update, rate = rounds.training(), momentum, rounds.RATE
        else:
            training, update = rounds.sharp_training(x64), adam(rounds.SHARP[x64])
            rate = rounds.SHARP_RATE
        program = jax.jit(functools.partial(run_round, training, 3, None))

        def apart(work):
            model, *_ = program(Model.of(variables), samples, work, KEY, jnp.asarray(rate))
            return (
                rounds.distance(model.variables.params, expected.params, variables.params),
                rounds.difference(model.variables.batch_stats, expected.batch_stats),
            )

        expected = fedavg(rounds.REFERENCE_CHAIN, (variables, samples), work, update, rate)
        of_params, of_statistics = apart(work)
        assert of_params < tolerance
        assert of_statistics < tolerance
        skewed = work._replace(weight=work.weight + np.eye(rounds.CUTS, dtype=np.float32)[0])
        assert min(apart(skewed)) > 10 * tolerance


def test_cuts_change_nothing_with_the_identity_link():
    work = assignments()
    other = work._replace(cut=work.cut[::-1].copy())
    finite.assert_equal(run(work), run(other))


def test_new_cuts_steps_weights_and_cohorts_compile_nothing():
    work = assignments()
    run(work)
    other = assignments(cuts=[2] * CLIENTS, seed=1)
    with metrics.CompileClock() as clock:
        run(
            other._replace(
                client=other.client + 50, steps=other.steps[::-1].copy(), weight=other.weight[::-1].copy()
            )
        )
        assert clock.compilations == 0
        jax.jit(lambda x: x * 3.25)(jnp.ones(7))
        assert clock.compilations > 0, "the counter counts"


def test_chunks_give_the_same_mean():
    work = assignments()
    by_threes, by_ones = run(work, 3), run(work, 1)
    assert rounds.difference(by_threes, by_ones) < 1e-5


def test_idle_steps_change_nothing_bitwise():
    work = assignments(steps=np.array([2, 1, 1] * 3))
    changed = work.batches.copy()
    changed[work.steps == 1, 1] = 63
    finite.assert_equal(run(work), run(work._replace(batches=changed)))
    changed[0, 1] = 63  # a step that is run
    assert rounds.difference(run(work), run(work._replace(batches=changed))) > 1e-4


def test_a_client_of_weight_0_has_no_influence():
    work = assignments()
    work.weight[4] = 0
    elsewhere = work.batches.copy()
    elsewhere[4] = 0
    finite.assert_equal(run(work), run(work._replace(batches=elsewhere)))


def test_nobody_came_keeps_the_variables():
    work = assignments()
    mean, loss = run(work._replace(weight=work.weight * 0))
    finite.assert_equal(mean, start()[0])
    assert np.isnan(loss)


# The images of client 4 are NaN, so its loss is. Or the gradient that comes down is, so only its update is.
BROKEN = {
    "loss": {"preprocess": rounds.preprocess_black_to_nan},
    "update": {"codecs": CutCodec(up=lambda x, _: x, down=lambda g, _: g * jnp.nan)},
}


@pytest.mark.parametrize("number", ["loss", pytest.param("update", marks=pytest.mark.slow)])
def test_a_diverged_client_has_no_influence_and_is_named(number):
    variables, samples = start()
    cuts = np.full(CLIENTS, len(CHAIN))  # only client 4 gets a message from the server
    cuts[4] = 2
    samples, work = rounds.poisoned(samples, assignments(cuts), 4)

    def run(skip, work):
        step = compiled(3, **BROKEN[number], skip_diverged=skip)
        return step(Model.of(variables), samples, work, KEY, jnp.asarray(rounds.RATE))

    absent = work._replace(weight=np.where(np.arange(CLIENTS) == 4, 0, work.weight))
    model, loss, diverged = run(True, work)
    expected, expected_loss, nobody = run(True, absent)
    assert diverged.client.tolist() == [-1] * 4 + [work.client[4]] + [-1] * 4
    assert nobody.client.tolist() == [-1] * CLIENTS
    assert loss == expected_loss
    assert np.isfinite(loss)
    finite.assert_equal(model.variables, expected.variables)
    assert rounds.difference(model.variables, variables) > 1e-3

    model, _, diverged = run(False, work)
    assert diverged.client.tolist() == [-1] * 4 + [work.client[4]] + [-1] * 4
    finite.assert_equal(model.variables, variables)


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_a_single_number_that_is_not_finite_is_seen_wherever_it_is(number):
    tree = {"a": jnp.ones((2, 3)), "b": jnp.zeros(())}
    assert _finite(tree)
    assert not _finite(tree | {"a": tree["a"].at[1, 2].set(number)})
    assert not _finite(tree | {"b": jnp.float32(number)})


def test_a_step_of_the_server_that_overflows_is_not_taken():
    variables, samples = start()
    optimizer = optax.chain(optax.scale(1e30), optax.scale(1e30))
    begun = Model.of(variables, optimizer.init(variables.params))
    step = compiled(3, server_optimizer=optimizer)
    model, loss, diverged = step(begun, samples, assignments(), KEY, jnp.asarray(rounds.RATE))
    assert np.isnan(loss)
    assert (diverged.client < 0).all()
    finite.assert_equal(model.variables, variables)


def test_server_momentum_adds_up_the_mean_changes():
    optimizer = optax.sgd(0.5, 0.9)
    training = dataclasses.replace(rounds.training(chain=CHAIN), server_optimizer=optimizer)
    step = compiled(3, server_optimizer=optimizer)
    variables, samples = start()
    model, velocity = start_model(training, variables), 0.0
    for seed in range(2):
        work = assignments(seed=seed)
        before = model.variables
        mean, _, _ = compiled(3)(Model.of(before), samples, work, KEY, jnp.asarray(rounds.RATE))
        model, _, _ = step(model, samples, work, KEY, jnp.asarray(rounds.RATE))
        velocity = jax.tree.map(
            lambda old, new, v: 0.9 * v + (np.asarray(old) - new),
            before.params, mean.variables.params, velocity or jax.tree.map(np.zeros_like, before.params),
        )  # fmt: skip
        expected = jax.tree.map(lambda old, v: np.asarray(old) - 0.5 * v, before.params, velocity)
        assert rounds.difference(model.variables.params, expected) < 1e-5
        # Statistics are averaged, without momentum.
        assert rounds.difference(model.variables.batch_stats, mean.variables.batch_stats) == 0


def test_a_client_that_does_not_come_has_no_influence_though_all_its_data_are_nan():
    """The compiled shape is the same: its place has no weight and no steps."""
    samples, _ = rounds.poisoned(start()[1], assignments(), 4)
    step = compiled(3, preprocess=rounds.preprocess_black_to_nan)

    def run(work):
        return step(Model.of(start()[0]), samples, work, KEY, jnp.asarray(rounds.RATE))

    work = assignments()
    there = np.arange(CLIENTS) != 4
    absent = work._replace(weight=work.weight * there, steps=work.steps * there)
    _, broken = rounds.poisoned(samples, absent, 4)
    finite.assert_equal(run(absent), run(broken))
    # If it came, it would be noticed.
    assert run(work._replace(batches=broken.batches))[2].client.max() == work.client[4]
    assert rounds.difference(run(work)[0].variables, run(absent)[0].variables) > 1e-4


IDLE = rounds.assignments(cuts=[0, 1, 2], steps=0)._replace(weight=np.array([6000, 1, 3000], np.float32))


@pytest.fixture(scope="module")
def idle():
    """(variables of several types and sizes, a round in which no client takes a step)."""
    chain = Chain((rounds.Block(4), rounds.Head()))
    variables, samples = rounds.start(chain, rounds.SMALL_SIZE)
    first, last = variables.params
    narrow = {"Dense_0": jax.tree.map(lambda x: x.astype(jnp.bfloat16), last["Dense_0"])}
    stats, none = variables.batch_stats
    stats = {
        "BatchNorm_0": {"mean": jnp.full(4, -1e35), "var": jnp.full(4, 1e35)},
        "calls": jnp.asarray(stats["calls"] + 12345),
    }
    variables = variables._replace(params=(first, narrow), batch_stats=(stats, none))
    program = jax.jit(functools.partial(run_round, rounds.training(chain=chain), 3, None))

    def run(weights):
        work = IDLE._replace(weight=weights)
        model, loss, _ = program(Model.of(variables), samples, work, KEY, jnp.asarray(rounds.RATE))
        return model.variables, loss

    return variables, run


def test_what_nobody_changed_stays_as_it_was(idle):
    """The mean of equal numbers is that number, also for narrow types, integers and very large numbers."""
    variables, run = idle
    mean, loss = run(normalised(IDLE.weight))
    assert loss == 0
    assert jax.tree.map(lambda x: x.dtype, mean) == jax.tree.map(lambda x: x.dtype, variables)
    assert rounds.difference(mean, variables) < 1e-6
    finite.assert_equal(mean.params[1], variables.params[1])
    assert mean.batch_stats[0]["calls"] == 12345


def test_statistics_that_overflow_are_not_taken(idle):
    variables, run = idle
    mean, loss = run(IDLE.weight)  # 6000 * 1e35 is infinite in float32
    assert np.isnan(loss)
    finite.assert_equal(mean, variables)


def test_a_state_of_the_server_that_overflows_is_not_taken():
    """Its steps may be small nevertheless, for example if Adam divides by an infinite number."""
    growing = optax.GradientTransformation(
        lambda params: jnp.float32(1e38),
        lambda updates, state, params=None: (jax.tree.map(jnp.zeros_like, updates), 10 * state),
    )
    chain = Chain((rounds.Block(4), rounds.Head()))
    training = dataclasses.replace(rounds.training(chain=chain), server_optimizer=growing)
    variables, samples = rounds.start(chain, rounds.SMALL_SIZE)
    step = jax.jit(functools.partial(run_round, training, 3, None))
    begun = start_model(training, variables)
    model, loss, _ = step(begun, samples, IDLE, KEY, jnp.asarray(rounds.RATE))
    assert np.isnan(loss)
    assert model.server_state == jnp.float32(1e38)


@pytest.mark.parametrize("weights", [[6000, 1, 3000], [1], [0.3, 0.1], [1e38, 1e38], [3e-38, 0], [8, 8]])
def test_normalised_weights_are_the_same_but_for_a_power_of_two(weights):
    weights = np.array(weights, np.float32)
    found = normalised(weights)
    assert found.dtype == np.float32
    assert 0.5 <= found.sum() <= 1
    factors = found[weights > 0] / weights[weights > 0].astype(np.float64)
    assert len(set(factors)) == 1
    assert np.frexp(factors[0])[0] == 0.5
    assert normalised(np.zeros(3, np.float32)).tolist() == [0, 0, 0]


def test_weights_of_a_round_are_normalised():
    run = devices.Rounds(rounds.training(chain=rounds.SMALL_CHAIN), 3, devices.choose_devices(1))
    variables, samples = rounds.start(rounds.SMALL_CHAIN, rounds.SMALL_SIZE)
    samples = devices.place_samples(samples, devices.choose_devices(1))
    (_, _, placed, *_), _ = run._place(Model.of(variables), samples, IDLE, KEY, rounds.RATE)
    assert sorted(np.ravel(placed.weight)) == sorted(normalised(IDLE.weight))


def test_the_keys_of_a_link_may_be_traced():
    """They are arguments of its gradient, with and without an axis of clients."""
    training = rounds.training("sgd", rounds.NOISY, rounds.SMALL_CHAIN)
    variables, samples = rounds.start(rounds.SMALL_CHAIN, rounds.SMALL_SIZE)

    @jax.jit
    def gradient(params, cut, key):
        def loss_of(params):
            now = variables._replace(params=params)
            images, labels = rounds.preprocess(samples.images[:4]), jnp.asarray(samples.labels[:4])
            return batch_loss(training, now, images, labels, cut, key)[0]

        return jax.grad(loss_of)(params)

    cuts, keys = jnp.array([0, 2]), jax.random.split(KEY, 2)
    jax.eval_shape(gradient, variables.params, cuts[1], keys[1])
    of_two = jax.vmap(gradient, (None, 0, 0))
    shapes = jax.eval_shape(of_two, variables.params, cuts, keys)
    assert jax.tree.leaves(shapes)[0].shape[0] == 2
