"""Fills disks."""

import contextlib
from pathlib import Path


def fill(path: Path, but: int = 0) -> None:
    """Writes a file that leaves only `but` bytes free on the disk."""
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        for size in (4096, 1):
            with contextlib.suppress(OSError):
                while file.write(bytes(size)) == size:
                    pass
        file.truncate(file.tell() - but)
