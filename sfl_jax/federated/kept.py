"""Compiled programs on disk, each with what it was made from. A later start neither traces nor compiles them.

A kept program only saves time. Its file may be absent, damaged, or made by other code or on another machine.
Then the program is compiled, and the file is replaced.

Such a file holds machine code, and JAX's loader unpickles what surrounds it. So it is trusted as JAX's own
compilation cache is, beside which it lies in the user's cache directory. No other file is read this way.
"""

import contextlib
import functools
import hashlib
import os
import platform
import threading
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental import serialize_executable

from sfl_jax.files import whole_file

_MARK = "sfl_jax program 1"  # another number where the meaning of the file changes
_PACKAGES = "jax", "jaxlib", "flax", "optax", "numpy"
# Settings of JAX that say where and what is kept, and not what is compiled.
_OF_CACHES = "jax_compilation_cache", "jax_persistent_cache", "jax_enable_compilation_cache"


class Kept:
    """The kept programs of some devices. Without a directory nothing is kept.

    facts: distinguish programs of one name. Each has its own file.
    """

    def __init__(self, directory: Path | None, devices: Sequence[Any], *facts: Any):
        # All of several processes must load a program, or none. One cannot know what the others found.
        self._directory = directory if directory and jax.process_count() == 1 else None
        self._devices, self._facts = devices, facts
        self._begun: dict[str, Future[Any]] = {}
        self._writing: list[Future[None]] = []

    def begin(self, name: str) -> None:
        """Starts to load the program of a name in a thread, before its arguments are known."""
        if self._directory is not None:
            self._begun[name] = _in_thread(self._read, name)

    def compiled(self, name: str, program: Any, arguments: tuple[Any, ...], results: Any, *facts: Any) -> Any:
        """The kept program for arguments like these. If there is none, `program` is compiled and kept.

        program: jitted. results: a tree like its results. facts: what the program depends on, besides code,
        releases, devices, settings of JAX and XLA, and shapes of arguments, which are always compared.
        """
        if self._directory is None:
            return _as_said(program.lower(*arguments).compile(), results)
        made_from = _made_from(arguments, facts)
        if found := self._loaded(name, made_from, results):
            return found
        lowered = program.lower(*arguments)
        # A program from JAX's own cache lacks kernels when it is written out again (CPU, jaxlib 0.10.2).
        with _compilations() as written:
            found = _as_said(lowered.compile(), results)
        self._writing.append(_in_thread(self._keep, name, made_from, lowered, found if written else None))
        return found

    def wait(self) -> None:
        """Waits until the compiled programs are on the disk."""
        while self._writing:
            self._writing.pop().result()

    def _loaded(self, name, made_from, results):
        begun = self._begun.pop(name, None)
        kept_from, program = begun.result() if begun else self._read(name)
        return Program(program, jax.tree.structure(results)) if kept_from == made_from else None

    def _keep(self, name, made_from, lowered, program) -> None:
        """Writes the compiled program, if JAX and the disk can.

        Without a program, the file stays valid for this code if its program has the same text.
        """
        with contextlib.suppress(Exception):  # for example, devices whose programs cannot be written out
            says = made_from, _sum(lowered.as_text())
            if program is not None:
                payload, takes, gives = serialize_executable.serialize(program)
                counts = f"{takes.num_leaves} {gives.num_leaves}"
                self._write(name, says, counts, zlib.compress(payload, level=1))
            elif (found := self._found(name)) and (found.here, found.text) == (self._here(), says[1]):
                self._write(name, says, found.counts, found.kept)

    def _write(self, name, says, counts, kept) -> None:
        assert self._directory is not None
        head = _MARK, code(), self._here(), *says, hashlib.sha256(kept).hexdigest(), counts
        self._directory.mkdir(parents=True, exist_ok=True)
        with whole_file(self._path(name)) as file:
            file.write("".join(f"{line}\n" for line in head).encode() + kept)

    def _found(self, name) -> "_Found | None":
        """The content of the file. None if it is damaged."""
        *head, kept = self._path(name).read_bytes().split(b"\n", 7)
        mark, of_code, here, made_from, text, digest, counts = (line.decode() for line in head)
        is_whole = mark == _MARK and digest == hashlib.sha256(kept).hexdigest()
        return _Found(of_code, here, made_from, text, counts, kept) if is_whole else None

    def _read(self, name) -> tuple[str, Any]:
        """(what the program was made from, the program with flat arguments). ("", None) in any doubt."""
        try:
            found = self._found(name)
            if found is None or (found.code, found.here) != (code(), self._here()):
                return "", None
            takes, gives = ([0] * int(count) for count in found.counts.split())
            trees = jax.tree.structure((tuple(takes), {})), jax.tree.structure(tuple(gives))
            return found.made_from, serialize_executable.deserialize_and_load(
                zlib.decompress(found.kept), *trees, self._devices[0].client, self._devices
            )
        except Exception:  # a damaged file can fail in any way, and none of them matters
            return "", None

    def _path(self, name) -> Path:
        assert self._directory is not None
        return self._directory / f"{name}-{_sum(self._devices_said(), self._facts)[:32]}.program"

    def _here(self) -> str:
        """A digest of what a program depends on, beside the code and its arguments."""
        settings = [
            f"{name}={value}" for name, value in jax.config.values.items() if not name.startswith(_OF_CACHES)
        ]
        flags = [os.environ.get(variable) for variable in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")]
        return _sum(surroundings(), self._devices_said(), self._facts, sorted(settings), flags)

    def _devices_said(self):
        return [(device.platform, device.device_kind, device.id) for device in self._devices]


class _Found(NamedTuple):
    """The content of a file.

    code: the digest of the code that made the program. here, made_from: digests of what else it depends on.
    text: the digest of its text. counts: how many arrays it takes and returns. kept: the compressed program.
    """

    code: str
    here: str
    made_from: str
    text: str
    counts: str
    kept: bytes


class Program:
    """A kept program. In its file, arguments and results are flat."""

    def __init__(self, flat: Any, results: Any):
        self._flat, self._results = flat, results
        self.memory_analysis = flat.memory_analysis

    def __call__(self, *arguments: Any) -> Any:
        return jax.tree.unflatten(self._results, self._flat(*jax.tree.leaves(arguments)))


NOTHING = Kept(None, ())


@contextlib.contextmanager
def _compilations() -> Iterator[list[str]]:
    """In this block, the list gets an entry for each program that this thread compiles and JAX caches."""
    noted: list[str] = []
    own = threading.get_ident()

    def listen(event: str, **_: str | int) -> None:
        if event == "/jax/compilation_cache/cache_misses" and threading.get_ident() == own:
            noted.append(event)

    jax.monitoring.register_event_listener(listen)
    try:
        yield noted
    finally:
        jax.monitoring.unregister_event_listener(listen)


def _as_said(program, results):
    """The program. Its results must have this tree, because a kept program gets the tree from its user."""
    assert program.out_tree == jax.tree.structure(results), (program.out_tree, results)
    return program


def _in_thread(work, *given) -> Future[Any]:
    pool = ThreadPoolExecutor(1, "kept programs")
    future = pool.submit(work, *given)
    pool.shutdown(wait=False)
    return future


def _made_from(arguments, facts) -> str:
    leaves, structure = jax.tree.flatten(arguments)
    shapes = [(leaf.shape, str(leaf.dtype), str(leaf.sharding)) for leaf in leaves]
    return _sum(facts, shapes, str(structure))


@functools.cache
def code() -> str:
    """A digest of this package's code."""
    package, total = Path(__file__).parent.parent, hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        total.update(f"{path.relative_to(package)}\n".encode() + path.read_bytes())
    return total.hexdigest()


@functools.cache
def surroundings() -> tuple[str, ...]:
    """A digest of the processor, and the releases of the packages that make a program."""
    processor = platform.processor() + platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        lines = {line for line in file if line.startswith(("model name", "flags", "Features"))}
        processor = "".join(sorted(lines))
    return _sum(processor), *map(_release, _PACKAGES)


def _release(package: str) -> str:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return f"{package} {metadata.version(package)}"
    return package


def _sum(*things: Any) -> str:
    return hashlib.sha256(repr(things).encode()).hexdigest()
