"""The cases that `test_devices.py` runs in other processes, with eight virtual devices."""

import contextlib
import dataclasses
import functools
import importlib
import io
import json
import math
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path
from unittest import mock

import finite  # noqa: F401 from now on NaN is no agreement
import flax.linen as nn
import jax
import networks
import numpy as np
from federated import rounds
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from benchmarks import scaling
from sfl_jax import models
from sfl_jax.commands import interruption, train
from sfl_jax.federated import devices, evaluation, round
from sfl_jax.federated.balance import fill_chunks
from sfl_jax.federated.packing import PackedVariables
from sfl_jax.federated.personal import LAYERS, Personal
from sfl_jax.federated.round import Model, run_round, start_model
from sfl_jax.federated.session import Samples
from sfl_jax.models import substitutes
from sfl_jax.run import metrics


class Linear(nn.Module):
    """A network that compiles fast."""

    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(10)(x.reshape(len(x), -1))


SHORT = {"product": rounds.short(rounds.CHAIN), "conv": rounds.short(rounds.REFERENCE_CHAIN)}
KEY = jax.random.key(7)
profiling = importlib.import_module(
    "sfl_jax.models.profile"
)  # `models.profile` is the function, not the module


def samples_of(chain):
    return Samples(*map(np.asarray, rounds.start(chain)[1]))


def cohort(chain, clients=rounds.CUTS, seed=0):
    return rounds.assignments(np.arange(clients) % (len(chain) + 1), seed=seed)


def after_rounds(
    count,
    chunk=2,
    execution="vmap",
    clients=rounds.CUTS,
    chain=rounds.CHAIN,
    broken=None,
    free_bytes=0,
    **changes,
):
    """(model, loss, diverged) in NumPy after two rounds on `count` devices.

    The `broken`-th client sees only black images. Samples are sent with the rounds, unless they fit into
    `free_bytes`.
    """
    chosen = devices.choose_devices(count)
    training = dataclasses.replace(rounds.training(codecs=rounds.SCALING, chain=chain), **changes)
    run = devices.Rounds(training, chunk, chosen, execution)
    own = samples_of(chain)
    samples = devices.place_samples(own, chosen, free_bytes)
    model = devices.replicate(start_model(training, rounds.start(chain)[0]), chosen)
    for seed in range(2):
        work = cohort(chain, clients, seed)
        if broken is not None:
            own, work = rounds.poisoned(own, work, broken)
            samples = devices.place_samples(own, chosen, free_bytes)
        with jax.transfer_guard_device_to_device("disallow"):
            result = run(model, samples, work, KEY, rounds.RATE)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(model)), "the model is donated"
        model = result[0]
    for leaf in jax.tree.leaves(result):
        assert leaf.sharding.is_fully_replicated
        assert len(leaf.sharding.device_set) == count
    return jax.tree.map(np.asarray, devices.on_first(result))


def distance(result, other):
    return rounds.difference(result[:2], other[:2])


def whole_network():
    """9 unequal clients in chunks of 2, so that nothing divides evenly."""
    one = after_rounds(1)
    assert rounds.difference(one[0].variables, rounds.start()[0]) > 0.01
    for count in (2, 4, 8):
        found = distance(one, after_rounds(count))
        print(f"{count} devices: {found:.1e} from one after two rounds")
        assert found < 1e-5, count


def small_network():
    chain = rounds.SMALL_CHAIN
    assert distance(after_rounds(1, chain=chain), after_rounds(4, chain=chain)) < 1e-5


def samples_stay_or_are_sent():
    """Neither changes a bit. Samples that stay are whole on every device."""
    chain = models.Chain((Linear(),))
    sent, resident = (after_rounds(4, chain=chain, free_bytes=free) for free in (0, math.inf))
    jax.tree.map(np.testing.assert_array_equal, sent, resident)
    assert np.isfinite(sent[1])
    placed = devices.place_samples(samples_of(chain), devices.choose_devices(4))
    for array, own in zip(placed, samples_of(chain), strict=True):
        assert [shard.data.shape for shard in array.addressable_shards] == [own.shape] * 4


def own_normalisation():
    """What each client keeps is on every device, and the statistics that are estimated again are the same."""
    chain, clients = rounds.SMALL_CHAIN, rounds.CUTS
    for changes in ({"personal": Personal(LAYERS, clients + 3)}, {"reestimates": True}):
        one, four = (after_rounds(count, chain=chain, **changes) for count in (1, 4))
        assert distance(one, four) < 1e-5
        if changes.get("personal"):
            assert rounds.difference(one[0].kept, four[0].kept) < 1e-5
        assert rounds.difference(one[0].variables, after_rounds(1, chain=chain)[0].variables) > 1e-3


def divergence():
    """A client whose loss is NaN is in no device's sum, and every device names it."""
    changes = {"preprocess": rounds.preprocess_black_to_nan, "skip_diverged": True, "chain": SHORT["conv"]}
    one, four = (after_rounds(count, broken=4, **changes) for count in (1, 4))
    for _, loss, diverged in (one, four):
        assert np.isfinite(loss)
        assert sorted(set(diverged.client.tolist())) == [-1, 4 + 3]
        assert diverged.steps.tolist() == (diverged.client >= 0).tolist(), "its first step is bad"
    assert distance(one, four) < 1e-5


def executions_and_cohorts():
    """Every execution, both layer forms, and chunks and cohorts that divide or do not."""
    cases = {
        "product": [(4, 3, "vmap", 9), (2, 2, "map", 9), (8, 4, "vmap", 3), (8, 2, "vmap", 1)],
        "conv": [(4, 2, "vmap", 9), (2, 3, "map", 9)],
    }
    for form, table in cases.items():
        ones = {}
        for count, chunk, execution, clients in table:
            if clients not in ones:
                ones[clients] = after_rounds(1, 1, clients=clients, chain=SHORT[form])
            several = after_rounds(count, chunk, execution, clients, SHORT[form])
            assert distance(ones[clients], several) < 1e-5, (form, count, chunk, execution, clients)


def mutations():
    """Leaves out what makes several devices equal to one. Each omission must show."""
    chain = SHORT["conv"]
    one = after_rounds(1, chain=chain)
    assert distance(one, after_rounds(4, chain=chain)) < 1e-5
    psum, gather = jax.lax.psum, devices.fill_chunks

    def last_client_twice(assignments, most, count):
        arranged, size = gather(assignments, most, count)
        return arranged._replace(weight=np.where(arranged.client == 11, 2, 1) * arranged.weight), size

    def not_summed(tree, axis_name):
        return tree

    def weights_of_this_device(tree, axis_name):
        """The sums of all devices over one device's weight."""
        (sums, _), (total, diverged) = tree, psum(tree, axis_name)
        return total._replace(weight=sums.weight), diverged

    breaks = {
        "no sum": mock.patch.object(round.lax, "psum", not_summed),
        "weights of one device": mock.patch.object(round.lax, "psum", weights_of_this_device),
        "a client counted twice": mock.patch.object(devices, "fill_chunks", last_client_twice),
        "another device's samples": mock.patch.object(np, "unique", shifted_unique),
    }
    for name, broken in breaks.items():
        with broken:
            assert distance(one, after_rounds(4, chain=chain)) > 1e-3, name


def shifted_unique(values, *, unique=np.unique, **options):
    rows, local = unique(values, **options)
    return rows, (local + 1) % len(rows)


def evaluations():
    """130 samples on 8 devices in batches of at most 6, with padding in the last ones."""
    evaluations_of(rounds.SMALL_CHAIN)


def evaluations_of_both_forms():
    for chain in SHORT.values():
        evaluations_of(chain)


def evaluations_of(chain):
    variables, _ = rounds.start(chain)
    rng = np.random.default_rng(1)
    images, labels = rng.integers(0, 256, (130, 16, 16, 1), np.uint8), rng.integers(0, 10, 130, np.int32)
    logits, _ = jax.jit(functools.partial(chain.apply, train=False))(variables, rounds.preprocess(images))
    right = np.asarray(logits).argmax(-1) == labels
    by_hand = [right[labels == number].mean() for number in range(10)]
    results = {}
    for count in (1, 2, 8):
        chosen = devices.choose_devices(count)
        given = (
            devices.replicate(PackedVariables.of(variables), chosen),
            devices.place_held_out(images, labels, chosen, batch=6),
        )
        evaluate = devices.Evaluation(chain, rounds.preprocess, chosen)
        assert evaluate.bytes_needed(*given) > 0
        with metrics.CompileClock() as clock:
            loss, accuracy, by_class = evaluate(*given)
        assert clock.compilations == 0, "compiled before"
        results[count] = float(devices.on_first(loss)), float(devices.on_first(accuracy))
        found = np.asarray(devices.on_first(by_class))
        np.testing.assert_allclose(found, by_hand, rtol=1e-6, equal_nan=False)
        if count > 1:
            assert {s.data.shape[0] for s in given[1].images.addressable_shards} == {1}
    loss = -np.mean(np.asarray(jax.nn.log_softmax(logits))[np.arange(130), labels])
    for count, got in results.items():
        np.testing.assert_allclose(got, (loss, right.mean()), rtol=1e-5, err_msg=str(count), equal_nan=False)
    with mock.patch.object(evaluation.lax, "psum", lambda tree, _: tree):
        part, *_ = devices.Evaluation(chain, rounds.preprocess, chosen)(*given)
    assert abs(float(devices.on_first(part)) / loss - 1) > 1e-4


class StopAfter(interruption.Stop):
    """A request to stop that comes after some rounds."""

    def __init__(self, rounds):
        self.looks, self.rounds = 0, rounds
        super().__init__()

    @property
    def asked(self):
        """Each reading counts as a round."""
        self.looks += 1
        return self.looks > self.rounds

    @asked.setter
    def asked(self, _):
        """Looks alone count."""


def checkpoints_move():
    """A run that goes on with other devices has the numbers of one that always had one, except for rounding.

    The server optimiser's state moves with it.
    """
    flags = [
        "--model=efficientnetv2-tiny", "--layer_form=conv", "--image_size=8", "--clients=1200",
        "--cohort_size=5", "--clients_per_chunk=2", "--rounds=6", "--eval_every=2", "--server_momentum=0.5",
        "--learning_rate=0.001", "--server_flops=1e10", "--nocompilation_cache",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        one, several = Path(place, "one"), Path(place, "several")
        assert train.main([*flags, "--devices=1", f"--workdir={one}"]) == 0
        for count, more, code in ((4, 2, 75), (1, 1, 75), (3, 1, 75), (2, 9, 0)):
            stop = contextlib.nullcontext(StopAfter(more))
            with mock.patch.object(train, "interruption", return_value=stop):
                assert train.main([*flags, f"--devices={count}", f"--workdir={several}"]) == code
            config = json.loads((several / "config.json").read_text())
            assert len(config["environment"]["devices"]) == count
        for name in ("train_loss", "test_loss", "test_accuracy"):
            a, b = (
                [json.loads(line)[name] for line in (run / "metrics.jsonl").read_text().splitlines()]
                for run in (one, several)
            )
            assert len(a) == len(b) == 6
            if name != "train_loss":  # in every second round
                assert a[::2] == b[::2] == [None] * 3
                a, b = a[1::2], b[1::2]
            np.testing.assert_allclose(np.array(a, float), np.array(b, float), rtol=1e-5, err_msg=name)


def placed(count, chain, chunk=2):
    """(the input of a round on `count` devices, the clients of a chunk)."""
    chosen = devices.choose_devices(count)
    arranged, size = fill_chunks(cohort(chain), chunk, count)
    samples = samples_of(chain)
    own = devices.place_clients(samples, arranged, chosen, devices.room(arranged, len(samples.labels), count))
    model = devices.replicate(Model.of(rounds.start(chain)[0]), chosen)
    return (model, *own, *devices.replicate((KEY, np.float32(rounds.RATE)), chosen)), size


def placement():
    """A device that is sent its samples holds the model, its own clients and their samples. Nothing else."""
    samples_stay_or_are_sent()
    chain, count = SHORT["conv"], 4
    (model, samples, assignments, *_), _ = placed(count, chain)
    arranged, _ = fill_chunks(cohort(chain), 2, count)
    everything = samples_of(chain)
    for leaf in jax.tree.leaves(model):
        assert {shard.data.shape for shard in leaf.addressable_shards} == {leaf.shape}
    by_device = jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), arranged)
    for shard in range(count):
        here, images, labels = jax.tree.map(
            lambda x, shard=shard: np.asarray(x.addressable_shards[shard].data)[0],
            (assignments, samples.images, samples.labels),
        )
        np.testing.assert_array_equal(here.client, by_device.client[shard])
        wanted = {
            index
            for steps, batches in zip(by_device.steps[shard], by_device.batches[shard], strict=True)
            for index in batches[:steps].reshape(-1)
        }
        # Rows beyond those of its clients are empty.
        np.testing.assert_array_equal(images[: len(wanted)], everything.images[sorted(wanted)])
        assert not images[len(wanted) :].any()
        for k, steps in enumerate(here.steps):
            np.testing.assert_array_equal(
                labels[here.batches[k, :steps]], everything.labels[by_device.batches[shard][k, :steps]]
            )


def collectives(text):
    """(kind, bytes of the result) of every collective in a compiled program."""
    kinds = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute|collective-broadcast"
    found = []
    for shapes, kind in re.findall(rf"= (.+?) ({kinds})(?:-start)?\(", text):
        arrays = re.findall(r"([a-z]+)(\d+)\[([\d,]*)\]", shapes)
        sizes = [int(bits) // 8 * np.prod([int(n) for n in dims.split(",") if n]) for _, bits, dims in arrays]
        found.append((kind, int(sum(sizes))))
    return found


def arguments_of(text):
    """The shapes of a compiled program's arguments on each device, without axes of length 1."""
    inside = re.search(r"entry_computation_layout=\{\((.*?)\)->", text)[1]
    found = re.findall(r"[a-z]+\d+\[([\d,]*)\]", inside)
    return Counter(tuple(int(n) for n in dims.split(",") if n not in ("", "1")) for dims in found)


def crossing_bytes():
    """The compiled program sums the model, the loss, the weight and who diverged over devices. It moves
    nothing else.

    So does `jit(shard_map(body))`, and its arguments are only those of its device.
    """
    crossing_bytes_of(networks.dense())


def crossing_bytes_of_both_forms():
    crossing_bytes_of(rounds.CHAIN, SHORT["conv"])


def crossing_bytes_of(*chains):
    for chain in chains:
        arguments, size = placed(4, chain)
        expected = scaling.reduced_bytes(models.profile(chain, (16, 16, 1)), arguments[2].client.size)
        floats = sum(leaf.size for leaf in jax.tree.leaves(arguments[0]))
        assert expected == 4 * (floats + 2 + 2 * arguments[2].client.size)
        by_pmap = devices.map_round(rounds.training(chain=chain), devices.choose_devices(4), size)
        for lowered in (by_pmap.lower(*arguments, None), mapped(chain, size).lower(*arguments)):
            text = lowered.compile().as_text()
            found = collectives(text)
            assert {kind for kind, _ in found} == {"all-reduce"}
            assert sum(amount for _, amount in found) == expected
            own = Counter(
                tuple(n for n in leaf.addressable_shards[0].data.shape if n != 1)
                for leaf in jax.tree.leaves((*arguments[:3], jax.random.key_data(KEY), arguments[4]))
            )
            given = arguments_of(text)  # without unused ones: with the identity codec, the cuts
            assert given <= own
            assert (own - given).total() <= 1
    # A program that moves too much is recognised.
    with mock.patch.object(round.lax, "psum", sum_of_gathered):
        found = collectives(mapped(chain, size).lower(*arguments).compile().as_text())
    assert "all-gather" in {kind for kind, _ in found}
    assert sum(amount for _, amount in found) > 3 * expected


def sum_of_gathered(tree, axis_name):
    return jax.tree.map(lambda x: jax.lax.all_gather(x, axis_name).sum(0), tree)


def work_of_devices():
    """The steps counted while they run on each device are those that the paper model predicts."""
    chain, counts = networks.dense(), Counter()

    def counting(images):
        # Its argument belongs to a client, so it runs once for each client of a chunk.
        device = jax.lax.axis_index(devices.AXIS)
        jax.debug.callback(lambda device, _: counts.update([int(device)]), device, images[0, 0, 0, 0])
        return rounds.preprocess(images)

    for count in (2, 8):
        chosen = devices.choose_devices(count)
        work = scaling.cohort(clients=13, steps=5, batch=4, samples=64)
        training = dataclasses.replace(rounds.training(chain=chain), preprocess=counting)
        run = devices.Rounds(training, 2, chosen)
        model = devices.replicate(Model.of(rounds.start(chain)[0]), chosen)
        counts.clear()
        jax.block_until_ready(run(model, samples_of(chain), work, KEY, rounds.RATE))
        jax.effects_barrier()
        expected = scaling.device_steps(*fill_chunks(work, 2, count), count)
        assert [counts[device] for device in range(count)] == expected.tolist()


def benchmark():
    """It runs, and its rows agree with the paper model of the busiest device."""
    flags = [
        "--devices=2", "--clients=3", "--steps=2", "--batch=4", "--size=16", "--rounds=1",
        "--clients_per_chunk=2",
    ]  # fmt: skip
    said = io.StringIO()
    with (
        mock.patch.object(scaling.models, "create", return_value=networks.dense()),
        mock.patch.object(sys, "argv", ["scaling", *flags]),
        contextlib.redirect_stdout(said),
    ):
        scaling.main()
    rows = [json.loads(line) for line in said.getvalue().splitlines()]
    assert [(row["scaling"], row["devices"], row["clients"]) for row in rows] == [
        ("weak", 2, 6),
        ("strong", 2, 3),
    ]
    profile = models.profile(networks.dense(), (16, 16, 1))
    for row in rows:
        work = scaling.cohort(row["clients"], 2, 4, 4096)
        arranged, size = fill_chunks(work, 2, row["devices"])
        steps = scaling.device_steps(arranged, size, row["devices"])
        assert row["flop_of_the_busiest_device"] == 2 * max(steps) * scaling.step_macs(profile, 4)
        everywhere = 2 * (row["devices"] - 1) * scaling.reduced_bytes(profile, len(arranged.steps))
        assert row["sent_bytes_of_a_device"] * row["devices"] == everywhere
        assert row["round_s"] > 0


def products(jaxpr, times=1):
    """Multiply-accumulates of convolutions and products.

    The body of a loop counts as often as it is known to run, and once if that is data.
    """
    total = 0
    for equation in jaxpr.eqns:
        total += times * profiling._MACS.get(equation.primitive.name, lambda _: 0)(equation)
        turns = times * equation.params.get("length", 1)
        total += sum(products(inner, turns) for inner in substitutes.bodies(equation))
    return total


def work_of_a_step():
    """A device's program has the products of the paper model, on one device of one and of four.

    So the sums over clients add no products.
    """
    chain, chunk = SHORT["conv"], 3
    profile, training = models.profile(chain, (16, 16, 1)), rounds.training(chain=chain)
    for count in (1, 4):
        work = cohort(chain, 24)
        batch = work.batches.shape[-1]
        arranged, size = fill_chunks(work, chunk, count)
        own = jax.tree.map(lambda x, count=count: x[: len(x) // count], arranged)
        chunks = len(own.client) // size
        assert (size, chunks) == (chunk, 8 // count)
        start = Model.of(rounds.start(chain)[0])
        body = functools.partial(run_round, training, size, None)
        traced = jax.make_jaxpr(body)(start, samples_of(chain), own, KEY, np.float32(rounds.RATE))
        assert products(traced.jaxpr) == chunks * size * scaling.step_macs(profile, batch)


def mapped(chain, size, donated=(0,)):
    """`jit(shard_map(body))` of a round on four devices."""
    body = functools.partial(run_round, rounds.training(chain=chain), size, devices.AXIS)

    def on_a_device(model, samples, assignments, key, rate):
        samples, assignments = jax.tree.map(lambda x: x[0], (samples, assignments))
        return body(model, samples, assignments, key, rate)

    mesh = Mesh(np.asarray(devices.choose_devices(4)), (devices.AXIS,))
    own = P(devices.AXIS)
    everywhere = jax.shard_map(
        on_a_device, mesh=mesh, in_specs=(P(), own, own, P(), P()), out_specs=P(), check_vma=False
    )
    return jax.jit(everywhere, donate_argnums=donated)


def lowered(chain, platform, chunk=2, donated=(0,)):
    """The StableHLO of a round on four devices of a platform that this machine does not have."""
    arguments, size = placed(4, chain, chunk)
    program = mapped(chain, size, donated).trace(*arguments).lower(lowering_platforms=(platform,))
    return program.as_text(), arguments


def donations(text):
    return text.count("tf.aliasing_output") + text.count("jax.buffer_donor")


def reduced(text):
    """The result bytes of all sums over devices in StableHLO."""
    results = re.findall(
        r'"stablehlo\.all_reduce"\(.*?\}\) : \([^)]*\) -> (\([^)]*\)|tensor<[^>]*>)', text, re.DOTALL
    )
    sizes = re.findall(r"tensor<((?:\d+x)*)[fi]32>", " ".join(results))
    return sum(4 * math.prod(int(n) for n in dims.split("x") if n) for dims in sizes)


def other_platforms():
    """On CUDA and TPU: products, no grouped convolutions; donation is kept; the only collective is one sum.

    It sums the model and who diverged.
    """
    for platform in ("cuda", "tpu"):
        text, (model, _, work, *_) = lowered(rounds.CHAIN, platform)
        assert "stablehlo.dot_general" in text
        assert not re.search(r"stablehlo\.convolution", text)
        kinds = set(re.findall(r"stablehlo\.(all_\w+|reduce_scatter|collective_\w+)", text))
        assert kinds == {"all_reduce"}, kinds
        assert reduced(text) == scaling.reduced_bytes(
            models.profile(rounds.CHAIN, (16, 16, 1)), work.client.size
        )
        assert donations(text) == len(jax.tree.leaves(model))
        # What these checks must recognise: the other form, no donation, another collective.
        with mock.patch.object(round.lax, "psum", sum_of_gathered):
            text, _ = lowered(SHORT["conv"], platform, donated=())
        assert donations(text) == 0
        assert "stablehlo.all_gather" in text
        groups = re.findall(r"(?:feature|batch)_group_count = (\d+)", text)
        assert max(map(int, groups)) > 1
