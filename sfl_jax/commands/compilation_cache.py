"""Compiled programs kept on disk, so that a second start of the same run need not compile them again."""

import os
import platform
from pathlib import Path

import jax
from jaxlib.version import __version__ as jaxlib_version

from sfl_jax.errors import BadInput
from sfl_jax.files import ensure_writable


def enable() -> Path | None:
    """Turns JAX's persistent compilation cache on; its directory, None where there is no place for it.

    Programs are machine code of this host for these releases, hence a directory for each pair of them, under
    $XDG_CACHE_HOME or ~/.cache. A directory that the user has given to JAX stays, except that JAX takes no ~
    for a home directory.
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
    """The file of what was measured here with these releases, in `directory`."""
    place = directory()
    return place and place / "executions.json"


def directory() -> Path | None:
    """Where what was found out here with these releases is kept; None where JAX is told to keep nothing, or
    there is no place for it.
    """
    keeps = jax.config.jax_enable_compilation_cache  # pyright: ignore[reportAttributeAccessIssue]
    return default_directory() if keeps else None


def default_directory() -> Path | None:
    """Where this user's programs for this host and these releases are kept.

    None where no home directory is known, as in a container whose user has a number and no name.
    """
    caches = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not caches.is_absolute():
        try:
            caches = Path.home() / ".cache"
        except RuntimeError:
            return None
    return caches / "sfl_jax" / f"jax-{jax.__version__}-jaxlib-{jaxlib_version}-{platform.node()}"
