"""The software that made a run: the releases of packages, and the commit of this one. None is unknown."""

import os
import re
import signal
import subprocess
from importlib import metadata
from pathlib import Path

from sfl_jax import __version__

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "scipy", "tensorflow-datasets")
PATIENCE_S = 5.0  # for git, which may wait for a file system


def packages() -> dict[str, str | None]:
    """The release of every package whose numbers a run may depend on."""
    return {"sfl_jax": __version__} | {name: _release(name) for name in PACKAGES}


def git_commit(file: Path = Path(__file__)) -> str | None:
    """The commit of the repository that tracks `file`. An installed copy inside another project's repository
    has none.
    """
    tracked = _git(file, "ls-files", "--error-unmatch", file.name)
    commit = _git(file, "rev-parse", "HEAD") if tracked else None
    return commit if commit and re.fullmatch("[0-9a-f]{40,64}", commit) else None


def _release(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # as under another name, or packed into one file
        return None


def _git(file: Path, *arguments: str) -> str | None:
    """What git says in the directory of `file`; None where it fails, is not there or does not end."""
    # Variables of git would name the repository of whoever called us, as in a hook.
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
            os.killpg(git.pid, signal.SIGKILL)  # with what it has started, which would hold the pipe
            return None
    return out.decode(errors="replace").strip() if git.returncode == 0 else None
