"""A training run in NumPy float64, written from the meaning of the settings, as an oracle for whole runs.

The network has two dense units with dropout between, so its gradient is a few lines. Cohorts, partitions and
plans come from their own rooms, which have their own tests. Nothing here calls the code that combines them:
`run`, `planning`, or the engine.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import networks
import numpy as np

from sfl_jax import datasets, fleet, models, optim

SIZE, CLASSES = 8, 10
BLACK_TO_WHITE = 127.5, -1.0  # pixel / divisor + offset


def dataset(samples=60, held_out=23):
    """Noise, the same every time, with unequal frequencies of labels."""
    rng = np.random.default_rng(11)
    images = rng.integers(0, 256, (samples + held_out, SIZE, SIZE, 1), np.uint8)
    labels = (CLASSES * rng.random(samples + held_out) ** 2).astype(np.int32)
    return datasets.Dataset(
        images[:samples], labels[:samples], images[samples:], labels[samples:], CLASSES, "mnist"
    )


class Line(NamedTuple):
    """The results of a round. params: front kernel, front bias, back kernel, back bias."""

    train_loss: float
    test_loss: float | None
    test_accuracy: float | None
    round_s: float
    bound_s: float
    clocks: dict[str, float]
    clients: int
    cuts: np.ndarray
    params: tuple[np.ndarray, ...]


def run(config, data, clients, scaling=BLACK_TO_WHITE, initial=None) -> list[Line]:
    """The rounds of `config`. clients: its fleet without samples; initial: parameters, None for new ones."""
    parts = datasets.partition(
        data.train_labels, config.clients, name=config.partition, alpha=config.dirichlet_alpha,
        shards_per_client=config.shards_per_client, seed=config.seed, min_samples=config.min_samples,
    )  # fmt: skip
    clients = clients.with_samples([len(part) for part in parts])
    params = start = _initial(config) if initial is None else initial
    moments = [(0.0, 0.0) for _ in params]
    sampling = fleet.Sampling(config.sampling)
    clocks = dict.fromkeys((config.method, "no_split", "common_cut"), 0.0)
    lines = []
    for round in range(config.rounds):
        ids, _ = sampling.cohort(config.seed, round, clients.samples, config.cohort_size)
        terms, plan, rivals = plans(config, clients, ids, round)
        round_s, came = waited(config, terms, plan, ids, round)
        for name, rival in {**rivals, config.method: plan}.items():
            clocks[name] += waited(config, terms, rival, ids, round)[0] if rival else math.inf
        here = ids[came]
        trained = [_session(config, data, scaling, start, parts, id, round) for id in here]
        weights = np.array([len(parts[id]) if config.sampling == "uniform" else 1 for id in here], float)
        loss = np.nan
        if len(here):
            weights /= weights.sum()
            loss = sum(w * own[1] for w, own in zip(weights, trained, strict=True))
            means = [sum(w * own[0][i] for w, own in zip(weights, trained, strict=True)) for i in range(4)]
            server = {"sgd": _server_sgd, "adam": _server_adam}[config.server_optimizer]
            moved = [
                server(p, p - x, m, round + 1, config) for m, p, x in zip(moments, start, means, strict=True)
            ]
            start, moments = tuple(p for p, _ in moved), [m for _, m in moved]
        is_tested = (round + 1) % config.eval_every == 0 or round + 1 == config.rounds
        tested = _evaluation(config, data, scaling, start) if is_tested else (None, None)
        lines.append(
            Line(loss, *tested, round_s, plan.bound_s, dict(clocks), len(here), plan.cuts[came], start)
        )
    return lines


def plans(config, clients, ids, round):
    """(the terms of a round, its plan, {rival: its plan, None if it cannot serve all clients})."""
    terms = optim.terms(profile(config), clients, work(config))
    if config.links != "fixed":
        links = fleet.Links(rayleigh=config.links == "fading", coherence_s=config.coherence_s)
        bits = float(terms.model_bits[-1])
        rates = fleet.fading_rates(clients, links, config.seed, round, transfer_bits=bits)
        terms = terms._replace(uplink_bps=rates.uplink_bps, downlink_bps=rates.downlink_bps)
    terms, flops = terms.take(ids), config.server_flops
    rivals: dict[str, Any] = {}
    for name in ("no_split", "common_cut"):
        try:
            rivals[name] = optim.solve(terms, flops, name, config.barrier)
        except optim.Infeasible:
            rivals[name] = None
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), 2**32 - 1), round)
    starts = config.starts.split(",")
    plan = optim.solve(terms, flops, config.method, config.barrier, key, starts=starts, recall=config.recall)
    return terms, plan, rivals


def profile(config):
    return models.profile(
        networks.dense(config.drop_rate_scale),
        (config.image_size, config.image_size, 1),
        stored_shape=(SIZE, SIZE, 1),
    )


def work(config):
    """The work of a round. Adam keeps two floats per parameter, momentum one."""
    slots = 2 if config.optimizer == "adam" else 1 if config.momentum else 0
    return optim.Work(
        local_epochs=config.local_epochs, batch_size=config.batch_size, bits_per_float=config.bits_per_float,
        min_cut=config.min_cut, optimizer_slots=slots, proximal=config.proximal > 0,
    )  # fmt: skip


def waited(config, terms, plan, ids, round):
    """(the round in seconds, the clients whose work counts)."""
    stays = fleet.availability(config.seed, round, ids, config.drop_probability)
    slower = fleet.slowdowns(config.seed, round, ids, config.jitter)
    staged = config.barrier == "staged"
    parts = terms.seconds(plan.cuts, np.full(len(ids), config.server_flops) if staged else plan.shares)
    before_s, server_s, after_s = slower * parts.before_server, parts.server, slower * parts.after_server
    deadline_s = config.deadline_factor * plan.round_s if config.deadline_factor else math.inf
    if staged:
        planned_s = parts.before_server.max()
        served = stays & (before_s <= planned_s + deadline_s - plan.round_s)
        begins_s = before_s[served].max(initial=0)
        if config.deadline_factor and not served.all():
            begins_s = planned_s + deadline_s - plan.round_s
        came, ends_s = served, begins_s + server_s[served].sum() + after_s
    else:
        came, ends_s = stays, before_s + server_s + after_s
    if config.deadline_factor:
        came = came & (ends_s <= deadline_s * (1 + 1e-12))
        return (ends_s.max() if came.all() else deadline_s), came
    return (ends_s[came].max() if came.any() else plan.round_s), came


def rate(config, round):
    """The learning rate: a ramp over the warm-up, whose last step is the full rate, then a half cosine."""
    if round < config.warmup_rounds:
        return config.learning_rate * (round + 1) / config.warmup_rounds
    if config.learning_rate_schedule == "constant":
        return config.learning_rate
    if config.learning_rate_schedule == "exponential":
        return config.learning_rate * config.decay_rate ** (
            (round - config.warmup_rounds) / config.decay_rounds
        )
    part = (round - config.warmup_rounds) / (config.rounds - config.warmup_rounds)
    return config.learning_rate * math.cos(math.pi / 2 * part) ** 2


def as_params(variables):
    front, back = variables.params
    parts = front["kernel"], front["bias"], back["dense_kernel"], back["bias"]
    return tuple(np.asarray(part, np.float64) for part in parts)


def _initial(config):
    images = jnp.zeros((1, config.image_size, config.image_size, 1))
    fresh = as_params(networks.dense().init(jax.random.key(config.seed), images))
    return *fresh[:2], *(config.head_init_scale * part for part in fresh[2:])


def _session(config, data, scaling, start, parts, id, round):
    """(parameters, mean loss) of a client's local steps."""
    steps = config.local_epochs * max(len(parts[id]) // config.batch_size, 1)
    batches, _ = datasets.batches(
        parts, [int(id)], seed=config.seed, round=round, local_epochs=config.local_epochs,
        batch_size=config.batch_size, steps_max=steps,
    )  # fmt: skip
    step = _adam if config.optimizer == "adam" else _sgd
    params, state, losses = start, [(0.0, 0.0)] * 4, []
    for index, batch in enumerate(batches[0]):
        x, labels = _pixels(data.train_images[batch], config, scaling), data.train_labels[batch]
        keep = _kept(
            config.seed, round, int(id), index, len(batch), networks.DROP_RATE * config.drop_rate_scale
        )
        loss, gradients = _loss_and_gradients(params, x, labels, keep)
        losses.append(loss)
        gradients = [g + config.proximal * (p - s) for g, p, s in zip(gradients, params, start, strict=True)]
        if config.clip_norm:
            gradients = [
                *_clipped(gradients[:2], config.clip_norm),
                *_clipped(gradients[2:], config.clip_norm),
            ]
        moved = [
            step(p, g, s, index + 1, config, rate(config, round))
            for p, g, s in zip(params, gradients, state, strict=True)
        ]
        params, state = tuple(p for p, _ in moved), [s for _, s in moved]
    return params, np.mean(losses)


def _clipped(unit, norm):
    """The gradient of a unit, no longer than `norm`."""
    length = math.sqrt(sum((part**2).sum() for part in unit))
    return [part * min(1, norm / length) for part in unit]


def _server_sgd(p, change, moments, _, config):
    trace = config.server_momentum * moments[0] + change
    return p - config.server_learning_rate * trace, (trace, 0.0)


def _server_adam(p, change, moments, step, config):
    decay = config.server_momentum
    first, second = decay * moments[0] + (1 - decay) * change, 0.99 * moments[1] + 0.01 * change**2
    mean, square = first / (1 - decay**step), second / (1 - 0.99**step)
    return p - config.server_learning_rate * mean / (np.sqrt(square) + config.server_epsilon), (first, second)


def _sgd(p, gradient, state, _, config, rate):
    trace = config.momentum * state[0] + gradient + config.weight_decay * p
    return p - rate * trace, (trace, 0.0)


def _adam(p, gradient, state, step, config, rate):
    first = config.momentum * state[0] + (1 - config.momentum) * gradient
    second = 0.999 * state[1] + 0.001 * gradient**2
    mean, square = first / (1 - config.momentum**step), second / (1 - 0.999**step)
    return p - rate * (mean / (np.sqrt(square) + 1e-8) + config.weight_decay * p), (first, second)


@functools.cache
def _kept(seed, round, id, step, samples, drop_rate):
    """The factors of dropout, drawn from (seed, round, client, step, unit)."""
    if not drop_rate:
        return np.ones((samples, networks.WIDTH))
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 2**32 - 2), round)
    for number in (id, step, 0):  # 0 is the unit
        key = jax.random.fold_in(key, number)
    key = networks.Front(drop_rate).apply({}, rngs={"drop": key}, method=lambda unit: unit.make_rng("drop"))
    return np.asarray(jax.random.bernoulli(key, 1 - drop_rate, (samples, networks.WIDTH))) / (1 - drop_rate)


def _pixels(images, config, scaling):
    """Scaled pixels; images that are smaller than config.image_size get a black frame."""
    border = config.image_size - SIZE
    before = border // 2
    images = np.pad(images[..., 0], ((0, 0), (before, border - before), (before, border - before)))
    return images.reshape(len(images), -1) / scaling[0] + scaling[1]


def _logits(params, x, keep=1.0):
    hidden = np.tanh(x @ params[0] / 4 + params[1])
    return hidden, (hidden * keep) @ params[2] + params[3]


def _cross_entropy(logits, labels):
    shifted = logits - logits.max(1, keepdims=True)
    log = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return -log[np.arange(len(labels)), labels].mean(), np.exp(log)


def _loss_and_gradients(params, x, labels, keep):
    hidden, logits = _logits(params, x, keep)
    loss, probabilities = _cross_entropy(logits, labels)
    of_logits = (probabilities - np.eye(CLASSES)[labels]) / len(labels)
    of_hidden = (of_logits @ params[2].T) * keep * (1 - hidden**2)
    return loss, (x.T @ of_hidden / 4, of_hidden.sum(0), (hidden * keep).T @ of_logits, of_logits.sum(0))


def _evaluation(config, data, scaling, params):
    _, logits = _logits(params, _pixels(data.test_images, config, scaling))
    loss, _ = _cross_entropy(logits, data.test_labels)
    return loss, (logits.argmax(1) == data.test_labels).mean()
