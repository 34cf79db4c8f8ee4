"""Every setting reaches its use: short runs of a network of two dense units against NumPy."""

import dataclasses
import functools
import itertools
import json

import finite
import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
import reference_run

from sfl_jax import datasets, fleet, models
from sfl_jax.commands import parts, train, workdir
from sfl_jax.commands.config import Config, fields_of, settings
from sfl_jax.models import keras_weights
from sfl_jax.run import Run, loop, recording
from sfl_jax.run.rounds import prepare

DATA = reference_run.dataset()
BASE = Config(
    model="efficientnetv2-tiny", image_size=reference_run.SIZE, layer_form="product", drop_rate_scale=0.0,
    head_init_scale=1.0, clients=7, cohort_size=4, partition="iid", server_flops=2e6, rounds=3, batch_size=4,
    optimizer="sgd", learning_rate=0.3, momentum=0.0, weight_decay=0.0, learning_rate_schedule="constant",
    warmup_rounds=0, eval_every=1, execution="vmap", clients_per_chunk=2, seed=2,
)  # fmt: skip
# Every run differs from BASE in several settings. A test shows that each setting alone matters.
RUNS = {
    "momentum": {
        "momentum": 0.7, "weight_decay": 0.05, "local_epochs": 2, "seed": 5, "eval_every": 2,
        "links": "fading", "coherence_s": 0.1, "drop_probability": 0.4, "barrier": "staged",
        "partition": "quantity", "dirichlet_alpha": 2.0,
    },
    "adam": {
        "optimizer": "adam", "momentum": 0.8, "weight_decay": 0.3, "learning_rate": 0.02, "batch_size": 3,
        "eval_every": 2, "drop_rate_scale": 0.8, "method": "equal_shares",
    },
    "server": {
        "server_learning_rate": 0.6, "server_momentum": 0.8, "partition": "dirichlet", "dirichlet_alpha": 0.3,
        "min_samples": 5, "method": "random_cut", "clients_per_chunk": 1, "execution": "map",
    },
    "schedule": {
        "warmup_rounds": 2, "learning_rate_schedule": "cosine", "rounds": 4, "eval_every": 3, "min_cut": 0,
        "server_flops": 8e6, "links": "shannon", "drop_rate_scale": 1.0,
    },
    "practice": {
        "proximal": 0.5, "clip_norm": 0.2, "sampling": "size", "server_optimizer": "adam",
        "server_momentum": 0.6, "server_epsilon": 0.05, "server_learning_rate": 0.1, "partition": "quantity",
        "learning_rate_schedule": "exponential", "decay_rate": 0.3, "decay_rounds": 2,
    },
    "fleet": {
        "fleet": "random", "clients": 9, "cohort_size": 3, "partition": "shards", "shards_per_client": 3,
        "image_size": 10, "head_init_scale": 0.3, "jitter": 0.5, "deadline_factor": 1.2,
    },
}  # fmt: skip
# Settings that no run of RUNS sets, and where they are tested instead.
ELSEWHERE = {
    "model": "models", "layer_form": "models", "compute_dtype": "federated/test_precision.py",
    "matmul_precision": "commands/test_accelerators.py", "deterministic": "commands/test_accelerators.py",
    "init_from": "below", "dataset": "below", "data_dir": "below", "label_key": "datasets/test_loading.py",
    **dict.fromkeys(("starts", "recall", "rounding", "band"), "planning/test_planner.py"),
    **dict.fromkeys(
        (
            *("scheme", "server_order", "server_batch", "max_cut", "tail_units", "keep_server_state"),
            *("codec", "codec_down"),
        ),
        "commands/test_schemes.py",
    ),
    **dict.fromkeys(("rtt_s", "broadcast_bps"), "commands/test_plan.py"),
    "server_memory_bytes": "planning/test_within_memory.py", "servers": "commands/test_servers_plan.py",
    "on_divergence": "run/test_loop.py", "norm": "models/test_layers.py",
    "augment": "datasets/test_augment.py", "availability": "fleet/test_sampling.py",
    "batch_norm": "federated/test_personal.py",
    "seeds": "commands/test_train_together.py", "learning_rates": "commands/test_train_together.py",
    "rtt_s": "planning/test_link_terms.py", "broadcast_bps": "planning/test_link_terms.py",
    "memory_budget_gib": "federated/test_tuning.py", "devices": "federated/test_devices.py",
    "compilation_cache": "commands/test_compilation_cache.py", "tensorboard": "commands/test_tensorboard.py",
    **dict.fromkeys(
        ("join_timeout_s", "num_processes", "process_id", "coordinator_address", "heartbeat_timeout_seconds"),
        "federated/test_processes.py",
    ),
    **dict.fromkeys(("workdir", "allow_config_change"), "commands/test_train.py"),
    **dict.fromkeys(
        ("checkpoint_every_rounds", "checkpoint_every_s", "keep", "on_write_error"), "run/test_recording.py"
    ),
}  # fmt: skip


def the_fleet():
    """Slow clients, for which a small network is much work."""
    draw = np.random.default_rng(4).random((4, 7))
    return fleet.Fleet(
        client=np.array([f"c{k}" for k in range(7)]), flops=10 ** (4.5 + draw[0]),
        uplink_bps=10 ** (5 + draw[1]), downlink_bps=10 ** (5.5 + draw[2]), memory_bytes=np.full(7, 1e6),
        transmit_w=np.full(7, 0.2), distance_m=800 + 1200 * draw[3],
    )  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def made_with():
    """The arguments with which the network was last made. The reference's network replaces it."""
    asked = {}

    def create(
        name, num_classes=10, in_channels=1, *, layer_form="product", dtype=None, drop_rate_scale=1.0, **_
    ):
        asked.update(name=name, num_classes=num_classes, in_channels=in_channels)
        asked.update(layer_form=layer_form, dtype=dtype)
        return networks.dense(drop_rate_scale, num_classes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "create", create)
        patch.setattr(datasets, "load", lambda *_, **__: DATA)
        patch.setattr(loop, "SHORT_S", 0.0)  # so that every round's model is kept
        yield asked


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("fleet") / "fleet.csv"
    fleet.write_fleet(path, the_fleet())
    return dataclasses.replace(BASE, fleet=str(path))


def clients_of(config):
    if config.fleet == "random":
        return fleet.random_fleet(config.clients, seed=config.seed)
    return the_fleet()


@functools.cache
def expected(config):
    return reference_run.run(config, DATA, clients_of(config))


def trained(config):
    """(its parts, [(parameters, state, line)] of its rounds)."""
    built = parts.build(config)
    run = Run.of(built.parts)
    run.compile()
    # Read at once, because the next round reuses the buffers.
    return built, [
        (reference_run.as_params(run.variables), run.state, line) for line in run.rounds(config.rounds)
    ]


def numbers(line):
    """The numbers of a line of the reference. -1 if a round was not evaluated."""
    values = [*line[:5], *line.clocks.values(), line.clients, line.cuts.mean()]
    return np.array([-1 if value is None else value for value in values], float)


def numbers_of(state, line):
    values = (
        line.train_loss, line.test_loss, line.test_accuracy, line.round_s, line.bound_s,
        *state.simulated_s.values(), line.clients, line.mean_cut,
    )  # fmt: skip
    return np.array([-1 if value is None else value for value in values], float)


def assert_params(params, expected):
    for ours, theirs in zip(params, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=2e-5)


def differ(a, b):
    """Whether a number of two lines differs by far more than rounding."""
    values = zip((*numbers(a)[[0, 1, 3, 4]], *a.params), (*numbers(b)[[0, 1, 3, 4]], *b.params), strict=True)
    return any(
        np.shape(x) != np.shape(y) or not finite.are_close(x, y, rtol=2e-3, atol=2e-3) for x, y in values
    )


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_what_its_settings_say(base, name):
    config = dataclasses.replace(base, **RUNS[name])
    built, rounds = trained(config)
    for (params, state, line), own in zip(rounds, expected(config), strict=True):
        np.testing.assert_allclose(numbers_of(state, line), numbers(own), rtol=2e-5)
        assert line.simulated_s == state.simulated_s[config.method]
        prepared = prepare(built.parts, line.round - 1)
        np.testing.assert_array_equal(prepared.assignments.cut[prepared.turnout.came], own.cuts)
        assert_params(params, own.params)


@pytest.mark.parametrize("name", RUNS)
def test_each_of_its_settings_matters(base, name):
    config = dataclasses.replace(base, **RUNS[name])
    whole = expected(config)
    without = {}
    for setting in RUNS[name].keys() - {"clients_per_chunk", "execution"}:
        change = {setting: getattr(base, setting)}
        if setting in ("fleet", "clients"):
            change = {"fleet": base.fleet, "clients": base.clients}
        without[setting] = expected(dataclasses.replace(config, **change))
    idle = [
        setting for setting, lines in without.items()
        if len(lines) == len(whole) and not any(map(differ, whole, lines))
    ]  # fmt: skip
    assert idle == []


def test_every_setting_of_training_is_in_a_run_or_tested_elsewhere():
    in_runs = {setting for changes in RUNS.values() for setting in changes}
    assert {field.name for field in fields_of("train")} == in_runs | ELSEWHERE.keys()
    assert not in_runs & ELSEWHERE.keys()


class Crash(Exception):
    """Ends a run like a machine that is lost."""


def test_a_run_that_was_lost_goes_on_with_everything_it_had(base, tmp_path, monkeypatch, made_with):
    config = dataclasses.replace(
        base, **RUNS["server"], workdir=str(tmp_path), compute_dtype="bfloat16", checkpoint_every_rounds=1
    )
    given = {
        name: value for name, value in settings(config, "train").items() if value != getattr(Config, name)
    }
    flags = [f"--{name}={value}" for name, value in given.items()]
    add = recording.Recorder.add

    def add_and_crash(self, state, line):
        add(self, state, line)
        if line.round == 1:
            raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(recording.Recorder, "add", add_and_crash)
        with pytest.raises(Crash):
            train.main(flags)
    assert made_with == {
        "name": config.model, "num_classes": reference_run.CLASSES, "in_channels": 1,
        "layer_form": "product", "dtype": jnp.bfloat16,
    }  # fmt: skip
    assert train.main(flags) == 0
    lines = [json.loads(line) for line in (tmp_path / recording.LOG).read_text().splitlines()]
    whole = expected(dataclasses.replace(base, **RUNS["server"]))
    for name in ("train_loss", "test_loss", "test_accuracy", "round_s", "bound_s", "clients"):
        np.testing.assert_allclose([x[name] for x in lines], [getattr(x, name) for x in whole], rtol=2e-5)
    clock = [own.clocks[config.method] for own in whole]
    np.testing.assert_allclose([line["simulated_s"] for line in lines], clock, rtol=2e-5)
    assert all(a["wall_s"] < b["wall_s"] for a, b in itertools.pairwise(lines))
    _, state = workdir.saved(config.workdir)
    assert state.simulated_s == pytest.approx(whole[-1].clocks, rel=2e-5)
    assert_params(reference_run.as_params(state.model.variables), whole[-1].params)


def test_given_weights_come_with_their_scaling(base, monkeypatch):
    config = dataclasses.replace(base, init_from="given.weights.h5", eval_every=3)
    given = networks.dense().init(jax.random.key(77), jnp.zeros((1, base.image_size, base.image_size, 1)))
    scaling = keras_weights.InputScaling((100.0,), (-0.5,))
    read = []

    def load(*arguments):
        read.append(arguments[:2])
        return keras_weights.Imported(given, scaling, reference_run.CLASSES)

    monkeypatch.setattr(keras_weights, "load", load)
    built, rounds = trained(config)
    assert parts.network(built)["input_scaling"] == scaling._asdict()
    assert set(read) == {(config.init_from, config.model)}
    initial = reference_run.as_params(given)
    lines = reference_run.run(config, DATA, the_fleet(), (scaling.divisor[0], scaling.offset[0]), initial)
    for (params, state, line), own in zip(rounds, lines, strict=True):
        np.testing.assert_allclose(numbers_of(state, line), numbers(own), rtol=2e-5)
        assert_params(params, own.params)


def test_what_a_run_reads_has_a_digest_each(base):
    built = parts.build(base)
    before = parts.inputs(built)

    def changed(**changes):
        if "init_digest" not in changes:
            changes = {"parts": dataclasses.replace(built.parts, **changes)}
        after = parts.inputs(built._replace(**changes))
        return {name for name, value in after.items() if value != before[name]}

    for name, column in built.parts.fleet.columns().items():
        other = column[::-1] if name == "client" else column + 1
        assert changed(fleet=dataclasses.replace(built.parts.fleet, **{name: other})) == {"fleet"}, name
    for name in ("train_images", "train_labels", "test_images", "test_labels"):
        other = getattr(DATA, name)[::-1].copy()
        assert changed(data=dataclasses.replace(DATA, **{name: other}, digest="")) == {"dataset"}, name
    assert changed(init_digest="other") == {"init_from"}
