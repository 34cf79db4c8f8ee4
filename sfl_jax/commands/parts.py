"""Turns the settings of a command into the parts of a run."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sfl_jax import datasets, fleet, models, optim, planning, registry, schemes
from sfl_jax.commands import compilation_cache, division, kept_profile
from sfl_jax.commands.config import AUTO, Config, fields_of, validate
from sfl_jax.commands.fields import HARMLESS
from sfl_jax.commands.rules import RANDOM
from sfl_jax.datasets.augment import augmentation, check_images
from sfl_jax.datasets.images import preprocessing, squeezed
from sfl_jax.digests import digest, digest_of_columns
from sfl_jax.errors import BadInput
from sfl_jax.federated import optimizers, server_optimizers
from sfl_jax.federated.execution import Execution
from sfl_jax.federated.packing import plain
from sfl_jax.federated.session import Training
from sfl_jax.fleet import Faults
from sfl_jax.models import keras_weights
from sfl_jax.planning import Planned, Planner
from sfl_jax.run import suiting, wires
from sfl_jax.run.checkpoints import Checkpoints, Progress
from sfl_jax.run.parts import RIVALS, Parts, Say, silent
from sfl_jax.run.schedules import schedule
from sfl_jax.run.state import model_like

# What is data to a program, or does not reach it. Whatever else there is may be part of it.
_NO_SHAPES = (
    "seed", "rounds", "learning_rate", "learning_rate_schedule", "warmup_rounds", "decay_rate",
    "decay_rounds", "layer_form", "data_dir", "dirichlet_alpha", "min_samples", "shards_per_client",
    "fleet", "sampling", "availability", "server_flops", "method", "starts", "recall", "barrier", "rounding",
    "links", "coherence_s", "band", "rtt_s", "broadcast_bps", "drop_probability", "jitter",
    "deadline_factor", "min_cut",
)  # fmt: skip


class Built(NamedTuple):
    """The parts of a run, and the settings that they come from.

    config: settled, see `division.settle`. scaling: of the images. init_digest: of the initial weights.
    notes: lines to print at the start, about inputs that are not used.
    """

    config: Config
    parts: Parts
    scaling: keras_weights.InputScaling
    init_digest: str
    notes: tuple[str, ...] = ()


def build(config: Config, say: Say = silent, progress: Progress | None = None) -> Built:
    """The parts of a run. Raises BadInput for what cannot work, before anything compiles.

    progress: how far the run has come, if it has begun. Its initial weights may be missing then.
    """
    validate(config)
    codec_pairs(config)  # which refuses a wrong form
    say(f"reading {config.dataset}")
    config, file = division.settle(config)
    own_scheme, own_planner = scheme(config), planner(config)
    faults = Faults(config.drop_probability, config.jitter, config.deadline_factor)
    suiting.check_faults(own_scheme, faults, config.on_divergence == "skip_client")
    devices = suiting.devices_for(own_scheme, config.devices)
    clients = division.clients(config, file)
    _compile_plan_meanwhile(config, own_planner, clients)
    data = datasets.load(config.dataset, config.data_dir or None, len(devices) > 1, config.label_key)
    if data.train_images.ndim != 4:
        raise BadInput(
            f"dataset={config.dataset}: samples of shape {data.train_images.shape[1:]}; "
            "must be images (H, W, C)"
        )
    shares = division.divide(config, file, data.train_labels)
    check_images(augmentation(config.augment, config.dataset), data.train_images.shape[1:])
    notes = [
        *data.notes,
        *squeezed(config.image_size, *data.train_images.shape[1:3]),
        *division.notes(config, file, shares, len(data.train_labels)),
        *(() if file is None else planning.doubts(file)),
    ]
    image_shape = (config.image_size, config.image_size, data.train_images.shape[-1])
    chain = _chain(config, data.num_classes, image_shape[-1])
    _check_cuts(config, chain)
    own_scheme.check(len(chain))
    suiting.check_steps(own_scheme, shares, config.batch_size)
    clients = clients.with_samples([len(share) for share in shares])
    planning.check_links(own_planner, clients)
    say(f"counting the work of the {len(chain)} units of {config.model}")
    directory = compilation_cache.directory() if config.compilation_cache else None
    stored = data.train_images.shape[1:]
    profile, least = kept_profile.profile(directory, chain, image_shape, stored)
    notes += division.single_values(config, shares, least)
    own_work = work(config, data.train_images.dtype, len(chain))
    _check_devices(config, clients, profile, data.num_classes, image_shape[-1])
    terms = optim.terms(profile, clients, own_work, _wires(config, profile))  # pyright: ignore[reportArgumentType] has samples
    own_sampling = sampling(config, clients)
    _check_rounds(config, own_planner, own_sampling, clients, terms)
    # Read here to check them, and again when the run starts. Kept, they would be a second copy of the model.
    if progress is not None and _weights_are_gone(config, progress):
        scaling, init_digest = _scaling(progress), progress.inputs["init_from"]
        notes.append(f"{config.init_from} is missing; the run goes on without it")
    else:
        imported = _imported(config, chain, image_shape)
        scaling = imported.scaling if imported else keras_weights.SIGNED
        init_digest = digest(map(np.asarray, jax.tree.leaves(imported[:2] if imported else (None, scaling))))
        notes += _classifier(config, imported, data.num_classes)
    parts = Parts(
        data, shares, clients, profile, terms, _training(config, chain, scaling),
        functools.partial(_initial, config, chain, image_shape), own_scheme, own_planner, faults, image_shape,
        config.cohort_size, config.local_epochs, config.batch_size, rate(config), config.eval_every,
        config.seed, suiting.execution_for(own_scheme, execution(config), config.cohort_size), devices,
        rivals=suiting.rivals_for(own_planner, RIVALS), sampling=own_sampling,
        network=f"{config.model} at {config.image_size}", program=f"{_program(config)}, {scaling}",
    )  # fmt: skip
    return Built(config, parts, scaling, init_digest, tuple(notes))


def inputs(built: Built) -> dict[str, str]:
    """Digests of what the run reads, by the flag that names it."""
    return {
        "dataset": built.parts.data.digest,
        "fleet": digest_of_columns(built.parts.fleet.contents()),
        "availability": built.parts.sampling.digest,
        "init_from": built.init_digest,
    }


def network(built: Built) -> dict[str, Any]:
    """What identifies the network beside the settings, and the scaling of its images; `trained` needs it."""
    return {
        "num_classes": built.parts.data.num_classes,
        "image_channels": built.parts.image_shape[-1],
        "input_scaling": built.scaling._asdict(),
    }


class Trained(NamedTuple):
    """What a run has learned: all that an export needs."""

    chain: models.Chain
    variables: models.Variables
    scaling: keras_weights.InputScaling
    round: int


def trained(config: Config, checkpoints: Checkpoints, progress: Progress) -> Trained:
    """The model of a checkpoint on the host. Needs neither the data nor the initial weights."""
    classes, channels = (progress.network[name] for name in ("num_classes", "image_channels"))
    chain, scaling = _chain(config, classes, channels), _scaling(progress)
    image_shape = (config.image_size, config.image_size, channels)
    model = checkpoints.restore(progress, model_like(_training(config, chain, scaling), image_shape))
    return Trained(chain, models.Variables(*plain(model.packed)), scaling, progress.round)


def planned(config: Config, file: fleet.Fleet | None = None) -> tuple[Config, Planned]:
    """Returns (`config` with its server, the plan for its fleet and network).

    file: its fleet file, if it was read already. With a target_round_s, the server is the smallest that
    reaches it.

    Raises BadInput if the fleet file is wrong or lacks samples, min_cut is larger than the chain, the method
    cannot do what is asked, or a client cannot be served.
    """
    clients, profile, terms = read_terms(config, file)
    if len(clients) < config.cohort_size != Config.cohort_size:
        raise BadInput(
            f"--cohort_size={config.cohort_size}: must be at most {len(clients)}, the clients there are"
        )
    if config.target_round_s:
        flops = planning.smallest_server(clients, terms, config.target_round_s)
        config = dataclasses.replace(config, server_flops=flops)
    try:
        plan = planning.solve(planner(config), clients, terms)
    except BadInput as error:
        raise BadInput(f"--fleet={config.fleet}: {error}") from error
    return config, Planned(planner(config), profile, clients, terms, plan)


def read_terms(
    config: Config, file: fleet.Fleet | None = None
) -> tuple[fleet.Fleet, models.Profile, optim.Terms]:
    """The fleet of `config`, the profile of its network, and their terms with the links of round 0."""
    clients = read_fleet(config, file)
    chain = models.create(
        config.model, config.num_classes, config.image_channels, drop_rate_scale=config.drop_rate_scale
    )
    _check_cuts(config, chain)
    scheme(config).check(len(chain))
    with ThreadPoolExecutor(1) as pool:
        compiled = pool.submit(_compile_plan, config, clients, len(chain), ("exact",))
        stored = config.stored_size or config.image_size
        sizes = [(side, side, config.image_channels) for side in (config.image_size, stored)]
        profile = models.profile(chain, *sizes)
        _check_devices(config, clients, profile, config.num_classes, config.image_channels)
        compiled.result()
    own_work = work(config, units=len(chain))
    terms = optim.terms(profile, clients, own_work, _wires(config, profile))  # pyright: ignore[reportArgumentType] has samples
    return clients, profile, planning.linked(planner(config), clients, terms)


def read_fleet(config: Config, file: fleet.Fleet | None = None) -> fleet.Fleet:
    """The fleet of `config`: its file, which is read unless given, or its random fleet."""
    own_planner = planner(config)
    config, file = division.settle(config, file)
    clients = division.clients(config, file)
    if config.fleet == RANDOM:
        return clients.with_samples(np.full(len(clients), config.samples_per_client))
    if clients.samples is None:
        raise BadInput(f"{config.fleet}: column samples: missing; a plan needs the samples of each client")
    planning.check_links(own_planner, clients)
    return clients


def scheme(config: Config) -> schemes.Scheme:
    """The scheme, with the options that it has."""
    options = {
        "order": config.server_order,
        "server_batch": config.server_batch,
        "most": None if config.max_cut < 0 else config.max_cut,
        "keeps_state": config.keep_server_state,
    }
    has = {field.name for field in dataclasses.fields(registry.SCHEMES[config.scheme])}
    own = {name: value for name, value in options.items() if name in has}
    return schemes.create(config.scheme, tail_units=config.tail_units, **own)


def cuts_matter(config: Config) -> bool:
    """Whether other cuts give other numbers: by the scheme, or by what the codec does at the cut."""
    return scheme(config).cuts_matter or (config.codec, config.codec_down) != ("float32", "")


def planner(config: Config) -> Planner:
    """How rounds are planned, under the scheme's clock."""
    own = Planner(
        config.method, config.server_flops, config.min_cut, config.barrier, tuple(config.starts.split(",")),
        config.recall, config.rounding, config.links, config.coherence_s, config.band, config.seed,
        server_memory_bytes=config.server_memory_bytes, broadcast_bps=config.broadcast_bps,
    )  # fmt: skip
    return suiting.planner_for(scheme(config), own)


def execution(config: Config) -> Execution:
    """How the devices compute a round; choices may be open."""
    return Execution(config.layer_form, config.clients_per_chunk, config.execution, config.memory_budget_gib)


def with_execution(config: Config, execution: Execution) -> Config:
    """The settings with the choices of an execution."""
    return dataclasses.replace(
        config,
        layer_form=execution.layer_form,
        clients_per_chunk=execution.clients_per_chunk,
        execution=execution.mode,
    )


def settled(before: Mapping[str, Any]) -> Execution:
    """The execution of a run with these settings."""
    return Execution(before["layer_form"], before["clients_per_chunk"], before["execution"])


def work(config: Config, stored: Any = np.uint8, units: int | None = None) -> optim.Work:
    """The work of each client in a round, as its costs need it.

    stored: the number type of stored images. units: those of the network, if the scheme has a largest cut.
    """
    return optim.Work(
        config.local_epochs,
        config.batch_size,
        config.bits_per_float,
        min_cut=config.min_cut,
        optimizer_slots=optimizer(config).slots,
        image_bits=8 * np.dtype(stored).itemsize,
        max_cut=None if units is None else _max_cut(config, units),
        tail_units=0 if units is None else config.tail_units,
        proximal=config.proximal > 0,
        step_once=range(0) if units is None else scheme(config).step_once(units),
    )


def codec_pairs(config: Config) -> Any:
    """The choices of (codec of smashed data, codec of their gradient)."""
    return wires.pairs(config.codec.split("+"), config.codec_down or None)


def _wires(config, profile):
    """The bits that cross the cut. None if --bits_per_float gives them."""
    if (config.codec, config.codec_down) == ("float32", ""):
        return None
    return wires.wires(codec_pairs(config), profile)


def optimizer(config: Config) -> optimizers.LocalOptimizer:
    """The local optimiser with learning rate 1. Each round brings its own rate."""
    return registry.OPTIMIZERS[config.optimizer](config.momentum, weight_decay=config.weight_decay)


def server_optimizer(config: Config) -> optax.GradientTransformation | None:
    """How the server takes the clients' mean change; None where it takes their mean."""
    return server_optimizers.create(
        config.server_optimizer, config.server_learning_rate, config.server_momentum, config.server_epsilon
    )


def sampling(config: Config, clients: fleet.Fleet) -> fleet.Sampling:
    """How the clients of a round are drawn."""
    trace = config.availability and fleet.read_availability(config.availability, clients.client.tolist())
    return fleet.Sampling(config.sampling, trace or None)


def rate(config: Config) -> Any:
    """The learning rate by round."""
    return schedule(
        config.learning_rate_schedule, config.learning_rate, config.rounds, config.warmup_rounds,
        config.decay_rate, config.decay_rounds,
    )  # fmt: skip


def _training(config, chain, scaling):
    return Training(
        chain, optimizer(config), preprocessing(config.image_size, *scaling),
        server_optimizer=server_optimizer(config), skip_diverged=config.on_divergence == "skip_client",
        scheme=scheme(config).engine(), tail_units=config.tail_units,
        codecs=wires.cut_codecs(codec_pairs(config)),
        augment=augmentation(config.augment, config.dataset), proximal=config.proximal,
        clip_norm=config.clip_norm, reestimates=config.batch_norm == "reestimated",
        personal=suiting.personal_for(scheme(config), config.batch_norm, config.clients),
    )  # fmt: skip


def network_name(config: Config, channels: int, num_classes: int) -> str:
    """The network and its input, as a device file names them."""
    side = config.image_size
    return f"{config.model} at {side}x{side}x{channels}, {num_classes} classes"


def _check_devices(config, clients, profile, num_classes, channels):
    name = network_name(config, channels, num_classes)
    fleet.check_devices(list(clients.devices.values()), profile.names, config.batch_size, name)


def _chain(config, num_classes, channels):
    dtype = None if config.compute_dtype == "float32" else jnp.dtype(config.compute_dtype)
    return models.create(
        config.model, num_classes, channels,
        layer_form="product" if config.layer_form == AUTO else config.layer_form, dtype=dtype,
        drop_rate_scale=config.drop_rate_scale, norm=config.norm,
    )  # fmt: skip


def _max_cut(config, units):
    """The largest cut that the scheme and the flag allow."""
    most = scheme(config).max_cut(units)
    return most if config.max_cut < 0 else min(most, config.max_cut)


def _check_cuts(config, chain):
    if config.max_cut > len(chain):
        raise BadInput(
            f"--max_cut={config.max_cut}: must be at most {len(chain)}, the units of {config.model}"
        )
    if config.min_cut > len(chain):
        raise BadInput(
            f"--min_cut={config.min_cut}: must be at most {len(chain)}, the units of {config.model}"
        )


def _check_rounds(config, own_planner, own_sampling, clients, terms):
    asked = (
        (round, own_sampling.cohort(config.seed, round, clients.samples, config.cohort_size))
        for round in range(config.rounds)
    )
    cohorts = ((round, ids[is_there]) for round, (ids, is_there) in asked if is_there.any())
    try:
        planning.check_rounds(own_planner, clients, terms, cohorts)
    except BadInput as error:
        raise BadInput(f"--fleet={config.fleet}: {error}") from error


def _compile_plan_meanwhile(
    config: Config, own_planner: Planner, clients: fleet.Fleet
) -> Future[None] | None:
    """Compiles in a thread what plans a round, while the data are read. None if another search plans it."""
    if (config.codec, config.codec_down) != ("float32", "") or own_planner.method != "exact":
        return None
    units = len(models.create(config.model))
    cohort = clients.take(range(min(config.cohort_size, len(clients))))
    cohort = cohort.with_samples(np.ones(len(cohort), int))
    pool = ThreadPoolExecutor(1, "plan")
    compiled = pool.submit(_compile_plan, config, cohort, units, ("exact", *RIVALS))
    pool.shutdown(wait=False)
    return compiled


def _compile_plan(config: Config, clients: fleet.Fleet, units: int, methods: Sequence[str]) -> None:
    """Compiles the search for plans on a network without costs, while the real network is traced."""
    if planner(config).barrier == "session" and config.band == "fixed":
        per_unit, per_cut = np.zeros(units, np.int64), np.zeros(units + 1, np.int64)
        free = models.Profile((), per_unit, per_unit, per_unit, per_unit, per_unit, per_cut)
        terms = optim.terms(free, clients, work(config))  # pyright: ignore[reportArgumentType]
        for method in methods:
            optim.solve(terms, config.server_flops, method)


def _program(config) -> str:
    """All settings that shape a compiled round, except how the devices compute it."""
    shapes = {
        field.name for field in fields_of("train")
        if field.metadata["group"] not in HARMLESS and field.name not in _NO_SHAPES
    }  # fmt: skip
    return ", ".join(f"{name}={getattr(config, name)}" for name in sorted(shapes))


def _initial(config, chain, image_shape) -> models.Variables:
    """The variables before the first round."""
    imported = _imported(config, chain, image_shape)
    return imported.variables if imported else _fresh(config, chain, image_shape)


def _imported(config, chain, image_shape) -> keras_weights.Imported | None:
    """The weights that --init_from names. None without --init_from."""
    if not config.init_from:
        return None
    if config.norm != "batch":
        raise BadInput(f"--init_from={config.init_from}: needs --norm=batch, as the file has it")
    if config.model not in models.VARIANTS:
        raise BadInput(f"--init_from={config.init_from}: needs --model=efficientnetv2-…, not {config.model}")
    fresh = _fresh(config, chain, image_shape)
    return keras_weights.load(config.init_from, config.model, chain, fresh)


def _weights_are_gone(config, progress) -> bool:
    """Whether --init_from names the run's initial weights and they are missing now."""
    same = config.init_from == progress.settings.get("init_from")
    return bool(config.init_from) and same and not Path(config.init_from).exists()


def _scaling(progress) -> keras_weights.InputScaling:
    """How a run scales its images, from its checkpoint."""
    scaling = progress.network["input_scaling"]
    return keras_weights.InputScaling(*map(tuple, (scaling["divisor"], scaling["offset"])))


def _classifier(config, imported, num_classes) -> list[str]:
    """A line that says where the classifier comes from, if --init_from names a file."""
    if imported is None:
        return []
    if imported.classes == num_classes:
        return [f"classifier: from {config.init_from}"]
    has = "none" if imported.classes is None else f"{imported.classes} classes"
    return [f"classifier: random weights, because {config.init_from} has {has}"]


def _fresh(config, chain, image_shape):
    variables = chain.init(jax.random.key(config.seed), jnp.zeros((1, *image_shape)))
    *units, classifier = variables.params
    classifier = jax.tree.map(lambda x: config.head_init_scale * x, classifier)
    return variables._replace(params=(*units, classifier))
