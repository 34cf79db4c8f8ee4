"""A training run: every round plan, train, evaluate now and then, and log."""

import logging
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sfl_jax import datasets, fleet, metrics, models, optim, planning
from sfl_jax.checkpoints import Checkpoints, Progress, digest
from sfl_jax.config import Config
from sfl_jax.datasets.images import preprocessing
from sfl_jax.errors import BadInput
from sfl_jax.federated import devices as federated_devices
from sfl_jax.federated.round import Model, start_model
from sfl_jax.federated.session import Assignment, Samples, Training
from sfl_jax.models import keras_weights
from sfl_jax.turnout import Turnout, delays, turnout

RIVALS = ("no_split", "common_cut")  # whose clocks run beside the plan's


class Diverged(ArithmeticError):
    """A number of a round is not finite; `state` is that before the round."""

    def __init__(self, message: str, state: "State"):
        super().__init__(message)
        self.state = state


class Experiment(NamedTuple):
    """All that a run needs and that stays the same from round to round."""

    config: Config
    dataset: datasets.Dataset
    parts: list[np.ndarray]
    fleet: fleet.Fleet
    terms: optim.Terms
    training: Training
    devices: list[Any]
    scaling: keras_weights.InputScaling
    imported: models.Variables | None  # what to start from; None is fresh
    steps_max: int


class State(NamedTuple):
    """All that changes from round to round: the model on the devices, and the simulated seconds of each
    scheme.
    """

    round: int
    model: Model
    simulated_s: dict[str, float]


class Prepared(NamedTuple):
    """A round before it runs."""

    round: int
    plan: optim.Plan | optim.BandPlan
    turnout: Turnout
    rival_s: dict[str, float]
    assignments: Assignment
    learning_rate: float


def build(config: Config) -> Experiment:
    """Data, fleet, costs and network of a run. BadInput for what cannot work, before anything compiles."""
    devices = federated_devices.choose_devices(config.devices)
    dataset = datasets.load(config.dataset, config.data_dir or None)
    parts = datasets.partition(
        dataset.train_labels,
        config.clients,
        scheme=config.partition,
        alpha=config.dirichlet_alpha,
        seed=config.seed,
    )
    channels = dataset.train_images.shape[-1]
    dtype = None if config.compute_dtype == "float32" else jnp.dtype(config.compute_dtype)
    chain = models.create(
        config.model, dataset.num_classes, channels,
        layer_form=config.layer_form, dtype=dtype, drop_rate_scale=config.drop_rate_scale,
    )  # fmt: skip
    if config.min_cut > len(chain):
        raise BadInput(
            f"--min_cut={config.min_cut}: must be at most {len(chain)}, the units of {config.model}"
        )
    clients = _clients(config).with_samples([len(part) for part in parts])
    planning.check_links(config, clients)
    profile = models.profile(chain, (config.image_size, config.image_size, channels))
    terms = optim.terms(profile, clients, planning.work(config))  # pyright: ignore[reportArgumentType] has samples
    imported, scaling = None, keras_weights.SIGNED
    if config.init_from:
        fresh = _fresh_variables(config, chain, channels)
        imported, scaling = keras_weights.load(config.init_from, config.model, chain, fresh)
    training = Training(
        chain, optimizer(config), preprocessing(config.image_size, *scaling),
        server_optimizer=server_optimizer(config), skip_diverged=config.on_divergence == "skip_client",
    )  # fmt: skip
    steps_max = datasets.max_steps(parts, config.local_epochs, config.batch_size)
    return Experiment(config, dataset, parts, clients, terms, training, devices, scaling, imported, steps_max)


def inputs(experiment: Experiment) -> dict[str, str]:
    """Digests of what the run reads, by the flag that names it."""
    data = experiment.dataset
    arrays = {
        "dataset": [data.train_images, data.train_labels, data.test_images, data.test_labels],
        "fleet": experiment.fleet.columns().values(),
        "init_from": jax.tree.leaves((experiment.imported, experiment.scaling)),
    }
    return {name: digest(map(np.asarray, values)) for name, values in arrays.items()}


def start(experiment: Experiment) -> State:
    """The state before the first round."""
    clocks = dict.fromkeys((experiment.config.method, *RIVALS), 0.0)
    model = initial_model(experiment)
    return State(0, federated_devices.replicate(model, experiment.devices), clocks)


def resume(experiment: Experiment, checkpoints: Checkpoints, progress: Progress) -> State:
    """The state of a checkpoint."""
    model = checkpoints.restore(progress, jax.eval_shape(lambda: initial_model(experiment)))
    clocks = dict(progress.simulated_s)
    # A method that was changed goes on from the clock of the one before.
    clocks[experiment.config.method] = progress.simulated_s[progress.settings["method"]]
    model = federated_devices.replicate(model, experiment.devices)
    return State(progress.round, model, clocks)


def initial_model(experiment: Experiment) -> Model:
    """The model before the first round."""
    config, channels = experiment.config, experiment.dataset.train_images.shape[-1]
    variables = experiment.imported or _fresh_variables(config, experiment.training.chain, channels)
    return start_model(experiment.training, variables)


def run(
    experiment: Experiment, state: State, clock: metrics.Stopwatch | None = None
) -> Iterator[tuple[State, metrics.Round]]:
    """Runs the remaining rounds; yields the state after each and its metrics. Raises Diverged.

    The next round is planned while the devices compute this one. The variables of an earlier state are
    donated to the round that follows it.
    """
    config, data = experiment.config, experiment.dataset
    devices, training = experiment.devices, experiment.training
    samples = federated_devices.place_samples(Samples(data.train_images, data.train_labels), devices)
    held_out = federated_devices.place_held_out(data.test_images, data.test_labels, devices)
    run_round = federated_devices.compile_round(training, config.clients_per_chunk, devices, config.execution)
    evaluate = federated_devices.compile_evaluation(training.chain, training.preprocess, devices)
    key = jax.random.fold_in(jax.random.key(config.seed), 1)

    clock = clock or metrics.Stopwatch()
    ready = prepare(experiment, state.round)
    before_s = clock.seconds
    while ready is not None:
        round_key = jax.random.fold_in(key, ready.round)
        model, loss, diverged = run_round(
            state.model, samples, ready.assignments, round_key, ready.learning_rate
        )
        done, ready = ready, prepare(experiment, ready.round + 1)
        before = state._replace(model=model)  # of use only where the round left the model as it was
        state = State(done.round + 1, model, _add_clocks(state.simulated_s, config.method, done))
        test_loss = test_accuracy = None
        if state.round % config.eval_every == 0 or state.round == config.rounds:
            test_loss, test_accuracy = map(
                float, federated_devices.on_first(evaluate(model.variables, held_out))
            )
        train_loss, diverged = jax.device_get(federated_devices.on_first((loss, diverged)))
        _judge(experiment, done, before, train_loss, diverged[diverged >= 0])
        now_s = clock.seconds
        trained = int(done.assignments.steps.sum()) * config.batch_size
        yield state, metrics.Round(
            state.round, float(train_loss), test_loss, test_accuracy, done.turnout.round_s, done.plan.bound_s,
            state.simulated_s[config.method], now_s, trained / (now_s - before_s),
            int(done.turnout.came.sum()) - int((diverged >= 0).sum()), float(done.plan.cuts.mean()),
        )  # fmt: skip
        before_s = now_s


def prepare(experiment: Experiment, round: int) -> Prepared | None:
    """Cohort, plan and batches of a round, all on the host; None after the last."""
    config = experiment.config
    if round >= config.rounds:
        return None
    ids, clients, terms = cohort(experiment, round)
    plan = planning.solve(config, clients, terms, round)
    indices, steps = datasets.batches(
        experiment.parts, ids, seed=config.seed, round=round, local_epochs=config.local_epochs,
        batch_size=config.batch_size, steps_max=experiment.steps_max,
    )  # fmt: skip
    assert clients.samples is not None
    delayed = delays(config, round, ids)
    comers = turnout(plan.client_s, plan.round_s, delayed, config.deadline_factor)
    # A client that does not come keeps its place, so that nothing compiles, and does nothing in it.
    weights = np.where(comers.came, clients.samples, 0).astype(np.float32)
    steps = np.where(comers.came, steps, 0).astype(np.int32)
    assignments = Assignment(ids.astype(np.int32), plan.cuts, weights, steps, indices)
    rival_s = {name: _round_s(config, terms, name, delayed) for name in RIVALS}
    return Prepared(round, plan, comers, rival_s, assignments, learning_rate(config, round))


def cohort(experiment: Experiment, round: int) -> tuple[np.ndarray, fleet.Fleet, optim.Terms]:
    """Who takes part in a round (indices), and their terms with the links of that round."""
    config = experiment.config
    ids = fleet.cohort(config.seed, round, config.clients, config.cohort_size)
    clients = experiment.fleet.take(ids)
    return ids, clients, planning.linked(config, clients, experiment.terms.take(ids), round, ids)


def optimizer(config: Config) -> optax.GradientTransformation:
    """The local optimiser without its learning rate, which each round brings along."""
    decay = optax.add_decayed_weights(config.weight_decay) if config.weight_decay else optax.identity()
    if config.optimizer == "adam":
        return optax.chain(optax.scale_by_adam(b1=config.momentum), decay)
    return optax.chain(decay, optax.trace(config.momentum) if config.momentum else optax.identity())


def server_optimizer(config: Config) -> optax.GradientTransformation | None:
    """SGD on the clients' mean change; None where that is plain federated averaging."""
    if (config.server_learning_rate, config.server_momentum) == (1, 0):
        return None
    return optax.sgd(config.server_learning_rate, config.server_momentum or None)


def learning_rate(config: Config, round: int) -> float:
    """Rises linearly over the warm-up rounds, then stays, or falls to 0 along a half cosine."""
    if round < config.warmup_rounds:
        return config.learning_rate * (round + 1) / config.warmup_rounds
    if config.learning_rate_schedule == "constant":
        return config.learning_rate
    progress = (round - config.warmup_rounds) / (config.rounds - config.warmup_rounds)
    return config.learning_rate * (1 + math.cos(math.pi * progress)) / 2


def _fresh_variables(config, chain, channels):
    images = jnp.zeros((1, config.image_size, config.image_size, channels))
    variables = chain.init(jax.random.key(config.seed), images)
    *units, classifier = variables.params
    classifier = jax.tree.map(lambda x: config.head_init_scale * x, classifier)
    return variables._replace(params=(*units, classifier))


def _judge(experiment, done: Prepared, before: State, train_loss, diverged) -> None:
    """Name the clients whose numbers are not finite. Raises Diverged where the round was not taken."""
    names = [
        f"round {done.round + 1}: the loss or the update of client {experiment.fleet.client[id]}, "
        f"cut {done.plan.cuts[done.assignments.client == id][0]}, is not finite"
        for id in diverged
    ]
    if names and not experiment.training.skip_diverged:
        raise Diverged("; ".join(names), before)
    for name in names:
        logging.warning("%s; left out", name)
    if len(diverged) < done.turnout.came.sum() and not math.isfinite(train_loss):
        raise Diverged(f"round {done.round + 1}: the step of the server is not finite", before)


def _clients(config):
    if config.fleet == "random":
        return fleet.random_fleet(config.clients, seed=config.seed)
    clients = fleet.read_fleet(config.fleet)
    if len(clients) != config.clients:
        raise BadInput(
            f"--clients={config.clients}: must be {len(clients)}, the clients of --fleet={config.fleet}"
        )
    return clients


def _round_s(config, terms, method, delayed) -> float:
    """A rival's round under the same delays, infinite where it cannot serve every client."""
    try:
        plan = optim.solve(terms, config.server_flops, method, config.barrier)
        return turnout(plan.client_s, plan.round_s, delayed, config.deadline_factor).round_s
    except optim.Infeasible:
        return math.inf


def _add_clocks(clocks, method, done: Prepared) -> dict[str, Any]:
    seconds = {**done.rival_s, method: done.turnout.round_s}
    return {name: total + seconds[name] for name, total in clocks.items()}
