"""Compiled programs on disk: a second process finds them, and a place that cannot be used does no harm."""

import json
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import jax
import jaxlib
import pytest
from jax._src.lru_cache import LRUCache

from sfl_jax.commands import compilation_cache

PROGRAM = """
import json, jax, jax.numpy as jnp
from sfl_jax.commands import compilation_cache
events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
compilation_cache.enable()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
y = jax.jit(lambda x: jnp.tanh(x @ x).cumsum(0))(jnp.ones((64, 64)))
hits, misses = (events.count(f"/jax/compilation_cache/cache_{kind}") for kind in ("hits", "misses"))
print(json.dumps([hits, misses, float(y.sum())]))
"""


@pytest.fixture
def no_directory():
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def start(caches):
    environment = os.environ | {"XDG_CACHE_HOME": str(caches), "JAX_ENABLE_COMPILATION_CACHE": "true"}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    root = Path(compilation_cache.__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=root, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    return json.loads(done.stdout)


@pytest.mark.slow
def test_a_second_start_finds_what_the_first_compiled(tmp_path):
    hits, misses, first = start(tmp_path)
    assert (hits, misses > 0) == (0, True)
    assert start(tmp_path) == [misses, 0, first]


def test_another_process_reads_a_program_whole_or_not_at_all(tmp_path):
    cache, program = LRUCache(str(tmp_path), max_size=-1), bytes(50_000_000)
    compilation_cache.write_whole()
    with ThreadPoolExecutor() as pool:
        written = pool.submit(cache.put, "key", program)
        found = set()
        while not written.done():
            found.add(cache.get("key"))
    written.result()
    assert found <= {None, program}
    assert cache.get("key") == program
    assert [path.name for path in tmp_path.iterdir()] == ["key-cache"]
    cache.put("key", b"another")
    assert cache.get("key") == program  # as JAX does


def test_the_directory_is_of_this_user_these_releases_and_this_host(monkeypatch, tmp_path, no_directory):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    directory = compilation_cache.default_directory()
    assert directory.parent == tmp_path / "sfl_jax"
    assert all(part in directory.name for part in (jax.__version__, jaxlib.__version__, platform.node()))
    assert compilation_cache.enable() == directory
    assert jax.config.jax_compilation_cache_dir == str(directory)
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert compilation_cache.default_directory().parent == Path.home() / ".cache" / "sfl_jax"


def test_where_nothing_can_be_written_nothing_is_kept(monkeypatch, tmp_path, no_directory):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert compilation_cache.enable() is None
    assert jax.config.jax_compilation_cache_dir is None


def test_where_no_home_is_known_nothing_is_kept(monkeypatch, no_directory):
    """For example in a container whose user has a number and no name."""

    def unknown(number):
        raise KeyError(number)

    monkeypatch.setattr("pwd.getpwuid", unknown)
    monkeypatch.delenv("HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative, which is none")
    assert compilation_cache.default_directory() is None
    kept = mock.Mock(jax_enable_compilation_cache=True, jax_compilation_cache_dir=None)
    monkeypatch.setattr(jax, "config", kept)
    assert compilation_cache.notes() is None
    assert compilation_cache.enable() is None


def test_a_directory_that_the_user_chose_stays(monkeypatch, tmp_path, no_directory):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "chosen"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    assert compilation_cache.enable() == tmp_path / "chosen"
    monkeypatch.setenv("HOME", str(tmp_path))
    jax.config.update("jax_compilation_cache_dir", "~/chosen")
    assert compilation_cache.enable() == tmp_path / "chosen"
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "chosen")
    assert not (tmp_path / "other").exists()
