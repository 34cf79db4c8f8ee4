"""Keeps compiled programs on disk, so that the same run starts faster the next time."""

import os
import platform
from pathlib import Path

import jax
from jaxlib.version import __version__ as jaxlib_version

from sfl_jax.errors import BadInput
from sfl_jax.files import ensure_writable


def enable() -> Path | None:
    """Turns JAX's persistent compilation cache on. Returns its directory, or None if there is no place for
    it.

    Programs are machine code for this host and these releases. So each combination has its own directory,
    under $XDG_CACHE_HOME or ~/.cache. A directory that the user gave to JAX is kept; a ~ in it is expanded.
    """
    given = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue] set by JAX at run time
    if given:
        if (place := os.path.expanduser(given)) != given:
            jax.config.update("jax_compilation_cache_dir", place)
        return Path(place)
    directory = default_directory()
    if directory is None:
        return None
    try:
        ensure_writable(directory, "compilation_cache", str(directory))
    except BadInput:
        return None
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    return directory


def notes() -> Path | None:
    """The file with what was measured on this host with these releases, in `directory`."""
    place = directory()
    return place and place / "executions.json"


def directory() -> Path | None:
    """The directory of what was found on this host with these releases.

    None if JAX is told to keep nothing, or if there is no place for it.
    """
    keeps = jax.config.jax_enable_compilation_cache  # pyright: ignore[reportAttributeAccessIssue]
    return default_directory() if keeps else None


def default_directory() -> Path | None:
    """The directory for this user's programs on this host with these releases.

    None if no home directory is known, for example in a container whose user has a number but no name.
    """
    caches = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not caches.is_absolute():
        try:
            caches = Path.home() / ".cache"
        except RuntimeError:
            return None
    return caches / "sfl_jax" / f"jax-{jax.__version__}-jaxlib-{jaxlib_version}-{platform.node()}"
