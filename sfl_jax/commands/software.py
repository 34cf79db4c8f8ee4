"""The software of a run: releases of packages, and the commit of this one. None means unknown."""

import os
import re
import signal
import subprocess
from importlib import metadata
from pathlib import Path

from sfl_jax import __version__

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "scipy", "tensorflow-datasets")
PATIENCE_S = 5.0  # the longest wait for git, which may hang on a file system


def packages() -> dict[str, str | None]:
    """The release of every package that may influence a run's numbers."""
    return {"sfl_jax": __version__} | {name: _release(name) for name in PACKAGES}


def git_commit(file: Path = Path(__file__)) -> str | None:
    """The commit of the repository that tracks `file`.

    None for an installed copy inside another project's repository.
    """
    tracked = _git(file, "ls-files", "--error-unmatch", file.name)
    commit = _git(file, "rev-parse", "HEAD") if tracked else None
    return commit if commit and re.fullmatch("[0-9a-f]{40,64}", commit) else None


def _release(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # for example under another name, or packed into one file
        return None


def _git(file: Path, *arguments: str) -> str | None:
    """The output of git in the directory of `file`. None if git fails, is missing or does not end."""
    # In a git hook, git's variables would name the hook's repository.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        git = subprocess.Popen(
            ["git", *arguments], cwd=file.parent, env=environment, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
    except OSError:
        return None
    with git:
        try:
            out, _ = git.communicate(timeout=PATIENCE_S)
        except subprocess.TimeoutExpired:
            os.killpg(git.pid, signal.SIGKILL)  # also its children, which would hold the pipe
            return None
    return out.decode(errors="replace").strip() if git.returncode == 0 else None
