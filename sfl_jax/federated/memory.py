"""How much memory a device has for rounds, and how much one is expected to need before it is compiled."""

import os
from pathlib import Path
from typing import Any

import jax

from sfl_jax.models import Profile

SPARE = 0.9  # part of what is available that a round may take


def available_bytes(device: Any) -> int:
    """What the rounds of this process may take on `device`: nine tenths of what is free.

    A GPU or TPU says itself how much it has. On a CPU it is what the machine, or the control group of this
    process, has left, divided among the CPU devices of the process.
    """
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return int(SPARE * (stats["bytes_limit"] - stats.get("bytes_in_use", 0)))
    return int(SPARE * _host_bytes() / len(jax.local_devices()))


def expected_bytes(profile: Profile, batch_size: int, clients_per_chunk: int, moments: int) -> int:
    """Roughly what a round needs beside the samples, rather too much: the global model and the mean; of each
    client of a chunk parameters, gradients, `moments` of the optimiser, and what the backward pass keeps.

    XLA's own analysis of compiled rounds is 0.7 to 1.0 times this (tiny and B0, 32 x 32, batch 8 and 32).
    """
    model = 4 * int(profile.parameters.sum() + profile.state.sum())
    kept = 4 * batch_size * int(profile.activations.sum())
    return 2 * model + clients_per_chunk * ((2 + moments) * model + int(1.1 * kept))


def _host_bytes():
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            limits.append(1024 * int(line.split()[1]))
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        if _read(limit).strip().isdigit():
            limits.append(int(_read(limit)) - int(_read(used) or 0))
    return max(min(limits), 0)


def _read(path):
    try:
        return Path(path).read_text()
    except OSError:
        return ""
