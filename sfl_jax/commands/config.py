"""All settings of all commands in one frozen dataclass, and the check of each value."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from sfl_jax import paths, registry
from sfl_jax.commands import rules
from sfl_jax.commands.fields import (
    ALONE,
    CERTIFYING,
    DATA,
    DATALESS,
    FILES,
    FLEET,
    LARGEST_INT,
    LEARNING,
    MACHINE,
    NETWORK,
    PLANNING,
    PROCESSES,
    PROFILING,
    RUNNING,
    SCHEME,
    TRAINING,
    allowed,
    flag,
    has_type,
    is_path,
    is_within,
    said,
)
from sfl_jax.commands.rules import CLIENTS, RANDOM
from sfl_jax.errors import BadInput, did_you_mean

AUTO = "auto"
PARTITIONS = (AUTO, *registry.PARTITIONS)
DTYPES = ("float32", "bfloat16")
PRECISIONS = ("default", "high", "highest")
PLANS_WORKDIR = "runs/methods"


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings of a run. A field's name is its flag's name. Units are in the help texts."""

    model: str = flag(
        "efficientnetv2-b0", NETWORK, (*PLANNING, *ALONE), "the network",
        choices=tuple(registry.NETWORKS),
    )  # fmt: skip
    image_size: int = flag(
        32,
        NETWORK,
        (*PLANNING, *ALONE),
        "side of the network's input images, in pixels",
        at_least=8,
        at_most=4096,
    )
    image_channels: int = flag(
        1, NETWORK, (*DATALESS, *ALONE), "channels of an image: 1 is grey, 3 is colour", at_least=1,
        at_most=4096,
    )  # fmt: skip
    norm: str = flag(
        "batch", NETWORK, (*TRAINING, *CERTIFYING), "the normalisation layers: batch norm, or group norm, "
        "which needs no statistics of a batch", choices=registry.NORMS,
    )  # fmt: skip
    num_classes: int = flag(10, NETWORK, (*DATALESS, *ALONE), "number of classes", at_least=1)
    layer_form: str = flag(
        AUTO, NETWORK, TRAINING, "how convolutions are computed; auto measures which is faster",
        choices=(AUTO, *registry.LAYER_FORMS), open=AUTO,
    )  # fmt: skip
    compute_dtype: str = flag(
        "float32", NETWORK, TRAINING, "number type of the layers' computations", choices=DTYPES
    )
    matmul_precision: str = flag(
        "default",
        NETWORK,
        TRAINING,
        "how exactly a GPU or TPU multiplies float32 numbers",
        choices=PRECISIONS,
    )
    drop_rate_scale: float = flag(
        0.0,
        NETWORK,
        (*PLANNING, *ALONE),
        "factor on the published rates of dropout and stochastic depth; 0 switches them off",
        at_least=0,
        at_most=1,
    )
    init_from: str = flag(
        "",
        NETWORK,
        TRAINING,
        "Keras weights to start from: .weights.h5, .h5 or .keras; empty: random weights",
        path=True,
    )
    head_init_scale: float = flag(
        0.0,
        NETWORK,
        TRAINING,
        "factor on the random initial weights of the classifier; 0 starts it at zero",
        at_least=0,
    )

    dataset: str = flag(
        "mnist", DATA, TRAINING, "a TFDS image classification set (mnist is built in), a .npz file, or a "
        "folder of pictures, such as ./mine",
    )  # fmt: skip
    data_dir: str = flag(
        "", DATA, TRAINING, "TFDS directory with the prepared dataset", harmless=True, path=True
    )
    label_key: str = flag(
        "", DATA, TRAINING, "the class label to learn, if there are several; empty: label, or the only one"
    )
    partition: str = flag(
        AUTO, DATA, TRAINING, "how samples are divided among clients; auto: fleet if the file of --fleet "
        "has the column samples, else iid", choices=PARTITIONS,
    )  # fmt: skip
    dirichlet_alpha: float = flag(
        0.5,
        DATA,
        TRAINING,
        "with dirichlet, how evenly classes are mixed in each client; with quantity, how similar the "
        "clients' numbers of samples are; larger is more even",
        above=0,
        at_most=1e6,
    )
    min_samples: int = flag(
        1, DATA, TRAINING, "the fewest samples that a client gets, under every partition", at_least=1
    )
    shards_per_client: int = flag(
        2,
        DATA,
        TRAINING,
        "with shards: samples are sorted by label and cut into pieces; this many for each client",
        at_least=1,
    )

    augment: str = flag(
        "none", DATA, TRAINING, "random changes of training images: none; auto (what suits the dataset); "
        "shift:PIXELS, flip, crop:PART; several with + between",
    )  # fmt: skip

    clients: int = flag(
        0, FLEET, PLANNING, f"number of clients; 0: as many as --fleet has, {CLIENTS} if random", at_least=0
    )
    cohort_size: int = flag(
        10, FLEET, PLANNING, "clients that take part in a round; a plan shows the time of such rounds "
        "beside that of a round of all clients", at_least=1,
    )  # fmt: skip
    sampling: str = flag(
        "uniform", FLEET, TRAINING, "how the clients of a round are drawn: uniform, weighted by samples in "
        "the mean; size: with probability proportional to samples, weighted equally",
        choices=registry.SAMPLINGS,
    )  # fmt: skip
    availability: str = flag(
        "", FLEET, TRAINING, "a CSV file with the columns client, from_round, until_round: when clients are "
        "available; empty: always", harmless=True, path=True,
    )  # fmt: skip
    fleet: str = flag(
        RANDOM,
        FLEET,
        PLANNING,
        "the clients' compute and links: the path of a fleet.csv, random, or example (ten made-up clients)",
        harmless=True,
        path=True,
    )
    server_flops: float = flag(2e10, FLEET, PLANNING, "the server's compute, FLOP/s; 20G is 2e10", above=0)
    servers: str = flag(
        "", FLEET, ("train", "plan"), "only for plans: the path of a CSV file of several servers (server, "
        "flops, memory_bytes); empty: one server, of --server_flops", path=True,
    )  # fmt: skip
    server_links: str = flag(
        "", FLEET, ("plan",), "with --servers, the path of a CSV file of the links of each client to each "
        "server (client, server, uplink_bps, downlink_bps); empty: the rates of the fleet", path=True,
    )  # fmt: skip
    server_memory_bytes: float = flag(
        0.0, FLEET, ("train", "plan"), "the server's memory for copies of its half, one for each client of a "
        "round, bytes; 8G is 8e9; 0: no limit", at_least=0,
    )  # fmt: skip
    method: str = flag(
        "exact",
        FLEET,
        PLANNING,
        "how cuts and server shares are chosen",
        choices=tuple(registry.METHODS),
    )
    starts: str = flag(
        "equal", FLEET, PLANNING, "start of alternating and regression: equal, proportional or random; of "
        "several, with commas between, the best result is kept",
    )  # fmt: skip
    recall: bool = flag(
        False,
        FLEET,
        PLANNING,
        "alternating and regression may bring back a client that left the server and now ends last",
    )
    barrier: str = flag(
        "session",
        FLEET,
        PLANNING,
        "session: no client waits for another before the end of the round; staged: all wait for each "
        "other before and after the server's work",
        choices=registry.BARRIERS,
    )
    rounding: str = flag(
        "need", FLEET, PLANNING, "how regression rounds a cut: to the neighbour that needs less of the "
        "server (need) or to the nearest", choices=registry.ROUNDINGS,
    )  # fmt: skip
    links: str = flag(
        "fixed",
        FLEET,
        PLANNING,
        "fixed: rates of the fleet; shannon: rates from the distance; fading: rates from the distance "
        "that change every round",
        choices=registry.LINKS,
    )
    coherence_s: float = flag(
        0.0, FLEET, PLANNING, "with --links=fading, seconds that a fade lasts; a transfer's rate is the mean "
        "over the fades that it sees; 0: over all fades", at_least=0,
    )  # fmt: skip
    band: str = flag(
        "fixed",
        FLEET,
        PLANNING,
        "how clients share bandwidth: equal parts (fixed); best parts of one band (pooled); best "
        "parts of an uplink band and a downlink band (separate); best parts of the time of one half-duplex "
        "medium, such as a Wi-Fi channel, at which the rates of the fleet hold (airtime)",
        choices=registry.BANDS,
    )
    rtt_s: float = flag(
        0.0, FLEET, PLANNING, "round-trip time of every client's link, seconds, half of which each message "
        "travels; 0: that of the fleet's column rtt_s, or none", at_least=0,
    )  # fmt: skip
    broadcast_bps: float = flag(
        0.0, FLEET, PLANNING, "bit/s at which the server sends the model once to all clients; 0: to each "
        "client at its own rate", at_least=0,
    )  # fmt: skip
    drop_probability: float = flag(
        0.0,
        FLEET,
        TRAINING,
        "probability that a client of the cohort drops out of a round",
        at_least=0,
        at_most=1,
    )
    jitter: float = flag(
        0.0,
        FLEET,
        TRAINING,
        "how much slower than planned clients are on average; 0.1 is 10 %",
        at_least=0,
        at_most=1e6,
    )
    deadline_factor: float = flag(
        0.0,
        FLEET,
        TRAINING,
        "a round ends after its planned seconds times this factor, and late clients are left out; "
        "0: wait for all clients",
        at_least=0,
    )
    stored_size: int = flag(
        0, FLEET, DATALESS, "side of the clients' stored images, which go up at cut 0, in pixels; 0: like "
        "--image_size", at_least=0, at_most=65536,
    )  # fmt: skip
    min_cut: int = flag(
        1, FLEET, PLANNING, "the fewest units on a client; with 0 images may go to the server", at_least=0
    )
    samples_per_client: int = flag(
        600, FLEET, DATALESS, "samples of each client in the random fleet", at_least=1
    )
    bits_per_float: int = flag(
        32,
        FLEET,
        DATALESS,
        "bits of each number of smashed data and their gradient on the link",
        at_least=1,
        at_most=64,
    )
    target_round_s: float = flag(
        0.0,
        FLEET,
        ("plan",),
        "find the smallest server with which a round takes at most these seconds; 0: off",
        at_least=0,
    )

    measured: str = flag(
        "", FLEET, ("plan",), "a CSV file of measured rounds (round, client, cut, and client_s or terms like "
        "client_forward_s): plan with rates that are fitted to them", path=True,
    )  # fmt: skip
    traces: str = flag(
        "", FLEET, ("plan",), "a CSV file of the clients' rates in past rounds (round, client, and flops, "
        "uplink_bps or downlink_bps): plan for rates that change", path=True,
    )  # fmt: skip
    interval: str = flag(
        "", FLEET, ("plan",), "LOW,HIGH: plan for rates between these factors of the fleet's rates"
    )
    quantile: float = flag(
        0.0, FLEET, ("plan",), "with --traces or --interval, the part of sampled rounds that should be "
        "short; 1: all of them; 0: the worst case, each rate at its least", at_least=0, at_most=1,
    )  # fmt: skip
    frontier: str = flag(
        "none", FLEET, ("plan",), "also find the least energy, or the fewest bytes, for each round time: "
        "none, energy or bytes", choices=registry.FRONTIERS,
    )  # fmt: skip
    budget: float = flag(
        0.0, FLEET, ("plan",), "with --frontier, the joules or bytes that a round of all clients may take; "
        "0: any", at_least=0,
    )  # fmt: skip
    round_s: float = flag(
        0.0, FLEET, ("plan",), "with --frontier, the seconds that the planned round may take; 0: the "
        "shortest", at_least=0,
    )  # fmt: skip

    scheme: str = flag(
        "sfl", SCHEME, PLANNING, "who holds, updates and averages which half: sfl (SplitFed V1), sfl_v2 "
        "(SplitFed V2), psl (parallel split learning), sl (split learning), fl (no split)",
        choices=tuple(registry.SCHEMES),
        hints={"splitfed": "SplitFed V1 is sfl, V2 is sfl_v2", "fedavg": "federated averaging is fl"},
    )  # fmt: skip
    server_order: str = flag(
        "client", SCHEME, PLANNING, "with sfl_v2, the order of clients at the server: client: one whole "
        "session after the other; step: one step of each client in turn", choices=registry.SERVER_ORDERS,
    )  # fmt: skip
    server_batch: str = flag(
        "separate", SCHEME, TRAINING, "with psl, the batches of the server's units: separate: one for each "
        "client; joined: one batch of all clients", choices=registry.SERVER_BATCHES,
    )  # fmt: skip
    max_cut: int = flag(
        -1, SCHEME, PLANNING, "the most units that a client may hold; -1: all. With psl, all clients share "
        "one copy of the units after these", at_least=-1,
    )  # fmt: skip
    tail_units: int = flag(
        0, SCHEME, (*PLANNING, *CERTIFYING), "how many last units the client also holds, so that labels "
        "never leave it", at_least=0,
    )  # fmt: skip
    codec: str = flag(
        "float32", SCHEME, PLANNING, "what is done to smashed data at the cut: float32 (nothing), bfloat16, "
        "float16, int8, int4, topk:PART, gaussian:NORM,SIGMA; of several, with + between, the plan chooses "
        "one for each client",
    )  # fmt: skip
    codec_down: str = flag(
        "", SCHEME, PLANNING, "the same for the gradient of smashed data; empty: like --codec"
    )
    keep_server_state: bool = flag(
        True, SCHEME, TRAINING, "with sfl_v2, psl and sl, keep the optimiser state of shared units for the "
        "next round",
    )  # fmt: skip

    rounds: int = flag(100, LEARNING, TRAINING, "rounds to train", at_least=1)
    local_epochs: int = flag(1, LEARNING, PLANNING, "epochs of a client in a round", at_least=1)
    batch_size: int = flag(32, LEARNING, (*PLANNING, *ALONE), "samples in a local step", at_least=1)
    optimizer: str = flag(
        "adam",
        LEARNING,
        PLANNING,
        "optimiser of the local steps",
        choices=tuple(registry.OPTIMIZERS),
        hints={"adamw": "adam with --weight_decay is AdamW"},
    )
    learning_rate: float = flag(
        0.002,
        LEARNING,
        TRAINING,
        "learning rate of the local steps; 0.002 suits adam, 0.05 suits sgd",
        above=0,
    )
    momentum: float = flag(
        0.9, LEARNING, PLANNING, "momentum of sgd; decay of the first moment of adam", at_least=0, below=1
    )
    weight_decay: float = flag(0.0, LEARNING, TRAINING, "weight decay of the local steps", at_least=0)
    learning_rate_schedule: str = flag(
        "cosine",
        LEARNING,
        TRAINING,
        "the learning rate over the rounds; cosine and linear fall to 0; exponential and step "
        "follow --decay_rate",
        choices=tuple(registry.SCHEDULES),
    )
    decay_rate: float = flag(
        0.5, LEARNING, TRAINING, "factor of the learning rate in --decay_rounds rounds", above=0, at_most=1
    )
    decay_rounds: int = flag(
        10, LEARNING, TRAINING, "rounds over which the learning rate changes by --decay_rate", at_least=1
    )
    warmup_rounds: int = flag(
        4, LEARNING, TRAINING, "rounds in which the learning rate rises to its full value", at_least=0
    )
    proximal: float = flag(
        0.0, LEARNING, TRAINING, "FedProx's factor mu, which holds local parameters near the global ones; 0: "
        "none", at_least=0,
    )  # fmt: skip
    clip_norm: float = flag(
        0.0, LEARNING, TRAINING, "largest norm of the gradient of a unit in a local step; 0: any", at_least=0
    )
    batch_norm: str = flag(
        "averaged", LEARNING, TRAINING, "normalisation at the end of a round: averaged; local_statistics: "
        "each client keeps its statistics; local: its scales and biases too; reestimated: statistics of the "
        "new model", choices=registry.BATCH_NORMS,
    )  # fmt: skip
    server_optimizer: str = flag(
        "sgd", LEARNING, TRAINING, "how the server takes the clients' mean change: sgd, adam or yogi",
        choices=tuple(registry.SERVER_OPTIMIZERS),
    )  # fmt: skip
    server_epsilon: float = flag(
        1e-3, LEARNING, TRAINING, "with server adam or yogi, the number added to the root of the second "
        "moment; smaller is more adaptive", above=0,
    )  # fmt: skip
    server_learning_rate: float = flag(1.0, LEARNING, TRAINING, "factor on the clients' mean change", above=0)
    server_momentum: float = flag(
        0.5,
        LEARNING,
        TRAINING,
        "momentum of the clients' mean change over the rounds; with adam and yogi the decay of its mean",
        at_least=0,
        below=1,
    )
    on_divergence: str = flag(
        "stop", LEARNING, TRAINING, "what to do if a client's loss or update is not finite",
        choices=("stop", "skip_client"), harmless=True,
    )  # fmt: skip
    seed: int = flag(0, LEARNING, (*PLANNING, *CERTIFYING), "seed of everything random", at_least=0)
    seeds: str = flag(
        "", LEARNING, ("train",), "several seeds, with commas between: one run for each, all computed in one "
        "program; empty: one run with --seed",
    )  # fmt: skip
    learning_rates: str = flag(
        "", LEARNING, ("train",), "several learning rates, with commas between: one run for each, as with "
        "--seeds",
    )  # fmt: skip

    clients_per_chunk: int = flag(
        0,
        MACHINE,
        TRAINING,
        "the most clients that a device computes at once; 0: the fastest number that fits the memory",
        at_least=0,
        open=0,
    )
    execution: str = flag(
        AUTO, MACHINE, TRAINING, "vmap: a device computes the clients of a chunk at once; "
        "map: one after the other; auto measures which is faster",
        choices=(AUTO, *registry.EXECUTIONS), open=AUTO,
    )  # fmt: skip
    memory_budget_gib: float = flag(
        0.0,
        MACHINE,
        TRAINING,
        "memory of a device that rounds may take, GiB; 0: all that is free",
        at_least=0,
    )
    devices: int = flag(0, MACHINE, TRAINING, "devices to use in each process; 0: all", at_least=0)
    deterministic: bool = flag(
        False, MACHINE, TRAINING, "the same bits in every run also on a GPU, which is slower"
    )
    compilation_cache: bool = flag(
        True, MACHINE, (*PLANNING, *ALONE), "keep compiled programs in the user's cache directory"
    )
    num_processes: int = flag(
        0,
        PROCESSES,
        ("train",),
        "number of processes; 0: from SLURM, Open MPI, a TPU pod or GKE, else 1",
        at_least=0,
    )
    process_id: int = flag(
        -1, PROCESSES, ("train",), "number of this process, from 0; -1: found automatically", at_least=-1
    )
    coordinator_address: str = flag(
        "", PROCESSES, ("train",), "host:port of process 0; empty: found automatically"
    )
    join_timeout_s: int = flag(
        300, PROCESSES, ("train",), "seconds to wait for the other processes at the start", at_least=1
    )
    heartbeat_timeout_seconds: int = flag(
        100, PROCESSES, ("train",), "seconds of silence after which a process counts as dead", at_least=1
    )

    # PLANS_WORKDIR replaces this default where plans are compared without training.
    workdir: str = flag("runs/demo", FILES, RUNNING, "directory of the run", path=True)
    eval_every: int = flag(1, FILES, TRAINING, "rounds between evaluations", at_least=1)
    checkpoint_every_rounds: int = flag(
        0, FILES, TRAINING, "rounds between checkpoints; 0: only by time", at_least=0
    )
    checkpoint_every_s: float = flag(
        300.0, FILES, TRAINING, "seconds between checkpoints; 0: only by rounds", at_least=0
    )
    keep: int = flag(2, FILES, TRAINING, "checkpoints to keep", at_least=1)
    on_write_error: str = flag(
        "stop", FILES, TRAINING, "what to do if the disk fails", choices=("stop", "continue")
    )
    allow_config_change: bool = flag(False, FILES, TRAINING, "go on with a run that has other settings")
    output: str = flag(
        "plan.json", FILES, ("plan",), "file of the plan; a .csv is written beside it", path=True
    )
    device_file: str = flag(
        "device.json", FILES, PROFILING, "file of the measured seconds; a fleet.csv names it in its column "
        "device", path=True,
    )  # fmt: skip
    certificate: str = flag("certificate.csv", FILES, CERTIFYING, "file of the table of all cuts", path=True)
    repetitions: int = flag(
        20, MACHINE, PROFILING, "times that each unit is run in each direction; the median counts", at_least=1
    )
    write_fleet: str = flag(
        "", FILES, ("plan",), "write the planned fleet, for example the random one, to this .csv file",
        path=True,
    )  # fmt: skip
    compare_with: str = flag(
        "", FILES, ("plan",), "an earlier plan (.json): say what changed since", path=True
    )
    plan_only: bool = flag(
        False, FILES, ("compare",), "do not train; compare the plans of all methods over many fleets"
    )
    tensorboard: bool = flag(
        False, FILES, TRAINING, "also write the rounds as events for TensorBoard, in the workdir"
    )
    plot: bool = flag(False, FILES, ("plan",), "draw the plan in a .png beside the output")
    report: bool = flag(False, FILES, ("plan",), "write the plan as a page in a .html beside the output")

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if is_path(field) and isinstance(value, str):
                object.__setattr__(self, field.name, paths.expand(f"--{field.name}", value))

    def to_dict(self) -> dict[str, Any]:
        """The settings in plain values for config.json."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], command: str = "train") -> "Config":
        """The settings from `to_dict` or a command line. Missing names get their defaults.

        Raises BadInput for an unknown name, a value of another type, and for whatever `validate` refuses.
        """
        known = {field.name: field for field in dataclasses.fields(cls)}
        for name, value in values.items():
            if name not in known:
                raise BadInput(f"config: {name} is not a setting")
            if not has_type(value, type(known[name].default)):
                raise BadInput(f"--{name}={value}: must be {allowed(known[name])}")
        config = cls(**values)
        validate(config, command)
        return config


def settings(config: Config, command: str) -> dict[str, Any]:
    """The flags of a command by name."""
    return {field.name: getattr(config, field.name) for field in fields_of(command)}


def changes(before: Mapping[str, Any], config: Config, command: str) -> dict[str, str]:
    """The settings that differ from `before` and change numbers, by name, for example "--seed=1 (was 0)"."""
    harmful = [field for field in fields_of(command) if not field.metadata["harmless"]]
    pairs = [(f.name, getattr(config, f.name), before.get(f.name, f.default)) for f in harmful]
    return {
        name: f"--{name}={said(name, now)} (was {said(name, was)})"
        for name, now, was in pairs
        if now != was and name not in left_open(config)
    }


def left_open(config: Config) -> list[str]:
    """The settings that the run chooses itself. A run that goes on keeps its choices."""
    fields = dataclasses.fields(config)
    return [f.name for f in fields if "open" in f.metadata and getattr(config, f.name) == f.metadata["open"]]


def fields_of(command: str) -> list[dataclasses.Field[Any]]:
    """The fields that `command` takes as flags, in the order of the dataclass."""
    return [field for field in dataclasses.fields(Config) if command in field.metadata["commands"]]


def validate(config: Config, command: str = "train") -> None:
    """Raises BadInput for the first invalid setting, with the flag, the value and what is allowed.

    Rules between flags are checked only for flags that `command` takes.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if type(value) is str:
            paths.check_text(f"--{field.name}", value)
        if not is_within(value, field.metadata):
            hint = field.metadata.get("hints", {}).get(str(value).lower())
            more = f"; {hint}" if hint else ""
            if not hint and "choices" in field.metadata:
                more = did_you_mean(str(value), field.metadata["choices"])
            raise BadInput(f"--{field.name}={value}: must be {allowed(field)}{more}")
        if type(value) is int and value > LARGEST_INT:
            raise BadInput(f"--{field.name}={value}: must be at most {LARGEST_INT}")
        if type(value) is str and is_path(field):
            paths.check_path(f"--{field.name}", value)

    rules.check(config, command, {field.name for field in fields_of(command)})


def as_flags(text: str) -> str:
    """The text with "--" before each setting with a value, for example "--seed=1" for "seed=1".

    Code below the commands knows names and values, but no flags.
    """
    return _NAMED.sub(r"--\1", text)


_NAMED = re.compile(rf"(?<![\w/.=-])({'|'.join(field.name for field in dataclasses.fields(Config))})(?==)")
