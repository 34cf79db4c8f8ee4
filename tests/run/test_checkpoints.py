"""Checkpoints: what comes back, what is kept, and all the ways in which a file can be damaged."""

import hashlib
import os
import pickle
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from disks import fill
from federated import rounds

from sfl_jax import files
from sfl_jax.errors import BadInput
from sfl_jax.federated import packing
from sfl_jax.federated.round import Model
from sfl_jax.run import checkpoints as checkpoints_module
from sfl_jax.run.checkpoints import Checkpoints, Progress, from_saved, to_saved

LOG = b"".join(b"round %d\n" % number for number in range(1, 10))


def progress(round):
    size = LOG.index(b"%d\n" % (round + 1)) - len("round ")
    digest = hashlib.sha256(LOG[:size]).hexdigest()
    clocks = {"exact": 0.1 * round, "no_split": float("inf")}
    return Progress(round, clocks, 1.5, 0.5, size, digest, {"seed": 3}, {"fleet": "ab"}, {})


def model(round):
    variables, _ = rounds.start()
    changed = jax.tree.map(lambda x: x + round, variables)
    return Model.of(changed, optax.sgd(1.0, 0.9).init(changed.params))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory with the checkpoints of rounds 2 and 5."""
    checkpoints = Checkpoints(tmp_path_factory.mktemp("saved") / "checkpoints", keep=2)
    for round in (2, 5):
        checkpoints.save(model(round), progress(round))
    checkpoints.wait()
    return checkpoints.directory


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "checkpoints")


def test_what_was_saved_comes_back(saved, monkeypatch):
    monkeypatch.setattr(pickle, "loads", lambda *_: pytest.fail("unpickled"))
    monkeypatch.setattr(pickle, "load", lambda *_: pytest.fail("unpickled"))
    checkpoints = Checkpoints(saved, keep=2)
    found = checkpoints.newest(LOG)
    assert found == progress(5)
    back = checkpoints.restore(found, jax.eval_shape(lambda: model(0)))
    assert jax.tree.structure(back) == jax.tree.structure(model(5))
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(model(5)), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_a_relative_directory_is_the_same_place_wherever_one_goes(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoints = Checkpoints(Path("run/checkpoints"), keep=2)
    checkpoints.save(model(2), progress(2))
    checkpoints.wait()
    back = Checkpoints(Path("run/checkpoints"), keep=2).restore(progress(2), jax.eval_shape(lambda: model(0)))
    jax.tree.map(np.testing.assert_array_equal, back, model(2))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    checkpoints.save({"x": np.ones(3)}, progress(5))
    checkpoints.wait()
    assert checkpoints.newest(LOG) == progress(5)
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["000002", "000005"]
    assert [*(tmp_path / "elsewhere").iterdir()] == []


def test_what_cannot_be_read_is_not_called_another_network(copy, monkeypatch):
    like = jax.eval_shape(lambda: model(0))
    (copy / "000005" / "model" / "_METADATA").write_text("{}")
    with pytest.raises(BadInput, match=r"000005/model: cannot be read \("):
        Checkpoints(copy, keep=2).restore(progress(5), like)

    def exhaust(*_, **__):
        raise MemoryError

    monkeypatch.setattr(ocp.Checkpointer, "restore", exhaust)
    with pytest.raises(MemoryError):
        Checkpoints(copy, keep=2).restore(progress(5), like)


def test_buffers_may_be_reused_while_it_is_written(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 7, tree), donate_argnums=0)
    given, may_begin = model(2), threading.Event()
    checkpoints._writer.submit(may_begin.wait, 60)  # like an earlier save that is slow
    checkpoints.save(given, progress(2))
    overwrite(given)
    may_begin.set()
    checkpoints.wait()
    back = checkpoints.restore(progress(2), jax.eval_shape(lambda: model(0)))
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(model(2)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_process_that_ends_while_it_saves_leaves_nothing(tmp_path, monkeypatch):
    def end(source, target):
        assert source.exists()
        assert target.parent.exists()
        files.remove_unfinished()
        assert not source.parent.exists(), "in the temporary directory"
        assert not target.parent.exists(), "beside the checkpoints"

    monkeypatch.setattr(checkpoints_module, "_copy", end)
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(model(2), progress(2))
    with pytest.raises(OSError, match="No such file or directory"):  # because this process has not ended
        checkpoints.wait()


@pytest.mark.parametrize("keep", [1, 2])
def test_the_newest_stay(keep, tmp_path):
    checkpoints = Checkpoints(tmp_path, keep)
    for round in range(4):
        checkpoints.save({"x": np.ones(3)}, progress(round))
    checkpoints.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{r:06d}" for r in range(4 - keep, 4)]


def damages(path):
    """(name, the damage done to a file) for every kind of damage."""
    content = path.read_bytes()
    middle = len(content) // 2
    flipped = bytes([*content[:middle], content[middle] ^ 1, *content[middle + 1 :]])
    yield "cut", lambda: path.write_bytes(content[:middle])
    yield "zeroed", lambda: path.write_bytes(bytes(len(content)))
    yield "flipped", lambda: path.write_bytes(flipped)
    yield "removed", path.unlink


def test_any_damage_to_any_file_is_noticed(saved, tmp_path, caplog):
    files = sorted(path.relative_to(saved) for path in (saved / "000005").rglob("*") if path.is_file())
    assert len(files) > 8
    tried = 0
    for name in files:
        for way in range(4):
            copy = shutil.copytree(saved, tmp_path / str(tried))
            how, damage = list(damages(copy / name))[way]
            damage()
            caplog.clear()
            assert Checkpoints(copy, keep=2).newest(LOG) == progress(2), (name, how)
            [warning] = caplog.messages
            assert "checkpoint 000005 is damaged" in warning
            assert "going on from checkpoint 000002" in warning
            tried += 1
    assert tried == 4 * len(files)


@pytest.mark.parametrize(
    "name", [".DS_Store", "._x", "Thumbs.db", ".nfs0001", "model/.DS_Store", "model/d/.nfs2"]
)
def test_a_file_that_somebody_left_in_a_checkpoint_is_not_of_it(name, copy, caplog):
    for path in (copy / "000005" / name, copy / ".DS_Store"):
        path.write_bytes(b"\0not ours")
    checkpoints = Checkpoints(copy, keep=2)
    assert checkpoints.newest(LOG) == progress(5)
    assert caplog.messages == []
    back = checkpoints.restore(progress(5), jax.eval_shape(lambda: model(0)))
    jax.tree.map(np.testing.assert_array_equal, back, model(5))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda lines: lines[1:], "SHA256SUMS lacks arrays.json"),
        (lambda lines: lines[:-1], "SHA256SUMS lacks progress.json"),
        (lambda lines: [lines[0], lines[-1]], "SHA256SUMS lacks model"),
        (lambda lines: [], "SHA256SUMS lacks arrays.json, model, progress.json"),
        (lambda lines: [*lines, "0123"], "SHA256SUMS has a line without a name"),
        (
            lambda lines: [*lines, lines[0].replace("arrays.json", "../000002/arrays.json")],
            "differs from SHA256",
        ),
    ],
)
def test_sums_must_list_all_that_a_checkpoint_is_made_of(change, reason, copy, caplog):
    path = copy / "000005" / "SHA256SUMS"
    path.write_text("".join(f"{line}\n" for line in change(path.read_text().splitlines())))
    assert Checkpoints(copy, keep=2).newest(LOG) == progress(2)
    assert reason in caplog.text


def test_what_somebody_else_keeps_beside_the_checkpoints_stays(copy):
    others = ["4", "0000002", "mine", ".download.part", ".000002.bak"]
    for name in others:
        shutil.copytree(copy / "000002", copy / name)
    (copy / "000001").write_text("a file")
    checkpoints = Checkpoints(copy, keep=1)
    assert checkpoints.newest(LOG) == progress(5)
    checkpoints.save({"x": np.ones(3)}, progress(6))
    checkpoints.wait()
    assert sorted(path.name for path in copy.iterdir()) == sorted(["000001", "000006", *others])


@pytest.mark.parametrize("can_be_deleted", [True, False])
def test_what_a_killed_run_left_of_a_replaced_checkpoint_is_not_in_the_way(can_be_deleted, copy, monkeypatch):
    (copy / "000005" / "progress.json").write_text("{}")
    for kind in ("old", "part"):
        shutil.copytree(copy / "000002", copy / f".000005.{kind}")
    checkpoints = Checkpoints(copy, keep=2)
    assert checkpoints.newest(LOG) == progress(2)
    if not can_be_deleted:  # like on NFS, while a process reads it
        remove = shutil.rmtree
        monkeypatch.setattr(
            shutil, "rmtree", lambda path, **how: None if ".0" in str(path) else remove(path, **how)
        )
    checkpoints.save({"x": np.ones(3)}, progress(5))
    checkpoints.wait()
    assert Checkpoints(copy, keep=2).newest(LOG) == progress(5)
    monkeypatch.undo()
    checkpoints.save({"x": np.ones(3)}, progress(6))
    checkpoints.wait()
    assert sorted(path.name for path in copy.iterdir()) == ["000005", "000006"]


def test_the_sums_can_be_checked_by_hand(saved):
    done = subprocess.run(
        ["sha256sum", "-c", "SHA256SUMS"], cwd=saved / "000005", capture_output=True, check=False
    )
    assert done.returncode == 0
    assert b"FAILED" not in done.stdout


def test_a_log_that_lost_lines_is_noticed(saved, caplog):
    assert Checkpoints(saved, keep=2).newest(LOG[: len("round 1\n") * 3]) == progress(2)
    assert "metrics.jsonl does not hold its rounds" in caplog.text
    assert Checkpoints(saved, keep=2).newest(LOG.replace(b"round 4", b"round 5")) == progress(2)


def test_all_damaged_stops_and_deletes_nothing(copy):
    for path in copy.glob("*/SHA256SUMS"):
        path.write_text("")
    before = sorted(copy.rglob("*"))
    with pytest.raises(BadInput, match=r"no checkpoint can be used: checkpoint 000005 .*; checkpoint 000002"):
        Checkpoints(copy, keep=2).newest(LOG)
    assert sorted(copy.rglob("*")) == before


def test_unfinished_ones_are_no_checkpoints(copy, caplog):
    (copy / "000005").rename(copy / ".000005.part")
    checkpoints = Checkpoints(copy, keep=2)
    assert checkpoints.newest(LOG) == progress(2)
    assert not caplog.messages
    checkpoints.save({"x": np.ones(3)}, progress(6))
    checkpoints.wait()
    assert sorted(path.name for path in copy.iterdir()) == ["000002", "000006"]


def test_a_damaged_one_is_replaced_and_does_not_count(copy, caplog):
    (copy / "000005" / "progress.json").write_text("{}")
    checkpoints = Checkpoints(copy, keep=2)
    assert checkpoints.newest(LOG) == progress(2)
    checkpoints.save({"x": np.ones(3)}, progress(4))
    checkpoints.wait()
    assert sorted(path.name for path in copy.iterdir()) == ["000002", "000004", "000005"]
    checkpoints.save({"x": np.ones(3)}, progress(5))
    checkpoints.wait()
    assert sorted(path.name for path in copy.iterdir()) == ["000004", "000005"]
    assert Checkpoints(copy, keep=2).newest(LOG) == progress(5)


def test_another_network_is_refused(saved):
    like = jax.eval_shape(lambda: Model.of(jax.tree.map(lambda x: x[..., None], model(0).variables)))
    with pytest.raises(BadInput, match=r"000005: is not a checkpoint of this .*\] instead of \["):
        Checkpoints(saved, keep=2).restore(progress(5), like)


def test_arrays_of_other_names_or_forms_are_refused_although_their_numbers_are_as_many(saved):
    like = jax.eval_shape(lambda: model(0))
    packed = to_saved(model(5))
    same = from_saved(packed, like)
    for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(model(5)), strict=True):
        np.testing.assert_array_equal(a, b)
    swapped = packed._replace(arrays=[packed.arrays[1], packed.arrays[0], *packed.arrays[2:]])
    turned = [[name, dtype, shape[::-1]] for name, dtype, shape in packed.arrays]
    for other in (swapped, packed._replace(arrays=turned), packed._replace(arrays=packed.arrays[:-1])):
        with pytest.raises(ValueError, match="instead of"):
            from_saved(other, like)


def test_leaves_are_known_by_their_paths_however_they_are_packed(saved, monkeypatch):
    packed = jax.eval_shape(lambda: model(0))
    monkeypatch.setattr(packing, "SMALL", 100)
    like = jax.eval_shape(lambda: model(0))
    assert jax.tree.structure(like) != jax.tree.structure(packed)
    back = Checkpoints(saved, keep=2).restore(progress(5), like)
    jax.tree.map(np.testing.assert_array_equal, back, model(5))


def renamed(tree, **names):
    """A tree of dicts with other names of leaves."""
    if isinstance(tree, dict):
        return {names.get(name, name): renamed(value, **names) for name, value in tree.items()}
    return tuple(renamed(value, **names) for value in tree) if isinstance(tree, tuple) else tree


@pytest.mark.parametrize(
    ("names", "said"),
    [({"bias": "base"}, r"\['bias'\].*instead of.*\['base'\]"),  # the order of the leaves stays
     ({"bias": "zeta"}, r"\['bias'\].*instead of.*\['kernel'\]"),
     ({"dense": "denser"}, r"\['dense'\]\['bias'\].*instead of.*\['denser'\]\['bias'\]")],
)  # fmt: skip
def test_a_leaf_of_another_name_is_refused_although_its_form_is_the_same(names, said, tmp_path):
    units = tuple(
        {"dense": {"bias": np.zeros(4), "kernel": np.ones(4)}, "norm": np.full(3, 2.0)} for _ in "ab"
    )
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save({"params": packing.pack(units)}, progress(2))
    checkpoints.wait()
    same = checkpoints.restore(progress(2), {"params": packing.pack(units)})
    jax.tree.map(np.testing.assert_array_equal, same["params"].unpack(), units)
    with pytest.raises(
        BadInput, match=rf"000002: is not a checkpoint of this network and release \(.*{said}"
    ):
        checkpoints.restore(progress(2), {"params": packing.pack(renamed(units, **names))})


def test_a_checkpoint_of_an_earlier_release_is_refused_in_a_line_that_says_so(copy):
    path = copy / "000005" / "arrays.json"
    path.write_text('[[".packed.params.arrays[0][0]", "float32", [304]]]')
    with pytest.raises(BadInput, match="its arrays have no names; an earlier release saved it"):
        Checkpoints(copy, keep=2).restore(progress(5), jax.eval_shape(lambda: model(0)))


def test_arrays_of_several_types_and_none_at_all():
    tree = {"a": np.arange(6.0).reshape(2, 3), "b": np.int32(7), "c": np.float32([1, 2]), "d": np.int32([8])}
    back = from_saved(to_saved(tree), tree)
    for name, given in tree.items():
        np.testing.assert_array_equal(back[name], given)
        assert back[name].dtype == given.dtype
    assert from_saved(to_saved(()), ()) == ()


def test_what_the_disk_refuses_is_raised_and_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    checkpoints = Checkpoints(tmp_path / "file" / "checkpoints", keep=2)
    checkpoints.save({"x": np.ones(3)}, progress(1))
    with pytest.raises(OSError, match="checkpoint of round 1: "):
        checkpoints.wait()
    checkpoints.wait()  # said once


@pytest.fixture
def small_temporary(small_disk, monkeypatch):
    """The temporary directory is a disk of 4 MB."""
    monkeypatch.setattr(tempfile, "tempdir", str(small_disk))
    return small_disk


def test_a_full_temporary_directory_is_named_and_orbax_never_meets_it(small_temporary, tmp_path, capfd):
    checkpoints = Checkpoints(tmp_path, keep=2)
    large = {"x": np.ones(10**6)}
    with pytest.raises(OSError, match=f"No space left on device: '{small_temporary}'"):
        checkpoints.ensure_room("w", large)
    checkpoints.save(large, progress(1))
    with pytest.raises(OSError, match=f"round 1: .*No space left on device: '{small_temporary}'"):
        checkpoints.wait()
    assert capfd.readouterr().err == ""
    fill(small_temporary / "filler", but=1_200_000)
    checkpoints.ensure_room("w", {"x": np.ones(3)})
    checkpoints.save({"x": np.ones(3)}, progress(1))
    checkpoints.wait()
    assert [path.name for path in small_temporary.iterdir()] == ["filler"]


def test_what_a_killed_run_left_in_the_temporary_directory_is_cleared(tmp_path, monkeypatch):
    """Nothing else is cleared: not what another save holds, for example in a container that shares the
    directory, and not a directory so new that its lock may come later.
    """
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with checkpoints_module._staging() as held:
        killed, new = (Path(tempfile.mkdtemp(prefix=f"sfl_jax-{os.getuid()}-")) for _ in range(2))
        (tmp_path / "sfl_jax-0-file").write_text("no directory")
        (killed / "half").write_text("never left in order")
        for path in (killed, held, tmp_path / "sfl_jax-0-file"):
            os.utime(path, (1, 1))
        with checkpoints_module._staging() as own:
            assert {*tmp_path.glob("sfl*")} == {held, own, new, tmp_path / "sfl_jax-0-file"}
            assert own.stat().st_mode & 0o777 == 0o700
    assert {*tmp_path.glob("sfl*")} == {new, tmp_path / "sfl_jax-0-file"}


def test_no_checkpoints(tmp_path):
    assert Checkpoints(tmp_path / "none", keep=2).newest(b"") is None
