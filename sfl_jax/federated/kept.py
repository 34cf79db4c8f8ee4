"""Compiled programs on disk, each with what it was made from. A later start neither traces nor compiles them.

What is kept is a convenience. A file may be absent, cut off, of other code or of another machine. Then the
program is compiled as if there were none, and the file is replaced.

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
    """Programs of these devices in a directory; None keeps nothing.

    facts: what tells programs of one name apart, each with a file of its own.
    """

    def __init__(self, directory: Path | None, devices: Sequence[Any], *facts: Any):
        # A program of several processes is loaded by all of them or by none, which one alone cannot know.
        self._directory = directory if directory and jax.process_count() == 1 else None
        self._devices, self._facts = devices, facts
        self._begun: dict[str, Future[Any]] = {}
        self._writing: list[Future[None]] = []

    def begin(self, name: str) -> None:
        """Load what is kept under `name` in a thread, before its arguments are known."""
        if self._directory is not None:
            self._begun[name] = _in_thread(self._read, name)

    def compiled(self, name: str, program: Any, arguments: tuple[Any, ...], results: Any, *facts: Any) -> Any:
        """The jitted `program` as it is kept for arguments like these; else it is compiled and kept.

        results: a tree like its results. facts: what it follows from besides what is looked up here, which is
        code, releases, devices, settings of JAX and XLA, and the shapes of its arguments.
        """
        if self._directory is None:
            return _as_said(program.lower(*arguments).compile(), results)
        made_from = _made_from(arguments, facts)
        if found := self._loaded(name, made_from, results):
            return found
        lowered = program.lower(*arguments)
        # What JAX has from its own cache lacks kernels when it is written out again (CPU, jaxlib 0.10.2).
        with _compilations() as written:
            found = _as_said(lowered.compile(), results)
        self._writing.append(_in_thread(self._keep, name, made_from, lowered, found if written else None))
        return found

    def wait(self) -> None:
        """Wait until what was compiled is on the disk."""
        while self._writing:
            self._writing.pop().result()

    def _loaded(self, name, made_from, results):
        begun = self._begun.pop(name, None)
        kept_from, program = begun.result() if begun else self._read(name)
        return Program(program, jax.tree.structure(results)) if kept_from == made_from else None

    def _keep(self, name, made_from, lowered, program) -> None:
        """Keep the compiled program, if JAX can write it out and the disk lets it. Where there is none, the
        program in the file is kept for this code as well, if it says the same, word for word.
        """
        with contextlib.suppress(Exception):  # as of devices whose programs cannot be written out
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
        """What is in the file, None where it is damaged."""
        *head, kept = self._path(name).read_bytes().split(b"\n", 7)
        mark, of_code, here, made_from, text, digest, counts = (line.decode() for line in head)
        is_whole = mark == _MARK and digest == hashlib.sha256(kept).hexdigest()
        return _Found(of_code, here, made_from, text, counts, kept) if is_whole else None

    def _read(self, name) -> tuple[str, Any]:
        """(what it was made from, the program of flat arguments and results); ("", None) in any doubt."""
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
        """A digest of what a program follows from besides the code and its arguments."""
        settings = [
            f"{name}={value}" for name, value in jax.config.values.items() if not name.startswith(_OF_CACHES)
        ]
        flags = [os.environ.get(variable) for variable in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")]
        return _sum(surroundings(), self._devices_said(), self._facts, sorted(settings), flags)

    def _devices_said(self):
        return [(device.platform, device.device_kind, device.id) for device in self._devices]


class _Found(NamedTuple):
    """What a file says of its program, and the program: the code that it is of, digests of what else it
    follows from and of its text, and how many arrays it takes and gives.
    """

    code: str
    here: str
    made_from: str
    text: str
    counts: str
    kept: bytes


class Program:
    """A program that was kept; what it takes and gives is flat in its file."""

    def __init__(self, flat: Any, results: Any):
        self._flat, self._results = flat, results
        self.memory_analysis = flat.memory_analysis

    def __call__(self, *arguments: Any) -> Any:
        return jax.tree.unflatten(self._results, self._flat(*jax.tree.leaves(arguments)))


NOTHING = Kept(None, ())


@contextlib.contextmanager
def _compilations() -> Iterator[list[str]]:
    """While it lasts, notes what this thread compiled and JAX wrote to its own cache."""
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
    """The program. A kept one is given back the tree of its results by whoever asks for it."""
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
    """A digest of the processor, and the releases of what a program is made by."""
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
