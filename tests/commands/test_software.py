"""What a run notes about its software. A note that cannot be made is None, and does not stop a run."""

import os
import subprocess
import time
from importlib import metadata
from pathlib import Path

import pytest

from sfl_jax.commands import software

REPOSITORY = Path(software.__file__).parents[2]


def git(directory, *arguments):
    own = ["-c", "user.name=n", "-c", "user.email=n@example.com"]
    done = subprocess.run(
        ["git", *own, *arguments], cwd=directory, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.fixture
def project(tmp_path):
    """Another project's repository, with a copy of the package installed in it."""
    git(tmp_path, "init")
    git(tmp_path, "commit", "--allow-empty", "-m", "x")
    installed = tmp_path / "venv" / "sfl_jax" / "software.py"
    installed.parent.mkdir(parents=True)
    installed.write_text("")
    return tmp_path, installed


def test_the_commit_is_that_of_the_repository_that_tracks_the_package(project, monkeypatch):
    directory, installed = project
    assert software.git_commit(installed) is None
    git(directory, "add", "venv")
    git(directory, "commit", "-m", "vendored")
    commit = git(directory, "rev-parse", "HEAD")
    assert software.git_commit(installed) == commit
    monkeypatch.setenv("GIT_DIR", str(REPOSITORY / ".git"))  # like in a hook of another repository
    assert software.git_commit(installed) == commit


def test_a_file_outside_of_any_repository_has_no_commit(tmp_path):
    (tmp_path / "software.py").write_text("")
    assert software.git_commit(tmp_path / "software.py") is None


@pytest.mark.parametrize("script", [None, "exit 1", "echo something else", "sleep 1000; true"])
def test_without_a_git_that_answers_there_is_no_commit(script, tmp_path, monkeypatch):
    if script:
        (tmp_path / "git").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin" if script else str(tmp_path))
    monkeypatch.setattr(software, "PATIENCE_S", 0.1 if script and "sleep" in script else 5.0)
    begun = time.monotonic()
    assert software.git_commit() is None
    assert time.monotonic() - begun < 60, os.environ["PATH"]


def test_what_a_git_that_does_not_answer_has_started_ends_with_it(tmp_path, monkeypatch):
    (tmp_path / "git").write_text(f"#!/bin/sh\nsleep 1000 &\necho $! > {tmp_path}/child\nwait\n")
    (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(software, "PATIENCE_S", 1.0)
    assert software.git_commit() is None
    state = Path("/proc", (tmp_path / "child").read_text().strip(), "stat")
    until = time.monotonic() + 30
    while (
        state.exists() and state.read_text().split()[2] != "Z"
    ):  # it has ended, and nobody has read its exit code
        assert time.monotonic() < until, "it is still there"
        time.sleep(0.01)


def test_a_package_without_metadata_is_none(monkeypatch):
    def missing(name):
        if name == "tensorflow-datasets":
            raise metadata.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(metadata, "version", missing)
    packages = software.packages()
    assert packages["tensorflow-datasets"] is None
    assert packages["jax"] == "1.0"
