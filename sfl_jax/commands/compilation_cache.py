"""Keeps compiled programs on disk, so that the same run starts faster the next time."""

import functools
import os
import platform
from pathlib import Path

import jax
from jax._src import lru_cache  # nothing public says how JAX writes a program
from jaxlib.version import __version__ as jaxlib_version

from sfl_jax.errors import BadInput
from sfl_jax.files import ensure_writable, whole_file


def enable() -> Path | None:
    """Turns JAX's persistent compilation cache on. Returns its directory, or None if there is no place for
    it. From then on this process writes programs whole or not at all.

    Programs are machine code for this host and these releases. So each combination has its own directory,
    under $XDG_CACHE_HOME or ~/.cache. A directory that the user gave to JAX is kept; a ~ in it is expanded.
    """
    write_whole()
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


@functools.cache  # once a process
def write_whole() -> None:
    """Lets a program have its name in the cache only when all of it is written.

    JAX opens the file under its last name. So another process can read a part, and a kill leaves a part that
    JAX never replaces: each later start warns of it and compiles that program again.
    """
    put = lru_cache.LRUCache.put

    def put_whole(self, key, value):
        directory = str(self.path)
        if self.eviction_enabled or "://" in directory:  # has a lock; is not a local disk
            return put(self, key, value)
        path = Path(directory, f"{key}-cache")
        if not path.exists():
            with whole_file(path) as file:
                file.write(value)

    lru_cache.LRUCache.put = put_whole


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
