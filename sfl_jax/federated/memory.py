"""How much memory a device has for rounds, and an estimate of what a round needs."""

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from sfl_jax.models import Profile

SPARE = 0.9  # the part of the available memory that a round may take


class _Hierarchy(NamedTuple):
    """Where one version of control groups is mounted, and the names of its files."""

    mount: str
    controller: str  # in /proc/self/cgroup
    limits: tuple[str, ...]
    used: str
    cache: tuple[str, ...]  # in memory.stat: page cache, which the kernel gives back on demand


_HIERARCHIES = (
    _Hierarchy(
        "sys/fs/cgroup", "", ("memory.max", "memory.high"), "memory.current",
        ("inactive_file", "active_file"),
    ),
    _Hierarchy(
        "sys/fs/cgroup/memory", "memory", ("memory.limit_in_bytes",), "memory.usage_in_bytes",
        ("total_inactive_file", "total_active_file"),
    ),
)  # fmt: skip


def available_bytes(device: Any, sharers: int = 1) -> int:
    """The memory that rounds of this process may take on `device`, beside what is placed already: 90 % of
    what is free.

    A GPU or TPU reports its own memory. On a CPU, the limit is what the machine or a control group of this
    process has left. It is divided by `sharers`, the number of CPU devices in use here by all processes.
    """
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return int(SPARE * (stats["bytes_limit"] - stats.get("bytes_in_use", 0)))
    return int(SPARE * host_bytes() / sharers)


def expected_bytes(profile: Profile, batch_size: int, clients_per_chunk: int, moments: int) -> int:
    """A rough, rather high estimate of what a round needs beside the samples and the model.

    It counts the mean, and for each client of a chunk: parameters, gradients, `moments` of the optimiser, and
    what the backward pass keeps. XLA's own analysis of compiled rounds is 0.79 to 0.88 times this (tiny and
    B0, 32x32, batch 8 and 32).
    """
    model = 4 * int(profile.parameters.sum() + profile.state.sum())
    kept = 4 * batch_size * int(profile.activations.sum())
    return model + clients_per_chunk * ((2 + moments) * model + int(1.1 * kept))


def host_bytes(root: Path = Path("/")) -> int:
    """The memory that is left: the least of the machine's and of each control group of this process.

    `root` holds /proc and /sys. Page cache counts as left, like in MemAvailable, because the kernel gives it
    back before it refuses memory. It would otherwise seem full, because files that a run has read fill it up
    to any limit.
    """
    free = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for line in _read(root / "proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            free.append(1024 * int(line.split()[1]))
    for hierarchy in _HIERARCHIES:
        for group in _groups(root, hierarchy):
            limits = [number for name in hierarchy.limits if (number := _number(group / name)) is not None]
            if limits:
                free.append(min(limits) - _held(group, hierarchy))
    return max(min(free), 0)


def _groups(root: Path, hierarchy: _Hierarchy) -> Iterator[Path]:
    """The directories of this process's control group and of all visible groups above it.

    In a container the mount may hold only its own group, whatever the path says.
    """
    mount = root / hierarchy.mount
    yield mount
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if hierarchy.controller in controllers.split(","):
            parts = PurePosixPath(path.lstrip("/")).parts
            yield from (mount.joinpath(*parts[:end]) for end in range(1, len(parts) + 1) if ".." not in parts)


def _held(group: Path, hierarchy: _Hierarchy) -> int:
    """Bytes in use that the kernel cannot give back."""
    pairs = (line.partition(" ") for line in _read(group / "memory.stat").splitlines())
    cache = sum(int(number) for name, _, number in pairs if name in hierarchy.cache)
    return max((_number(group / hierarchy.used) or 0) - cache, 0)


def _number(path: Path) -> int | None:
    """The number in a file. None if there is no file, or if it says "max"."""
    text = _read(path).strip()
    return int(text) if text.isdigit() else None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
