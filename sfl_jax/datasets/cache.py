"""Decoded arrays kept in the user's cache directory: images are decompressed once, not in every run.

A cache is a convenience: whatever is wrong with it (no home, read-only, full, truncated, tampered with) the
caller gets None, or nothing is kept, and the run goes on.
"""

import contextlib
import hashlib
import os
import struct
import zipfile
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sfl_jax.files import whole_file

_FORMAT = 2  # raise when the meaning of the kept arrays changes


def read_cache(directory: Path, mapped: Collection[str] = ()) -> dict[str, np.ndarray] | None:
    """The arrays kept for the dataset in `directory`, or None if there are none or any doubt about them.

    Those named in `mapped` stay in the file as `np.memmap`, and nothing of them is read or checked here. The
    archive carries a CRC-32 of every array, checked while reading the others; the fingerprint covers their
    names and the files that they were decoded from.
    """
    try:
        with _file(directory).open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays: dict[str, np.ndarray] = {
                name: _map(file.name, archive.zip, name) if name in mapped else archive[name]
                for name in archive.files
            }
        return arrays if arrays.pop("fingerprint").item() == _fingerprint(directory, arrays) else None
    except Exception:  # a damaged archive can fail in any way, and none of them matters
        return None


def write_cache(directory: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Keep `arrays` for the dataset in `directory`; a reader sees the whole file or none."""
    with contextlib.suppress(OSError, RuntimeError):
        file = _file(directory)
        file.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(file) as archive:
            kept: dict[str, Any] = {**arrays, "fingerprint": np.array(_fingerprint(directory, arrays))}
            np.savez(archive, **kept)


def _map(path: str, archive: zipfile.ZipFile, name: str) -> np.memmap:
    """An array of the archive where it lies, uncompressed: behind the header of its member, which ends with
    as many bytes as two of its numbers say, and a header of its own.
    """
    member = archive.getinfo(f"{name}.npy")
    with Path(path).open("rb") as file:
        file.seek(member.header_offset)
        file.seek(sum(struct.unpack("<26x2H", file.read(30))), os.SEEK_CUR)
        version = np.lib.format.read_magic(file)
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
        start = file.tell()
    if member.compress_type != zipfile.ZIP_STORED or version != (1, 0) or fortran_order:
        raise ValueError("not as it was written")
    return np.memmap(path, dtype, "r", start, shape)


def _file(directory: Path) -> Path:
    """One file per dataset directory, so that an outdated one is replaced and none pile up."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(home) if os.path.isabs(home) else Path.home() / ".cache"
    where = hashlib.sha256(os.fsencode(directory.resolve())).hexdigest()[:16]
    return base / "sfl_jax" / "datasets" / f"{directory.parent.name}-{directory.name}-{where}.npz"


def _fingerprint(directory: Path, names: Iterable[str]) -> str:
    """Changes when a file of the dataset is added, removed, resized or rewritten."""
    parts = [str(_FORMAT), str(directory.resolve()), *sorted(names)]
    for file in sorted(directory.iterdir()):
        status = file.stat()
        parts.append(f"{file.name} {status.st_size} {status.st_mtime_ns}")
    return hashlib.sha256("\n".join(parts).encode(errors="surrogateescape")).hexdigest()
