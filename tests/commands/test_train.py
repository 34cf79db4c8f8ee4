"""launch.train on a small run: its files, its table, and what it refuses before it writes anything."""

import contextlib
import dataclasses
import itertools
import json
import math
import re

import finite
import jax
import jax.numpy as jnp
import numpy as np
import plain
import pytest
from commands import small_world
from models import keras_models

from sfl_jax import models
from sfl_jax.commands import parts, train
from sfl_jax.commands import workdir as workdirs
from sfl_jax.commands.config import Config, fields_of, settings
from sfl_jax.commands.flags import parse
from sfl_jax.errors import BadInput
from sfl_jax.federated import processes
from sfl_jax.models import keras_weights
from sfl_jax.run import Run, loop, metrics, recording
from sfl_jax.run.checkpoints import Checkpoints
from sfl_jax.run.state import start

IMAGES = jnp.zeros((1, 8, 8, 1))

SMALL = [
    "--model=efficientnetv2-tiny", "--clients=600", "--cohort_size=3", "--rounds=3", "--eval_every=2",
    "--clients_per_chunk=3", "--server_flops=1e10", "--layer_form=product", "--learning_rate=0.02",
    "--image_size=8",
    *plain.FLAGS,
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(workdir, exit code) of a small run."""
    workdir = tmp_path_factory.mktemp("runs") / "new" / "small"
    return workdir, train.main([*SMALL, f"--workdir={workdir}"])


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_line_a_round(run):
    workdir, code = run
    assert code == 0
    rounds = lines(workdir)
    assert [list(line) for line in rounds] == [list(metrics.Round._fields)] * 3
    assert [line["round"] for line in rounds] == [1, 2, 3]
    assert [line["test_accuracy"] is None for line in rounds] == [True, False, False]
    assert [line["test_loss"] is None for line in rounds] == [True, False, False]
    assert all(line["clients"] == 3 and 1 <= line["mean_cut"] <= 8 for line in rounds)
    assert all(0 < line["bound_s"] <= line["round_s"] <= line["bound_s"] * (1 + 1e-6) for line in rounds)
    np.testing.assert_allclose(
        [line["simulated_s"] for line in rounds], np.cumsum([line["round_s"] for line in rounds])
    )
    assert rounds[0]["wall_s"] < rounds[1]["wall_s"] < rounds[2]["wall_s"]


def test_config_json_says_how_to_repeat_it(run):
    workdir, _ = run
    written = json.loads((workdir / "config.json").read_text())
    assert set(written) == {field.name for field in fields_of("train")} | {"environment"}
    assert written["seed"] == 0
    assert (written["clients"], written["partition"]) == (600, "iid")
    packages = written["environment"]["packages"]
    assert {"jax", "flax", "numpy", "sfl_jax"} <= set(packages)
    assert written["environment"]["devices"]
    assert "git_commit" in written["environment"]


def test_a_finished_run_is_not_trained_again(run, capsys, monkeypatch):
    workdir, _ = run
    monkeypatch.setattr(parts, "build", lambda *_: pytest.fail("built"))
    before = (workdir / "metrics.jsonl").read_bytes()
    assert train.main([*SMALL, f"--workdir={workdir}"]) == 0
    assert "all 3 rounds are done" in capsys.readouterr().out
    assert (workdir / "metrics.jsonl").read_bytes() == before


def test_other_settings_are_refused_with_the_difference(run, capsys):
    workdir, _ = run
    given = ["--learning_rate=0.03", "--seed=1", "--clients_per_chunk=2", "--eval_every=1"]
    before = (workdir / "metrics.jsonl").read_bytes()
    assert train.main([*SMALL, f"--workdir={workdir}", *given]) == 2
    *_, said = capsys.readouterr().err.splitlines()
    assert "--learning_rate=0.03 (was 0.02), --seed=1 (was 0): " in said
    assert "chunk" not in said
    assert "--allow_config_change" in said
    assert (workdir / "metrics.jsonl").read_bytes() == before


def test_lines_without_a_checkpoint_are_refused(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text("earlier\n")
    assert train.main([*SMALL, f"--workdir={tmp_path}"]) == 2
    assert "has a metrics.jsonl but no checkpoint to go on from" in capsys.readouterr().err
    assert (tmp_path / "metrics.jsonl").read_text() == "earlier\n"


def test_a_run_goes_on_without_the_weights_it_began_with_but_not_with_others(tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        raise BadInput("this is far enough")

    path, flags = tmp_path / "given.weights.h5", [f"--init_from={tmp_path}/given.weights.h5"]
    chain, workdir = models.create("efficientnetv2-tiny"), tmp_path / "run"
    given, others = (chain.init(jax.random.key(seed), IMAGES) for seed in (1, 2))
    keras_weights.save(str(path), chain, given, keras_weights.CENTRED)
    monkeypatch.setattr(Run, "compile", interrupted)
    workdir.mkdir()
    with small_world.world(create=models.create):
        begun = parts.build(
            parse([*small_world.FLAGS, *flags, f"--workdir={workdir}", "--rounds=1"], "train")
        )
        saves = Checkpoints(workdir / "checkpoints", 1), None, metrics.Stopwatch(), metrics.CompileClock()
        own = recording.Recorder(str(workdir), recording.Saving(), settings(begun.config, "train"), *saves)
        with contextlib.closing(own) as recorder:
            recorder.begin(start(begun.parts), parts.inputs(begun), parts.network(begun), {})
        path.unlink()
        assert small_world.run(workdir, *flags, "--rounds=2") == 2
        out, err = capsys.readouterr()
        assert f"{path} is missing; the run goes on without it" in out
        assert "this is far enough" in err
        built, state = workdirs.saved(str(workdir))
        assert built.scaling == keras_weights.CENTRED
        jax.tree.map(np.testing.assert_array_equal, state.model.variables, given)
        keras_weights.save(str(path), chain, others, keras_weights.CENTRED)
        assert small_world.run(workdir, *flags, "--rounds=2") == 2
        assert f"--init_from={path} (has other contents now)" in capsys.readouterr().err
        with pytest.raises(BadInput, match="has other contents now"):
            workdirs.saved(str(workdir))


@pytest.mark.slow
def test_training_starts_from_given_weights_and_records_their_scaling(monkeypatch, tmp_path):
    chain, started = models.create("efficientnetv2-tiny"), []
    given = chain.init(jax.random.key(7), IMAGES)
    keras_weights.save(str(tmp_path / "given.weights.h5"), chain, given, keras_weights.CENTRED)
    monkeypatch.setattr(loop, "run", lambda *given: iter(started.append(given[:2]) or ()))
    for name, more in {"given": [f"--init_from={tmp_path / 'given.weights.h5'}"], "fresh": []}.items():
        flags = [*SMALL, f"--workdir={tmp_path / name}", "--head_init_scale=0"]
        assert train.main([*flags, *more]) == 75, "no round was run"
    (built, imported), (_, fresh) = started
    jax.tree.map(np.testing.assert_array_equal, imported.model.variables, given)
    stems = [state.model.variables.params[0]["conv"]["kernel"] for state in (imported, fresh)]
    assert not finite.are_equal(*stems)
    grey = np.array([0, 128, 255], np.uint8).reshape(3, 1, 1, 1) * np.ones((1, 32, 32, 1), np.uint8)
    scaled = built.training.preprocess(grey)
    np.testing.assert_allclose(scaled[:, 4, 4, 0], [-1, 0, 127 / 128], atol=1e-6)
    scalings = [
        json.loads((tmp_path / name / "config.json").read_text())["environment"]["input_scaling"]
        for name in ("given", "fresh")
    ]
    assert scalings == [{"divisor": [128.0], "offset": [-1.0]}, {"divisor": [127.5], "offset": [-1.0]}]


def test_a_trained_run_is_exported_for_keras(run, tmp_path, monkeypatch):
    workdir, _ = run
    monkeypatch.chdir(workdir.parent)
    built, state = workdirs.saved(workdir.name)
    assert state.round == 3
    chain, path = built.parts.training.chain, str(tmp_path / "trained.weights.h5")
    keras_weights.save(path, chain, state.model.variables, built.scaling)
    fresh = chain.init(jax.random.key(0), IMAGES)
    reread = keras_weights.load(path, "efficientnetv2-tiny", chain, fresh)
    jax.tree.map(np.testing.assert_array_equal, reread.variables, state.model.variables)
    images = built.parts.training.preprocess(built.parts.data.test_images[:500])
    logits, _ = jax.jit(chain.apply)(reread.variables, images)
    accuracy = (np.argmax(logits, -1) == built.parts.data.test_labels[:500]).mean()
    assert accuracy == pytest.approx(lines(workdir)[-1]["test_accuracy"], abs=0.1)


def test_an_export_needs_the_checkpoint_alone(run, monkeypatch):
    workdir, _ = run
    monkeypatch.chdir(workdir.parent)
    for name in ("datasets.load", "keras_weights.load", "fleet.read_fleet", "commands.parts.build"):
        monkeypatch.setattr(
            f"sfl_jax.{name}".replace("jax.keras", "jax.models.keras"), lambda *_: pytest.fail("read")
        )
    found = workdirs.trained(workdir.name)
    _, checkpoints, progress = workdirs._newest(workdir.name)
    with pytest.MonkeyPatch.context() as patch:  # of a fleet file that is missing
        lost = progress._replace(settings=progress.settings | {"fleet": "gone.csv"})
        patch.setattr(type(checkpoints), "newest", lambda *_: lost)
        assert workdirs.trained(workdir.name).round == 3
    config = dataclasses.replace(Config.from_dict(progress.settings), init_from="gone.h5", fleet="gone.csv")
    network = progress.network | {"input_scaling": {"divisor": [58.4], "offset": [-2.1]}}
    other = parts.trained(config, checkpoints, progress._replace(network=network))
    monkeypatch.undo()
    monkeypatch.chdir(workdir.parent)
    _, state = workdirs.saved(workdir.name)
    assert (found.round, found.scaling) == (3, keras_weights.SIGNED)
    assert other.scaling == ((58.4,), (-2.1,))
    for one in (found, other):
        assert jax.tree.structure(one.variables) == jax.tree.structure(state.model.variables)
        jax.tree.map(np.testing.assert_array_equal, one.variables, state.model.variables)


@pytest.mark.parametrize("read", [workdirs.saved, workdirs.trained])
def test_where_there_is_no_run_none_is_exported(read, tmp_path):
    with pytest.raises(BadInput, match=r"^--workdir=.*: has no run"):
        read(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BadInput, match=r"^--workdir=.*: has no checkpoint"):
        read(str(tmp_path))


@pytest.mark.parametrize("content", ["", "{", "[]", "[" * 99999, '"a"', '{"seed": "x"}', '{"other": 1}'])
def test_a_damaged_description_of_a_run_is_refused(content, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(BadInput, match=r"^[^\n]*$"):
        workdirs.saved(str(tmp_path))


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning"
)  # from Keras, which saves them
def test_training_starts_from_a_model_of_colour_images_that_keras_wrote(monkeypatch, tmp_path):
    model = keras_models.make("efficientnetv2-b0", include_preprocessing=True, classes=1000)
    model.save(tmp_path / "b0.keras")
    config = Config(model="efficientnetv2-b0", init_from=str(tmp_path / "b0.keras"))
    built = parts.build(config)
    assert built.scaling == keras_weights.CENTRED  # the images of MNIST are grey
    top = next(layer for layer in model.layers if layer.name == "top_conv")
    kernel = start(built.parts).model.variables.params[-2]["conv"]["kernel"]
    np.testing.assert_array_equal(kernel, np.asarray(top.kernel.value))


@pytest.mark.parametrize(
    ("flag", "line"),
    [("--clients_per_chunk=9", "chunk=9: does not fit into the memory; try 4"),
     pytest.param(
         "--clients_per_chunk=1", "size=32: does not fit into the memory; try 16", marks=pytest.mark.slow
     )],
)  # fmt: skip
def test_too_little_memory_is_a_line_with_a_way_out(flag, line, tmp_path, monkeypatch, capsys):
    def exhaust(*_):
        # More than any machine has, so the error comes from the allocator.
        jax.block_until_ready(jnp.zeros((2**46,), jnp.int8))
        yield

    monkeypatch.setattr(loop, "run", exhaust)
    assert train.main([*SMALL, f"--workdir={tmp_path}", flag]) == 2
    *_, said = capsys.readouterr().err.splitlines()
    assert line in said


@pytest.mark.parametrize(
    ("chunk", "batch", "line"),
    [
        (0, 32, "--clients_per_chunk=0: the chosen number does not fit into the memory; try 1"),
        (9, 32, "--clients_per_chunk=9: does not fit into the memory; try 4"),
        (1, 32, "--batch_size=32: does not fit into the memory; try 16"),
        (1, 1, "--batch_size=1: does not fit into the memory; choose a smaller --image_size or --model"),
    ],
)
def test_the_way_out_of_too_little_memory_is_one(chunk, batch, line):
    assert train._too_large(Config(clients_per_chunk=chunk, batch_size=batch)) == line


def test_only_what_the_disk_refuses_is_laid_to_the_workdir(tmp_path, monkeypatch):
    def lose_the_reader(*_):
        raise BrokenPipeError

    monkeypatch.setattr(train, "_train", lose_the_reader)
    with pytest.raises(BrokenPipeError):
        train.train(Config(workdir=str(tmp_path)))


@pytest.mark.parametrize("is_first", [True, False])
def test_of_several_processes_that_have_met_the_first_speaks(is_first, tmp_path, monkeypatch):
    found = []
    monkeypatch.setattr(train, "_train", lambda *given: found.append((given[2], given[3].speaks)) or 0)
    monkeypatch.setattr(processes, "is_first", lambda: is_first)
    monkeypatch.setattr(
        train, "is_perhaps_first", lambda config: not is_first
    )  # before, this process seemed to be the first
    assert train.train(Config(workdir=str(tmp_path))) == 0
    assert found == [(is_first, is_first)]


def test_the_table_compares_the_clocks():
    last = metrics.Round(2, 0.5, 0.4, 0.9123, 1.0, 1.0, 2.0, 9.0, 100.0, 10, 3.5)
    clocks = {"exact": 2.0, "no_split": 5.0, "common_cut": math.inf}
    text = train.summary(Config(clients=100), clocks, last, wall_s=9.0, compile_s=3.0, came=[10, 10])
    assert "2 rounds of 10 of 100 clients\n" in text
    assert "91.23 %" in text
    assert re.search(r"no_split +5.00 s +this plan is 2.50 times as fast$", text, re.M)
    assert "not possible" in text
    assert "compiling 3.0 s" in text
    assert "whole network" not in text


def test_the_table_reads_the_right_way_in_columns():
    """A worse plan, a long name, equal clocks, no accuracy, and a network that nobody cuts."""
    last = metrics.Round(2, 0.5, 0.4, math.nan, 1.0, 1.0, 2.0, 9.0, 100.0, 2, 8.0)
    clocks = {"random_cut": 1540.0, "no_split": 200.0, "common_cut": 1540.0}
    text = train.summary(
        Config(method="random_cut"),
        clocks,
        last,
        wall_s=9.0,
        compile_s=3.0,
        came=[2],
        mean_cuts=[8.0],
        units=8,
    )
    lines = text.splitlines()[1:5]
    assert "random_cut (this plan)" in lines[1]
    assert len({re.match(r".*?(not finite|[\d.] s)", line).end() for line in lines}) == 1, text
    assert lines[0].endswith(" not finite")
    assert lines[2].endswith(" 200.0 s  this plan is 7.70 times as slow")
    assert lines[3].endswith(" 1,540.0 s  this plan is as fast")
    whole = "  all clients keep the whole network: a split gains nothing"
    assert whole in text.splitlines()
    some_split = train.summary(
        Config(), {"exact": 1.0}, last, 9.0, 3.0, [2, 2], mean_cuts=[7.5, 8.0], units=8
    )
    assert whole not in some_split
    untested = train.summary(Config(), {"exact": 1.0}, last._replace(test_accuracy=None), 9.0, 3.0, [2])
    assert re.search(r"test accuracy +-$", untested, re.M)
    assert untested.splitlines()[3].endswith("9.0 s  of which compiling 3.0 s")
    threads = train.summary(Config(), {"exact": 1.0}, last, 9.0, 9.5, [2])
    assert "9.0 s  compiling 9.5 s in several threads at once" in threads


def test_the_table_counts_the_clients_of_all_rounds():
    last = metrics.Round(4, 0.5, 0.4, 0.9, 1.0, 1.0, 2.0, 9.0, 100.0, 1, 3.5)
    text = train.summary(
        Config(clients=100, cohort_size=4), {"exact": 2.0}, last, 9.0, 3.0, came=[4, 0, 4, 1]
    )
    assert "4 rounds of 4 of 100 clients, of which 2.2 contributed on average\n" in text
    assert re.search(r"failed rounds, without a client +1\n", text)


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--model=resnet"], r"--model=resnet: must be one of .*efficientnetv2-b0"),
        (["--method=best"], r"--method=best: must be one of exact"),
        (["--dataset=nowhere"], r"--dataset=nowhere: .*tfds\.builder"),
        (["--dataset={vectors}"], r"--dataset=.*: samples of shape \(7,\); must be images \(H, W, C\)"),
        (["--min_cut=99"], r"--min_cut=99: must be at most 8"),
        (["--clients=70000"], r"--clients=70000: .*60000"),
        (["--server_flops=0"], r"--server_flops=0.0: must be .*above 0"),
        (["--devices=99"], r"--devices=99: must be 0 to"),
        (["train"], r"'train' is not a flag"),
        (["--fleet={fleet}"], r"--clients=600: must be 1, the clients of --fleet="),
        (["--fleet={dead}"], r"dead.csv:2: client \w+: column uplink_bps: '0'"),
        (["--init_from=nowhere.h5"], r"--init_from=nowhere.h5: no such file"),
        (["--init_from=x.h5", "--model=cnn"], r"--init_from=x.h5: needs --model=efficientnetv2-…, not cnn"),
        (["--init_from={fleet}"], r"--init_from=.*fleet.csv: not a weights file that Keras wrote"),
        (["--init_from={weights}"], r"--init_from=.*: holds no block2b_expand_conv/kernel; "),
        (["--workdir={file}/run"], r"--workdir=.*cannot be written"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_nothing_is_written(flags, line, tmp_path, capsys):
    header = "client,flops,uplink_bps,downlink_bps,memory_bytes\n"
    (tmp_path / "fleet.csv").write_text(header + "a,1e9,1e6,1e6,1e9\n")
    (tmp_path / "dead.csv").write_text(header + "a,1e9,0,1e6,1e9\n")
    (tmp_path / "file").write_text("")
    np.savez(tmp_path / "vectors.npz", x_train=np.zeros((20, 7), np.float32), y_train=np.arange(20) % 2)
    client, _ = models.create("efficientnetv2-tiny").split(3)
    keras_weights.save(str(tmp_path / "weights"), client, client.init(jax.random.key(0), IMAGES))
    places = {name: tmp_path / f"{name}.csv" for name in ("fleet", "dead")}
    places |= {name: tmp_path / name for name in ("file", "weights")}
    places["vectors"] = tmp_path / "vectors.npz"
    workdir = tmp_path / "run"
    given = [flag.format(**places) for flag in flags]
    assert train.main([*SMALL, f"--workdir={workdir}", *given]) == 2
    captured = capsys.readouterr()
    *_, said = captured.err.splitlines()
    assert captured.err.count("error: ") == 1
    assert re.search(line, said), said
    assert [path.name for path in workdir.glob("*")] in ([], [".lock"])


def test_learning_rate_rises_and_falls():
    config = Config(rounds=10, warmup_rounds=2, learning_rate=0.1, learning_rate_schedule="cosine")
    rates = [parts.rate(config)(r) for r in range(10)]
    assert rates[:3] == pytest.approx([0.05, 0.1, 0.1])
    assert rates[6] == pytest.approx(0.05)
    assert all(a > b for a, b in itertools.pairwise(rates[2:]))
    assert rates[-1] > 0
