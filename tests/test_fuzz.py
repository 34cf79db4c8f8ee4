"""Long random tests of users' inputs and damaged files. `-s` shows how many inputs were tried.

Each input is read with the right contents or refused in one line. Nothing is unpickled.
"""

import contextlib
import csv
import io
import json
import pickle
import random

import hypothesis
import jax
import numpy as np
import pytest
from commands.test_flags import ARGUMENTS
from fuzz import attempt, damaged, tries
from hypothesis import given
from hypothesis import strategies as st
from run.test_checkpoints import LOG, model, progress

from sfl_jax import fleet
from sfl_jax.commands import flags
from sfl_jax.commands.config import Config, fields_of, validate
from sfl_jax.run import checkpoints as checkpoints_module
from sfl_jax.run.checkpoints import SUMS, Checkpoints, Progress


@pytest.fixture(scope="module", autouse=True)
def no_pickle():
    with pytest.MonkeyPatch.context() as patch:
        for name in ("load", "loads"):
            patch.setattr(pickle, name, lambda *_, **__: pytest.fail("unpickled"))
        yield


def given_to(command, arguments):
    """The Config that the command gets; None if it is refused in one line with exit code 2."""
    configs, out, err = [], io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = flags.run(configs.append, command, "", arguments)
    if configs:
        assert (code, out.getvalue(), err.getvalue()) == (0, "", "")
        return configs[0]
    assert (code, out.getvalue()) == (2, "")
    assert err.getvalue()[:-1].isprintable(), err.getvalue()
    return None


WORDS = [
    "", "0", "-1", "1", "3", "1e999", "-inf", "nan", "1e-320", "true", "no", "9" * 30, "1_0",
    "٣", "\0", "\ud800", "=", "iid", "exact", "random", "/", ".", "/dev/null", "--", "a b", "1.5", "0x10",
    "None", "plan.json", "'", '"',
]  # fmt: skip


@pytest.mark.slow
def test_flags():
    rng, taken = random.Random(1), 0
    for _ in tries(6000, 25, "flags"):
        command = rng.choice(["train", "plan", "compare", "report"])
        fields = {field.name: field for field in fields_of(command)}
        settings = [(rng.choice(list(fields)), rng.choice(WORDS)) for _ in range(rng.randint(0, 3))]
        given = [f"--{name}={value}" for name, value in settings]
        config = given_to(command, given)
        if config is None:
            continue
        taken += 1
        validate(config, command)
        for name, value in dict(settings).items():
            kind = type(fields[name].default)
            if kind is not bool:
                assert getattr(config, name) == kind(value)
        rest = {name: field.default for name, field in fields.items() if name not in dict(settings)}
        assert {name: getattr(config, name) for name in rest} == rest
    assert taken > 100


@pytest.mark.slow
@hypothesis.settings(max_examples=1000)
@given(ARGUMENTS, st.sampled_from(["train", "plan", "compare", "report"]))
def test_whatever_is_given_to_whichever_command(arguments, command):
    config = given_to(command, [a for a in arguments if "flagfile" not in a and "h" not in a[:3]])
    if config is not None:
        validate(config, command)
        assert Config.from_dict(config.to_dict(), command) == config


@pytest.mark.slow
def test_flagfiles(tmp_path):
    rng, taken = random.Random(2), 0
    path = tmp_path / "x.flags"
    (tmp_path / "more").write_text("--momentum=0.5\n")
    good = (
        f"# a run\n--model=efficientnetv2-b0\n--rounds=7\n--seed=3\n--flagfile={tmp_path}/more\n\n--keep=5\n"
    )
    for _ in tries(3000, 25, "flag files"):
        path.write_bytes(damaged(rng, good.encode()))
        config = given_to("train", [f"--flagfile={path}"])
        if config is not None:
            validate(config, "train")
            taken += 1
    assert taken > 10


COLUMNS = "client,flops,uplink_bps,downlink_bps,memory_bytes,samples,distance_m"
FLEET = f"""{COLUMNS}
pi,1e10,5e6,2e7,1073741824,600,12.5
"phone, the second",2.5e11,10000000,4e7,4294967296,12,80
München,3E9,1.5e6,2e6,0,60000,3
"""


def read_plainly(data):
    """The columns of a fleet.csv by Python's csv, unchecked; no blanks around cells, no empty lines."""
    text = io.StringIO(data.decode("utf-8-sig"), newline="")
    rows = [[cell.strip() for cell in row] for row in csv.reader(text, skipinitialspace=True) if any(row)]
    columns = dict(zip(rows[0], zip(*rows[1:], strict=True), strict=True))
    return {name: list(cells if name == "client" else map(float, cells)) for name, cells in columns.items()}


@pytest.mark.slow
def test_fleet_files(tmp_path):
    rng, taken = random.Random(3), 0
    path = tmp_path / "fleet.csv"
    for _ in tries(20_000, 25, "fleet.csv"):
        data = damaged(rng, FLEET.encode())
        if rng.random() < 0.5:
            at = rng.randrange(len(data) + 1)
            data = data[:at] + rng.choice(WORDS + list(',\n\r;" ')).encode(errors="surrogatepass") + data[at:]
        path.write_bytes(data)
        found, said = attempt(fleet.read_fleet, path)
        if found is None:
            assert said.startswith(f"{path}:")
            continue
        taken += 1
        columns = found.columns()
        expected = read_plainly(data)
        assert columns.keys() == expected.keys()
        for name, values in columns.items():
            assert values.tolist() == expected[name]
            if name != "client":
                assert (np.isfinite(values) & (values >= (0 if name == "memory_bytes" else 5e-324))).all()
    assert taken > 50


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory with the checkpoints of rounds 2 and 5."""
    checkpoints = Checkpoints(tmp_path_factory.mktemp("saved") / "checkpoints", keep=2)
    for round in (2, 5):
        checkpoints.save(model(round), progress(round))
    checkpoints.wait()
    return checkpoints.directory


@contextlib.contextmanager
def spoilt(rng, path, also_sums=False):
    """Damages one file of a checkpoint during the block. also_sums: makes the checksums fit."""
    files = sorted(
        file for file in path.rglob("*") if file.is_file() and (file.name != SUMS or not also_sums)
    )
    file, sums = rng.choice(files), path / SUMS
    before = {file: file.read_bytes(), sums: sums.read_bytes()}
    file.write_bytes(damaged(rng, before[file]))
    if also_sums:
        sums.write_text(checkpoints_module._sums(path))
    yield file
    for changed, content in before.items():
        changed.write_bytes(content)


@pytest.mark.slow
def test_checkpoints(saved, caplog):
    rng = random.Random(4)
    newest, older = saved / "000005", saved / "000002"
    for number in tries(5000, 25, "checkpoints"):
        caplog.clear()
        with spoilt(rng, newest) as file:
            assert Checkpoints(saved, keep=2).newest(LOG) == progress(2), file
            [warning] = caplog.messages
            assert warning.startswith("checkpoint 000005 is damaged (")
            assert len(warning.splitlines()) == 1
            if number % 5 == 0:
                with spoilt(rng, older):
                    _, said = attempt(Checkpoints(saved, keep=2).newest, LOG)
                    assert "nothing was deleted" in said
    assert Checkpoints(saved, keep=2).newest(LOG) == progress(5)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


@pytest.mark.slow
@hypothesis.settings(max_examples=1500)
@given(values=st.dictionaries(st.sampled_from([*Progress._fields, "other"]), JSON, max_size=3), whole=JSON)
def test_progress_of_another_form(saved, values, whole):
    """With checksums that fit, which no disk fault produces."""
    path = saved / "000005"
    for content in (progress(5)._asdict() | values, whole):
        (path / "progress.json").write_text(json.dumps(content))
        sums = (path / SUMS).read_text()
        (path / SUMS).write_text(checkpoints_module._sums(path))
        found = Checkpoints(saved, keep=2).newest(LOG)
        (path / "progress.json").write_text(json.dumps(progress(5)._asdict()))
        (path / SUMS).write_text(sums)
        assert found is not None
        assert found.round == 2 or [*map(type, found)] == [*map(type, progress(5))]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # orbax leaves tasks behind
def test_models_of_checkpoints_whose_sums_fit(saved):
    """A foreign or deliberately changed checkpoint gives another model of this network, or is refused."""
    rng, like = random.Random(5), jax.eval_shape(lambda: model(0))
    expected = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), like)
    checkpoints = Checkpoints(saved, keep=2)
    for _ in tries(300, 25, "models of checkpoints"):
        with spoilt(rng, saved / "000005", also_sums=True):
            found = checkpoints.newest(LOG)
            assert found is not None
            restored, _ = attempt(checkpoints.restore, found, like)
            if restored is not None:
                assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), restored) == expected
