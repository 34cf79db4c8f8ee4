import os
import subprocess
import sys

import pytest
from disks import fill

from sfl_jax import files
from sfl_jax.errors import BadInput
from sfl_jax.files import ensure_ours, ensure_writable, locked, whole_file


def test_a_file_appears_whole_and_alone(tmp_path):
    path = tmp_path / "plan.json"
    path.write_bytes(b"before")
    with whole_file(path) as file:
        file.write(b"after")
        file.flush()
        assert path.read_bytes() == b"before"
    assert path.read_bytes() == b"after"
    assert os.listdir(tmp_path) == ["plan.json"]
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_what_was_there(tmp_path, error):
    path = tmp_path / "plan.json"
    path.write_bytes(b"before")

    def fail_halfway():
        with whole_file(path) as file:
            file.write(b"half")
            raise error

    with pytest.raises(error):
        fail_halfway()
    assert path.read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["plan.json"]


def test_directories_are_made_and_tried(tmp_path):
    ensure_writable(tmp_path / "a" / "b", "workdir", "a/b")
    assert os.listdir(tmp_path / "a" / "b") == []


def test_a_file_as_parent_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match=r"^workdir=file/x: cannot be written \(Not a directory\)"):
        ensure_writable(tmp_path / "file" / "x", "workdir", "file/x")
    with pytest.raises(BadInput, match=r"^workdir=: cannot be written"):
        ensure_writable("a\0b", "workdir", "")


def test_a_read_only_disk_is_refused(small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(BadInput, match=r"^workdir=d: cannot be written \(Read-only file system\)"):
        ensure_writable(small_disk / "new", "workdir", "d")


def test_a_full_disk_is_an_error_that_names_the_file(small_disk):
    fill(small_disk / "filler")
    with (
        pytest.raises(OSError, match=r"No space left on device: '.*/disk/plan.json'"),
        whole_file(small_disk / "plan.json") as file,
    ):
        file.write(bytes(10**6))
    assert os.listdir(small_disk) == ["filler"]


HOLD = """
import sys, time
from sfl_jax.files import locked
with locked(sys.argv[1], "workdir", "w"):
    print("held", flush=True)
    time.sleep(100)
"""


def test_a_lock_is_refused_while_its_process_lives_and_no_longer(tmp_path):
    (tmp_path / ".lock").write_text("sfl_jax 123\n")  # left by a killed run
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"held\n"
        with (
            pytest.raises(BadInput, match=f"^workdir=w: run {process.pid} is using it"),
            locked(tmp_path, "workdir", "w"),
        ):
            pytest.fail("taken")
    finally:
        process.kill()
        process.communicate()
    assert (tmp_path / ".lock").read_text() == f"sfl_jax {process.pid}\n"
    with locked(tmp_path, "workdir", "w"):
        assert (tmp_path / ".lock").read_text() == f"sfl_jax {os.getpid()}\n"


@pytest.mark.parametrize("theirs", [b"\xff of another program", b"123\n", b"123", b"sfl_jax 1\n" * 9, b"\n"])
def test_a_lock_file_of_somebody_else_is_locked_and_left_as_it_is(theirs, tmp_path):
    (tmp_path / ".lock").write_bytes(theirs)
    with (
        locked(tmp_path, "workdir", "w"),
        pytest.raises(BadInput, match=r"^workdir=w: another process is using it"),
        locked(tmp_path, "workdir", "w"),
    ):
        pytest.fail("taken")
    assert (tmp_path / ".lock").read_bytes() == theirs


def test_what_cannot_be_a_lock_is_refused(tmp_path):
    (tmp_path / ".lock").mkdir()
    with (
        pytest.raises(BadInput, match=r"^workdir=w: cannot be locked \(.*Is a directory"),
        locked(tmp_path, "workdir", "w"),
    ):
        pytest.fail("taken")


def test_a_lock_needs_no_room(small_disk):
    fill(small_disk / "filler")
    with locked(small_disk, "workdir", "w"):
        assert (small_disk / ".lock").read_bytes() == b""


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_file_is_ours_if_it_has_the_mark(tmp_path):
    path = tmp_path / "a.csv"
    ensure_ours(path, b"x,y", "output", "a.json")
    path.mkdir()
    ensure_ours(path, b"x,y", "output", "a.json")
    ensure_ours(path / "b" / "c", b"x,y", "output", "a.json")
    path.rmdir()
    for content in (b"", b"x,y\n1,2\n", b"\x89PNG" + bytes(99) + b"x,y"):
        path.write_bytes(content)
        ensure_ours(path, b"x,y", "output", "a.json")
        ensure_ours(path / "b", b"x,y", "output", "a.json")
    path.write_bytes(b"y,x\n")
    with pytest.raises(
        BadInput, match=r"^output=a.json: would replace .*a.csv, which sfl_jax did not write; move it"
    ):
        ensure_ours(path, b"x,y", "output", "a.json")


def test_a_place_that_cannot_be_leaves_nothing_to_remove(tmp_path):
    """The error is the original one, and removing other files later does not fail because of it."""
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError), whole_file(tmp_path / "file" / "below"):
        pass
    files.remove_unfinished()
    assert not files._unfinished
