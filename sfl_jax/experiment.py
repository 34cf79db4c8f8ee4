"""A training run: every round plan, train, evaluate now and then, and log."""

import dataclasses
import functools
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sfl_jax import datasets, division, fleet, metrics, models, optim, planning, tuning
from sfl_jax.checkpoints import Checkpoints, Progress
from sfl_jax.config import AUTO, Config, left_open, validate
from sfl_jax.datasets.images import preprocessing, squeezed
from sfl_jax.digests import digest, digest_of_columns
from sfl_jax.errors import BadInput
from sfl_jax.federated import devices as federated_devices
from sfl_jax.federated import execution, optimizers
from sfl_jax.federated.evaluation import batch_at
from sfl_jax.federated.packing import plain
from sfl_jax.federated.round import Model, Outcome, start_model
from sfl_jax.federated.session import Assignment, Samples, Training
from sfl_jax.models import keras_weights
from sfl_jax.programs import Programs
from sfl_jax.turnout import Turnout, delays, turnout

RIVALS = ("no_split", "common_cut")  # whose clocks run beside the plan's
Say = Callable[[str], None]  # is told what is being done, for a person who waits
SHORT_S = 2.0  # a round that takes less is followed by the next before it is read


def silent(line: str) -> None:
    """Tells nobody."""


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
    init_digest: str  # of the weights to start from
    steps_max: int
    notes: tuple[str, ...] = ()  # lines to say at the start: what of the inputs is not used


class State(NamedTuple):
    """All that changes from round to round: the model on the devices, and the simulated seconds of each
    scheme.
    """

    round: int
    model: Model
    simulated_s: dict[str, float]


class Engine(NamedTuple):
    """What computes the rounds: the data on the devices, and compiled programs."""

    samples: Samples
    held_out: Samples
    run_round: federated_devices.Rounds
    evaluate: Callable[..., Any]
    tried: dict[execution.Execution, float]  # seconds that were measured of each alternative


class Prepared(NamedTuple):
    """A round before it runs."""

    round: int
    plan: optim.Plan | optim.BandPlan
    left_out: tuple[str, ...]  # whom no plan serves with the links of this round, and why
    turnout: Turnout
    rival_s: dict[str, float]
    assignments: Assignment
    learning_rate: float


class Sent(NamedTuple):
    """A round that the devices compute: the states before and after it, and what will be read of it.

    began_s: the clock when its preparation began.  ended_s, tested_s: when the round was done, and when its
    evaluation was.
    """

    prepared: Prepared
    before: State
    state: State
    outcome: Outcome
    tested: Any  # (loss, accuracy) on held-out samples; None where it is not evaluated
    began_s: float
    ended_s: Future[float]
    tested_s: Future[float]


def build(config: Config, say: Say = silent, progress: Progress | None = None) -> Experiment:
    """Data, fleet, costs and network of a run. BadInput for what cannot work, before anything compiles.

    progress: what the run has reached, if it has begun; then the weights that it began with may be gone.
    """
    validate(config)
    say(f"reading {config.dataset}")
    config, file = division.settle(config)
    devices = federated_devices.choose_devices(config.devices)
    dataset = datasets.load(config.dataset, config.data_dir or None, len(devices) > 1, config.label_key)
    parts = division.divide(config, file, dataset.train_labels)
    notes = [
        *dataset.notes,
        *squeezed(config.image_size, *dataset.train_images.shape[1:3]),
        *division.notes(config, file, parts, len(dataset.train_labels)),
        *(() if file is None else planning.doubts(file)),
    ]
    channels = _channels(dataset)
    chain = _chain_for(config, dataset, "product" if config.layer_form == AUTO else config.layer_form)
    if config.min_cut > len(chain):
        raise BadInput(
            f"--min_cut={config.min_cut}: must be at most {len(chain)}, the units of {config.model}"
        )
    clients = division.clients(config, file).with_samples([len(part) for part in parts])
    planning.check_links(config, clients)
    say(f"counting the work of the {len(chain)} units of {config.model}")
    image_shape = (config.image_size, config.image_size, channels)
    profile = models.profile(chain, image_shape, stored_shape=dataset.train_images.shape[1:])
    notes += division.single_values(config, parts, models.least_normalised(chain, image_shape))
    terms = optim.terms(profile, clients, planning.work(config))  # pyright: ignore[reportArgumentType] has samples
    planning.check_rounds(config, clients, terms)
    # Read here to be checked, and again where the run starts: kept, they would be a second copy of the model.
    if progress is not None and _weights_are_gone(config, progress):
        scaling, init_digest = _scaling(progress), progress.inputs["init_from"]
        notes.append(f"{config.init_from} is gone; the run goes on without it")
    else:
        imported = _imported(config, chain, channels)
        scaling = imported.scaling if imported else keras_weights.SIGNED
        init_digest = digest(map(np.asarray, jax.tree.leaves(imported[:2] if imported else (None, scaling))))
        notes += _classifier(config, imported, dataset.num_classes)
    training = _training(config, chain, scaling)
    steps_max = datasets.max_steps(parts, config.local_epochs, config.batch_size)
    return Experiment(
        config, dataset, parts, clients, terms, training, devices, scaling, init_digest, steps_max,
        tuple(notes),
    )  # fmt: skip


def inputs(experiment: Experiment) -> dict[str, str]:
    """Digests of what the run reads, by the flag that names it."""
    return {
        "dataset": experiment.dataset.digest,
        "fleet": digest_of_columns(experiment.fleet.columns()),
        "init_from": experiment.init_digest,
    }


def network(experiment: Experiment) -> dict[str, Any]:
    """What says, besides the settings, which network it is, and how its images are scaled: for `trained`."""
    return {
        "num_classes": experiment.dataset.num_classes,
        "image_channels": _channels(experiment.dataset),
        "input_scaling": experiment.scaling._asdict(),
    }


class Trained(NamedTuple):
    """What a run has learned: all that an export needs."""

    chain: models.Chain
    variables: models.Variables
    scaling: keras_weights.InputScaling
    round: int


def trained(config: Config, checkpoints: Checkpoints, progress: Progress) -> Trained:
    """The model of a checkpoint on the host, without the data and the weights that it began with."""
    classes, channels = (progress.network[name] for name in ("num_classes", "image_channels"))
    chain, scaling = _chain(config, classes, channels, config.layer_form), _scaling(progress)
    training = _training(config, chain, scaling)
    fresh = functools.partial(_fresh_variables, config, chain, channels)
    model = checkpoints.restore(progress, jax.eval_shape(lambda: start_model(training, fresh())))
    return Trained(chain, models.Variables(*plain(model.packed)), scaling, progress.round)


def start(experiment: Experiment) -> State:
    """The state before the first round."""
    clocks = dict.fromkeys((experiment.config.method, *RIVALS), 0.0)
    model = initial_model(experiment)
    return State(0, federated_devices.replicate(model, experiment.devices), clocks)


def resume(experiment: Experiment, checkpoints: Checkpoints, progress: Progress) -> State:
    """The state of a checkpoint."""
    shapes = jax.eval_shape(lambda: start_model(experiment.training, _fresh_of(experiment)))
    model = checkpoints.restore(progress, shapes)
    # A method that was changed goes on from the clock of the one before.
    now, before = experiment.config.method, progress.settings["method"]
    clocks = {name: progress.simulated_s[before if name == now else name] for name in (now, *RIVALS)}
    model = federated_devices.replicate(model, experiment.devices)
    return State(progress.round, model, clocks)


def initial_model(experiment: Experiment) -> Model:
    """The model before the first round."""
    imported = _imported(experiment.config, experiment.training.chain, _channels(experiment.dataset))
    return start_model(experiment.training, imported.variables if imported else _fresh_of(experiment))


def compile(
    experiment: Experiment,
    state: State,
    before: Mapping[str, Any] | None = None,
    notes: Path | None = None,
    say: Say = silent,
) -> tuple[Experiment, Engine]:
    """(the experiment with nothing left open, what computes the rounds after `state`).

    before, notes: see `tuning.settle`. A chunk that was left open shrinks until the compiled round fits into
    the memory. BadInput where none does.
    """
    data, devices, own = experiment.dataset, experiment.devices, experiment.training
    image = (experiment.config.image_size,) * 2 + data.train_images.shape[-1:]
    profile = models.profile(own.chain, image)
    batch = (experiment.config.batch_size, *data.train_images.shape[1:])
    images = jax.eval_shape(own.preprocess, jax.ShapeDtypeStruct(batch, data.train_images.dtype))

    def seconds(one):
        say(f"measuring {one}")
        chain = _chain_for(experiment.config, data, one.layer_form)
        return execution.seconds_per_client(chain, profile, images, one.clients_per_chunk, devices[0])

    placed = federated_devices.bytes_placed(state.model)
    free = tuning.budget_bytes(experiment.config, devices, placed)
    samples = federated_devices.place_samples(Samples(data.train_images, data.train_labels), devices, free)
    placed += federated_devices.bytes_placed(samples)
    config, tried = tuning.settle(experiment.config, before, profile, devices, seconds, notes, placed)
    training = dataclasses.replace(own, chain=_chain_for(config, data, config.layer_form))
    say("compiling the evaluation")
    evaluate = federated_devices.Evaluation(training.chain, training.preprocess, devices)
    held_out = _place_held_out(config, data, devices, evaluate, state, placed)
    placed += federated_devices.bytes_placed(held_out)
    first, needed = prepare(experiment, state.round), {}
    programs = Programs(notes, devices)
    while True:
        say(programs.expected(config))
        begun = time.perf_counter()
        rounds = federated_devices.Rounds(training, config.clients_per_chunk, devices, config.execution)
        engine = Engine(samples, held_out, rounds, evaluate, tried)
        of_round = rounds.bytes_needed(*_arguments(config, engine, state, first)) if first else 0
        programs.took(config, time.perf_counter() - begun)
        needed[config.clients_per_chunk] = tuning.most_bytes(of_round)
        smaller = tuning.fit(config, left_open(experiment.config), needed, profile, devices, placed)
        if smaller == config:
            return experiment._replace(config=config, training=training), engine
        config = smaller


def _place_held_out(config, data, devices, evaluate, state, placed):
    """The held-out samples on the devices, in batches with which `evaluate` fits into the memory."""
    batch, images, labels = batch_at(config.image_size), data.test_images, data.test_labels
    while True:
        held_out = federated_devices.place_held_out(images, labels, devices, batch)
        needed = tuning.most_bytes(evaluate.bytes_needed(state.model.packed, held_out))
        free = tuning.budget_bytes(config, devices, placed + federated_devices.bytes_placed(held_out))
        if needed <= free or batch == 1:
            return held_out
        batch = max(1, min(batch // 2, batch * free // needed))


def run(
    experiment: Experiment,
    state: State,
    engine: Engine,
    clock: metrics.Stopwatch | None = None,
    pauses: Callable[[int], bool] = lambda round: False,
) -> Iterator[tuple[State, metrics.Round]]:
    """Runs the remaining rounds; yields the state after each and its metrics. Raises Diverged.

    Where rounds are short the next is sent off before the metrics of one are read, so that the devices need
    not wait; the model of the state that is yielded is donated then, see `is_held`. `pauses` says that the
    state after so many rounds will be wanted. Long rounds gain nothing by this, and can be stopped sooner.
    """
    config = experiment.config
    clock = clock or metrics.Stopwatch()
    free_s, lasted_s = clock.seconds, math.inf  # since when the devices are idle; how long they were busy
    with ThreadPoolExecutor(1, "rounds") as pool:
        follow = functools.partial(_send, experiment, engine, clock, pool)
        sent = follow(state)
        while sent:
            following, failure = None, None
            if lasted_s < SHORT_S and not pauses(sent.state.round):
                try:
                    following = follow(sent.state, sent.outcome)
                except Exception as error:  # not before the round that is done has been yielded
                    failure = error
            ended_s, tested_s = sent.ended_s.result(), sent.tested_s.result()
            outcome, tested = jax.device_get(federated_devices.on_first((sent.outcome, sent.tested)))
            _judge(experiment, sent._replace(state=(following or sent).state), outcome)
            start_s, free_s = max(free_s, sent.began_s), tested_s
            lasted_s = tested_s - start_s
            yield sent.state, _line(config, sent, outcome, tested, tested_s, ended_s - start_s)
            if failure:
                raise failure
            sent = following or follow(sent.state, sent.outcome)


def is_held(state: State) -> bool:
    """Whether the model of this state is there still, and not donated to a round."""
    return not any(leaf.is_deleted() for leaf in jax.tree.leaves(state.model))


def _send(experiment, engine, clock, pool, state, previous=None) -> Sent | None:
    """Plan the round after `state` and send it off to the devices; None after the last."""
    began_s = clock.seconds
    config, prepared = experiment.config, prepare(experiment, state.round)
    if prepared is None:
        return None
    model, loss, diverged = engine.run_round(*_arguments(config, engine, state, prepared), previous)
    clocks = _add_clocks(state.simulated_s, config.method, prepared)
    after = State(state.round + 1, model, clocks)
    came = federated_devices.replicate(np.int32(prepared.turnout.came.sum()), experiment.devices)
    outcome = Outcome(loss, diverged, came)
    ended_s = pool.submit(_clock_after, outcome, clock)
    due = after.round % config.eval_every == 0 or after.round == config.rounds
    tested = engine.evaluate(model.packed, engine.held_out) if due else None
    tested_s = pool.submit(_clock_after, tested, clock)
    return Sent(prepared, state, after, outcome, tested, began_s, ended_s, tested_s)


def _clock_after(arrays, clock):
    """The clock once these are computed. In a thread of its own, or whatever else is done would be in it."""
    jax.block_until_ready(arrays)
    return clock.seconds


def _arguments(config, engine, state, prepared):
    """Of `Rounds`."""
    key = planning.round_key(config, prepared.round, planning.TRAINING)
    return state.model, engine.samples, prepared.assignments, key, prepared.learning_rate


def _line(config, sent, outcome, tested, wall_s, took_s) -> metrics.Round:
    done = sent.prepared
    test_loss, test_accuracy = (None, None) if tested is None else map(float, tested)
    trained = int(done.assignments.steps.sum()) * config.batch_size
    diverged = outcome.diverged[outcome.diverged >= 0]
    counted = done.turnout.came & ~np.isin(done.assignments.client, diverged)
    cuts = done.plan.cuts[counted]
    return metrics.Round(
        sent.state.round, float(outcome.loss), test_loss, test_accuracy, done.turnout.round_s,
        done.plan.bound_s, sent.state.simulated_s[config.method], wall_s, trained / took_s,
        int(outcome.came) - len(diverged), float(cuts.mean()) if len(cuts) else math.nan,
    )  # fmt: skip


def prepare(experiment: Experiment, round: int) -> Prepared | None:
    """Cohort, plan and batches of a round, all on the host; None after the last."""
    config = experiment.config
    if round >= config.rounds:
        return None
    ids, clients, terms = cohort(experiment, round)
    plan, present, left_out = planning.serve(config, clients, terms, round)
    indices, steps = datasets.batches(
        experiment.parts, ids, seed=config.seed, round=round, local_epochs=config.local_epochs,
        batch_size=config.batch_size, steps_max=experiment.steps_max,
    )  # fmt: skip
    assert clients.samples is not None
    delayed = delays(config, round, ids)
    comers = turnout(config, terms, plan, delayed, present)
    # A client that does not come keeps its place, so that nothing compiles, and does nothing in it.
    weights = np.where(comers.came, clients.samples, 0).astype(np.float32)
    steps = np.where(comers.came, steps, 0).astype(np.int32)
    assignments = Assignment(ids.astype(np.int32), plan.cuts, weights, steps, indices)
    rival_s = {name: _round_s(config, terms, name, delayed, present) for name in RIVALS}
    return Prepared(round, plan, left_out, comers, rival_s, assignments, learning_rate(config, round))


def cohort(experiment: Experiment, round: int) -> tuple[np.ndarray, fleet.Fleet, optim.Terms]:
    """Who takes part in a round (indices), and their terms with the links of that round."""
    config = experiment.config
    ids = fleet.cohort(config.seed, round, config.clients, config.cohort_size)
    clients = experiment.fleet.take(ids)
    return ids, clients, planning.linked(config, clients, experiment.terms.take(ids), round, ids)


def optimizer(config: Config) -> optimizers.LocalOptimizer:
    """The local optimiser without its learning rate, which each round brings along."""
    if config.optimizer == "adam":
        return optimizers.adam(config.momentum, weight_decay=config.weight_decay)
    return optimizers.sgd(config.momentum, config.weight_decay)


def server_optimizer(config: Config) -> optax.GradientTransformation | None:
    """SGD on the clients' mean change; None where that is plain federated averaging."""
    if (config.server_learning_rate, config.server_momentum) == (1, 0):
        return None
    return optax.sgd(config.server_learning_rate, config.server_momentum or None)


def learning_rate(config: Config, round: int) -> float:
    """Rises linearly over the warm-up rounds, then stays, or falls to 0 along a half cosine.

    A run with fewer rounds than the warm-up takes rises to its end.
    """
    warmup = min(config.warmup_rounds, config.rounds)
    if round < warmup:
        return config.learning_rate * (round + 1) / warmup
    if config.learning_rate_schedule == "constant":
        return config.learning_rate
    progress = (round - warmup) / (config.rounds - warmup)
    return config.learning_rate * (1 + math.cos(math.pi * progress)) / 2


def _training(config, chain, scaling):
    return Training(
        chain, optimizer(config), preprocessing(config.image_size, *scaling),
        server_optimizer=server_optimizer(config), skip_diverged=config.on_divergence == "skip_client",
    )  # fmt: skip


def _chain_for(config, dataset, layer_form):
    return _chain(config, dataset.num_classes, _channels(dataset), layer_form)


def _chain(config, num_classes, channels, layer_form):
    dtype = None if config.compute_dtype == "float32" else jnp.dtype(config.compute_dtype)
    return models.create(
        config.model, num_classes, channels,
        layer_form=layer_form, dtype=dtype, drop_rate_scale=config.drop_rate_scale,
    )  # fmt: skip


def _channels(dataset):
    return dataset.train_images.shape[-1]


def _imported(config, chain, channels) -> keras_weights.Imported | None:
    """What --init_from names; None where it names nothing."""
    if not config.init_from:
        return None
    fresh = _fresh_variables(config, chain, channels)
    return keras_weights.load(config.init_from, config.model, chain, fresh)


def _weights_are_gone(config, progress) -> bool:
    """Whether --init_from names what the run began with, and nothing is there any more."""
    same = config.init_from == progress.settings.get("init_from")
    return bool(config.init_from) and same and not Path(config.init_from).exists()


def _scaling(progress) -> keras_weights.InputScaling:
    """How a run scales its images, as its checkpoint says."""
    scaling = progress.network["input_scaling"]
    return keras_weights.InputScaling(*map(tuple, (scaling["divisor"], scaling["offset"])))


def _classifier(config, imported, num_classes) -> list[str]:
    """The line that says where the classifier comes from, if --init_from names a file."""
    if imported is None:
        return []
    if imported.classes == num_classes:
        return [f"classifier: from {config.init_from}"]
    has = "none" if imported.classes is None else f"{imported.classes} classes"
    return [f"classifier: fresh, {config.init_from} has {has}"]


def _fresh_of(experiment):
    return _fresh_variables(experiment.config, experiment.training.chain, _channels(experiment.dataset))


def _fresh_variables(config, chain, channels):
    images = jnp.zeros((1, config.image_size, config.image_size, channels))
    variables = chain.init(jax.random.key(config.seed), images)
    *units, classifier = variables.params
    classifier = jax.tree.map(lambda x: config.head_init_scale * x, classifier)
    return variables._replace(params=(*units, classifier))


def _judge(experiment, sent: Sent, outcome: Outcome) -> None:
    """Name the clients whose numbers are not finite. Raises Diverged where that ends the run, which has left
    the model as it was.
    """
    done = sent.prepared
    for line in done.left_out:
        logging.warning("round %d: %s; left out", done.round + 1, line)
    names = [
        f"round {done.round + 1}: the loss or the update of client {experiment.fleet.client[id]}, "
        f"cut {done.plan.cuts[done.assignments.client == id][0]}, is not finite"
        for id in outcome.diverged[outcome.diverged >= 0]
    ]
    if outcome.is_last(experiment.training):
        of_server = f"round {done.round + 1}: the step of the server is not finite"
        raise Diverged("; ".join(names) or of_server, sent.before._replace(model=sent.state.model))
    for name in names:
        logging.warning("%s; left out", name)
    if len(names) == outcome.came:
        logging.warning("round %d: failed, no client's work is left; the model stays", done.round + 1)


def _round_s(config, terms, method, delayed, present) -> float:
    """A rival's round of the same clients and delays, infinite where it cannot serve each of them."""
    try:
        plan = optim.solve(terms, config.server_flops, method, config.barrier, present=present)
        return turnout(config, terms, plan, delayed, present).round_s
    except optim.Infeasible:
        return math.inf


def _add_clocks(clocks, method, done: Prepared) -> dict[str, Any]:
    seconds = {**done.rival_s, method: done.turnout.round_s}
    return {name: total + seconds[name] for name, total in clocks.items()}
