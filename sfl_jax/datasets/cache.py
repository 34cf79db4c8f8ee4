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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from sfl_jax.files import whole_file

_FORMAT = 3  # raise when the meaning of the kept arrays changes


def contents(directory: Path) -> str:
    """A digest of the names and the bytes of the files in `directory`. OSError where one cannot be read.

    Times and sizes would not do: some packagers give every file the same time, and other labels of one digit
    have the same size.
    """
    files = sorted(file for file in directory.iterdir() if file.is_file())
    with ThreadPoolExecutor() as pool:  # reading and hashing go on outside Python's lock
        sums = list(pool.map(_sum, files))
    lines = [f"{digest} {file.name}" for file, digest in zip(files, sums, strict=True)]
    return _digest("\n".join(lines))


def read_cache(
    directory: Path, key: str, mapped: Collection[str] = (), variant: str = ""
) -> dict[str, np.ndarray] | None:
    """The arrays kept for the dataset in `directory`, or None if there are none or any doubt about them.

    key: the `contents` that they were decoded from.
    mapped: names of arrays that stay in the file as `np.memmap`; nothing of them is read or checked here. The
      archive carries a CRC-32 of the others, which is checked.
    variant: which of several ways to read the dataset they come from; each has a file of its own.
    """
    try:
        with _file(directory, variant).open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays: dict[str, np.ndarray] = {
                name: _map(file.name, archive.zip, name) if name in mapped else archive[name]
                for name in archive.files
            }
        return arrays if arrays.pop("fingerprint").item() == _fingerprint(key, arrays) else None
    except Exception:  # a damaged archive can fail in any way, and none of them matters
        return None


def write_cache(directory: Path, key: str, arrays: Mapping[str, np.ndarray], variant: str = "") -> None:
    """Keep `arrays` for `read_cache` of the same arguments; a reader sees the whole file or none."""
    with contextlib.suppress(OSError, RuntimeError):
        file = _file(directory, variant)
        file.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(file) as archive:
            kept: dict[str, Any] = {**arrays, "fingerprint": np.array(_fingerprint(key, arrays))}
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


def _file(directory: Path, variant: str) -> Path:
    """One file per dataset directory and variant, so that an outdated one is replaced and none pile up."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(home) if os.path.isabs(home) else Path.home() / ".cache"
    where = hashlib.sha256(os.fsencode(directory.resolve()) + variant.encode()).hexdigest()[:16]
    return base / "sfl_jax" / "datasets" / f"{directory.parent.name}-{directory.name}-{where}.npz"


def _fingerprint(key: str, names: Iterable[str]) -> str:
    """Changes when the dataset's files do, or which arrays are kept, or what they mean."""
    return _digest("\n".join([str(_FORMAT), key, *sorted(names)]))


def _sum(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()
