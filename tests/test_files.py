import os

import pytest

from sfl_jax.errors import BadInput
from sfl_jax.files import ensure_writable, whole_file


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
    with pytest.raises(BadInput, match=r"^--workdir=file/x: cannot be written \(Not a directory\)"):
        ensure_writable(tmp_path / "file" / "x", "workdir", "file/x")
    with pytest.raises(BadInput, match=r"^--workdir=: cannot be written"):
        ensure_writable("a\0b", "workdir", "")


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask
